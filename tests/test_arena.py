"""The arena: slots never overlap, who came first is served first, and all that is given back joins up again."""

from __future__ import annotations

import asyncio
import mmap
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from cvworker.arena import PAGE, Arena, Slot

PAGES = 8


def run(scenario):
    return asyncio.run(scenario)


async def at_once(arena: Arena, size: int) -> Slot:
    """A slot that needs no waiting."""
    task = asyncio.create_task(arena.take(size))
    await asyncio.sleep(0)
    assert task.done(), "there is room, and it was not given"
    return task.result()


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_bytes_written_are_read_by_another_mapping_of_the_same_file() -> None:
    async def scenario() -> None:
        arena = Arena(PAGES * PAGE)
        await arena.take(PAGE)
        slot = await arena.take(3 * PAGE)
        slot.write(b"first ")
        slot.write(memoryview(b"second"))
        with mmap.mmap(arena.fd, arena.size, access=mmap.ACCESS_READ) as reader:
            assert reader[slot.offset : slot.offset + slot.length] == b"first second"

    run(scenario())


def test_the_size_is_rounded_up_to_pages_so_that_the_largest_image_fits() -> None:
    async def scenario() -> None:
        arena = Arena(2 * PAGE + 1)
        assert arena.size == 3 * PAGE
        assert (await at_once(arena, 2 * PAGE + 1)).room == 3 * PAGE

    run(scenario())


def test_sealing_gives_back_the_room_that_was_not_needed_and_freeing_the_rest_once() -> None:
    async def scenario() -> None:
        arena = Arena(PAGES * PAGE)
        slot = await arena.take(PAGES * PAGE)
        slot.write(b"x" * (PAGE + 1))
        slot.seal()
        assert (slot.room, arena.used) == (2 * PAGE, 2 * PAGE)
        other = await at_once(arena, (PAGES - 2) * PAGE)
        slot.free()
        slot.free()
        assert arena.used == other.room
        other.free()
        assert (await at_once(arena, PAGES * PAGE)).offset == 0

    run(scenario())


def test_an_empty_image_still_has_a_place_of_its_own() -> None:
    async def scenario() -> None:
        arena = Arena(2 * PAGE)
        first, second = await at_once(arena, 0), await at_once(arena, 0)
        first.seal()
        assert first.offset != second.offset

    run(scenario())


def test_a_large_image_is_not_overtaken_by_small_ones_that_would_fit() -> None:
    async def scenario() -> None:
        arena = Arena(4 * PAGE)
        held = await arena.take(2 * PAGE)
        large, small = asyncio.create_task(arena.take(3 * PAGE)), asyncio.create_task(arena.take(PAGE))
        await turn()
        assert not large.done()
        assert not small.done()
        held.free()
        await turn()
        assert large.done()
        assert small.done()

    run(scenario())


def test_when_the_first_in_line_gives_up_those_behind_it_are_served() -> None:
    async def scenario() -> None:
        arena = Arena(4 * PAGE)
        await arena.take(2 * PAGE)
        large, small = asyncio.create_task(arena.take(3 * PAGE)), asyncio.create_task(arena.take(PAGE))
        await turn()
        large.cancel()
        await turn()
        assert small.done()

    run(scenario())


def test_a_slot_that_comes_as_its_taker_is_cancelled_goes_back() -> None:
    async def scenario() -> None:
        arena = Arena(PAGE)
        for turns in range(4):  # at each point of the hand-over
            held = await at_once(arena, PAGE)
            waiting = asyncio.create_task(arena.take(PAGE))
            await turn()
            held.free()
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting.cancel()
            await turn()
            if not waiting.cancelled():
                waiting.result().free()
            assert arena.used == 0

    run(scenario())


def test_who_waits_on_a_loop_that_has_ended_does_not_keep_the_room() -> None:
    arena = Arena(PAGE)

    async def take_and_leave() -> Slot:
        held = await arena.take(PAGE)
        loop = asyncio.get_running_loop()
        loop.create_task(arena.take(PAGE))  # noqa: RUF006 - left behind on purpose
        await turn()
        return held

    loop = asyncio.new_event_loop()
    held = loop.run_until_complete(take_and_leave())
    loop.close()
    held.free()
    assert arena.used == 0


