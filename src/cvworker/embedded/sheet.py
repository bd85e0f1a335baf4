"""The demo's contact sheet: every picture with its answer, on one HTML page that needs nothing else.

The page loads nothing from outside, and its content security policy would not let it; what came from pictures and
answers is escaped. Bars are SVG, as a strict policy forbids ``style`` attributes too.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

STEPS = {"download": "download", "preprocess": "preprocess", "process": "model", "waiting": "between steps"}
"""The parts of a picture's time in the worker, and their names; ``waiting`` is what the timings leave over."""
BARS_SHOWN = 5
"""Scores on one picture, the highest."""
BOXES_SHOWN = 50
"""Boxes on one picture, the first of the answer."""
BOX_COLORS = 6
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 320, 72


@dataclass(frozen=True, slots=True)
class Tile:
    """One picture: a small JPEG of it, what it is known to hold, and the callback's JSON (None if none came).

    ``right`` says whether the answer fits what is known; None where nothing is known.
    """

    name: str
    thumbnail: bytes | None
    expected: Sequence[str]
    answer: Mapping[str, Any] | None
    right: bool | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What stands above the pictures, beside all that is counted from them.

    ``seconds`` is how long they took together, for images a second. ``figures`` are further headline numbers (name
    and value) and ``notes`` sentences.
    """

    title: str
    subtitle: str = ""
    seconds: float | None = None
    figures: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


@dataclass(slots=True)
class Tally:
    """The pictures in numbers; times in milliseconds."""

    images: int = 0
    right: int = 0
    wrong: int = 0
    unanswered: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    totals: list[float] = field(default_factory=list)
    """From sent to answered, one for each picture, ascending."""
    queued: float = 0.0
    """From sent to received, summed."""
    steps: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    """The parts of the rest, summed."""

    @classmethod
    def of(cls, tiles: Iterable[Tile]) -> Tally:
        """Count ``tiles``."""
        tally = cls()
        for tile in tiles:
            reading = _Reading(tile)
            tally.images += 1
            tally.right += tile.right is True
            tally.wrong += tile.right is False
            tally.unanswered += tile.answer is None
            tally.verdicts.update(reading.verdicts)
            tally.labels.update(reading.labels)
            tally.errors.update([reading.error] if reading.error else [])
            if total := reading.times.get("total"):
                tally.totals.append(total)
                tally.queued += reading.times.get("queue", 0.0)
                for step, time in reading.steps.items():
                    tally.steps[step] += time
        tally.totals.sort()
        return tally

    def percentile(self, percent: float) -> float | None:
        """The time from sent to answered that so many percent of the pictures kept within (nearest rank)."""
        return self.totals[max(0, math.ceil(len(self.totals) * percent / 100) - 1)] if self.totals else None


class _Reading:
    """What the page makes of one answer, from whatever module; nothing in it is taken for granted."""

    def __init__(self, tile: Tile) -> None:
        answer = _mapping(tile.answer)
        result, error = _mapping(answer.get("result")), _mapping(answer.get("error"))
        failed = tile.answer is not None and answer.get("status") != "ok"
        self.error = str(error.get("code") or "unknown") if failed else ""
        self.error_message = str(error.get("message") or "")
        self.verdicts = {value for value in [result.get("verdict")] if isinstance(value, str)}
        found: list[Any] = next((value for value in result.values() if _is_labelled(value)), [])
        top = result.get("label")  # of a module that gives one label, and the next likely ones beside it
        self.labels = {top} if isinstance(top, str) else {str(entry["label"]) for entry in found}
        self.badges = self.verdicts or ({top} if isinstance(top, str) else set())
        self.boxes = [(str(entry["label"]), box) for entry in found if (box := _box(entry.get("box")))][:BOXES_SHOWN]
        self.size = _number(result.get("width")), _number(result.get("height"))
        self.scores = _numbers(result.get("scores"))
        for entry in sorted(found, key=lambda entry: -_number(entry.get("score"))):  # the best of each label
            self.scores.setdefault(str(entry["label"]), _number(entry.get("score")))
        self.times = _numbers(answer.get("timings_ms"))
        self.steps = {step: self.times.get(step, 0.0) for step in STEPS}
        in_worker = self.times.get("total", 0.0) - self.times.get("queue", 0.0)
        self.steps["waiting"] = max(0.0, in_worker - sum(self.steps.values()))


def thumbnail(image: bytes) -> bytes | None:
    """A JPEG of the picture, upright and at most 320 pixels a side; None where the bytes are no picture."""
    from PIL import Image, ImageOps

    small = io.BytesIO()
    try:
        with Image.open(io.BytesIO(image)) as opened:
            opened.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            upright = ImageOps.exif_transpose(opened).convert("RGB")
        upright.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        upright.save(small, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    except Exception:  # decoders raise anything, and the demo has damaged pictures on purpose
        return None
    return small.getvalue()


def write_sheet(path: Path, summary: Summary, tiles: Sequence[Tile]) -> Path:
    """Write the page to ``path`` and return it; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(summary, tiles), encoding="utf-8", errors="replace", newline="\n")
    return path


