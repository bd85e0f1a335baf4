"""A harness that finds nothing proves nothing: the judge is shown each violation, and what only looks like one."""

from __future__ import annotations

import itertools

import pytest
from load.faults.judge import Rules, Verdict, judge
from load.faults.ledger import DUPLICATE, STALE, UNDELIVERED, Event, Kind


def tell(*rows: str, rules: Rules | None = None, nature: str = "good") -> Verdict:
    """Judge a story of one message m, a row for each event: ``worker kind [what]``, one second apart."""
    numbers = itertools.count()
    events = [Event(next(numbers), Kind.SENT, "m", note=nature)]
    for row in rows:
        worker, kind, *words = row.split()
        of = dict(word.split("=") for word in words)
        event = Event(
            next(numbers),
            Kind(kind),
            of.get("message", "" if kind in ("started", "stopping", "stopped", "killed", "call") else "m"),
            worker.strip("-"),
            count=int(of.get("count", 1)),
            seconds=int(of.get("seconds", 30)),
            status=int(of.get("status", 200 if kind == "callback" else 0)),
            note=of.get("note", "").replace("_", " "),
        )
        events.append(event)
    return judge(events, rules)


def found(*rows: str, rules: Rules | None = None, nature: str = "good") -> list[str]:
    return [violation.what for violation in tell(*rows, rules=rules, nature=nature).violations]


HONEST = ("a started", "a received", "a callback", "a deleted")


def test_a_message_that_is_answered_and_deleted_is_no_violation() -> None:
    assert found(*HONEST) == []


def test_a_message_that_nobody_answers_is_lost() -> None:
    assert found() == ["lost"]
    assert found("a received", "a hidden seconds=5") == ["lost"]


def test_a_message_that_was_answered_and_stays_in_the_queue_was_never_deleted() -> None:
    assert found("a received", "a callback") == ["answered, but never deleted"]


def test_a_message_deleted_before_its_callback_was_accepted_is_deleted_unanswered() -> None:
    assert found("a received", "a deleted") == ["deleted unanswered"]
    assert found("a received", "a callback status=503", "a deleted") == ["deleted unanswered"]
    assert found("a received", "a callback status=0", "a deleted", "a callback") == ["deleted unanswered"]


def test_a_receiver_that_is_gone_for_good_settles_its_message() -> None:
    assert found("a received", "a callback status=410", "a deleted", nature="gone") == []


def test_a_second_accepted_callback_is_an_answer_too_many() -> None:
    assert found("a received", "a callback", "a callback", "a deleted") == ["answered twice"]


def test_a_repeat_is_no_violation_where_the_connection_broke_before_the_first_was_accepted() -> None:
    assert found("a received", "a callback status=0", "a callback", "a deleted") == []


@pytest.mark.parametrize("again", ["b received count=2", "b received count=2 seconds=15"])
def test_a_kill_excuses_one_repeat_of_what_was_held_and_no_more(again: str) -> None:
    story = ["a started", "a received", "a callback", "a killed status=-9", "- expired", again, "b callback count=2"]
    assert found(*story, "b deleted") == []
    assert found(*story, "b callback count=2", "b deleted") == ["answered twice"]


def test_a_kill_excuses_no_repeat_of_what_was_settled_before() -> None:
    story = ("a started", *HONEST[1:], "a killed", f"b received count=2 note={DUPLICATE}")
    assert found(*story, "b callback count=2", "b deleted") == [], "a duplicate for another worker does"
    assert found("a started", *HONEST[1:], "a killed", "b received count=2", "b callback count=2", "b deleted") == [
        "answered twice"
    ]


def test_a_duplicate_for_the_worker_that_answered_excuses_no_second_callback() -> None:
    story = ("a received", "a callback", "a deleted", f"a received count=2 note={DUPLICATE}")
    assert found(*story, "a deleted") == []
    assert found(*story, "a callback count=2", "a deleted") == ["answered twice"]


def test_a_message_that_expires_while_a_worker_has_it_has_expired_while_held() -> None:
    story = ("a received", "- expired", "b received count=2", "b callback count=2", "b deleted")
    assert found(*story) == ["expired while held"]
    extended = ("a received", "a hidden seconds=30", "- expired", "b received count=2", "b callback", "b deleted")
    assert found(*extended) == ["expired while held"]


