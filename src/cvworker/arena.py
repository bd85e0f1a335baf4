"""Image bytes in shared memory: written once by the download, read in place by the process that decodes them."""

from __future__ import annotations

import asyncio
import bisect
import mmap
import os
import threading
from collections import deque

PAGE = 4096


class Slot:
    """A stretch of the arena that holds one image; freed once."""

    __slots__ = ("_arena", "_room", "length", "offset")

    def __init__(self, arena: Arena, offset: int, room: int) -> None:
        self._arena: Arena | None = arena
        self._room = room
        self.offset = offset
        self.length = 0

    @property
    def room(self) -> int:
        return self._room

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``; the caller keeps within ``room``."""
        self.next(len(data))[:] = data

    def next(self, length: int) -> memoryview:
        """The memory of the next ``length`` bytes, for who writes them in place; the caller keeps within ``room``."""
        assert self._arena is not None
        at = self.offset + self.length
        self.length += length
        return self._arena.memory[at : at + length]

    def seal(self) -> None:
        """Give back the room that was not needed."""
        assert self._arena is not None
        self._room = self._arena.shrink(self.offset, self._room, self.length)

    def free(self) -> None:
        arena, self._arena = self._arena, None
        if arena is not None:
            arena.release(self.offset, self._room)


class Arena:
    """One anonymous shared file of ``size`` bytes, given out in slots.

    It is the budget as well (``max_inflight_bytes``): who finds no room waits in line. The file is sparse, and slots
    are taken from the front, so that the memory really used follows what is in flight. A memory file descriptor
    rather than ``/dev/shm``, which containers limit to 64 MB.
    """

    def __init__(self, size: int) -> None:
        self.size = _pages(size)
        self.fd = os.memfd_create("cvworker-images")
        os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size)
        self.memory = memoryview(self._map)
        self._free: list[tuple[int, int]] = [(0, self.size)]
        self._lock = threading.Lock()
        self._line: deque[tuple[int, asyncio.AbstractEventLoop, asyncio.Future[Slot]]] = deque()
        self.used = 0

    async def take(self, at_most: int) -> Slot:
        """Room for ``at_most`` bytes, waiting in line until there is."""
        want = max(_pages(at_most), PAGE)
        with self._lock:
            slot = None if self._line else self._find(want)
            if slot is not None:
                return slot
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[Slot] = loop.create_future()
            self._line.append((want, loop, waiter))
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # it came at the same moment
                waiter.result().free()
            else:
                with self._lock:
                    self._line = deque(entry for entry in self._line if entry[2] is not waiter)
                self._serve_line()
            raise

    def shrink(self, offset: int, room: int, length: int) -> int:
        """Give back the end of a slot; returns the room it keeps."""
        keep = max(_pages(length), PAGE)
        if keep < room:
            self.release(offset + keep, room - keep)
        return keep

    def release(self, offset: int, room: int) -> None:
        """Take back ``room`` bytes at ``offset``, joined with free neighbours."""
        with self._lock:
            self.used -= room
            at = bisect.bisect(self._free, (offset, 0))
            if at < len(self._free) and offset + room == self._free[at][0]:
                room += self._free.pop(at)[1]
            if at > 0 and sum(self._free[at - 1]) == offset:
                at -= 1
                before = self._free.pop(at)
                offset, room = before[0], before[1] + room
            self._free.insert(at, (offset, room))
        self._serve_line()

    def close(self) -> None:
        self.memory.release()
        self._map.close()
        os.close(self.fd)

    def _serve_line(self) -> None:
        served: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[Slot], Slot]] = []
        with self._lock:
            while self._line:
                want, loop, waiter = self._line[0]
                slot = self._find(want)
                if slot is None:
                    break  # first come, first served: a large image is not overtaken for ever
                self._line.popleft()
                served.append((loop, waiter, slot))
        for loop, waiter, slot in served:
            try:
                loop.call_soon_threadsafe(_hand_over, waiter, slot)
            except RuntimeError:  # its loop has ended
                slot.free()

    def _find(self, want: int) -> Slot | None:
        for index, (offset, room) in enumerate(self._free):
            if room >= want:
                if room == want:
                    del self._free[index]
                else:
                    self._free[index] = (offset + want, room - want)
                self.used += want
                return Slot(self, offset, want)
        return None


def _hand_over(waiter: asyncio.Future[Slot], slot: Slot) -> None:
    if waiter.cancelled():
        slot.free()
    else:
        waiter.set_result(slot)


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
