"""The plan in the terminal, as a page, and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cvworker.plan.fleet import Fleet, Wish
from cvworker.plan.recommend import Settings, recommend, remarks, scaling_in_words
from cvworker.plan.traffic import DAY_S
from cvworker.report import Line, Page, line_chart, pictures_missing

COLUMNS = (
    *("machine", "tasks", "machines", "pace/s", "load", "p50 s", "p95 s", "p99 s", "a month", "$/million"),
    *("kept", "limit"),
)
APART = 0.25
"""Simulations that differ by more, relative to single events, are told to."""
SHOWN = 96
"""Points of the day's picture: every quarter of an hour."""
WIDE = 10.0
"""Latencies that lie further apart, as a ratio, are drawn on a logarithmic scale."""


def best_of(fleets: Sequence[Fleet]) -> Fleet:
    """The cheapest that keeps the target; where none does, the one with the lowest 95th percentile."""
    keeping = [fleet for fleet in fleets if fleet.keeps]
    if not keeping:
        return min(fleets, key=lambda fleet: fleet.percentile(0.95))
    return min(keeping, key=lambda fleet: (fleet.month is None, fleet.month or 0.0, fleet.machines))


def row(fleet: Fleet, wish: Wish) -> list[str]:
    """What the tables show of a fleet."""
    million = None if fleet.month is None else fleet.month / (wish.traffic.a_day * 365 / 12) * 1e6
    return [
        fleet.machine.name + (" *" if "scaled" in fleet.machine.note else ""),
        scaling_in_words(fleet.scaling),
        f"{fleet.machines:.1f}",
        _rate(fleet.pace),
        f"{fleet.load:.0%}",
        *(_seconds(fleet.percentile(share)) for share in (0.5, 0.95, 0.99)),
        "–" if fleet.month is None else f"${fleet.month:,.0f}",
        "–" if million is None else f"${million:,.2f}",
        "yes" if fleet.keeps else "NO",
        fleet.limit,
    ]


def print_plan(fleets: Sequence[Fleet], wish: Wish, prices: str, console: Console) -> None:
    """Everything, in the terminal."""
    best = best_of(fleets)
    console.print(headline(wish), markup=False, soft_wrap=True)
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:-1]:
        column.justify, column.no_wrap = "right", True
    for fleet in sorted(fleets, key=_by_price):
        table.add_row(*map(Text, row(fleet, wish)), style="bold" if fleet is best else "")
    console.print(table)
    for line in notes(fleets, prices):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    console.print(verdict(best, wish), style="bold", markup=False, soft_wrap=True)
    for line in (*remarks(best, wish), agreement_in_words(best)):
        console.print(f"- {line}", markup=False, soft_wrap=True)
    for title, text in blocks(recommend(best, wish)):
        console.print(f"\n{title}", style="bold", markup=False, soft_wrap=True)
        console.print(text, markup=False, soft_wrap=True)


def headline(wish: Wish) -> str:
    traffic = wish.traffic
    burst = f", {traffic.burst:,} at once" if traffic.burst > 1 else ""
    return (
        f"{_rate(traffic.a_day / DAY_S)} images/s over the day, {_rate(traffic.busiest)} at the busiest{burst}; "
        f"95 of 100 answered within {wish.latency_s:g} s"
    )


def notes(fleets: Sequence[Fleet], prices: str) -> list[str]:
    found = [f"prices: {prices}; month of 730 h; pace: of one task, with full batches; load: of the tasks' pace"]
    if any("scaled" in fleet.machine.note for fleet in fleets):
        found.append(
            "* not measured there: "
            + "; ".join(
                f"{fleet.machine.name} {fleet.machine.note}" for fleet in fleets if "scaled" in fleet.machine.note
            )
        )
    return found


def verdict(best: Fleet, wish: Wish) -> str:
    if not best.keeps:
        return (
            f"No fleet here keeps {wish.latency_s:g} s. The nearest, {best.machine.name}, is at "
            f"{_seconds(best.percentile(0.95))} s; a lone image takes "
            f"{best.machine.worker.lone_s(wish.traffic):.2f} s by itself: give it more time, or smaller batches."
        )
    month = "" if best.month is None else f", ${best.month:,.0f} a month"
    kind = "always" if best.scaling.fixed else "by the backlog"
    return (
        f"Take {best.machine.name}: {_tasks(best)} {kind}{month}. One task does "
        f"{_rate(best.pace)} images/s, and what limits it is: {best.limit}."
    )


