"""The picture: a bar for each worker under each load, and the machine's limit as a line, as an SVG without scripts."""

from __future__ import annotations

from html import escape

from load.compare.contenders import BASELINE, CONTENDERS
from load.compare.limit import DECODE, DECODE_MIN_SIDE, MODEL
from load.compare.report import Report, Row
from load.compare.task import LOADS

WIDTH, NAMES, NUMBERS = 860, 170, 210
"""Pixels: the whole, the column of names, and the room for numbers to the right of the longest bar."""
BAR, GAP, TITLE, MARGIN = 18, 8, 46, 16
OURS, BASE, OTHERS, LINE = "#2563eb", "#64748b", "#b6c0cd", "#dc2626"
FONT = "font-family='system-ui, sans-serif'"


def draw(report: Report) -> str:
    """The whole SVG."""
    rows = report.rows()
    parts: list[str] = []
    y = MARGIN
    for load in dict.fromkeys(row.load for row in rows):
        panel, y = _panel(load, [row for row in rows if row.load == load], _limits(report, load), y)
        parts += panel
    foot = f"{report.rounds} rounds of {report.seconds:g} s in turn, medians; × is to {BASELINE} in the same round"
    parts.append(_text(MARGIN, y + 14, foot, "#64748b", 12))
    size = f"width='{WIDTH}' height='{y + 32}' viewBox='0 0 {WIDTH} {y + 32}'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img'><title>Workers compared</title>"
    return "\n".join([head, f"<rect width='{WIDTH}' height='{y + 32}' fill='#ffffff'/>", *parts, "</svg>"]) + "\n"


def _limits(report: Report, load: str) -> dict[str, float]:
    """The limits that hold for a load, by name."""
    wanted = (MODEL,) if LOADS[load].model != "none" else (DECODE, DECODE_MIN_SIDE)
    return {limit.name: limit.images_s for limit in report.limits if limit.name in wanted}


def _panel(load: str, rows: list[Row], limits: dict[str, float], y: int) -> tuple[list[str], int]:
    """One load, from ``y`` down; the ``y`` below it."""
    room = WIDTH - NAMES - NUMBERS - 2 * MARGIN
    scale = room / max([row.images_s for row in rows] + list(limits.values()) + [1e-9])
    left = MARGIN + NAMES
    parts = [_text(MARGIN, y + 16, f"{load}: {LOADS[load].summary}", "#0f172a", 15, "font-weight='600'")]
    top = y + TITLE - 12
    y += TITLE
    for row in rows:
        colour = BASE if row.worker == BASELINE else OTHERS if CONTENDERS[row.worker].program else OURS
        width = max(1.0, row.images_s * scale)
        parts.append(_text(left - 8, y + 13, row.worker, "#0f172a", 13, "text-anchor='end'"))
        parts.append(f"<rect x='{left}' y='{y}' width='{width:.1f}' height='{BAR}' rx='2' fill='{colour}'/>")
        ratio = f" · {row.ratio:.2f}×" if row.ratio is not None else ""
        said = f"{row.images_s:.1f}/s{ratio} · {row.cpu_ms:.1f} CPU ms"
        parts.append(_text(left + width + 6, y + 13, said, "#334155", 12))
        y += BAR + GAP
    for name, value in limits.items():
        x = left + value * scale
        parts.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{top}' y2='{y}' stroke='{LINE}' stroke-dasharray='3 3'/>")
        parts.append(_text(x, y + 12, f"{name} alone {value:.0f}", LINE, 11, "text-anchor='middle'"))
        y += 14
    return parts, y + 22


def _text(x: float, y: float, text: str, colour: str, size: int, more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' fill='{colour}' font-size='{size}' {FONT} {more}>{escape(text)}</text>"
