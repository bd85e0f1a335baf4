"""A callback host that is dead, hangs or is slow does not hold up the answers to the others."""

from __future__ import annotations

import socket
import time

import pytest

from cvworker.embedded.receiver import CallbackReceiver
from world import MODULES, World, poll

SLOW = f"{MODULES / 'mean.py'}:Slow"
COUNT = 400


def _seconds_until_the_well_host_has_its_answers(here: World, other: str) -> float:
    """Half of the messages go to ``other``; the module does 80 pictures a second at most."""
    here.receiver.clear()
    bodies = [here.request(n) for n in range(COUNT)]
    for body in bodies[::2]:
        body["callback_url"] = other
    began = time.monotonic()
    here.send(*bodies)
    poll(lambda: len(here.receiver.accepted) >= COUNT / 2, 90, "the well host has all its answers")
    return time.monotonic() - began


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["dead", "hanging", "failing", "slow"])
def test_half_of_the_answers_for_a_bad_host_leave_the_other_half_its_pace(fast_world: World, kind: str) -> None:
    here = fast_world
    here.worker("--callback-timeout", "5", module=SLOW).ready()
    with CallbackReceiver() as well, CallbackReceiver() as bad, socket.socket() as closed:
        usual = _seconds_until_the_well_host_has_its_answers(here, well.url + "/answers")
        assert well.wait_for(COUNT // 2, 30)
        closed.bind(("127.0.0.1", 0))  # not listening: refuses connections
        bad.delay = {"hanging": 60, "slow": 3}.get(kind, 0)
        bad.respond = lambda received: 200 if kind == "slow" else 503
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/" if kind == "dead" else bad.url + "/answers"
        with_bad_host = _seconds_until_the_well_host_has_its_answers(here, url)
        assert with_bad_host < usual / 0.9 + 1, (usual, with_bad_host)
        taken = len(bad.accepted)
        assert sum(here.counts()) >= COUNT / 2 - 5 - taken, "what the bad host did not accept is not deleted"