def agreement_in_words(fleet: Fleet) -> str:
    """How well single events and the aggregate agree."""
    both = fleet.agreement
    whole = both.seconds >= DAY_S
    stretch = "the whole day" if whole else f"{_length(both.seconds)} around the busiest time"
    part = "" if both.share >= 1 else f" of {both.share:.2%} of the fleet"
    events, flow = (both.events.percentile(0.95), both.flow.percentile(0.95))
    if abs(flow - events) > APART * events:
        part += " (they differ: where a fleet swings, minutes of chance decide; keep more tasks)"
    by = "single messages" if fleet.whole_day else "the aggregate over the day"
    differences = ", ".join(
        f"{name} {single:.3g} and {aggregated:.3g} ({_difference(single, aggregated)})"
        for name, single, aggregated in both.rows()
    )
    return (
        f"Two simulations of {stretch}{part}, {len(both.events.arrived):,} messages one by one and aggregated: "
        f"{differences}. The table is by {by}."
    )


def blocks(settings: Settings) -> list[tuple[str, str]]:
    """Titles, and lines to paste."""
    return [
        ("deploy/cloudformation/queue.yaml (--parameter-overrides)", settings.queue_parameters()),
        ("deploy/cloudformation/service.yaml (--parameter-overrides)", settings.service_parameters()),
        ("deploy/kubernetes/base/scaledobject.yaml", settings.keda()),
        ("the worker's environment", settings.environment()),
    ]


def page(fleets: Sequence[Fleet], wish: Wish, prices: str) -> Page:
    """The same as HTML, with pictures."""
    best = best_of(fleets)
    made = Page("Fleet plan", headline(wish))
    made.text(verdict(best, wish))
    ordered = sorted(fleets, key=_by_price)
    made.table(COLUMNS, [row(fleet, wish) for fleet in ordered], marked=[ordered.index(best)])
    for line in notes(fleets, prices):
        made.text(line)
    if why := pictures_missing():
        made.text(why)
    made.heading("Latency over price")
    made.picture(
        latency_over_price(ordered, wish, "p95"), "Fixed fleets over the whole day; beside each point, its tasks."
    )
    made.picture(latency_over_price(ordered, wish, "p50"))
    made.heading("The day")
    made.picture(day(best, wish), f"{best.machine.name}, aggregated in steps of 10 s.")
    made.heading("To paste")
    for title, text in blocks(recommend(best, wish)):
        made.text(title)
        made.code(text)
    made.heading("What to know")
    for line in remarks(best, wish):
        made.text(line)
    made.heading("How well the two simulations agree")
    made.text(agreement_in_words(best))
    made.table(
        [
            "machine",
            "of what",
            *(f"{name}, {how}" for name, _, _ in best.agreement.rows() for how in ("events", "flow")),
        ],
        [
            [
                fleet.machine.name,
                _length(fleet.agreement.seconds),
                *(f"{value:.3g}" for _, one, other in fleet.agreement.rows() for value in (one, other)),
            ]
            for fleet in ordered
        ],
    )
    made.heading("What limits a task")
    bounds = {name: None for fleet in ordered for name in fleet.machine.worker.bounds(wish.traffic)}
    made.table(
        ["images/s", *(fleet.machine.name for fleet in ordered)],
        [[name, *(_bound(fleet, name, wish) for fleet in ordered)] for name in bounds],
    )
    return made


