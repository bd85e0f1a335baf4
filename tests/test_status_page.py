"""The endpoints, and the page for people: what a browser may load, and what it makes of the worker's status."""

from __future__ import annotations

import asyncio
import html
import itertools
import json
import re
from html.parser import HTMLParser

import aiohttp
import pytest

from browser import CHROMIUM, Browser
from cvworker.embedded.receiver import accept
from cvworker.errors import StartupError
from cvworker.observe.http import HEADERS, MOST_STREAMS, Endpoints
from cvworker.observe.metrics import Metrics
from cvworker.observe.verdict import Judge
from cvworker.settings import Settings
from world import MODULES

with_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not on this machine")
SLOW = f"{MODULES / 'mean.py'}:Slow"
MARKUP = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>&amp;"


def worker_status(**changes):
    """The status of a worker whose process step is at its limit."""
    status = {
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
        "backlog": {"visible": 8286, "hidden": 118, "delayed": 3},
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
        "done": {
            "receive": 1300.0,
            "download": 1290.0,
            "preprocess": 1280.0,
            "process": 1270.0,
            "callback": 1234.0,
            "batches": 180.0,
        },
        "leases": {"extended": 17.0, "lost": 2.0, "oldest_s": 12.4},
        "history": {"every_s": 5.0, "rate_per_s": [20.0, 27.0], "p50_ms": [150.0, None], "p95_ms": [400.0, None]},
        "examples": [{"at": 1.0, "code": "image_not_found", "message": "HTTP 404", "id": "req-1", "message_id": "m1"}],
        "settings": Settings(module="threat", queue_url="https://sqs.example.com/1/pictures").shown(),
        **changes,
    }
    return {"verdict": Judge().verdict(status).json(), **status}


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


def test_events_bring_the_status_once_a_second():
    numbers = iter(range(100))

    async def visit(base):
        async with aiohttp.ClientSession() as session, session.get(base + "/events") as response:
            assert response.content_type == "text/event-stream"
            assert response.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
            events = [await response.content.readuntil(b"\n\n") for _ in range(2)]
        return [json.loads(event.removeprefix(b"data: "))["held"] for event in events]

    assert served(visit, status=lambda: worker_status(held=next(numbers))) == [0, 1]


def test_pages_that_listen_do_not_hold_up_the_end():
    async def main():
        endpoints = Endpoints(problems=list, missing=list, status=worker_status, metrics=bytes)
        await endpoints.start("127.0.0.1", 0)
        async with aiohttp.ClientSession() as session:
            response = await session.get(f"http://127.0.0.1:{endpoints.port}/events")
            await response.content.readuntil(b"\n\n")
            await asyncio.wait_for(endpoints.stop(), 20)
            await response.content.read()  # the stream has ended, in order

    asyncio.run(main())


def test_more_pages_than_are_good_are_told_so():
    async def visit(base):
        async with aiohttp.ClientSession() as session:
            held = [await session.get(base + "/events") for _ in range(MOST_STREAMS)]
            async with session.get(base + "/events") as one_more:
                codes = {each.status for each in held}, one_more.status
            for each in held:
                each.close()
        return codes

    assert served(visit) == ({200}, 503)


# The page, in a browser


@pytest.fixture(scope="module")
def browser():
    with Browser() as running:
        yield running


ANSWERED = "document.getElementById('state').textContent !== 'no answer yet'"


@pytest.fixture
def look(browser):
    """Open the page on what ``status()`` returns; gives the text of an element by its id, and the document."""

    def look(status, until=ANSWERED):
        async def visit(base):
            async with browser.page(base + "/") as page:
                await page.until(until)
                return await page.html(), page.complaints

        document, complaints = served(visit, status=status)
        assert [each for each in complaints if "Content Security" in each] == []

        def text(name):
            inner = re.search(rf'id="{name}"[^>]*>(.*?)</(?:h1|h2|p|ul|tbody|b)>', document, re.DOTALL)[1]
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
    assert "leases 118 held, the oldest sent 12 s ago" in text("facts")
    assert "leases so far 17 extended, 2 lost" in text("facts")
    assert text("examples").endswith("image_not_found req-1 HTTP 404")
    assert (text("backlog"), text("eta")) == ("8,286", "5 min 0 s at this pace")
    assert re.search(r'<path d="M[\d.]+ [\d.]+L[\d.]+ [\d.]+L300 [\d.]+"', document), "the last minutes' throughput"


@with_browser
def test_each_step_shows_its_rate_and_the_batches_their_fill(look):
    # given counters that grow: four batches with 30 images every second
    seconds = itertools.count(100)

    def status():
        now = next(seconds)
        rates = {**worker_status()["done"], "process": 30, "batches": 4}
        return worker_status(uptime_s=float(now), done={name: rate * now for name, rate in rates.items()})

    text, document = look(status, "document.querySelector('[data-step=process] .pace').textContent")
    assert text("batches") == "batches of 7.5, at most 8"
    assert re.search(r'<h3>process <span class="pace quiet">30/s', document)


