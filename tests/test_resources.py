"""What the worker costs when it has nothing to do, and that it does not grow with what it has done."""

from __future__ import annotations

import time

import psutil
import pytest

from world import WorkerProcess, World, poll

IDLE_S = 60
IDLE_SHARE = 0.03
LONG_POLL_S = 10
DOWNLOADS_AT_ONCE = 32
CALLBACKS_AT_ONCE = 64
MOST_CONNECTIONS = DOWNLOADS_AT_ONCE + CALLBACKS_AT_ONCE + 10
"""Connections kept alive to the image host and the receiver, and those of the SQS client."""


def _tree(worker: WorkerProcess) -> list[psutil.Process]:
    parent = psutil.Process(worker.process.pid)
    return [parent, *parent.children(recursive=True)]


def _cpu_seconds(worker: WorkerProcess) -> float:
    return sum(sum(each.cpu_times()[:2]) for each in _tree(worker))


def _private_bytes(worker: WorkerProcess) -> int:
    """Memory that is this worker's own: pages shared between its processes counted once."""
    return sum(each.memory_full_info().pss for each in _tree(worker))


@pytest.mark.timeout(180)
def test_an_idle_worker_takes_under_3_percent_of_a_core_and_one_long_poll_at_a_time(fast_world: World) -> None:
    worker = fast_world.worker("--preprocess-workers", "2").ready()
    poll(lambda: worker.metric("cvworker_sqs_requests_total", operation="receive", outcome="ok") >= 1, 30)
    calls = worker.metric("cvworker_sqs_requests_total", operation="receive", outcome="ok")
    before, began = _cpu_seconds(worker), time.monotonic()
    time.sleep(IDLE_S)  # not to wait for something: this is the minute that is measured
    elapsed = time.monotonic() - began
    assert (_cpu_seconds(worker) - before) / elapsed < IDLE_SHARE
    calls = worker.metric("cvworker_sqs_requests_total", operation="receive", outcome="ok") - calls
    assert calls <= elapsed / LONG_POLL_S + 2


@pytest.mark.timeout(600)
def test_memory_threads_and_descriptors_do_not_grow_with_the_number_of_messages(fast_world: World) -> None:
    # given a worker warmed up with a thousand messages
    here = fast_world
    worker = here.worker("--preprocess-workers", "2", "--download-concurrency", str(DOWNLOADS_AT_ONCE)).ready()
    bodies = [here.request(n) for n in range(1000)]

    def run(times: int) -> None:
        for _ in range(times):
            done = here.receiver.count + len(bodies)
            here.send(*bodies)
            assert here.receiver.wait_for(done, 120)
        here.receiver.clear()

    run(2)
    before = (_private_bytes(worker), *_counts(worker))
    # when ten thousand more have gone through
    for _ in range(10):
        run(1)
    # then it takes no more memory, threads or descriptors than before, and keeps no more connections than it may
    poll(lambda: here.counts() == (0, 0), 30, "all settled")
    after = (_private_bytes(worker), *_counts(worker))
    assert after[0] < before[0] * 1.05 + 8 * 2**20, (before, after)
    assert after[1] <= before[1] + 2, (before, after)
    assert after[2] <= before[2] + 8, (before, after)
    assert after[3] <= MOST_CONNECTIONS, (before, after)


def _counts(worker: WorkerProcess) -> tuple[int, int, int]:
    """Threads, descriptors that are not connections, and connections, of all processes together."""
    tree = _tree(worker)
    connections = sum(len([c for c in each.net_connections("inet") if c.raddr]) for each in tree)
    descriptors = sum(each.num_fds() for each in tree)
    return sum(each.num_threads() for each in tree), descriptors - connections, connections