def render(summary: Summary, tiles: Sequence[Tile]) -> str:
    """The page as HTML."""
    page = resources.files("cvworker.embedded").joinpath("sheet.html").read_text(encoding="utf-8")
    tally = Tally.of(tiles)
    read = [(tile, _Reading(tile)) for tile in tiles]
    filters = {name: [holds(*pair) for pair in read] for name, holds in _filters(tally)}
    tags = [" ".join(str(n) for n, shown in enumerate(filters.values()) if shown[i]) for i in range(len(read))]
    return Template(page).substitute(
        style_hash=_hash(page, "style"),
        script_hash=_hash(page, "script"),
        title=escape(summary.title),
        subtitle=escape(summary.subtitle),
        figures="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _figures(summary, tally)
        ),
        notes="".join(f"<p>{escape(note)}</p>" for note in summary.notes),
        panels=_time_panel(tally) + _count_panel("Labels found", tally.labels) + _count_panel("Errors", tally.errors),
        filters="".join(
            f'<button type="button" data-filter="{n}" aria-pressed="{"false" if n else "true"}">{escape(name)}'
            f" <span>{sum(shown):,}</span></button>"
            for n, (name, shown) in enumerate(filters.items())
        ),
        tiles="".join(_tile(tile, reading, tag) for (tile, reading), tag in zip(read, tags, strict=True)),
    )


def _figures(summary: Summary, tally: Tally) -> Iterator[tuple[str, str]]:
    yield "pictures", f"{tally.images:,}"
    if known := tally.right + tally.wrong:
        yield "right", f"{tally.right:,} of {known:,}"
    for verdict, count in sorted(tally.verdicts.items()):
        yield verdict, f"{count:,}"
    yield "errors", f"{tally.errors.total():,}"
    if tally.unanswered:
        yield "without an answer", f"{tally.unanswered:,}"
    if summary.seconds:
        yield "images/s", f"{tally.images / summary.seconds:,.1f}"
    for percent in (50, 95):
        if (time := tally.percentile(percent)) is not None:
            yield f"p{percent} sent to answered", _time(time)
    yield from summary.figures


def _filters(tally: Tally) -> Iterator[tuple[str, Callable[[Tile, _Reading], bool]]]:
    """What can be picked from the pictures, by the name of its button."""
    yield "all", lambda tile, reading: True
    yield "wrong", lambda tile, reading: tile.right is False
    yield "errors", lambda tile, reading: bool(reading.error)
    if tally.unanswered:
        yield "no answer", lambda tile, reading: tile.answer is None
    for verdict in sorted(tally.verdicts):
        yield verdict, lambda tile, reading, verdict=verdict: verdict in reading.verdicts  # type: ignore[misc]
    for label in sorted(tally.labels):
        yield label, lambda tile, reading, label=label: label in reading.labels  # type: ignore[misc]


def _time_panel(tally: Tally) -> str:
    if not (pictures := len(tally.totals)):
        return ""
    whole = sum(tally.steps.values()) or 1.0
    legend = "".join(
        f'<li><i class="{step}"></i>{name} <b>{_time(tally.steps[step] / pictures)}</b>'
        f" <span>{tally.steps[step] / whole:.0%}</span></li>"
        for step, name in STEPS.items()
    )
    return (
        f"<section><h2>Where the time went</h2>{_stack(tally.steps)}<ul class=legend>{legend}</ul>"
        f"<p>A picture's mean time in the worker, after {_time(tally.queued / pictures)} in the queue.</p></section>"
    )


def _count_panel(title: str, counts: Counter[str]) -> str:
    rows = "".join(
        _bar(name, count / counts.most_common(1)[0][1], f"{count:,}", "") for name, count in counts.most_common()
    )
    return f"<section><h2>{title}</h2><ul class=bars>{rows}</ul></section>" if rows else ""