def test_threads_with_loops_of_their_own_never_write_over_each_other() -> None:
    arena = Arena(16 * PAGE)

    async def one(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(15):
            slot = await arena.take(chance.randint(0, 9 * PAGE))
            data = bytes([chance.randrange(256)]) * chance.randint(0, slot.room)
            slot.write(data)
            slot.seal()
            await asyncio.sleep(0)
            assert bytes(arena.memory[slot.offset : slot.offset + slot.length]) == data
            slot.free()

    async def several(seed: int) -> None:
        await asyncio.gather(*(one(seed * 10 + n) for n in range(5)))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(asyncio.run, several(seed)) for seed in range(4)]:
            done.result(60)
    assert arena.used == 0
    assert run(at_once(arena, 16 * PAGE)).offset == 0


class ArenaMachine(RuleBasedStateMachine):
    """Takes, seals, frees and cancels in any order, with the event loop's turns between them or not."""

    slots = Bundle("slots")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.arena = Arena(PAGES * PAGE)
        self.live: dict[Slot, bytes] = {}
        self.line: list[tuple[int, asyncio.Task[Slot]]] = []

    def teardown(self) -> None:
        for slot in self.live:
            slot.free()
        for _, task in self.line:
            task.cancel()
        self.loop.run_until_complete(turn())
        for _, task in self.line:
            if not task.cancelled():
                task.result().free()
        assert self.arena.used == 0
        assert self.loop.run_until_complete(at_once(self.arena, PAGES * PAGE)).offset == 0
        self.loop.close()
        self.arena.close()

    @rule(pages=st.integers(1, PAGES), less=st.integers(0, PAGE - 1))
    def take(self, pages: int, less: int) -> None:
        self.line.append((pages * PAGE, self.loop.create_task(self.arena.take(pages * PAGE - less))))

    @rule(target=slots, fill=st.integers(0, 255))
    def turn(self, fill: int):
        self.loop.run_until_complete(turn())
        served = [task.result() for _, task in self.line if task.done() and not task.cancelled()]
        self.line = [(want, task) for want, task in self.line if not task.done()]
        for slot in served:
            slot.write(bytes([fill]) * slot.room)
            self.live[slot] = bytes([fill])
        if self.line:
            assert self.largest_gap() < self.line[0][0], "the first in line would fit"
        return multiple(*served)

    @rule(slot=slots, pages=st.integers(0, PAGES))
    def seal(self, slot: Slot, pages: int) -> None:
        if slot in self.live and pages * PAGE < slot.room:
            slot.length = pages * PAGE
            slot.seal()
            assert slot.room == max(pages, 1) * PAGE

    @rule(slot=consumes(slots))
    def free(self, slot: Slot) -> None:
        slot.free()
        self.live.pop(slot, None)

    @rule(place=st.integers(0, 5))
    def cancel(self, place: int) -> None:
        if place < len(self.line):
            self.line[place][1].cancel()

    @invariant()
    def those_in_line_are_served_in_order(self) -> None:
        waiting = [task.done() for _, task in self.line if not task.cancelled() and not task.cancelling()]
        assert waiting == sorted(waiting, reverse=True)

    @invariant()
    def slots_hold_what_was_written_and_do_not_overlap(self) -> None:
        taken = sorted((slot.offset, slot.offset + slot.room) for slot in self.live)
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
        for slot, fill in self.live.items():
            assert self.arena.memory[slot.offset] == self.arena.memory[slot.offset + slot.room - 1] == fill[0]

    def largest_gap(self) -> int:
        edges = [
            0,
            *(
                edge
                for slot in sorted(self.live, key=lambda slot: slot.offset)
                for edge in (slot.offset, slot.offset + slot.room)
            ),
            self.arena.size,
        ]
        return max(end - start for start, end in zip(edges[::2], edges[1::2], strict=True))


TestArenaInAnyOrder = ArenaMachine.TestCase
TestArenaInAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
