"""Pictures for reports: SVG by matplotlib, the same bytes for the same numbers, in the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scale = Literal["linear", "log2", "log10"]

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626", "#64748b", "#a16207")
MARKERS = "os^Dv*PX<>"
"""Beside the colours, for those who do not see them."""
_INK = "#010203"
"""Drawn with this, replaced by the page's own text colour, so that one picture serves light and dark pages."""
_SIZE_INCHES = (7.2, 3.8)


@dataclass(frozen=True, slots=True)
class Line:
    """One series: ``ys`` over ``xs``; points whose y is None are left out. ``dashed`` marks what was not measured."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    dashed: bool = False
    names: Sequence[str] = ()
    """Texts beside the points, where each is a thing of its own."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its name, its length, and what stands at its end (the number itself by default)."""

    label: str
    value: float
    text: str = ""


def pictures_missing() -> str | None:
    """One line where pictures cannot be drawn here, saying what to install."""
    if find_spec("matplotlib") is None:
        return "no pictures: they need matplotlib: pip install 'cvworker[lab]'"
    return None


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_scale: Scale = "linear",
    y_scale: Scale = "linear",
    limit: tuple[str, float] | None = None,
) -> str:
    """An SVG of lines over one axis, with a legend; ``limit`` draws a named horizontal line.

    The empty string where :func:`pictures_missing`.
    """
    if pictures_missing():
        return ""
    with _drawing(title) as (figure, axes):
        for index, line in enumerate(lines):
            points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if y is not None]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                label=line.label,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                linewidth=1.6,
                linestyle="--" if line.dashed else "-",
            )
            for name, (x, y) in zip(line.names, points, strict=False):
                axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", color=_INK, fontsize=7)
        if limit is not None:
            axes.axhline(limit[1], color=_INK, linewidth=1, linestyle=":", label=limit[0])
        _scale(axes, x_scale, y_scale, [x for line in lines for x in line.xs])
        axes.set_xlabel(x_label, color=_INK)
        axes.set_ylabel(y_label, color=_INK)
        if len(lines) > 1 or limit is not None:
            axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
        return _svg(figure, title)


def bar_chart(title: str, bars: Sequence[Bar], *, x_label: str) -> str:
    """An SVG of horizontal bars, the first on top. The empty string where :func:`pictures_missing`."""
    if pictures_missing():
        return ""
    with _drawing(title, height=0.8 + 0.34 * len(bars)) as (figure, axes):
        drawn = axes.barh([bar.label for bar in bars], [bar.value for bar in bars], color=COLOURS[0], height=0.65)
        axes.bar_label(drawn, [bar.text or f"{bar.value:g}" for bar in bars], padding=4, color=_INK, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set_xlabel(x_label, color=_INK)
        axes.grid(visible=False, axis="y")
        return _svg(figure, title)


@contextmanager
def _drawing(title: str, height: float = _SIZE_INCHES[1]) -> Iterator[tuple[Figure, Axes]]:
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "cvworker", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_SIZE_INCHES[0], height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.set_title(title, color=_INK, fontsize=10, loc="left")
        axes.grid(visible=True, color=_INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(_INK)
        yield figure, axes


def _scale(axes: Axes, x_scale: Scale, y_scale: Scale, xs: Sequence[float]) -> None:
    for name, scale in (("x", x_scale), ("y", y_scale)):
        if scale != "linear":
            getattr(axes, f"set_{name}scale")("log", base=int(scale.removeprefix("log")))
    if x_scale == "log2":  # batch sizes: every one gets its tick, in plain figures
        axes.set_xticks(sorted(set(xs)), [f"{x:g}" for x in sorted(set(xs))])
    if y_scale == "linear":
        axes.set_ylim(bottom=0)


def _svg(figure: Figure, title: str) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"font: ([0-9.]+px) '[^;\"]*", r"font: \1 sans-serif", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)