@with_browser
def test_the_verdict_is_the_workers(look):
    verdict = {"tone": "bad", "text": "Failing: a thread died.", "hint": "another", "step": None, "tag": ""}
    text, document = look(lambda: worker_status(verdict=verdict, problems=["a thread died", "another"]))
    assert (text("state"), text("limit"), text("hint")) == ("running, failing", "Failing: a thread died.", "another")
    assert 'id="verdict" aria-labelledby="limit" data-tone="bad"' in document
    assert "data-mark" not in document


@with_browser
def test_nothing_in_the_status_is_taken_for_markup(look):
    status = worker_status(problems=[MARKUP], errors={MARKUP: 1.0}, messages={MARKUP: 1.0}, callbacks={MARKUP: 1.0})
    status["model"] = {**status["model"], "module": MARKUP, "device": MARKUP, "weights": MARKUP}
    status["settings"] = {**status["settings"], "callback_url": MARKUP, MARKUP: [MARKUP]}
    status["verdict"] = Judge().verdict(status).json()
    status["examples"] = [{"at": 1.0, "code": MARKUP, "message": MARKUP, "id": MARKUP, "message_id": MARKUP}]
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
    text, document = look(lambda: next(first), "document.getElementById('main').dataset.from === 'then'")
    assert text("state") == "no answer"
    assert text("limit").startswith("No answer since ")
    assert "it answers HTTP 500. What stands below is from then." in text("hint")
    assert 'data-from="then"' in document
    assert "answered 0 1,234" in text("messages")


@with_browser
def test_an_answer_that_cannot_be_read_is_told(look):
    text, document = look(lambda: {"not": "a status"}, ANSWERED)
    assert text("state") == "no answer"
    assert "this page cannot read what it answers" in text("hint")
    assert "data-from" not in document


@with_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone_by_day_and_by_night(browser, scheme):
    async def visit(base):
        async with browser.page(base + "/", width=360, scheme=scheme) as page:
            await page.until(ANSWERED)
            wide = await page.value("document.documentElement.scrollWidth")
            colours = await page.value(
                "['body', '.card', '.quiet', '#limit'].map(s => getComputedStyle(document.querySelector(s)))"
                ".map(s => [s.color, s.backgroundColor])"
            )
            return wide, colours

    wide, colours = served(visit, status=worker_status)
    assert wide <= 360, "nothing has to be moved sideways"
    (_, ground), (_, card), (quiet, _), (limit, _) = colours
    for text in (quiet, limit):
        for back in (ground, card):
            assert contrast(text, back) >= 4.5, (text, back)  # WCAG 2, level AA
    assert (luminance(ground) < 0.1) == (scheme == "dark")


@with_browser
def test_it_can_be_used_by_keyboard(browser):
    async def visit(base):
        async with browser.page(base + "/") as page:
            await page.until(ANSWERED)
            reached = []
            for _ in range(5):
                for kind in ("keyDown", "keyUp"):
                    await page.call("Input.dispatchKeyEvent", type=kind, key="Tab", windowsVirtualKeyCode=9)
                reached.append(await page.value("document.activeElement.textContent.trim()"))
                if reached[-1] == "Settings in force":
                    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
                    await page.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **enter)
                    await page.call("Input.dispatchKeyEvent", type="keyUp", **enter)
                    await page.until("document.querySelector('details').open")
            return reached

    reached = served(visit)
    assert reached == ["Settings in force", "status.json", "metrics", "livez", "readyz"]


def luminance(colour):
    """Of ``rgb(r, g, b)``, as WCAG defines it."""
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [each / 12.92 if each <= 0.03928 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


# With a worker at work


@with_browser
def test_the_page_of_a_worker_under_load_and_under_a_fault(browser, fast_world):
    # given a worker whose module is slow, and more messages than it can do at once
    here = fast_world
    worker = here.worker("--batch-size", "2", module=SLOW).ready()
    picture = here.request(1)
    here.send(*({**picture, "id": f"req-{n}"} for n in range(600)))

    async def visit():
        async with browser.page(worker.url()) as page:
            # then the page says what holds it back and what to change
            await page.until("document.getElementById('limit').textContent.startsWith('process holds it back')", 60)
            assert "batch_size" in await page.text("#hint")
            # and when its callbacks' receiver fails, it says that too
            here.receiver.respond = lambda received: 400
            await page.until("document.getElementById('notes').textContent.includes('not accepted')", 60)
            # and when a picture is missing, which one
            here.receiver.respond = accept
            here.send({**here.request(1), "id": "gone", "image_url": here.images.url + "/gone"})
            await page.until("document.getElementById('examples').textContent.includes('gone')", 60)
            assert "image_not_found" in await page.text("#examples")
            # and when it is killed, that it does not answer
            await asyncio.to_thread(worker.kill)
            await page.until("document.getElementById('state').textContent === 'no answer'", 30)
            return page.complaints

    complaints = asyncio.run(visit())
    assert [each for each in complaints if "Security" in each or "Error:" in each] == []
