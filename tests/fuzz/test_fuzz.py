"""Inputs that nobody thought of, for the three places where a stranger's bytes are read.

``make test`` spends a small budget, ``make fuzz`` (the profile ``fuzz``) a large one. An input that fails is written
to ``cases/PLACE/found``, in its smallest form. Give it a name that says what it was and leave it there: every file in
``cases/`` is tried first from then on.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
import yarl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile_images
from cvworker import images
from cvworker.answer import WorkerInfo, answer_body
from cvworker.errors import ImageInvalid, ImageTooLarge, ImageUnsupported, InvalidMessage, UrlNotAllowed
from cvworker.messages import is_s3_url, parse, split_s3_url
from cvworker.net import AddressGuard, Url, display_url
from hostile_urls import REFUSED_V4, REFUSED_V6

CASES = Path(__file__).parent / "cases"
LARGE = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
BUDGET = settings(
    max_examples=20_000 if LARGE else 100,
    derandomize=not LARGE,  # `make test` tries the same inputs each time, so that it does not fail by chance
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
DEFAULT = "https://client.example/default"
MAX_PIXELS = 200_000
GUARD = AddressGuard()


def keeping(place: str, check: Callable[[Any], None], data: str | bytes) -> None:
    """Run ``check``; an input that fails it is kept. Hypothesis tries the smallest last, so that one stays."""
    try:
        check(data)
    except BaseException:
        raw = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
        (CASES / place / "found").write_bytes(raw)
        raise


def kept(place: str) -> list[Path]:
    return sorted(path for path in (CASES / place).iterdir() if path.name != ".gitkeep")


def text_of(case: Path) -> str:
    return case.read_bytes().decode("utf-8", "surrogatepass")


# --- messages

NAMES = st.sampled_from(
    [
        *("image_url", "callback_url", "id", "task", "metadata"),
        *("Records", "s3", "bucket", "object", "key", "name"),
        *("Type", "Message", "TopicArn", "Event", "detail", "detail-type", "source", "eventSource", "eventName"),
    ]
)
VALUES = st.sampled_from(
    [
        *(
            "s3:TestEvent",
            "Notification",
            "aws:s3",
            "aws.s3",
            "Object Created",
            "ObjectCreated:Put",
            "threat",
            "models",
        ),
        *("https://images.example/a.jpg", "s3://models/a b", "http://127.0.0.1/", "http://a@b/", "%ZZ", "a+b%20c"),
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | VALUES
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=6),
    max_leaves=20,
)


def wrapped(depth: int, content: Any) -> Any:
    for _ in range(depth):
        content = {"Type": "Notification", "TopicArn": "arn:aws:sns:a", "Message": json.dumps(content)}
    return content


BODIES = (
    st.builds(wrapped, st.integers(0, 3), JSON).map(json.dumps)
    | st.builds(
        lambda text, at, more: text[: at % (len(text) + 1)] + more + text[at % (len(text) + 1) :],
        JSON.map(json.dumps),
        st.integers(0, 10_000),
        st.text(max_size=4) | st.sampled_from(['"', "{", "]", "\\ud800", "1e999", "[" * 2000, "NaN", "\0"]),
    )
    | st.text()
)


def check_message(body: str) -> None:
    requests = parse(
        body,
        message_id="m-1",
        task="threat",
        default_callback=DEFAULT,
        check_url=GUARD.check_url,
        allowed_buckets={"models"},
    )
    if not requests:
        assert "s3:TestEvent" in json.dumps(json.loads(body)), "only this may be deleted without an answer"
    assert len({request.key for request in requests}) == len(requests)
    for request in requests:
        assert request.callback_url == DEFAULT or GUARD.check_url(request.callback_url or "")
        if request.error is None:
            url = request.image_url or ""
            assert split_s3_url(url)[0] == "models" if is_s3_url(url) else GUARD.check_url(url)
        else:
            assert "\n" not in request.error.message
        error = request.error or InvalidMessage("any")
        answer = answer_body(
            request,
            result=None,
            error=error,
            attempt=1,
            timings_ms={"queue": 0.0, "total": 0.0},
            worker=WorkerInfo("0", "threat", None),
        )
        assert json.loads(answer)["status"] == "error"


@BUDGET
@given(BODIES)
def test_whatever_a_message_holds_it_becomes_requests_that_can_be_answered(body: str) -> None:
    keeping("messages", check_message, body)


@pytest.mark.parametrize("case", kept("messages"), ids=lambda case: case.name)
def test_messages_that_once_failed_do_no_more(case: Path) -> None:
    check_message(text_of(case))


# --- URLs

PIECES = st.sampled_from(
    [
        *("http", "https", "HTTP", "://", ":", "/", "//", "\\", "@", "?", "#", "[", "]", "%", "%25", "%2f", "%00", "."),
        *(
            "..",
            "80",
            "0",
            "localhost",
            "example.com",
            "xn--",
            "xn--a",
            "é",
            "℀",
            "。",
            "①②⑦",
            "\u200b",
            "\ud800",
            "\n",
        ),
        *REFUSED_V4,
        *REFUSED_V6,
        "0x7f.1",
        "2130706433",
        "0177.1",
        "::ffff:127.0.0.1",
        "[::1]",
        "8.8.8.8",
        "\t",
        " ",
    ]
)
URLS = (st.text() | st.lists(PIECES | st.text(max_size=3), max_size=10).map("".join)).flatmap(
    lambda text: st.sampled_from([text, f"http://{text}", f"https://{text}/a.jpg", f"http://example.com{text}"])
)


def check_url(text: str) -> None:
    assert "\n" not in display_url(text)
    refused = ""
    try:
        url: Url | None = GUARD.check_url(text)
    except UrlNotAllowed as error:
        refused = str(error)
        url = None
    if url is None:
        assert "\n" not in refused
        return
    assert GUARD.check_url(str(url)) == url, "what was accepted stays as it is"
    assert str(url).isascii()
    host = url.host.strip("[]")
    # What other readers of the same text take for the host is what was checked.
    assert urlsplit(str(url)).hostname == host
    assert yarl.URL(str(url)).raw_host == host
    assert yarl.URL(str(url)).raw_user is yarl.URL(str(url)).raw_password is None
    assert host != "localhost"
    try:
        GUARD.check_address(str(ipaddress.ip_address(host)))
    except ValueError:  # a name; it is resolved, and the addresses are checked then
        pass
    try:
        GUARD.check_url(urljoin(str(url), text))
    except (UrlNotAllowed, ValueError):  # as for a redirect
        pass


@BUDGET
@given(URLS)
def test_a_url_is_refused_or_means_the_same_host_to_everybody(url: str) -> None:
    keeping("urls", check_url, url)


@pytest.mark.parametrize("case", kept("urls"), ids=lambda case: case.name)
def test_urls_that_once_failed_do_no_more(case: Path) -> None:
    check_url(text_of(case))


# --- images


@cache
def seeds() -> list[bytes]:
    return [*hostile_images.sound().values(), *hostile_images.damaged().values()]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A file with some bytes changed, cut out, put in twice, or taken from another file."""
    data = bytearray(draw(st.sampled_from(seeds())))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        at = at if draw(st.booleans()) else at % 128  # headers are where the decisions are
        length = draw(st.integers(1, 16))
        match draw(st.integers(0, 5)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                data[at : at + length] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80"])) * length
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data = data[:at] if draw(st.integers(0, 3)) == 0 else data
            case 5:
                other = draw(st.sampled_from(seeds()))
                data[at : at + 4 * length] = other[at : at + 4 * length]
    return bytes(data)


def check_image(data: bytes) -> None:
    for kind in ("tensor", "pil"):
        try:
            image: Any = images.decode(data, image_type=kind, min_side=16, max_pixels=MAX_PIXELS)  # type: ignore[arg-type]
        except (ImageInvalid, ImageTooLarge, ImageUnsupported):
            continue
        if kind == "tensor":
            assert str(image.dtype) == "torch.uint8"
            assert image.shape[0] == 3
            assert 0 < image.shape[1] * image.shape[2] <= MAX_PIXELS
        else:
            assert image.mode == "RGB"
            assert 0 < image.width * image.height <= MAX_PIXELS


@BUDGET
@given(mutated() | st.binary(max_size=300))
def test_a_damaged_picture_is_refused_or_is_a_picture_within_the_limits(data: bytes) -> None:
    keeping("images", check_image, data)


@pytest.mark.parametrize("case", kept("images"), ids=lambda case: case.name)
def test_pictures_that_once_failed_do_no_more(case: Path) -> None:
    check_image(case.read_bytes())
