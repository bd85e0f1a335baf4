"""What the harness has found, each made to happen again without it."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

from load.faults.workers import MODULE

from cvworker.arena import Arena
from cvworker.clock import Clock
from cvworker.model.link import ModelLink
from cvworker.settings import Settings
from cvworker.sqs.acks import Acks
from cvworker.sqs.leases import LeaseTable
from cvworker.sqs.outcome import ANSWERED
from cvworker.worker import model_config


def test_a_model_process_whose_worker_dies_while_it_loads_ends_too() -> None:
    # given a model process that has begun to load
    arena = Arena(2**20)
    settings = Settings(module=MODULE, preprocess_workers=1)
    link = ModelLink(model_config(settings, None, arena.size), arena.fd)
    try:
        # when its worker is gone before it can say that it is ready, then it ends by itself
        link.close()
        assert link._process.wait(60) != -signal.SIGKILL
    finally:
        link.kill()


def test_a_message_received_again_during_its_delete_is_deleted_by_the_new_handle_too() -> None:
    # given a message that SQS delivers once more while its delete is under way
    clock = Clock()
    leases = LeaseTable(30, 900, clock.monotonic)
    lease = leases.add("m", "old")
    assert lease is not None
    deleted: list[str] = []
    ended: list[Any] = []

    def delete(receipts: list[str]) -> list[Any]:
        deleted.extend(receipts)
        leases.add("m", "new", attempt=2)
        return []  # a stale handle succeeds, and deletes nothing

    queue: Any = SimpleNamespace(delete=delete)
    acks = Acks(queue, clock, lambda lease, outcome: ended.append(lease))
    acks.start()
    # when it is settled, then the newest handle is told, and it ends once
    acks.put(lease, ANSWERED)
    acks.stop(clock.monotonic() + 10)
    assert deleted == ["old", "new"]
    assert ended == [lease]
