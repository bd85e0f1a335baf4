"""`dlq`: messages that really went through redrive are looked at without being consumed, and moved without a loss."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from cvworker import cli, dlq
from cvworker.commands.dlq import ago, find, seconds_in
from cvworker.dlq import RETRY_WAITS_S, Choice, DeadLetters, Report
from cvworker.embedded.sqs import EmbeddedSqs
from cvworker.errors import StartupError, WorkerFailed
from fakes import eventually

_names = (f"queue-{n}" for n in itertools.count())


@pytest.fixture(scope="module")
def sqs() -> Iterator[EmbeddedSqs]:
    with EmbeddedSqs() as sqs:
        yield sqs


@pytest.fixture(autouse=True)
def no_long_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dlq, "LONG_POLL_S", 0)  # this SQS has one server, and need not be asked twice


class Queues:
    """A queue whose messages die at the first failure, and its dead-letter queue."""

    def __init__(self, sqs: EmbeddedSqs) -> None:
        self.client = sqs.client()
        self.source = sqs.create_queue(next(_names), max_receives=1)
        self.dead = f"{self.source}-dead"
        self.letters = DeadLetters(self.client, self.dead, self.source)

    def kill(self, *bodies: str, **more: Any) -> None:
        """Send messages and let each be received once too often."""
        before = sum(self.counts(self.dead))
        for body in bodies:
            self.client.send_message(QueueUrl=self.source, MessageBody=body, **more)
        self.fail_all()
        assert sum(self.counts(self.dead)) == before + len(bodies)

    def fail_all(self) -> None:
        def received() -> list[Any]:
            answer = self.client.receive_message(QueueUrl=self.source, VisibilityTimeout=0, MaxNumberOfMessages=10)
            return list(answer.get("Messages", []))

        eventually(lambda: not received() and self.counts(self.source) == (0, 0), "the queue is empty")

    def counts(self, url: str) -> tuple[int, int]:
        """Messages visible and hidden."""
        answer = self.client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        return int(answer["ApproximateNumberOfMessages"]), int(answer["ApproximateNumberOfMessagesNotVisible"])

    def settled(self, url: str, visible: int) -> None:
        eventually(lambda: self.counts(url) == (visible, 0), f"{visible} visible, none hidden; is {self.counts(url)}")

    def drain(self, url: str) -> list[Any]:
        found: list[Any] = []
        while answer := self.client.receive_message(
            QueueUrl=url, MaxNumberOfMessages=10, MessageAttributeNames=["All"], MessageSystemAttributeNames=["All"]
        ).get("Messages"):
            found += answer
        return found

    def bodies(self, url: str) -> list[str]:
        return sorted(message["Body"] for message in self.drain(url))


@pytest.fixture
def queues(sqs: EmbeddedSqs) -> Queues:
    return Queues(sqs)


def requests(n: int, **more: Any) -> list[str]:
    return [
        json.dumps({"id": f"req-{i}", "image_url": f"https://a/{i}.jpg", "callback_url": "https://c/", **more})
        for i in range(n)
    ]


class Meddled:
    """A client some of whose calls go wrong: ``fault`` is given the operation and its call, which it may make."""

    def __init__(self, client: Any, fault: Callable[[str, Callable[[], Any], dict[str, Any]], Any]) -> None:
        self._client = client
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        return lambda **arguments: self._fault(name, lambda: getattr(self._client, name)(**arguments), arguments)


def meddle(queues: Queues, fault: Callable[[str, Callable[[], Any], dict[str, Any]], Any]) -> DeadLetters:
    client: Any = Meddled(queues.client, fault)
    return DeadLetters(client, queues.dead, queues.source)


def denied(operation: str) -> ClientError:
    answer: Any = {"Error": {"Code": "AccessDenied", "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    return ClientError(answer, operation)


# Looking


def test_a_look_shows_what_failed_and_consumes_nothing(queues: Queues):
    queues.kill(*requests(12), "not a request")
    letters, report = queues.letters.look(Choice(), 50)
    assert (len(letters), report.seen) == (13, 13)
    first = next(letter for letter in letters if "req-3" in letter.ids)
    assert first.requests[0].image_url == "https://a/3.jpg"
    assert 0 <= time.time() - first.sent_at < 60
    assert [str(letter.requests[0].error)[:30] for letter in letters if letter.requests[0].error] == [
        "the message body is not JSON: "
    ]
    queues.settled(queues.dead, 13)


def test_each_look_raises_the_receive_count_by_one(queues: Queues):
    queues.kill(*requests(1))
    counts = [queues.letters.look(Choice(), 5)[0][0].receives for _ in range(3) if not time.sleep(0.005)]
    assert counts == [2, 3, 4]  # one receive in the source queue


def test_a_look_receives_no_more_than_it_shows(queues: Queues):
    queues.kill(*requests(15))
    letters, report = queues.letters.look(Choice(), 12)
    assert (len(letters), report.seen) == (12, 12)
    queues.settled(queues.dead, 15)


def test_a_look_that_fails_midway_shows_again_what_it_has_seen(queues: Queues):
    queues.kill(*requests(12))
    calls = itertools.count()

    def fault(name: str, call: Callable[[], Any], _: Any) -> Any:
        if name == "receive_message" and next(calls):
            raise denied("ReceiveMessage")
        return call()

    with pytest.raises(StartupError, match=r"denied.*\[AccessDenied\]"):
        meddle(queues, fault).look(Choice(), 50)
    queues.settled(queues.dead, 12)


def test_a_hold_that_lapses_during_a_long_look_shows_nothing_twice(queues: Queues, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dlq, "HOLD_S", 0)  # whatever is seen comes again at once
    queues.kill(*requests(7))
    letters, _ = queues.letters.look(Choice(), 50)
    assert len({letter.message_id for letter in letters}) == len(letters) == 7


# Redriving


def test_a_redrive_moves_bodies_and_attributes_unchanged(queues: Queues):
    attributes = {
        "text": {"DataType": "String", "StringValue": "ä"},
        "number": {"DataType": "Number.int", "StringValue": "7"},
        "bytes": {"DataType": "Binary", "BinaryValue": b"\x00\xff"},
    }
    trace = {"AWSTraceHeader": {"DataType": "String", "StringValue": "Root=1-5759e988-bd862e3fe1be46a994272793"}}
    body = ' {"image_url": "https://a/ü.jpg?x=<&>",\n "other": 1}'
    queues.kill(body, MessageAttributes=attributes, MessageSystemAttributes=trace)
    entries: list[Any] = []

    def note(name: str, call: Callable[[], Any], arguments: Any) -> Any:
        entries.extend(arguments["Entries"] if name == "send_message_batch" else [])
        return call()

    report = meddle(queues, note).redrive(Choice())
    assert (report.moved, report.refused, report.in_both) == (1, [], [])
    assert entries[0]["MessageSystemAttributes"] == trace  # which this SQS loses of a batch
    (message,) = queues.drain(queues.source)
    assert message["Body"] == body
    assert message["MessageAttributes"] == attributes
    assert queues.counts(queues.dead) == (0, 0)


def test_more_than_one_batch_is_moved_with_progress(queues: Queues):
    bodies = requests(23)
    queues.kill(*bodies)
    seen: list[int] = []
    report = queues.letters.redrive(Choice(), progress=lambda report: seen.append(report.moved))
    assert (report.moved, seen) == (23, [10, 20, 23])
    assert queues.bodies(queues.source) == sorted(bodies)


def test_ids_choose_by_the_requests_own_id_or_by_message_id(queues: Queues):
    bodies = requests(13)
    queues.kill(*bodies)
    letters, _ = queues.letters.look(Choice(frozenset({"req-11"})), 1)
    choice = Choice(frozenset({"req-4", letters[0].message_id, "nobody"}))
    report = queues.letters.redrive(choice)
    assert report.moved == 2
    assert report.found == {"req-4", letters[0].message_id}
    queues.settled(queues.dead, 11)
    assert queues.bodies(queues.source) == sorted([bodies[4], bodies[11]])


def test_only_those_sent_before_a_time_are_moved(queues: Queues):
    queues.kill("old")
    (old,), _ = queues.letters.look(Choice(), 1)
    eventually(lambda: time.time() > old.sent_at + 0.02)
    queues.kill("new")
    assert queues.letters.redrive(Choice(sent_before=old.sent_at)).moved == 1
    assert queues.bodies(queues.source) == ["old"]
    queues.settled(queues.dead, 1)


def test_a_limit_is_kept(queues: Queues):
    queues.kill(*requests(14))
    assert queues.letters.redrive(Choice(), 12).moved == 12
    queues.settled(queues.dead, 2)
    assert queues.counts(queues.source) == (12, 0)


def test_a_dry_run_counts_and_moves_nothing(queues: Queues):
    queues.kill(*requests(12))
    report = queues.letters.redrive(Choice(), dry_run=True)
    assert (report.chosen, report.moved) == (12, 0)
    queues.settled(queues.dead, 12)
    assert queues.counts(queues.source) == (0, 0)


def test_calls_stay_within_the_size_that_sqs_takes(queues: Queues):
    queues.kill(*[f"{n}{'x' * 240_000}" for n in range(6)])
    sizes: list[int] = []

    def note(name: str, call: Callable[[], Any], arguments: Any) -> Any:
        if name == "send_message_batch":
            sizes.append(sum(len(entry["MessageBody"]) for entry in arguments["Entries"]))
        return call()

    assert meddle(queues, note).redrive(Choice()).moved == 6
    assert len(sizes) == 2
    assert max(sizes) <= 1024 * 1024


def test_entries_that_sqs_fails_to_take_are_sent_again_and_only_they(queues: Queues):
    queues.kill(*requests(5))
    sent: list[int] = []
    waits: list[float] = []

    def fault(name: str, call: Callable[[], Any], arguments: Any) -> Any:
        if name != "send_message_batch":
            return call()
        sent.append(len(arguments["Entries"]))
        if len(sent) > 1:
            return call()
        failed = [arguments["Entries"].pop(i)["Id"] for i in (3, 1)]
        return {**call(), "Failed": [{"Id": key, "SenderFault": False, "Code": "InternalError"} for key in failed]}

    report = meddle(queues, fault).redrive(Choice(), sleep=waits.append)
    assert (report.moved, sent) == (5, [5, 2])
    assert [wait for wait in waits if wait] == [RETRY_WAITS_S[0]]
    assert queues.counts(queues.source) == (5, 0)
    assert queues.counts(queues.dead) == (0, 0)


def test_a_message_that_sqs_refuses_stays_and_is_told(queues: Queues):
    queues.kill(*requests(3))

    def fault(name: str, call: Callable[[], Any], arguments: Any) -> Any:
        if name != "send_message_batch":
            return call()
        arguments["Entries"].pop(0)
        return {**call(), "Failed": [{"Id": "0", "SenderFault": True, "Code": "InvalidParameterValue", "Message": "m"}]}

    report = meddle(queues, fault).redrive(Choice())
    assert report.moved == 2
    assert [(failure.code, failure.message) for failure in report.refused] == [("InvalidParameterValue", "m")]
    queues.settled(queues.dead, 1)


def test_sqs_giving_out_says_how_far_it_came(queues: Queues):
    queues.kill(*requests(15))
    calls = itertools.count()

    def fault(name: str, call: Callable[[], Any], arguments: Any) -> Any:
        if name == "send_message_batch" and next(calls):
            return {"Failed": [{**entry, "SenderFault": False, "Code": "Busy"} for entry in arguments["Entries"]]}
        return call()

    with pytest.raises(WorkerFailed, match=r"take 5 messages in 4 tries: Busy \(10 were moved before that; none is"):
        meddle(queues, fault).redrive(Choice(), sleep=lambda _: None)
    queues.settled(queues.dead, 5)


def test_no_leave_to_send_is_told_before_anything_happens(queues: Queues):
    queues.kill(*requests(2))

    def fault(name: str, call: Callable[[], Any], _: Any) -> Any:
        if name == "send_message_batch":
            raise denied("SendMessageBatch")
        return call()

    with pytest.raises(StartupError, match=r"SQS cannot take messages.*AccessDenied"):
        meddle(queues, fault).redrive(Choice())
    queues.settled(queues.dead, 2)


def test_no_leave_to_delete_ends_with_what_is_in_both_queues(queues: Queues):
    queues.kill(*requests(12))

    def fault(name: str, call: Callable[[], Any], _: Any) -> Any:
        if name == "delete_message_batch":
            raise denied("DeleteMessageBatch")
        return call()

    with pytest.raises(WorkerFailed, match=r"SQS cannot delete.*0 were moved before that, 10 may be in both queues"):
        meddle(queues, fault).redrive(Choice())
    queues.settled(queues.dead, 12)
    assert queues.counts(queues.source) == (10, 0)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(9))
def test_ended_around_any_call_nothing_is_lost(queues: Queues, at: int, after: bool):
    bodies = requests(12)
    queues.kill(*bodies)
    calls = itertools.count()

    def fault(_name: str, call: Callable[[], Any], _: Any) -> Any:
        now = next(calls) == at
        if now and not after:
            raise KeyboardInterrupt
        answer = call()
        if now:
            unseen.update(message["Body"] for message in answer.get("Messages", []))
            raise KeyboardInterrupt
        return answer

    unseen: set[str] = set()  # received by a call that was cut off: hidden until their hold lapses
    try:
        meddle(queues, fault).redrive(Choice(), sleep=lambda _: None)
    except KeyboardInterrupt:
        pass
    dead, hidden = queues.counts(queues.dead)
    source, _ = queues.counts(queues.source)
    assert 12 <= dead + hidden + source <= 22  # at worst, those of the call under way are in both
    assert hidden == len(unseen)
    assert {*queues.bodies(queues.source), *queues.bodies(queues.dead), *unseen} == set(bodies)


def test_a_message_that_fails_again_meanwhile_is_not_moved_twice(queues: Queues):
    queues.kill(*requests(12))
    report = queues.letters.redrive(Choice(), progress=lambda _: queues.fail_all())
    assert report.moved == 12
    queues.settled(queues.dead, 12)


def test_messages_of_another_source_queue_are_left_alone(queues: Queues):
    queues.kill(*requests(4))

    def fault(name: str, call: Callable[[], Any], _: Any) -> Any:
        answer = call()
        if name == "receive_message":  # as SQS says it, and this one does not
            for message in answer.get("Messages", []):
                number = json.loads(message["Body"])["id"][-1]
                message["Attributes"]["DeadLetterQueueSourceArn"] = "arn:ours" if number in "12" else "arn:other"
        return answer

    letters = meddle(queues, fault)
    letters.source_arn = "arn:ours"
    report = letters.redrive(Choice())
    assert (report.moved, report.of_other_queues) == (2, 2)
    queues.settled(queues.dead, 2)


def test_asked_to_stop_it_ends_after_the_batch_and_shows_the_rest(queues: Queues):
    queues.kill(*requests(25))
    reports: list[Report] = []
    report = queues.letters.redrive(Choice(), progress=reports.append, stop=lambda: bool(reports))
    assert (report.moved, report.interrupted) == (10, True)
    queues.settled(queues.dead, 15)


# The command


@pytest.fixture
def command(sqs: EmbeddedSqs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    for name, value in sqs.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(cli.COMMANDS, "dlq", cli.Command("cvworker.commands.dlq:Dlq", ""))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["dlq", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_look_prints_a_table_without_query_strings_markup_or_control_characters(queues: Queues, command: Any):
    body = {
        "id": "[red]r\x1b[2J",
        "image_url": "https://a/b.jpg?X-Amz-Signature=s3cret",
        "callback_url": "https://c/?k=s3cret",
    }
    queues.kill(json.dumps(body), '{"Event": "s3:TestEvent"}', '{"image_url": 7}')
    code, out, err = command("look", "--queue-url", queues.source)
    assert code == 0
    assert "[red]r\N{REPLACEMENT CHARACTER}[2J" in out
    assert "https://a/b.jpg" in out
    assert "s3cret" not in out + err
    assert "image_url must be a string" in out
    assert "S3 test event" in out
    assert err == f"3 shown of about 3 in {queues.dead}\n"
    queues.settled(queues.dead, 3)


def test_look_prints_json_lines(queues: Queues, command: Any):
    queues.kill(json.dumps({"id": "r\ud800", "image_url": "s3://b/k?1", "task": "any"}))
    code, out, _ = command("look", "--json", "--queue-url", queues.source)
    (row,) = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert row["receives"] == 2
    assert row["requests"] == [
        {"id": "r\ud800", "image_url": "s3://b/k?1", "callback_url": None, "task": "any", "problem": None}
    ]


def test_redrive_by_the_command(queues: Queues, command: Any):
    queues.kill(*requests(5))
    code, out, _ = command("redrive", "--queue-url", queues.source, "--older-than", "0s", "--dry-run")
    assert (code, out) == (0, f"5 of 5 seen would be moved from {queues.dead} to {queues.source}\n")
    code, out, _ = command("redrive", "--dead-letter-url", queues.dead, "--id", "req-1", "--id", "req-3,req-9")
    assert code == 1
    assert out == f"2 of 5 seen moved from {queues.dead} to {queues.source}\n"
    eventually(lambda: queues.counts(queues.dead) == (3, 0))
    code, out, _ = command("redrive", "--queue-url", queues.source, "--older-than", "1h", "--limit", "2")
    assert (code, out[:9]) == (0, "0 of 3 se")
    assert queues.counts(queues.source) == (2, 0)


def test_an_id_that_is_not_there_is_told(queues: Queues, command: Any):
    queues.kill(*requests(1))
    code, _, err = command("redrive", "--queue-url", queues.source, "--id", "req-9")
    assert code == 1
    assert "not found: req-9\n" in err


def test_ctrl_c_lets_the_batch_end_and_says_where_the_rest_is(
    queues: Queues, command: Any, monkeypatch: pytest.MonkeyPatch
):
    queues.kill(*requests(15))
    move = dlq._Held.move

    def interrupted(self: Any, letters: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        move(self, letters)

    monkeypatch.setattr(dlq._Held, "move", interrupted)
    before = signal.getsignal(signal.SIGINT)
    code, out, err = command("redrive", "--queue-url", queues.source)
    assert code == 1
    assert out.startswith("10 of 10 seen moved")
    assert f"interrupted: what was not moved is in {queues.dead} and can be received again; nothing is lost" in err
    assert signal.getsignal(signal.SIGINT) is before
    queues.settled(queues.dead, 5)


def test_each_mistake_is_one_line_that_names_the_way_out(sqs: EmbeddedSqs, queues: Queues, command: Any):
    alone = sqs.create_queue(next(_names), max_receives=None)
    missing = f"{alone}-not"
    for arguments, said in (
        (["look"], "queue_url is not set: give --queue-url"),
        (["look", "--queue-url", alone], "has no redrive policy"),
        (["look", "--queue-url", missing], f"queue_url: {missing} does not exist"),
        (["look", "--dead-letter-url", missing], f"dead_letter_url: {missing} does not exist|queue_url"),
        (["look", "--dead-letter-url", queues.source], "has itself a dead-letter queue"),
        (["look", "--queue-url", queues.source, "--dead-letter-url", alone], "is not the dead-letter queue of"),
        (["redrive", "--dead-letter-url", alone], "serves no queue; say where to with --queue-url"),
        (["look", "--queue-url", f"{alone}.fifo"], "is a FIFO queue"),
        (["look", "--older-than", "soon"], "older_than (--older-than or CVWORKER_OLDER_THAN): must be a time"),
        (["redrive", "--limit", "0"], "limit (--limit"),
        ([], "ACTION"),
    ):
        code, out, err = command(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert any(each in err for each in said.split("|")), err


def test_a_dead_letter_queue_of_several_sources_wants_to_know_where_to(sqs: EmbeddedSqs, queues: Queues, command: Any):
    client = sqs.client()
    arn = client.get_queue_attributes(QueueUrl=queues.dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 2})
    second = client.create_queue(QueueName=next(_names), Attributes={"RedrivePolicy": policy})["QueueUrl"]
    with pytest.raises(StartupError, match=r"serves several queues .*; say where to"):
        find(None, queues.dead, to_redrive=True)
    assert find(None, queues.dead, to_redrive=False).source_url is None
    assert find(second, queues.dead, to_redrive=True).source_url == second


def test_times_are_read_and_written_as_people_do():
    assert [seconds_in(text) for text in ("90", "90s", "1.5m", "1h", "2 d", "1w")] == [90, 90, 90, 3600, 172800, 604800]
    assert [ago(s) for s in (0.4, 42, 185, 7800, 7200, 540_000)] == [
        "0 s", "42 s", "3 min 5 s", "2 h 10 min", "2 h", "6 d 6 h"
    ]  # fmt: skip
