"""Names → addresses, checked: what is dialled is what was checked, and nobody resolves a name in between."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from time import monotonic

from cvworker.addresses import refusal
from cvworker.errors import UrlNotAllowed
from cvworker.net.guard import HOSTS_REMEMBERED

LOOKUP_TIMEOUT = 5.0  # seconds; libc itself waits 5 s, twice, for each name server
LOOKUPS_AT_ONCE = 64  # per session, and so at most that many threads wait for silent name servers
DNS_CACHE_SECONDS = 10  # how long a checked answer serves new connections to the same host

# Blocking: the addresses of a host name, or OSError. The port is only there for `getaddrinfo`.
Lookup = Callable[[str, int], Sequence[str]]


def look_up(host: str, port: int) -> list[str]:
    """The addresses that the operating system has for ``host``."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [str(address[0]) for *_, address in found]


class Lookups:
    """Name look-ups within a time limit, each on a daemon thread.

    ``getaddrinfo`` cannot be interrupted. The threads of an executor are joined when the process ends, and would hold
    it up for as long as some name server stays silent.
    """

    def __init__(self, lookup: Lookup, time_limit: float) -> None:
        self._lookup = lookup
        self._time_limit = time_limit
        self._free = asyncio.Semaphore(LOOKUPS_AT_ONCE)

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """Raises OSError where the name does not resolve, or not in time."""
        try:
            async with asyncio.timeout(self._time_limit):
                await self._free.acquire()
                found = await self._start(host, port)
        except TimeoutError:
            raise socket.gaierror(socket.EAI_AGAIN, f"no answer within {self._time_limit:g} s") from None
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        return found

    def _start(self, host: str, port: int) -> asyncio.Future[Sequence[str]]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[str]] = loop.create_future()

        def settle(found: Sequence[str], error: Exception | None) -> None:
            self._free.release()  # only now: a thread that nobody waits for any more still counts
            if answer.done():
                return
            if error is None:
                answer.set_result(found)
            else:
                answer.set_exception(error)

        def run() -> None:
            found: Sequence[str] = ()
            error: Exception | None = None
            try:
                found = self._lookup(host, port)
            except Exception as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(settle, found, error)
            except RuntimeError:
                pass  # the loop is closed, and with it everybody who waited

        try:
            threading.Thread(target=run, name="name-lookup", daemon=True).start()
        except RuntimeError as error:
            settle((), OSError(str(error)))  # no more threads to be had
        return answer


class Resolver:
    """The addresses of hosts, each refused if any one of its addresses is; an answer serves for a few seconds."""

    def __init__(self, lookup: Lookup, time_limit: float) -> None:
        self.lookups = Lookups(lookup, time_limit)
        self._known: dict[tuple[str, int], tuple[Sequence[str], float]] = {}
        self._asked: dict[tuple[str, int], asyncio.Task[Sequence[str]]] = {}

    async def addresses(self, host: str, port: int, *, checked: bool) -> Sequence[str]:
        """Raises OSError where the name does not resolve, UrlNotAllowed where it does to what may not be dialled."""
        addresses = await self._resolve(host, port)
        for address in addresses if checked else ():
            if why := refusal(address):
                # Without the address: the client is sent this text, and our internal names are none of its business.
                raise UrlNotAllowed(f"{host} does not resolve to public addresses only ({why})")
        return addresses

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        key = host, port
        known, until = self._known.get(key, ((), 0.0))
        if until > monotonic():
            return known
        task = self._asked.get(key)
        if task is None:  # one question for all who wait, and not ended by the first of them who gives up
            task = self._asked[key] = asyncio.ensure_future(self._ask(key))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if nobody waits any more
        return await asyncio.shield(task)

    async def _ask(self, key: tuple[str, int]) -> Sequence[str]:
        try:
            addresses = await self.lookups.addresses(*key)
        finally:
            del self._asked[key]
        if len(self._known) >= HOSTS_REMEMBERED:
            self._known.clear()
        self._known[key] = addresses, monotonic() + DNS_CACHE_SECONDS
        return addresses
