"""Fair shares and breakers by host."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack

from cvworker.steps.hosts import FIRST_PAUSE_S, LONGEST_PAUSE_S, OPENS_AFTER, QUEUE_AT_SLOW, REMEMBERED, Hosts


class Stepped:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_one_host_alone_may_use_every_slot() -> None:
    async def main() -> None:
        hosts = Hosts(lambda: 4, Stepped())
        async with AsyncExitStack() as stack:
            for _ in range(4):
                await asyncio.wait_for(stack.enter_async_context(hosts.slot("a")), 1)

    asyncio.run(main())


def test_a_host_gets_no_more_than_half_while_another_wants_some() -> None:
    async def main() -> None:
        clock = Stepped()
        hosts = Hosts(lambda: 4, clock)
        under_way: list[str] = []
        hold = {name: asyncio.Event() for name in "ab"}

        async def request(name: str) -> None:
            async with hosts.slot(name):
                under_way.append(name)
                await hold[name].wait()

        # given a slow host that has taken every slot and has more waiting, when a second host comes
        slow = [asyncio.create_task(request("a")) for _ in range(8)]
        await _settle()
        assert under_way == ["a"] * 4
        other = [asyncio.create_task(request("b")) for _ in range(3)]
        await _settle()
        # then the next slots are the second host's, as far as half of them
        for task in slow[:2]:
            task.cancel()
        await _settle()
        assert under_way == ["a"] * 4 + ["b"] * 2
        hold["b"].set()
        await asyncio.gather(*other)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        # and everything is given back
        clock.now += 1000
        async with AsyncExitStack() as stack:
            for _ in range(4):
                await asyncio.wait_for(stack.enter_async_context(hosts.slot("c")), 1)

    asyncio.run(main())


def test_a_limit_that_grows_is_noticed_with_the_next_request() -> None:
    async def main() -> None:
        limit = 2
        hosts = Hosts(lambda: limit, Stepped())
        stuck = [asyncio.create_task(_hold(hosts, "stuck")) for _ in range(4)]
        await _settle()
        assert hosts.under_way == 2
        limit = 16
        async with asyncio.timeout(1), hosts.slot("other"):
            assert hosts.under_way == 5
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)

    asyncio.run(main())


def test_a_slow_host_never_takes_the_half_that_another_used_a_moment_ago() -> None:
    async def main() -> None:
        clock = Stepped()
        hosts = Hosts(lambda: 4, clock)
        # given a quick host that has nothing under way just now, and a slow one with many
        async with hosts.slot("quick"):
            pass
        slow = [asyncio.create_task(_hold(hosts, "slow")) for _ in range(8)]
        await _settle()
        # then there is room at once for the quick one
        async with asyncio.timeout(1), hosts.slot("quick"):
            pass
        # and when the quick one has not been seen for long, the slow one may use everything
        clock.now += 1000
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        async with AsyncExitStack() as stack:
            for _ in range(4):
                await asyncio.wait_for(stack.enter_async_context(hosts.slot("slow")), 1)

    asyncio.run(main())


async def _hold(hosts: Hosts, name: str) -> None:
    async with hosts.slot(name):
        await asyncio.Event().wait()


def test_a_host_that_fails_again_and_again_is_left_alone_for_growing_pauses_with_one_probe_between() -> None:
    async def main() -> None:
        clock = Stepped()
        hosts = Hosts(lambda: 4, clock)
        for _ in range(OPENS_AFTER - 1):
            hosts.failed("dead")
        assert hosts.paused_for("dead") == 0
        hosts.failed("dead")
        pause = FIRST_PAUSE_S
        while pause < LONGEST_PAUSE_S:
            assert hosts.paused_for("dead") == pause
            clock.now += pause
            assert hosts.paused_for("dead") == 0
            async with hosts.slot("dead"):
                assert hosts.paused_for("dead") > 0, "one probe at a time"
            hosts.failed("dead")
            pause = min(pause * 2, LONGEST_PAUSE_S)
        assert hosts.paused_for("well") == 0
        hosts.succeeded("dead")
        assert hosts.paused_for("dead") == 0

    asyncio.run(main())


def test_failures_of_requests_under_way_when_the_pause_began_do_not_lengthen_it() -> None:
    hosts = Hosts(lambda: 64, Stepped())
    for _ in range(50):
        hosts.failed("dead")
    assert hosts.paused_for("dead") == FIRST_PAUSE_S


def test_a_crowd_before_a_paused_host_is_told_and_a_crowd_before_the_only_host_is_not() -> None:
    hosts = Hosts(lambda: 2, Stepped())
    with hosts.in_hand("a"), hosts.in_hand("a"):
        assert not hosts.crowded("a")
        for _ in range(OPENS_AFTER):
            hosts.failed("a")
        assert hosts.crowded("a")
        assert not hosts.crowded("b")
    assert not hosts.crowded("a")


def test_who_is_patient_joins_the_queue_of_a_slow_host_and_not_that_of_a_paused_one() -> None:
    hosts = Hosts(lambda: 2, Stepped())
    with ExitStack() as stack:
        for _ in range(2 * QUEUE_AT_SLOW):
            stack.enter_context(hosts.in_hand("slow"))
        stack.enter_context(hosts.in_hand("quick"))
        assert hosts.crowded("slow")
        assert not hosts.crowded("slow", patient=True)
        for _ in range(OPENS_AFTER):
            hosts.failed("slow")
        assert hosts.crowded("slow", patient=True)


def test_no_more_hosts_are_remembered_than_fit() -> None:
    hosts = Hosts(lambda: 2, Stepped())
    for number in range(3 * REMEMBERED):
        hosts.failed(f"host-{number}")
    assert len(hosts._hosts) <= REMEMBERED
