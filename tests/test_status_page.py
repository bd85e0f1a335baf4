"""The endpoints, and the page for people: what a browser may load, and what it makes of the worker's status."""

from __future__ import annotations

import asyncio
import html
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import aiohttp
import pytest

from cvworker.errors import StartupError
from cvworker.observe.http import Endpoints
from cvworker.observe.metrics import Metrics
from cvworker.settings import Settings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
with_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not on this machine")
MARKUP = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>&amp;"


def worker_status(**changes):
    """The status of a worker whose process step is at its limit."""
    return {
        "version": "9.8.7",
        "state": "running",
        "uptime_s": 3725.0,
        "problems": [],
        "missing": [],
        "queue": {"url": "https://sqs.example.com/1/pictures", "reachable": True, "max_receives": 5},
        "model": {
            "module": "threat",
            "device": "NVIDIA T4",
            "precision": "fp16",
            "weights": "sha256:0123",
            "restarts": 0,
            "pid": 4711,
        },
        "held": 118,
        "image_bytes": 61_000_000,
        "queues": {name: {"depth": 3, "limit": 28} for name in ("download", "inference", "results")},
        "in_hand": {"download": 24, "model": 40, "callback": 5},
        "download_concurrency": 54,
        "rate_per_s": 27.62,
        "pace_per_s": 28.1,
        "busy": {"receive": 0.21, "download": 0.41, "preprocess": 0.714, "process": 0.973, "callback": 0.05},
        "latency_ms": {"download": {"p50": 83.2, "p95": 1310.0}},
        "messages": {"answered": 1234.0, "later": 12.0},
        "errors": {"image_not_found": 97.0},
        "callbacks": {"2xx": 1234.0},
        "settings": Settings(module="threat", queue_url="https://sqs.example.com/1/pictures").shown(),
        **changes,
    }


def served(visit, *, problems=(), missing=(), status=worker_status):
    """What ``visit(base)`` returns while the endpoints are up."""

    async def main():
        endpoints = Endpoints(
            problems=lambda: list(problems),
            missing=lambda: list(missing),
            status=status,
            metrics=Metrics().text,
        )
        await endpoints.start("127.0.0.1", 0)
        try:
            return await visit(f"http://127.0.0.1:{endpoints.port}")
        finally:
            await endpoints.stop()

    return asyncio.run(main())


def get(path, **endpoints):
    """Status code, headers and text of one answer."""

    async def visit(base):
        async with aiohttp.ClientSession() as session, session.get(base + path) as response:
            return response.status, response.headers, await response.text()

    return served(visit, **endpoints)


