"""The main job, run as a user runs it: real processes, real sockets, known pictures."""

from __future__ import annotations

import pytest

from world import MODULES, World, colour_of, picture, poll


def _all_right(here: World, count: int) -> None:
    answers = here.receiver.received
    assert len(answers) == count, "answered more or less often than once each"
    assert {each.id for each in answers} == {f"req-{n}" for n in range(count)}
    wrong = [each.json for each in answers if not here.right(each.json)]
    assert not wrong, wrong[:3]


@pytest.mark.timeout(240)
def test_500_messages_through_moto_are_each_answered_once_with_their_own_picture(moto_world: World) -> None:
    here = moto_world
    here.send(*(here.request(n) for n in range(500)))
    worker = here.worker("--exit-when-idle", "2")
    assert worker.wait(180) == 0
    _all_right(here, 500)
    assert here.counts() == (0, 0)
    assert len(worker.lines("answered")) == 500


@pytest.mark.timeout(240)
def test_2000_messages_through_ministack_are_each_answered_once_with_their_own_picture(fast_world: World) -> None:
    here = fast_world
    here.send(*(here.request(n) for n in range(2000)))
    worker = here.worker("--exit-when-idle", "2", "--preprocess-workers", "2")
    assert worker.wait(180) == 0
    _all_right(here, 2000)
    assert here.counts() == (0, 0)


def test_a_message_is_deleted_only_after_its_callback_was_accepted(fast_world: World) -> None:
    here = fast_world
    statuses = iter([500, 500, 500, 500, 404])
    here.receiver.respond = lambda received: next(statuses, 200)
    worker = here.worker().ready()
    here.send(here.request(1))
    poll(lambda: worker.lines("later"), 30, "the message is tried again later")
    assert sum(here.counts()) == 1
    poll(lambda: here.receiver.accepted, 60, "the answer is accepted in the end")
    poll(lambda: here.counts() == (0, 0), 10, "the message is deleted")
    ids = {each.webhook_id for each in here.receiver.received}
    assert len(ids) == 1, "each attempt must carry the same webhook-id"


def test_samples_of_many_shapes_and_trees_reach_process_as_they_were_made(fast_world: World) -> None:
    here = fast_world
    worker = here.worker("--preprocess-workers", "2", module=f"{MODULES / 'mean.py'}:Mixed")
    bodies = [here.request(n) for n in range(40)]
    for n in range(40):
        here.images.add(f"/{n}.png", picture(n, (20 + n % 3, 10)), "image/png")
    here.send(*bodies)
    assert here.receiver.wait_for(40, 60)
    for each in here.receiver.received:
        n = int(str(each.id).removeprefix("req-"))
        assert each.json["result"] == {"pixel": list(colour_of(n)), "size": [20 + n % 3, 10], "row": 20 + n % 3}
    worker.signal()
    assert worker.wait() == 0


def test_decoding_on_threads_gives_the_same_answers(fast_world: World) -> None:
    here = fast_world
    here.send(*(here.request(n) for n in range(100)))
    worker = here.worker("--exit-when-idle", "2", "--preprocess-workers", "0")
    assert worker.wait(90) == 0
    _all_right(here, 100)
