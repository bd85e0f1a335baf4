"""The requests that are sent, each of a nature, and what its answer must say by the contracts."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping
from typing import Any

from load.faults.module import GOOD, HANGS, RAISES, SEGFAULTS
from PIL import Image

ERRORS = {
    "missing": "image_not_found",
    "damaged": "image_invalid",
    "text": "image_unsupported",
    "no image": "invalid_message",
    "other task": "unsupported_task",
    "raises": "process_failed",
    "segfaults": "process_failed",
    "hangs": "process_failed",
}
"""Natures whose answer is an error, and its code."""
NATURES = ("good", *ERRORS, "gone", "refused", "mute")
"""``gone``'s callback answers 410, ``refused``'s always 400, and ``mute`` names no callback at all."""
UNANSWERABLE = frozenset({"refused", "mute"})
"""Those that must end in the dead-letter queue."""
POISONS = frozenset({"segfaults", "hangs"})
"""Those that cost a model process."""
BLUE = {"raises": RAISES, "segfaults": SEGFAULTS, "hangs": HANGS}


def colour(number: int, nature: str) -> tuple[int, int, int]:
    """What the picture's answer must show; 65,536 of them differ."""
    return number % 256, number // 256 % 256, BLUE.get(nature, GOOD)


@functools.lru_cache(maxsize=4096)
def picture(number: int, nature: str) -> bytes:
    """The bytes that the image host serves."""
    if nature == "text":
        return b"this is not a picture"
    file = io.BytesIO()
    Image.new("RGB", (64, 48), colour(number, nature)).save(file, "PNG")
    data = file.getvalue()
    return data[: len(data) // 2] if nature == "damaged" else data


def body(number: int, nature: str, images: str, callbacks: str) -> str:
    """The SQS message."""
    request: dict[str, Any] = {
        "id": f"req-{number}",
        "image_url": f"{images}/{number}/{nature.replace(' ', '-')}.png",
        "callback_url": f"{callbacks}/{number}/{nature.replace(' ', '-')}",
        "metadata": {"number": number},
    }
    if nature == "no image":
        del request["image_url"]
    if nature == "other task":
        request["task"] = "another"
    if nature == "mute":
        del request["callback_url"]
    return json.dumps(request)


def wrong(answer: Mapping[str, Any], number: int, nature: str, *, max_receives: int, failed_downloads: int) -> str:
    """What is wrong with an answer; empty if it is as the contracts say."""
    if answer.get("id") != f"req-{number}" or answer.get("metadata") != {"number": number}:
        return f"id or metadata of another request: {answer.get('id')}"
    code = (answer.get("error") or {}).get("code", "ok")
    if code == "download_failed" and failed_downloads and nature not in ("no image", "other task"):
        last = answer.get("attempt", 0) >= max_receives
        return "" if last else f"download_failed was answered at attempt {answer.get('attempt')} of {max_receives}"
    expected = ERRORS.get(nature, "ok")
    if code != expected:
        return f"{code} instead of {expected}: {(answer.get('error') or {}).get('message', '')}"
    mean = list(colour(number, nature))
    if code == "ok" and answer["result"] != {"mean": mean}:
        return f"the result of another picture: {answer['result']} instead of {mean}"
    return ""
