"""A real browser, driven over its own debugging protocol: pages are looked at in real time, with live connections."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
START_S, LOOK_S = 60.0, 0.05


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        """What the browser wrote to its console: errors of scripts, and what the page's policy forbade."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            said = await self._socket.receive_json(timeout=60)
            if said.get("method") == "Log.entryAdded":
                self.complaints.append(said["params"]["entry"]["text"])
            elif said.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(said["params"]["exceptionDetails"]))
            elif said.get("id") == number:
                assert "error" not in said, said
                return dict(said["result"])

    async def value(self, script: str) -> Any:
        """What an expression of JavaScript gives."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, within: float = 30) -> Any:
        """Wait until an expression is true; what it gave."""
        until = time.monotonic() + within
        while not (found := await self.value(script)):
            assert time.monotonic() < until, f"not within {within:g} s: {script}\n{await self.text('body')}"
            await asyncio.sleep(LOOK_S)
        return found

    async def text(self, selector: str) -> str:
        """The words of an element, seen or not, each apart."""
        walk = (
            "(e => { const w = document.createTreeWalker(e, NodeFilter.SHOW_TEXT), t = [];"
            " while (w.nextNode()) t.push(w.currentNode.data); return t.join(' '); })"
        )
        return " ".join(str(await self.value(f"{walk}(document.querySelector({selector!r}))")).split())

    async def html(self) -> str:
        return str(await self.value("document.documentElement.outerHTML"))


class Browser:
    """A headless Chromium, for as many pages as are wanted."""

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = [*FLAGS, f"--user-data-dir={self._folder.name}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        told, until = Path(self._folder.name, "DevToolsActivePort"), time.monotonic() + START_S
        while not (told.exists() and told.read_text().count("\n")):
            assert time.monotonic() < until, "the browser does not start"
            time.sleep(LOOK_S)
        self._address = f"127.0.0.1:{told.read_text().split()[0]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    @asynccontextmanager
    async def page(self, url: str, **media: Any) -> AsyncIterator[Page]:
        """Open ``url`` in a tab of its own; ``width`` in pixels and ``scheme``, light or dark, as wanted."""
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://{self._address}/json/new?about:blank") as answer:
                tab = await answer.json()
            try:
                async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    for domain in ("Runtime", "Log", "Page"):
                        await page.call(f"{domain}.enable")
                    await page.call("Page.bringToFront")
                    await page.call("Emulation.setFocusEmulationEnabled", enabled=True)
                    size = {"width": media.get("width", 1280), "height": media.get("height", 900)}
                    await page.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
                    if "scheme" in media:
                        feature = {"name": "prefers-color-scheme", "value": media["scheme"]}
                        await page.call("Emulation.setEmulatedMedia", features=[feature])
                    await page.call("Page.navigate", url=url)
                    await page.until("location.href !== 'about:blank' && document.readyState === 'complete'")
                    yield page
            finally:
                async with session.get(f"http://{self._address}/json/close/{tab['id']}"):
                    pass