def latency_over_price(fleets: Sequence[Fleet], wish: Wish, which: str) -> str:
    """The T4-and-A10G picture: what a lower latency costs, by machine type."""
    lines = []
    for fleet in fleets:
        points = [point for point in fleet.curve if point.month is not None]
        lines.append(
            Line(
                fleet.machine.name,
                [point.month or 0.0 for point in points],
                [point.p95_s if which == "p95" else point.p50_s for point in points],
                dashed="scaled" in fleet.machine.note,
                names=[str(point.tasks) for point in points],
            )
        )
    lines = [line for line in lines if line.xs]
    if not lines:
        return ""
    seconds = [y for line in lines for y in line.ys if y]
    return line_chart(
        f"{which} over price",
        lines,
        x_label="dollars a month",
        y_label=f"{which} [s]",
        y_scale="log10" if max(seconds) > WIDE * min(seconds) else "linear",
        limit=("target", wish.latency_s) if which == "p95" else None,
    )


def day(fleet: Fleet, wish: Wish) -> str:
    """Arrivals and what the active tasks could do, over the day."""
    flow, every = fleet.flow, max(1, len(fleet.flow.at_s) // SHOWN)
    hours = [at / 3600 for at in flow.at_s[::every].tolist()]
    step = flow.seconds / len(flow.at_s)
    return line_chart(
        "Arrivals and capacity",
        [
            Line("images/s that arrive", hours, [value / step for value in flow.arrivals[::every].tolist()]),
            Line("images/s that the tasks can do", hours, [n * fleet.pace for n in flow.active[::every].tolist()]),
        ],
        x_label="hour of the day",
        y_label="images/s",
    )


def as_json(fleets: Sequence[Fleet], wish: Wish, prices: str) -> dict[str, Any]:
    """The plan for programs."""
    best = best_of(fleets)
    return {
        "format": "cvworker plan",
        "version": 1,
        "prices": prices,
        "latency_s": wish.latency_s,
        "images_a_day": wish.traffic.a_day,
        "busiest_images_s": wish.traffic.busiest,
        "best": best.machine.name,
        "seed": wish.seed,
        "fleets": [
            {
                "machine": fleet.machine.name,
                "note": fleet.machine.note,
                "keeps": fleet.keeps,
                "tasks": [fleet.scaling.least, fleet.scaling.most],
                "machines": fleet.machines,
                "pace_images_s": fleet.pace,
                "limit": fleet.limit,
                "load": fleet.load,
                **{f"p{round(share * 100)}_s": _finite(fleet.percentile(share)) for share in (0.5, 0.95, 0.99)},
                "dollars_a_month": fleet.month,
                "settings": dict(_fields(recommend(fleet, wish))),
                "agreement": {name: [_finite(one), _finite(two)] for name, one, two in fleet.agreement.rows()},
                "curve": [[point.tasks, point.month, point.p50_s, point.p95_s] for point in fleet.curve],
            }
            for fleet in fleets
        ],
    }


def write(folder: Path, fleets: Sequence[Fleet], wish: Wish, prices: str) -> None:
    """``plan.html``, ``plan.json`` and ``plan.csv``, each whole or not at all."""
    page(fleets, wish, prices).write(folder / "plan.html")
    text = json.dumps(as_json(fleets, wish, prices), indent=1, allow_nan=False) + "\n"
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([COLUMNS, *(row(fleet, wish) for fleet in sorted(fleets, key=_by_price))])
    for name, content in (("plan.json", text), ("plan.csv", table.getvalue())):
        part = folder / f".{name}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(folder / name)


def _tasks(fleet: Fleet) -> str:
    number = scaling_in_words(fleet.scaling)
    return f"{number} task" if number == "1" else f"{number} tasks"


def _by_price(fleet: Fleet) -> tuple[bool, float]:
    return not fleet.keeps, fleet.month if fleet.month is not None else fleet.machines


def _bound(fleet: Fleet, name: str, wish: Wish) -> str | None:
    found = fleet.machine.worker.bounds(wish.traffic).get(name)
    return None if found is None else f"{found:,.0f}"


def _fields(settings: Settings) -> list[tuple[str, Any]]:
    return [(name, getattr(settings, name)) for name in settings.__slots__]


def _rate(value: float) -> str:
    return f"{value:.2g}" if value < 1 else f"{value:,.1f}"


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "never"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _length(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"


def _difference(one: float, other: float) -> str:
    if not (math.isfinite(one) and math.isfinite(other)) or not one:
        return "–"
    return f"{other / one - 1:+.1%}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
