"""Who takes part: how each is started, for which loads, and what it needs."""

from __future__ import annotations

import base64
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvworker.bench.world import QUEUE

ROOT = Path(__file__).parents[2]
BASELINE = "asyncio"
MODULES = Path(__file__).with_name("modules.py")


@dataclass(frozen=True, slots=True)
class Contender:
    """One worker, with its settings."""

    name: str
    summary: str
    program: str = ""
    """A module in ``load.compare.workers``; none is cvworker itself."""
    min_side: bool = False
    module: str = ""
    """A class in ``modules.py``; none is the one that fits the load."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """cvworker's, by environment variable without its prefix."""
    loads: tuple[str, ...] = ("io", "cpu", "r50")
    messages: str = "plain"
    """How the world writes requests."""
    arguments: tuple[str, ...] = ()
    """For the program."""
    needs: str = ""
    """A package that has to be importable."""
    install: str = ""

    @property
    def missing(self) -> str:
        """Why it cannot take part, or nothing."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.name}: skipped: pip install {self.install}"
        return ""

    def command(self, base: str, load: str) -> list[str]:
        """What starts it."""
        if self.program:
            program = f"load.compare.workers.{self.program}"
            return [sys.executable, "-m", program, "--queue-url", base + QUEUE, "--load", load, *self.arguments]
        kind = self.module or ("ResNet" if load == "r50" else "") + ("MinSide" if self.min_side else "")
        module = f"{MODULES}:{kind or 'FullSize'}"
        return [sys.executable, "-m", "cvworker", "run", "--module", module, "--queue-url", base + QUEUE]

    def environment(self, base: str) -> dict[str, str]:
        """Its environment: none of the caller's settings, and every protection on that production has."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("CVWORKER_", "AWS_"))}
        common = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "AWS_ENDPOINT_URL_SQS": base,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "compare",
            "AWS_SECRET_ACCESS_KEY": "compare",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if self.program:
            return own | common
        ours = _PRODUCTION | dict(self.settings)
        return own | common | {f"CVWORKER_{name}": value for name, value in ours.items()}


_PRODUCTION = {
    "ALLOWED_HOSTS": "127.0.0.1",  # the address check stays on, and this host is exempt
    "CALLBACK_SECRET": "whsec_" + base64.b64encode(b"compare" * 4).decode(),
    "LOG_FORMAT": "json",
    "LOG_LEVEL": "info",
    "HTTP_PORT": "0",
}

_FP32 = {"PRECISION": "fp32"}
_CELERY: Any = {"messages": "celery", "needs": "celery", "install": "'celery[sqs]'"}
CONTENDERS = {
    each.name: each
    for each in (
        Contender("sequential", "one after the other", "sequential"),
        Contender("article", "the article's worker: threads, DataLoader, queues of 300", "article"),
        Contender("celery", "Celery on SQS, 16 threads", "celery_", **_CELERY),
        Contender(
            "celery-prefork", "Celery on SQS, 2 processes", "celery_", arguments=("--pool", "prefork"), **_CELERY
        ),
        Contender("spdl", "an SPDL pipeline, 32 downloads at once", "spdl_", needs="spdl", install="spdl-core"),
        Contender(BASELINE, "150 lines of asyncio, threads for decoding; the baseline", "asyncio_"),
        Contender("cvworker", "its defaults, min_side 224, fp32", min_side=True, settings=_FP32),
        Contender("cvworker-full", "its defaults, no min_side, fp32", settings=_FP32),
        Contender(
            "cvworker-threads",
            "min_side 224, decoding on threads (preprocess_workers 0), fp32",
            min_side=True,
            settings=_FP32 | {"PREPROCESS_WORKERS": "0"},
        ),
        Contender("cvworker-auto", "min_side 224, precision auto", min_side=True, loads=("r50",)),
    )
}
