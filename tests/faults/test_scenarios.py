"""Short runs of the fault harness: whole workers, peers that fail by seed, and a judge that must find nothing.

The runs wait more than they work, so they go on side by side, and each test waits for its own.
``make soak`` is the long one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIDE_BY_SIDE = 3
TAKES_S = 540
"""A run's limit on a machine that is busy with other things; on two free cores all of them take under two minutes."""

pytestmark = pytest.mark.timeout(TAKES_S + 30)


@dataclass(frozen=True)
class Shown:
    """What a run printed."""

    code: int
    text: str

    def count(self, name: str) -> int:
        found = re.search(rf"\b{name} (\d+)", self.text)
        assert found, f"{name} in {self.text}"
        return int(found[1])


def play(arguments: str) -> Shown:
    process = subprocess.Popen(
        [sys.executable, "-m", "load.faults", *arguments.split()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        text, _ = process.communicate(timeout=TAKES_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its workers
        text, _ = process.communicate(timeout=60)
    return Shown(process.returncode, text)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Shown]]]:
    """The runs of all tests that were asked for, begun."""
    wanted = [item.callspec.params["shown"] for item in request.session.items if "shown" in params_of(item)]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {each: pool.submit(play, each) for each in wanted}
        pool.shutdown(cancel_futures=True)


def params_of(item: pytest.Item) -> dict[str, object]:
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


@pytest.fixture
def shown(request: pytest.FixtureRequest, runs: dict[str, Future[Shown]]) -> Shown:
    outcome = runs[request.param].result()
    print(outcome.text)
    assert outcome.code == 0, outcome.text
    return outcome


def run_of(arguments: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shown", [arguments], indirect=True, ids=[arguments.split()[0]])


@run_of("kills --seed 7")
def test_after_ten_kills_every_message_is_answered_and_only_what_was_held_is_repeated(shown: Shown) -> None:
    assert (shown.count("sent"), shown.count("answered"), shown.count("killed")) == (2000, 2000, 10)
    assert shown.count("repeats") <= shown.count("held at a kill")


@run_of("faults --seed 7")
def test_with_a_fifth_of_everything_failing_each_message_is_answered_as_the_contracts_say_or_dead(shown: Shown) -> None:
    answered, dead = shown.count("answered"), shown.count("in the dead-letter queue")
    assert answered + dead == shown.count("sent") == 1000
    assert dead < 40, "those that cannot be answered, and few others"
    assert shown.count("repeats") == 0
    for fault in ("image hang", "image 500", "callback 503", "receive duplicate", "batch partial", "batch throttle"):
        assert shown.count(fault) > 0


@run_of("slow --seed 7")
def test_with_a_visibility_of_5_s_and_callbacks_of_12_s_no_message_expires_while_held(shown: Shown) -> None:
    assert shown.count("answered") == shown.count("received") == 100
    assert shown.count("extended") > 100
    assert shown.count("expired") == 0


@run_of("stop --seed 7")
def test_when_one_of_two_workers_stops_the_other_finishes_without_waiting_for_a_timeout(shown: Shown) -> None:
    assert (shown.count("answered"), shown.count("stopped"), shown.count("repeats")) == (2000, 2, 0)


@run_of("outage --seed 7")
def test_while_sqs_is_away_nothing_expires_and_nobody_calls_it_in_a_loop(shown: Shown) -> None:
    assert shown.count("answered") == shown.count("received") == 600
    assert shown.count("SQS calls") < 400
    assert shown.count("expired") == shown.count("repeats") == 0


@run_of("poison --seed 10")
def test_pictures_that_end_or_hang_process_fail_and_no_other_message_is_received_again(shown: Shown) -> None:
    assert shown.count("answered") == shown.count("received") == 300
    assert shown.count("poisoned") == 3


def test_a_run_that_finds_a_violation_says_so_and_ends_with_1() -> None:
    # given so little time that messages are still in the queue when the run is over
    shown = play("faults --seed 7 --messages 100 --within 0")
    # then the judge finds them, and the seed to see it again is printed
    assert shown.code == 1
    assert "VIOLATION lost" in shown.text
    assert "verdict (seed 7): lost" in shown.text