class Markup(HTMLParser):
    """Every attribute, and the text inside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.attributes = []
        self.inline = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in ("script", "style"):
            self.inline += data.strip()


# The endpoints


@pytest.mark.parametrize("path", ["/", "/status.css", "/status.js", "/status.json", "/livez", "/readyz", "/metrics"])
def test_nothing_may_come_from_elsewhere(path):
    code, headers, text = get(path)
    assert code == 200
    assert text
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html"),
        ("/status.css", "text/css"),
        ("/status.js", "text/javascript"),
        ("/livez", "application/json"),
    ],
)
def test_each_has_its_content_type(path, content_type):
    assert get(path)[1]["Content-Type"].split(";")[0] == content_type


def test_the_page_keeps_to_its_own_policy():
    page = Markup(get("/")[2])
    assert page.inline == ""
    assert {name for name, _ in page.attributes if name == "style" or name.startswith("on")} == set()
    targets = [value for name, value in page.attributes if name in ("src", "href", "action", "srcset", "data")]
    assert sorted(targets)[-2:] == ["status.json", "status.json"]
    for target in targets:
        assert get("/" + target)[0] == 200


@pytest.mark.parametrize("path", ["/", "/status.css", "/status.js"])
def test_no_asset_names_another_origin(path):
    assert re.findall(r"//[\w.-]+\.\w+|url\(|@import|\bdata:|\bimport\b", get(path)[2]) == []


def test_the_script_writes_text_only():
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\("
    assert re.findall(ways, get("/status.js")[2]) == []


def test_livez_says_what_is_wrong():
    assert get("/livez")[0] == 200
    code, _, text = get("/livez", problems=["download has made no progress for 130 s"], missing=["stopping"])
    assert (code, text) == (503, '{"ok": false, "reasons": ["download has made no progress for 130 s"]}\n')


def test_readyz_says_what_is_missing():
    assert get("/readyz", problems=["a thread died"])[0] == 200
    code, _, text = get("/readyz", missing=["the model is not warm yet"])
    assert (code, text) == (503, '{"ok": false, "reasons": ["the model is not warm yet"]}\n')


def test_the_endpoints_are_read_only():
    async def visit(base):
        async with aiohttp.ClientSession() as session, session.post(base + "/status.json") as response:
            return response.status

    assert served(visit) == 405


def test_a_taken_port_is_told_by_its_setting():
    async def visit(base):
        with pytest.raises(StartupError, match=r"^http_port: port \d+ on 127\.0\.0\.1 is taken"):
            await Endpoints(problems=list, missing=list, status=dict, metrics=bytes).start(
                "127.0.0.1", int(base.rpartition(":")[2])
            )

    served(visit)


# The page, in a browser


@pytest.fixture
def look(tmp_path):
    """Open the page on what ``status()`` returns; gives the text of an element by its id, and the document."""

    def browse(base):
        flags = ["--headless", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        flags += ["--disable-sync", "--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")
        done = subprocess.run(
            [CHROMIUM, *flags, "--virtual-time-budget=3500", "--dump-dom", base + "/"],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout

    def look(status):
        document = served(lambda base: asyncio.to_thread(browse, base), status=status)

        def text(name):
            inner = re.search(rf'id="{name}"[^>]*>(.*?)</(?:h1|h2|p|ul|tbody)>', document, re.DOTALL)[1]
            return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", inner).split()))

        return text, document

    return look


@with_browser
def test_the_page_tells_what_holds_the_worker_back(look):
    text, document = look(worker_status)
    assert text("state") == "running"
    assert text("module") == "threat"
    assert text("about") == "NVIDIA T4 · fp16 · cvworker 9.8.7 · up 1 h 2 min"
    assert text("limit") == "process holds it back: 97% busy."
    assert "batch_size (8)" in text("hint")
    assert re.findall(r'data-step="(\w+)" data-mark', document) == ["process"]
    assert "image_not_found 0 97" in text("errors")
    assert "download 83 ms 1.3 s" in text("latency")
    assert "answered 0 1,234" in text("messages")
    assert "callback_timeout 15" in text("settings")


@with_browser
@pytest.mark.parametrize(
    ("changes", "limit", "hint"),
    [
        ({"held": 0, "rate_per_s": 0.0}, "Idle: no messages to work on.", ""),
        ({"state": "starting", "missing": ["not warm"]}, "Starting: no messages taken yet.", "not warm"),
        ({"state": "stopping", "missing": ["stopping"]}, "Stopping: 118 messages in hand.", ""),
        ({"problems": ["a thread died", "another"]}, "Failing: a thread died.", "another"),
        ({"missing": ["sqs: denied"]}, "Not ready.", "sqs: denied"),
        ({"busy": {"download": 0.3}}, "It keeps up with what arrives.", "download_concurrency (auto, now 54)"),
        ({"busy": {"download": 0.01}}, "It keeps up with what arrives.", "Every step has room."),
        # all before a full queue only waits for room, however busy it is
        (
            {"queues": {"results": {"depth": 28, "limit": 28}}},
            "callback holds it back: 5% busy.",
            "callback_concurrency (64)",
        ),
        (
            {"image_bytes": 512 * 2**20, "busy": {"download": 1.0, "process": 0.2}},
            "Too little memory for images holds it back.",
            "max_inflight_bytes (512 MiB)",
        ),
    ],
)
def test_the_verdict(look, changes, limit, hint):
    text, _ = look(lambda: worker_status(**changes))
    assert text("limit") == limit
    assert hint in text("hint")


@with_browser
def test_nothing_in_the_status_is_taken_for_markup(look):
    status = worker_status(problems=[MARKUP], errors={MARKUP: 1.0}, messages={MARKUP: 1.0}, callbacks={MARKUP: 1.0})
    status["model"] = {**status["model"], "module": MARKUP, "device": MARKUP, "weights": MARKUP}
    status["settings"] = {**status["settings"], "callback_url": MARKUP, MARKUP: [MARKUP]}
    text, document = look(lambda: status)
    assert "<img" not in document
    assert document.count("<script") == 1
    assert "<title>owned" not in document
    assert text("module") == MARKUP
    assert text("limit") == f"Failing: {MARKUP}."
    assert f"{MARKUP} 0 1" in text("errors")


@with_browser
def test_a_worker_that_answers_no_more_is_told(look):
    first = iter([worker_status()])
    text, document = look(lambda: next(first))
    assert text("state") == "no answer"
    assert text("limit").startswith("No answer since ")
    assert "it answers HTTP 500. What stands below is from then." in text("hint")
    assert 'data-from="then"' in document
    assert "answered 0 1,234" in text("messages")


@with_browser
def test_an_answer_that_cannot_be_read_is_told(look):
    text, document = look(lambda: {"not": "a status"})
    assert text("state") == "no answer"
    assert "this page cannot read what it answers" in text("hint")
    assert "data-from" not in document
