"""The scenarios: what is sent, what fails, who is ended when, and what must hold beyond the contracts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from load.faults.judge import Rules

QUICK = {"preprocess_workers": "1", "shutdown_grace": "10"}
"""One worker must leave cores for others; a short grace makes long polls short, and so the end of a run."""
FAILING = {"download_timeout": "3", "callback_timeout": "5"}
STALLING = {"stall_timeout": "3"}


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. With ``seconds`` requests are sent for so long, else ``messages`` of them at once."""

    summary: str
    messages: int = 500
    seconds: float = 0.0
    backlog: int = 300
    """With ``seconds``: messages in the queue or in flight that sending keeps to."""
    pace: float = 50.0
    """With ``seconds``: messages a second that it sends at most, because the ledger of half an hour lies in memory."""
    rate: float = 0.0
    """The share of everything that fails: see :data:`load.faults.chance.FAULTS`."""
    natures: Mapping[str, float] = field(default_factory=dict)
    """Shares of requests that are not good ones: see :data:`load.faults.requests.NATURES`."""
    workers: int = 1
    kills: int = 0
    """SIGKILLs spread over the messages at random, each followed by a new worker."""
    stops: int = 0
    """SIGTERMs, likewise, and nobody new."""
    outage: float = 0.0
    """Seconds without SQS, once a tenth of the messages is answered."""
    kill_every: float = 0.0
    """With ``seconds``: the first worker ends about so often, by SIGKILL and SIGTERM in turn, and a new one follows."""
    visibility: int = 15
    """Seconds; with failures none of the contracts' delays, from which an extension could not be told."""
    max_receives: int = 3
    callback_takes: float = 0.0
    flags: Mapping[str, str] = field(default_factory=lambda: {**QUICK, **FAILING})
    """Settings of the workers."""
    within: float = 300.0
    """Seconds for the queue to become empty, once everything is sent."""
    rules: Rules = field(default_factory=Rules)


MIXED = {
    "missing": 0.02,
    "damaged": 0.02,
    "text": 0.01,
    "no image": 0.01,
    "other task": 0.01,
    "raises": 0.01,
    "gone": 0.01,
    "refused": 0.01,
    "mute": 0.01,
}

PLANS = {
    "kills": Plan("kill -9 at random moments, a new worker each time", messages=2000, kills=10, within=400),
    "faults": Plan("a fifth of everything fails", messages=1000, rate=0.2, natures=MIXED),
    "slow": Plan(
        "callbacks that take longer than twice the visibility timeout",
        messages=100,
        visibility=5,
        callback_takes=12,
        flags=QUICK,
        rules=Rules(most_receives=1, calls_per_message=5),
    ),
    "stop": Plan(
        "two workers, one is stopped under load: nobody waits for a visibility timeout of ten minutes",
        messages=2000,
        workers=2,
        stops=1,
        visibility=600,
        within=240,
        rules=Rules(most_receives=2),
    ),
    "outage": Plan(
        "SQS is away for a while: nothing expires, nothing is repeated, nobody calls it in a loop",
        messages=600,
        outage=8,
        visibility=30,
        flags=QUICK,
        rules=Rules(most_receives=1, calls_per_message=1),
    ),
    "poison": Plan(
        "one picture in a hundred ends its process or hangs in it",
        messages=300,
        natures={"segfaults": 0.005, "hangs": 0.005},
        flags={**QUICK, **STALLING},
        rules=Rules(most_receives=1),
    ),
    "mixed": Plan(
        "everything at once, for as long as it is given",
        seconds=60,
        rate=0.1,
        natures={**MIXED, "segfaults": 0.0002, "hangs": 0.0002},
        workers=2,
        kill_every=20,
        max_receives=4,
        flags={**QUICK, **FAILING, "stall_timeout": "10"},
        within=240,
    ),
}
