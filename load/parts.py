"""What single parts of an image's way cost, beside the least that they could: ``python -m load.parts``.

CPU time per image in one process, medians of rounds in turn. Downloads and callbacks go to the world of
``load.compare``; "alone" is aiohttp without address check, time limits, retries, fair shares and signature.
"""

from __future__ import annotations

import asyncio
import base64
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator

import aiohttp
import torch
from load.compare.measure import world
from load.compare.task import LOADS, SIDE
from rich.console import Console
from rich.table import Table
from torch.utils.data import default_collate

from cvworker.arena import Arena
from cvworker.clock import Clock
from cvworker.model.slabs import Slabs
from cvworker.net import AddressGuard, GuardedSession
from cvworker.signing import Signer
from cvworker.steps.callback import CallbackSender
from cvworker.steps.download import Fetcher

ROUNDS = 7
IMAGES, AT_ONCE = 600, 16
CHUNK = 8
BODY = b'{"id":"request-1","status":"ok","result":{"mean":12.3},"timings_ms":{"total":5.0},"metadata":{}}' + b" " * 200
Work = Callable[[int], Awaitable[object]]


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    with world(LOADS["cpu"]) as peer:
        for _ in range(ROUNDS):
            for name, measure in _PARTS.items():
                found.setdefault(name, []).append(measure(peer.base))
    table = Table("part", "CPU ms per image", "least", box=None)
    for name, values in found.items():
        table.add_row(name, f"{statistics.median(values):.3f}", f"{min(values):.3f}")
    Console().print(table)


def download_alone(base: str) -> float:
    async def run() -> float:
        async with aiohttp.ClientSession(auto_decompress=False) as session:

            async def one(n: int) -> None:
                async with session.get(f"{base}/i/{n % 64}.jpg") as response:
                    await response.read()

            return await _cost(one)

    return asyncio.run(run())


def download(base: str) -> float:
    async def run() -> float:
        guard = AddressGuard(allowed_hosts=["127.0.0.1"])
        arena = Arena(512 << 20)
        async with Fetcher(
            guard, arena, max_bytes=20 << 20, timeout=20, connections=256, user_agent="parts"
        ) as fetcher:

            async def one(n: int) -> None:
                (await fetcher.fetch(f"{base}/i/{n % 64}.jpg")).free()

            return await _cost(one)

    return asyncio.run(run())


def callback_alone(base: str) -> float:
    async def run() -> float:
        async with aiohttp.ClientSession() as session:

            async def one(_: int) -> None:
                async with session.post(f"{base}/callback", data=BODY) as response:
                    await response.read()

            return await _cost(one)

    return asyncio.run(run())


def callback(base: str) -> float:
    async def run() -> float:
        async with GuardedSession(AddressGuard(allowed_hosts=["127.0.0.1"]), limit=64) as session:
            signer = Signer(["whsec_" + base64.b64encode(b"parts" * 6).decode()])
            sender = CallbackSender(session, signer=signer, timeout=15, clock=Clock(), concurrency=64)
            return await _cost(lambda _: sender.post(f"{base}/callback", "id", BODY))

    return asyncio.run(run())


def hand_over_torch(_: str) -> float:
    """A chunk as a DataLoader process stacks it: into a new shared file."""
    return _of_chunks(lambda: default_collate(_samples()).share_memory_())


def hand_over_slab(_: str) -> float:
    slabs = Slabs(1)

    def one() -> None:
        slab, places = slabs.write(0, [_samples()]) or (0, [])
        slabs.read(slab, places, pin=False)

    return _of_chunks(one)


_PARTS = {
    "download, aiohttp alone": download_alone,
    "download": download,
    "callback, aiohttp alone": callback_alone,
    "callback": callback,
    f"{CHUNK} samples into a shared tensor, torch": hand_over_torch,
    f"{CHUNK} samples into a slab and out": hand_over_slab,
}
_PICTURES = [torch.zeros((256, 336, 3), dtype=torch.uint8) for _ in range(CHUNK)]


def _samples() -> list[torch.Tensor]:
    """Crops as most modules make them: views of ``[H, W, 3]``."""
    return [each.permute(2, 0, 1)[:, :SIDE, :SIDE] for each in _PICTURES]


async def _cost(one: Work) -> float:
    """CPU milliseconds for each of many, some at once; the first ones open connections and do not count."""
    for images in (AT_ONCE, IMAGES):
        numbers, began = iter(range(images)), time.process_time()
        await asyncio.gather(*(_each(one, numbers) for _ in range(AT_ONCE)))
    return (time.process_time() - began) / IMAGES * 1000


async def _each(one: Work, numbers: Iterator[int]) -> None:
    for n in numbers:
        await one(n)


def _of_chunks(one: Callable[[], object]) -> float:
    one()
    began = time.process_time()
    for _ in range(20):
        one()
    return (time.process_time() - began) / 20 / CHUNK * 1000


if __name__ == "__main__":
    main()
