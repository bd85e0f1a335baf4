"""A picture or a module that misbehaves costs that picture and nothing else."""

from __future__ import annotations

import pytest

from world import MODULES, World, colour_of, poll

POISONOUS = f"{MODULES / 'mean.py'}:Poisonous"
BAD_PREPROCESS = f"{MODULES / 'mean.py'}:BadPreprocess"


def _answers(here: World, count: int, timeout: float) -> dict[str, dict]:
    assert here.receiver.wait_for(count, timeout), here.receiver.count
    return here.receiver.answers


@pytest.mark.parametrize(("red", "says"), [(250, "too red"), (253, "not JSON"), (254, "results for a batch of")])
def test_a_picture_that_process_cannot_do_fails_alone(fast_world: World, red: int, says: str) -> None:
    here = fast_world
    numbers = [*range(20), red, *range(20, 40)]
    worker = here.worker(module=POISONOUS).ready()
    here.send(*(here.request(n) for n in numbers))
    answers = _answers(here, 41, 60)
    bad = answers.pop(f"req-{red}")
    assert bad["status"] == "error"
    assert bad["error"]["code"] == "process_failed"
    assert says in bad["error"]["message"]
    assert bad["error"]["retryable"] is False
    assert all(here.right(answer) for answer in answers.values())
    assert worker.status()["model"]["restarts"] == 0


def test_a_picture_that_ends_the_model_process_fails_and_all_others_are_answered(fast_world: World) -> None:
    here = fast_world
    numbers = [*range(20), 251, *range(20, 40)]
    worker = here.worker(module=POISONOUS).ready()
    here.send(*(here.request(n) for n in numbers))
    answers = _answers(here, 41, 120)
    bad = answers.pop("req-251")
    assert (bad["status"], bad["error"]["code"]) == ("error", "process_failed")
    assert all(here.right(answer) and answer["attempt"] == 1 for answer in answers.values())
    assert not here.receiver.duplicates
    assert worker.status()["model"]["restarts"] == 2, "once in its batch, once alone"


def test_a_picture_that_hangs_in_process_fails_and_all_others_are_answered(fast_world: World) -> None:
    here = fast_world
    numbers = [*range(10), 252, *range(10, 20)]
    worker = here.worker("--stall-timeout", "3", module=POISONOUS).ready()
    here.send(*(here.request(n) for n in numbers))
    answers = _answers(here, 21, 120)
    assert answers.pop("req-252")["error"]["code"] == "process_failed"
    assert all(here.right(answer) and answer["attempt"] == 1 for answer in answers.values())
    assert "in process" in worker.text() or "Thread" in worker.text(), "the stacks of the hung process are logged"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_picture_that_raises_ends_or_hangs_preprocess_fails_and_all_others_are_answered(
    fast_world: World, workers: str
) -> None:
    here = fast_world
    bad = {256 * 1: "too green", 256 * 2: "SIGABRT", 256 * 3: "SIGKILL"}
    assert [colour_of(n)[1] for n in bad] == [1, 2, 3]
    numbers = [*range(10), 256, *range(10, 20), 512, *range(20, 30), 768, *range(30, 40)]
    here.worker("--stall-timeout", "3", "--preprocess-workers", workers, module=BAD_PREPROCESS).ready()
    here.send(*(here.request(n) for n in numbers))
    answers = _answers(here, 43, 90)
    for number, says in bad.items():
        answer = answers.pop(f"req-{number}")
        assert answer["error"]["code"] == "preprocess_failed"
        assert says in answer["error"]["message"]
    assert all(here.right(answer) and answer["attempt"] == 1 for answer in answers.values())
    assert not here.receiver.duplicates


def test_a_module_that_returns_too_few_results_is_told_so_by_the_answers_and_the_log(fast_world: World) -> None:
    here = fast_world
    worker = here.worker("--batch-size", "4", module=f"{MODULES / 'mean.py'}:TooFew").ready()
    assert poll(lambda: worker.lines("warm-up failed; the module may dislike its example"), 10)
    here.send(*(here.request(n) for n in range(4)))
    for answer in _answers(here, 4, 30).values():
        assert answer["error"] == {
            "code": "process_failed",
            "message": "process returned 0 results for a batch of 1",
            "retryable": False,
        }
    assert "process returned 0 results for a batch of 1" in worker.text()
