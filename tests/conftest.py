from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from world import MiniStack, World, world

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's & has it: what tests start must hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

for name in list(os.environ):  # a developer's own settings and credentials must not reach the tests
    if name.startswith(("CVWORKER_", "AWS_")):
        del os.environ[name]


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Commands that a test calls in its own process set logging up for all of it, and for pytest's own stdout."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def ministack() -> Iterator[MiniStack]:
    with MiniStack() as running:
        yield running


@pytest.fixture
def moto_world(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as here:
        yield here


_queues = iter(range(1_000_000))


@pytest.fixture
def fast_world(tmp_path: Path, ministack: MiniStack) -> Iterator[World]:
    """A world on MiniStack, with a queue of its own."""
    with world(tmp_path, sqs=ministack, name=f"images-{next(_queues)}") as here:
        yield here
