"""Whether the worker is alive and whether it is ready, with the reasons."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable


class Health:
    """Collects the reasons not to be alive or ready; no reason means all is well."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._alive: list[Callable[[], str | None]] = []
        self._ready: list[Callable[[], str | None]] = []
        self.stopping = False

    def watch(self, threads: Iterable[threading.Thread]) -> None:
        """These threads must live for as long as the worker does."""
        self._threads.extend(threads)

    def alive_if(self, check: Callable[[], str | None]) -> None:
        """``check`` returns what is wrong, or None."""
        self._alive.append(check)

    def ready_if(self, check: Callable[[], str | None]) -> None:
        """``check`` returns what is missing, or None."""
        self._ready.append(check)

    def dead_threads(self) -> list[str]:
        if self.stopping:
            return []
        return [f"thread {thread.name} has ended" for thread in self._threads if not thread.is_alive()]

    def problems(self) -> list[str]:
        """For ``/livez``: a step has stalled or a thread died."""
        return self.dead_threads() + _reasons(self._alive)

    def missing(self) -> list[str]:
        """For ``/readyz``: the model is not warm, the queue cannot be reached, the worker stops."""
        return (["stopping"] if self.stopping else []) + _reasons(self._ready)


def _reasons(checks: Iterable[Callable[[], str | None]]) -> list[str]:
    return [reason for check in checks if (reason := check()) is not None]
