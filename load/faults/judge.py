"""Judges a ledger: a pure function over events, which knows nothing of how they came to be."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from load.faults.ledger import DUPLICATE, STALE, UNDELIVERED, Event, Kind
from load.faults.requests import POISONS, UNANSWERABLE

RETRY_BASE_S, RETRY_CAP_S, JITTER = 5.0, 900.0, 0.2
"""The delays of the contracts: 5 s x 2^n by receive count, capped, give or take a fifth."""
LONGEST_PAUSE_S = 60.0
"""A host that fails again and again is left alone for so long at most; answers for it wait as long."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a run must keep to beyond the contracts."""

    calls_per_message: float = 2.0
    """SQS calls for each message, failed ones included, and ..."""
    calls_per_second: float = 4.0
    """... for each second that a worker lives: polls of an empty queue, attempts while SQS fails."""
    most_receives: int | None = None
    """Receives of each message, where nothing gives a reason for another."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One breach: ``what`` is its kind, ``message`` whose it is."""

    what: str
    message: str = ""
    detail: str = ""


@dataclass(slots=True)
class Verdict:
    """What a ledger shows; it is good without violations."""

    violations: list[Violation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def good(self) -> bool:
        return not self.violations


@dataclass(slots=True)
class _Message:
    nature: str
    receives: int = 0
    accepted: int = 0
    excuses: int = 0
    """Times that somebody else may have had to answer it once more."""
    cause: bool = False
    """Whether anything happened that may take it to the dead-letter queue."""
    gone: bool = False
    dead: bool = False
    holders: dict[str, int] = field(default_factory=dict)
    """Worker → the seconds it asked for: those who have it, and have not settled it."""
    newest: str = ""
    duplicates: int = 0
    had_by: set[str] = field(default_factory=set)


class _Judge:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.verdict = Verdict()
        self.messages: dict[str, _Message] = {}
        self.held: defaultdict[str, set[str]] = defaultdict(set)
        self.started: dict[str, float] = {}
        self.stopping: set[str] = set()
        self.dead_workers: set[str] = set()
        self.worker_seconds = 0.0

    def breach(self, what: str, message: str = "", detail: str = "") -> None:
        self.verdict.violations.append(Violation(what, message, detail))

    def take(self, e: Event) -> None:
        self.verdict.counts[e.kind] += 1
        if e.kind is Kind.SENT:
            self.messages[e.message] = _Message(e.note)
            self.verdict.counts["poisoned"] += e.note in POISONS
        elif e.kind in (Kind.STARTED, Kind.STOPPING, Kind.STOPPED, Kind.KILLED):
            self._worker(e)
        elif e.kind is not Kind.CALL:
            message = self.messages.get(e.message)
            if message is None:
                self.breach("unknown webhook-id" if e.kind is Kind.CALLBACK else "unknown message", e.message)
            else:
                getattr(self, f"_{e.kind}")(e, message)

    def _worker(self, e: Event) -> None:
        if e.kind is Kind.STARTED:
            self.started[e.worker] = e.at
            return
        if e.kind is Kind.STOPPING:
            self.stopping.add(e.worker)
            return
        self.worker_seconds += e.at - self.started.pop(e.worker, e.at)
        self.dead_workers.add(e.worker)
        if e.kind is Kind.STOPPED and e.status:
            self.breach("a worker failed", detail=f"{e.worker} ended with {e.status}")
        for name in list(self.held.pop(e.worker, ())):
            message = self.messages[name]
            del message.holders[e.worker]
            if e.kind is Kind.KILLED or e.status:
                message.excuses += 1
                message.cause = True
                self.verdict.counts["held at a kill"] += 1
            else:
                self.breach("left hidden by a worker that stopped", name, e.worker)

    def _received(self, e: Event, m: _Message) -> None:
        m.receives, m.gone, m.newest = e.count, False, e.worker
        if DUPLICATE in e.note:
            m.cause = True
            m.duplicates += 1
            m.excuses += bool(m.had_by - {e.worker})
        elif self.rules.most_receives and e.count > self.rules.most_receives:
            self.breach("received again", e.message, f"receive {e.count}")
        if e.note == UNDELIVERED or e.worker in self.dead_workers:
            m.cause, m.newest = True, ""
            return
        m.had_by.add(e.worker)
        self._nobody_holds(e.message, m)  # the newest handle is the only one that counts
        if m.nature == "mute":  # is left as it stands, at once
            return
        m.holders[e.worker] = e.seconds
        self.held[e.worker].add(e.message)

    def _hidden(self, e: Event, m: _Message) -> None:
        asked = m.holders.get(e.worker)
        if asked is None or e.seconds == asked:  # an extension
            self.verdict.counts["extended"] += 1
            return
        self._settled(e, m)
        if e.seconds == 0:
            if e.worker not in self.stopping:
                self.breach("given back by a worker that does not stop", e.message, e.worker)
        elif not any(_is_delay(e.seconds, m.receives - n) for n in range(m.duplicates + 1)):
            self.breach("a delay that the contracts do not know", e.message, f"{e.seconds} s at receive {m.receives}")

    def _expired(self, e: Event, m: _Message) -> None:
        if m.newest in m.holders:
            self.breach("expired while held", e.message, f"by {m.newest}, receive {m.receives}")

    def _deleted(self, e: Event, m: _Message) -> None:
        self._settled(e, m)
        if not m.accepted:
            self.breach("deleted unanswered", e.message, m.nature)
        if e.note != STALE:
            m.gone = True
            self._nobody_holds(e.message, m)

    def _dead(self, e: Event, m: _Message) -> None:
        m.dead = m.gone = True
        if m.nature not in UNANSWERABLE and not m.cause:
            self.breach("dead without a cause", e.message, m.nature)

    def _callback(self, e: Event, m: _Message) -> None:
        if e.note:
            self.breach("a wrong answer", e.message, f"{m.nature}: {e.note}")
        if not 1 <= e.count <= m.receives:
            self.breach("a wrong answer", e.message, f"attempt {e.count} after {m.receives} receives")
        if not (200 <= e.status < 300 or e.status == 410):
            m.cause = True
            return
        m.accepted += 1
        self.verdict.counts["accepted"] += 1
        if m.accepted > 1:
            self.verdict.counts["repeats"] += 1
        if m.accepted > 1 + m.excuses:
            self.breach("answered twice", e.message, f"{m.accepted} times, {m.excuses} with a reason")

    def _nobody_holds(self, name: str, m: _Message) -> None:
        for worker in m.holders:
            self.held[worker].discard(name)
        m.holders.clear()

    def _settled(self, e: Event, m: _Message) -> None:
        m.holders.pop(e.worker, None)
        self.held[e.worker].discard(e.message)

    def end(self, at: float) -> Verdict:
        for name, message in self.messages.items():
            if message.dead:
                self.verdict.counts["in the dead-letter queue"] += 1
            elif message.accepted:
                self.verdict.counts["answered"] += 1
            if not message.gone and not message.dead:
                what = "answered, but never deleted" if message.accepted else "lost"
                self.breach(what, name, f"{message.nature}, {message.receives} receives")
        self.worker_seconds += sum(at - began for began in self.started.values())
        calls, rules = self.verdict.counts[Kind.CALL], self.rules
        allowed = rules.calls_per_message * len(self.messages) + rules.calls_per_second * self.worker_seconds
        if calls > allowed:
            self.breach("a hot loop", detail=f"{calls} SQS calls; {allowed:.0f} would be many")
        return self.verdict


def judge(events: Iterable[Event], rules: Rules | None = None) -> Verdict:
    """What the events of a run show, from its first message to its end.

    An extension and a delay look alike to SQS; a visibility of exactly what was asked for at the receive is taken for
    an extension. So a run with failures needs a visibility timeout that is none of the contracts' delays.
    """
    one = _Judge(rules or Rules())
    at = 0.0
    for event in events:
        one.take(event)
        at = event.at
    return one.end(at)


def _is_delay(seconds: int, receives: int) -> bool:
    exact = min(RETRY_BASE_S * 2.0 ** (receives - 1), RETRY_CAP_S)
    return exact * (1 - JITTER) <= seconds <= math.ceil(min(max(exact, LONGEST_PAUSE_S) * (1 + JITTER), RETRY_CAP_S))
