"""The harness's own SQS: what it keeps, shows again and gives up, and that its faults do what they say."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from load.faults.chance import FAULTS, Chance
from load.faults.ledger import DUPLICATE, STALE, UNDELIVERED, Kind, Ledger
from load.faults.sqs import GHOSTS, Sqs


class Bench:
    """A queue whose clock is set by hand, spoken to below HTTP."""

    def __init__(self, max_receives: int = 3) -> None:
        self.now = 0.0
        self.ledger = Ledger(lambda: self.now)
        self.sqs = Sqs(self.ledger, Chance(1), visibility=30, max_receives=max_receives)

    def receive(self, worker: str = "a", fault: str = "", at_most: int = 10) -> list[dict[str, Any]]:
        answer = asyncio.run(self.sqs._receive(worker, {"MaxNumberOfMessages": at_most}, fault))
        return list(answer.get("Messages", []))

    def batch(self, operation: str, *handles: str, fault: str = "", seconds: int = 0) -> dict[str, Any]:
        entries = [
            {"Id": str(n), "ReceiptHandle": handle, "VisibilityTimeout": seconds} for n, handle in enumerate(handles)
        ]
        act = self.sqs._delete_batch if operation == "delete" else self.sqs._hide_batch
        return asyncio.run(act("a", {"Entries": entries}, fault))

    def kinds(self) -> list[str]:
        return [event.kind for event in self.ledger.events]


def test_a_message_is_hidden_from_its_receive_until_its_timeout_runs_out() -> None:
    bench = Bench()
    bench.sqs.send("body")
    [first] = bench.receive()
    assert bench.receive() == []
    bench.now = 29.9
    assert bench.receive() == []
    bench.now = 30.0
    [second] = bench.receive()
    assert second["MessageId"] == first["MessageId"]
    assert second["ReceiptHandle"] != first["ReceiptHandle"]
    assert second["Attributes"]["ApproximateReceiveCount"] == "2"
    assert bench.kinds() == ["sent", "received", "expired", "received"]


def test_an_extension_counts_from_now_and_a_return_shows_the_message_at_once() -> None:
    bench = Bench()
    bench.sqs.send("body")
    [message] = bench.receive()
    bench.now = 20.0
    assert bench.batch("hide", message["ReceiptHandle"], seconds=30)["Failed"] == []
    bench.now = 49.0
    assert bench.receive() == []
    bench.batch("hide", message["ReceiptHandle"], seconds=0)
    assert len(bench.receive()) == 1


def test_after_its_last_receive_a_message_goes_to_the_dead_letter_queue() -> None:
    bench = Bench(max_receives=2)
    bench.sqs.send("body")
    for _ in range(2):
        assert len(bench.receive()) == 1
        bench.now += 30
    assert bench.receive() == []
    assert bench.kinds()[-1] == "dead"
    assert bench.sqs.open == 0


def test_a_deleted_message_never_comes_back_and_an_old_handle_deletes_nothing() -> None:
    bench = Bench()
    bench.sqs.send("body")
    [old] = bench.receive()
    bench.now = 30.0
    [new] = bench.receive()
    assert bench.batch("delete", old["ReceiptHandle"])["Failed"] == []
    assert (bench.ledger.events[-1].kind, bench.ledger.events[-1].note, bench.sqs.open) == (Kind.DELETED, STALE, 1)
    bench.batch("delete", new["ReceiptHandle"])
    assert bench.sqs.open == 0
    bench.now = 90.0
    assert bench.receive() == []
    assert [entry["Code"] for entry in bench.batch("hide", new["ReceiptHandle"], "x", seconds=9)["Failed"]] == [
        "MessageNotInflight",
        "ReceiptHandleIsInvalid",
    ]


def test_faults_of_a_receive_are_written_down_as_what_they_are() -> None:
    bench = Bench()
    bench.sqs.send("body")
    bench.receive(fault="reset after")
    assert bench.ledger.events[-1].note == UNDELIVERED
    [again] = bench.receive("b", fault="duplicate")
    assert (bench.ledger.events[-1].note, bench.ledger.events[-1].count) == (DUPLICATE, 2)
    bench.batch("delete", again["ReceiptHandle"])
    assert len(bench.receive(fault="ghost")) == 1, "deleted, and delivered once more"
    assert bench.sqs.open == 1


def test_a_partial_failure_has_an_effect_on_those_that_succeeded_alone() -> None:
    bench = Bench()
    for _ in range(10):
        bench.sqs.send("body")
    handles = [message["ReceiptHandle"] for message in bench.receive()]
    answer = bench.batch("delete", *handles, fault="partial")
    assert 0 < len(answer["Failed"]) < 10
    assert all(not entry["SenderFault"] for entry in answer["Failed"])
    assert bench.sqs.open == len(answer["Failed"])


def test_many_messages_may_be_deleted_and_only_the_last_of_them_come_back() -> None:
    bench = Bench()
    for _ in range(GHOSTS + 20):
        bench.sqs.send("body")
        [message] = bench.receive(at_most=1)
        bench.batch("delete", message["ReceiptHandle"])
    assert bench.sqs.open == 0
    assert len(bench.receive(fault="ghost")) == 1


@pytest.mark.parametrize("kind", [*FAULTS])
def test_faults_come_by_seed_at_the_rate_that_was_asked_for_and_in_all_their_kinds(kind: str) -> None:
    drawn = [Chance(7, 0.2).fault(kind, key) for key in range(3000)]
    assert drawn == [Chance(7, 0.2).fault(kind, key) for key in range(3000)]
    assert drawn != [Chance(8, 0.2).fault(kind, key) for key in range(3000)]
    counts = Counter(drawn)
    assert 2250 < counts.pop("") < 2550
    assert set(counts) == set(FAULTS[kind])


def test_no_fault_comes_where_none_is_asked_for() -> None:
    chance = Chance(7)
    assert not any(chance.fault("image", key) for key in range(1000))
    assert not chance.injected


def test_the_worker_that_calls_is_known_by_its_access_key() -> None:
    bench = Bench()
    bench.sqs.send("body")

    async def read() -> bytes:
        return b'{"MaxNumberOfMessages": 1}'

    authorization = "AWS4-HMAC-SHA256 Credential=worker-3/20260101/us-east-1/sqs/aws4_request"
    headers = {"X-Amz-Target": "AmazonSQS.ReceiveMessage", "Authorization": authorization}
    request: Any = SimpleNamespace(headers=headers, read=read, transport=None)
    asyncio.run(bench.sqs.handle(request))
    assert [event.worker for event in bench.ledger.events[1:]] == ["worker-3", "worker-3"]