@pytest.mark.parametrize(
    "why",
    [
        ("a received", "a hidden seconds=5"),
        (f"a received note={UNDELIVERED}",),
        ("a started", "a received", "a killed status=-9"),
        ("a started", "a killed status=-9", "a received"),
        ("a received", "a callback", f"a received count=2 note={DUPLICATE}", f"a deleted note={STALE}"),
    ],
    ids=["put off", "never delivered", "its worker killed", "received by the dead", "settled by an old handle"],
)
def test_a_message_that_nobody_has_may_become_visible(why: tuple[str, ...]) -> None:
    count = 1 + sum("received" in row for row in why)
    answered = any("callback" in row for row in why)
    callback = () if answered else (f"b callback count={count}",)
    verdict = tell(*why, "- expired", f"b received count={count}", *callback, "b deleted")
    assert verdict.good, verdict.violations


def test_a_worker_that_stops_must_have_given_everything_back() -> None:
    rest = ("b received count=2", "b callback count=2", "b deleted")
    stop = ("a stopping", "a stopped")
    assert found("a started", "a received", *stop, "- expired", *rest) == ["left hidden by a worker that stopped"]
    assert found("a started", "a received", "a stopping", "a hidden seconds=0", "a stopped", "- expired", *rest) == []


def test_who_has_a_message_by_an_old_handle_has_it_no_more() -> None:
    duplicate = f"b received count=2 note={DUPLICATE}"
    stop = ("a stopping", "a stopped")
    assert found("a started", "a received", duplicate, "b callback count=2", "b deleted", *stop) == []
    assert found("a started", "a received", duplicate, *stop, "b callback count=2", "b deleted") == []


def test_a_worker_that_goes_on_gives_nothing_back_at_once() -> None:
    rest = ("- expired", "b received count=2", "b callback count=2", "b deleted")
    assert found("a received", "a hidden seconds=0", *rest) == ["given back by a worker that does not stop"]


@pytest.mark.parametrize(
    ("receive", "seconds", "good"),
    [(1, 4, True), (1, 6, True), (1, 3, False), (2, 7, False), (2, 12, True), (1, 73, False)],
)
def test_delays_are_those_of_the_contracts(receive: int, seconds: int, good: bool) -> None:
    story = (f"a received count={receive}", f"a hidden seconds={seconds}", "- expired")
    rest = (f"a received count={receive + 1}", f"a callback count={receive + 1}", "a deleted")
    assert found(*story, *rest) == ([] if good else ["a delay that the contracts do not know"])


def test_wrong_answers_and_answers_to_nothing_are_violations() -> None:
    assert found("a received", "a callback note=another_picture", "a deleted") == ["a wrong answer"]
    assert found("a received", "a callback count=2", "a deleted") == ["a wrong answer"]
    assert found(*HONEST, "a callback message=x") == ["unknown webhook-id"]


def test_the_dead_letter_queue_is_for_what_failed() -> None:
    assert found("a received", "a hidden seconds=5", "- expired", "- dead") == ["dead without a cause"]
    assert found("a received", "a callback status=503", "a hidden seconds=5", "- expired", "- dead") == []
    assert found("a received", "- expired", "- dead", nature="mute") == []


def test_more_calls_than_messages_and_time_explain_are_a_hot_loop() -> None:
    calls = ["a call note=ReceiveMessage"]
    assert found(*HONEST, *calls * 9, rules=Rules(1, 1)) == []
    assert found("a received", "a callback", "a deleted", *calls * 9, rules=Rules(1, 1)) == ["a hot loop"]


def test_a_message_received_again_is_a_violation_where_the_rules_allow_one_receive() -> None:
    story = ("a received", "a hidden seconds=5", "- expired", "a received count=2", "a callback count=2", "a deleted")
    assert found(*story, rules=Rules(most_receives=1)) == ["received again"]
    assert found(*story) == []


def test_a_worker_that_ends_by_itself_with_an_error_is_a_violation() -> None:
    assert found(*HONEST, "a stopped status=1") == ["a worker failed"]


def test_repeats_and_what_was_held_at_kills_are_counted() -> None:
    verdict = tell(
        *("a started", "a received", "a callback", "a killed status=-9", "- expired"),
        *("b received count=2", "b callback count=2", "b deleted"),
    )
    assert (verdict.counts["repeats"], verdict.counts["held at a kill"], verdict.counts["answered"]) == (1, 1, 1)