def _tile(tile: Tile, reading: _Reading, tags: str) -> str:
    mark = {True: "<b class=right>✓ right</b>", False: "<b class=wrong>✗ wrong</b>", None: ""}[tile.right]
    badges = [("error", reading.error)] if reading.error else [(text, text) for text in reading.badges]
    if tile.answer is None:
        badges = [("error", "no answer")]
    picture = "<span class=blank>no picture</span>"
    if tile.thumbnail is not None:
        data = base64.b64encode(tile.thumbnail).decode()
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="{escape(tile.name)}" loading=lazy decoding=async>'
        picture += _overlay(reading)
    highest = sorted(reading.scores.items(), key=lambda score: -score[1])[:BARS_SHOWN]
    bars = "".join(_bar(label, s, f"{s:.2f}", "found" if label in reading.labels else "") for label, s in highest)
    total = _time(reading.times["total"]) if "total" in reading.times else ""
    known = "" if tile.right is None else f"<p>known content: {escape(', '.join(tile.expected) or 'none')}</p>"
    raw = escape(json.dumps(tile.answer, indent=2, ensure_ascii=False, default=str))
    unread = " open" if tile.answer is not None and not (badges or bars) else ""  # a module this page knows nothing of
    return (
        f'<article data-tags="{tags}"><figure>{picture}<figcaption>'
        + "".join(f'<b class="badge {"".join(filter(str.isalnum, kind))}">{escape(text)}</b>' for kind, text in badges)
        + f"{mark}</figcaption></figure><h3>{escape(tile.name)}<small>{total}</small></h3>{_stack(reading.steps)}"
        + (f"<p class=message>{escape(reading.error_message)}</p>" if reading.error else "")
        + f"<ul class=bars>{bars}</ul>{known}<details{unread}><summary>answer</summary><pre>{raw}</pre></details>"
        + "</article>"
    )


def _overlay(reading: _Reading) -> str:
    """Boxes over the picture, in its own pixels: drawn as it is, they fit it at any size."""
    width, height = reading.size
    if not reading.boxes or width <= 0 or height <= 0:
        return ""
    letters, drawn = max(width, height) / 20, ""
    for label, (left, top, right, bottom) in reading.boxes:
        drawn += (
            f'<g class="c{zlib.crc32(label.encode()) % BOX_COLORS}">'
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"/>'
            f'<text x="{left + letters / 4:.1f}" y="{bottom - letters / 3:.1f}">{escape(label)}</text></g>'
        )
    shape = f'viewBox="0 0 {width:.0f} {height:.0f}" font-size="{letters:.1f}"'
    return f"<svg class=boxes {shape} aria-hidden=true>{drawn}</svg>"


def _stack(steps: Mapping[str, float]) -> str:
    whole, left, parts = sum(steps.values()), 0.0, ""
    for step, time in steps.items():
        share = 100 * time / whole if whole else 0.0
        parts += f'<rect class="{step}" x="{left:.2f}%" width="{share:.2f}%" height="100%"/>'
        left += share
    return f"<svg class=stack aria-hidden=true>{parts}</svg>" if whole else ""


def _bar(name: str, share: float, value: str, kind: str) -> str:
    width = 100 * min(1.0, max(0.0, share))
    return (
        f'<li class="{kind}"><span>{escape(name)}</span><svg aria-hidden=true><rect width="100%" height="100%" rx="3"/>'
        f'<rect class=fill width="{width:.1f}%" height="100%" rx="3"/></svg><b>{value}</b></li>'
    )


def _time(ms: float) -> str:
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"


def _hash(page: str, element: str) -> str:
    """The policy's expression for the one inline ``element`` of the page."""
    [content] = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: object) -> float:
    try:
        number = float(value) if isinstance(value, int | float) else 0.0
    except OverflowError:  # JSON's integers have no limit
        return 0.0
    return number if math.isfinite(number) else 0.0


def _numbers(value: object) -> dict[str, float]:
    return {str(name): _number(number) for name, number in _mapping(value).items() if isinstance(number, int | float)}


def _box(value: object) -> list[float] | None:
    """Left, top, right and bottom, where these are four numbers in order."""
    if not (isinstance(value, list) and len(value) == 4 and all(isinstance(part, int | float) for part in value)):
        return None
    box = [_number(part) for part in value]
    return box if box[0] <= box[2] and box[1] <= box[3] else None


def _is_labelled(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(entry, Mapping) and "label" in entry for entry in value)
