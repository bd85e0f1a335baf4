"""The image host and the callback receiver, which fail by seed."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

from aiohttp import web
from load.faults.chance import Chance
from load.faults.ledger import Kind, Ledger
from load.faults.requests import picture, wrong

HANG_S = 60.0
SLOW_S = 1.0


class Peers:
    """Answers image requests and callbacks; every callback goes into the ledger with what is wrong with it."""

    def __init__(self, ledger: Ledger, chance: Chance, *, max_receives: int, callback_takes: float = 0.0) -> None:
        self._ledger = ledger
        self._chance = chance
        self._max_receives = max_receives
        self._callback_takes = callback_takes
        self._failed_downloads: Counter[int] = Counter()
        self.accepted = 0

    async def image(self, request: web.Request) -> web.StreamResponse:
        """``GET /number/nature.png``"""
        try:
            return await self._image(request)
        except ConnectionError:  # the worker left: it was killed, or had waited for long enough
            return _cut(request)

    async def _image(self, request: web.Request) -> web.StreamResponse:
        number, nature = _of(request)
        fault = self._chance.fault("image", number)
        if fault and fault != "slow":
            self._failed_downloads[number] += 1
        if fault.isdigit():
            return web.Response(status=int(fault))
        if fault == "reset":
            return _cut(request)
        if fault == "hang":
            await asyncio.sleep(HANG_S)
            return _cut(request)
        if nature == "missing":
            return web.Response(status=404)
        data = picture(number, nature)
        response = web.StreamResponse(headers={"Content-Type": "image/png", "Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        if fault == "short":
            return _cut(request, response)
        if fault == "slow":
            await asyncio.sleep(SLOW_S)
        await response.write(data[len(data) // 2 :])
        return response

    async def callback(self, request: web.Request) -> web.StreamResponse:
        """``POST /number/nature``"""
        number, nature = _of(request)
        answer = json.loads(await request.read())
        message = request.headers.get("webhook-id", "")
        note = wrong(
            answer,
            number,
            nature,
            max_receives=self._max_receives,
            failed_downloads=self._failed_downloads[number],
        )
        fault = self._chance.fault("callback", number)
        status = {"gone": 410, "refused": 400}.get(nature, 200)
        if fault.isdigit():
            status = int(fault)
        if fault == "slow" or self._callback_takes:
            await asyncio.sleep(self._callback_takes or SLOW_S)
        transport = request.transport
        heard = not fault.startswith("reset") and transport is not None and not transport.is_closing()
        status = status if heard else 0
        self._ledger.note(Kind.CALLBACK, message, count=int(answer.get("attempt", 0)), status=status, note=note)
        if not heard:
            return _cut(request)
        self.accepted += 200 <= status < 300 or status == 410
        return web.Response(status=status)


def _of(request: web.Request) -> tuple[int, str]:
    return int(request.match_info["number"]), request.match_info["nature"].replace("-", " ")


def _cut(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return response or web.Response()
