"""Tables and pictures from raw data: the same bytes for the same data, whenever and wherever they are made."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from load.scenarios.raw import Raw
from load.scenarios.rows import BEHIND_S, BEHIND_SHARE, SPLIT, Row, Slope, knee, outstanding, row, slopes
from rich import box
from rich.console import Console
from rich.table import Table

from cvworker.report import Bar, Line, Page, bar_chart, line_chart, pictures_missing

SURE, LONG_S = 3.0, 400.0
"""Standard deviations by which growth has to be more than none, and seconds below which nothing is said of it: pools
and caches take minutes to find their size."""
BUCKETS = 60
"""Points of a curve over time, at most."""
TITLES = {
    "offline": "Offline: a full queue, drained",
    "online": "Online: latency over the offered rate",
    "burst": "Burst: idle, then ten times the mean",
    "soak": "Soak: a steady load for a long time",
    "offer": "Traffic of one's own",
}
Column = tuple[str, Callable[[Row], str]]


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else "all" if value == float("inf") else f"{value:,.{digits}f}"


def _split(name: str) -> Column:
    return name, lambda each: _number(each.split_ms[name], 1)


def _latency(name: str) -> Column:
    return f"{name} ms", lambda each: _number(each.latency_ms[name])


LATENCIES: list[Column] = [
    ("offered/s", lambda each: _number(each.offered, 1)),
    ("achieved/s", lambda each: _number(each.achieved, 1)),
    *(_latency(name) for name in ("p50", "p90", "p95", "p99", "avg", "max")),
    ("requests", lambda each: _number(each.requests)),
    ("errors", lambda each: _number(each.errors)),
    ("repeats", lambda each: _number(each.repeats)),
    ("lost", lambda each: _number(each.lost)),
    ("valid", lambda each: "yes" if each.valid else f"NO: {each.late:.1%} late"),
]
PARTS: list[Column] = [
    *(_split(name) for name in SPLIT),
    ("batch", lambda each: _number(each.batch, 1)),
    ("CPU cores", lambda each: _number(each.cpu, 2)),
    ("beside", lambda each: _number(each.cpu_beside, 2)),
    ("GPU %", lambda each: _number(None if each.gpu is None else 100 * each.gpu)),
    ("GPU MB", lambda each: _number(each.gpu_memory_mb)),
    ("memory MB", lambda each: _number(each.memory_mb)),
]
TOLD = (
    "Latency is from the intended time of sending to the callback's arrival. Where the time goes are means in ms: what "
    "the answers tell, and the waits between the steps by how many messages waited there. 'send' is the way into the "
    "queue and the callback's way; 'callback' is its whole request, which the latency holds only the way there of. "
    "'beside' is the CPU that queue, image host, receiver and generator took, in cores."
)


def show(raws: Sequence[Raw], console: Console) -> None:
    """The tables, in a terminal."""
    for raw in raws:
        rows = [row(each) for each in raw["rows"]]
        console.print(f"\n{TITLES[raw['scenario']]}", style="bold")
        for line in setting(raw):
            console.print(line, style="dim", markup=False, soft_wrap=True)
        for columns in (LATENCIES, PARTS):
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
            table.add_column(raw["scenario"])
            for name, _ in columns:
                table.add_column(name, justify="right")
            for each in rows:
                style = "bold" if each is _marked(raw, rows) else "" if each.valid else "red"
                table.add_row(each.name, *(cell(each) for _, cell in columns), style=style)
            console.print(table)
        for line in findings(raw, rows):
            console.print(line, markup=False, soft_wrap=True)


def setting(raw: Raw) -> list[str]:
    """What was measured, with what, where: above each table."""
    model, machine, ceiling = raw["model"], raw["machine"], raw["ceiling"]
    queue = "not measured" if ceiling["queue"] is None else f"{ceiling['queue']:,.0f} messages/s"
    where = f"{machine['type']}, " if machine["type"] else ""
    device = "" if machine["device_name"] == machine["cpu"] else f" on {machine['device_name']}"
    how = "workers elsewhere"
    if raw["workers"]:
        how = (
            f"{raw['workers']} {'worker' if raw['workers'] == 1 else 'workers'} of module {raw['module']}{device}, "
            f"{model['precision']}, batches of {model['batch_size']} at most, "
            f"{model['preprocess_workers']} preprocess workers"
        )
    return [
        f"{how}; {where}{machine['cores']} cores of {machine['cpu']}; {raw['pictures']}",
        f"{raw['made']}, cvworker {raw['versions']['cvworker']}, commit {raw['commit']}, seed {raw['seed']}: "
        f"{raw['command']}",
        f"ceilings by themselves: queue ({raw['queue']}) {queue}, image host and receiver {ceiling['host']:,.0f} "
        f"images/s; {raw['world']}",
    ]


def findings(raw: Raw, rows: Sequence[Row]) -> list[str]:
    """What the numbers come to, a line each."""
    found: list[str] = list(raw["notes"])
    if raw["scenario"] == "offline" and rows:
        found.append(f"Highest throughput: {rows[0].achieved:.1f} images/s.")
    if raw["scenario"] == "online" and (best := knee(list(rows))):
        found.append(
            f"The knee is at {best.name}: {best.achieved:.1f} images/s with p95 {best.latency_ms['p95']:,.0f} ms. "
            "Beyond it more load buys latency rather than answers."
        )
    if raw["scenario"] == "burst":
        for each, kept in zip(rows, raw["rows"], strict=True):
            _, waiting = outstanding(kept)
            found.append(
                f"{each.name}: {max(waiting):,.0f} waiting at most; the slowest answer took "
                f"{each.latency_ms['max'] / 1000:.1f} s."
            )
    if raw["scenario"] == "soak":
        found += [_growth(each) for kept in raw["rows"] for each in slopes(kept)]
    invalid = [each.name for each in rows if not each.valid]
    if invalid:
        found.append(
            f"INVALID: {', '.join(invalid)}: more than {BEHIND_SHARE:.0%} of the requests were sent more than "
            f"{BEHIND_S * 1000:.0f} ms later than intended; the generator needs a machine of its own, or less to do."
        )
    return found


def _growth(slope: Slope) -> str:
    unit = " MB" if slope.name == "memory" else ""
    grows = slope.an_hour > SURE * slope.error and slope.last > slope.first
    verdict = "it grows" if grows else "no growth that can be told from its swing"
    if slope.seconds < LONG_S:
        return f"{slope.name}: {slope.first:,.0f} to {slope.last:,.0f}{unit}; growth is told from ten minutes on."
    an_hour = f"{round(slope.an_hour, 1) + 0.0:+,.1f} ± {slope.error:,.1f} an hour"  # and not -0.0
    return f"{slope.name}: {slope.first:,.0f} to {slope.last:,.0f}{unit}, {an_hour}: {verdict}."


def table_csv(raws: Sequence[Raw]) -> str:
    """Every row of every scenario, plain numbers."""
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    names = [f"latency_{name}_ms" for name in ("p50", "p90", "p95", "p99", "avg", "max")]
    parts = [f"{name.replace(' ', '_')}_ms" for name in SPLIT]
    rest = (
        "batch",
        "cpu_cores",
        "cpu_beside",
        "gpu",
        "gpu_memory_mb",
        "memory_mb",
        "errors",
        "repeats",
        "lost",
        "valid",
    )
    lines.writerow(["scenario", "row", "traffic", "requests", "offered_s", "achieved_s", *names, *parts, *rest])
    for raw in raws:
        for each in map(row, raw["rows"]):
            values = [each.batch, each.cpu, each.cpu_beside, each.gpu, each.gpu_memory_mb, each.memory_mb]
            numbers = [each.offered, each.achieved, *each.latency_ms.values(), *each.split_ms.values(), *values]
            lines.writerow(
                [raw["scenario"], each.name, each.traffic, each.requests]
                + ["" if value is None else f"{value:.3f}" for value in numbers]
                + [each.errors, each.repeats, each.lost, "yes" if each.valid else "no"]
            )
    return written.getvalue()


def page(raws: Sequence[Raw]) -> str:
    """The HTML page."""
    made = Page("Load test", f"module {raws[0]['module']}, cvworker {raws[0]['versions']['cvworker']}")
    made.text(TOLD)
    if missing := pictures_missing():
        made.text(missing)
    for raw in raws:
        rows = [row(each) for each in raw["rows"]]
        made.heading(TITLES[raw["scenario"]])
        for line in setting(raw):
            made.text(line)
        marked = [place for place, each in enumerate(rows) if each is _marked(raw, rows)]
        for columns in (LATENCIES, PARTS):
            cells = [[each.name, *(cell(each) for _, cell in columns)] for each in rows]
            made.table([raw["scenario"], *(name for name, _ in columns)], cells, marked=marked)
        for line in findings(raw, rows):
            made.text(line)
        for picture in _pictures(raw, rows):
            made.picture(picture)
    return made.html()


def write(raws: Sequence[Raw], folder: Path) -> Path:
    """The page and the CSV into ``folder``, each whole or not at all; the page's path."""
    name = raws[0]["scenario"] if len(raws) == 1 else "load"
    for suffix, text in (("csv", table_csv(raws)), ("html", page(raws))):
        part = folder / f".{name}.{suffix}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / f"{name}.{suffix}")
    return folder / f"{name}.html"


def _marked(raw: Raw, rows: list[Row]) -> Row | None:
    return knee(rows) if raw["scenario"] == "online" else None


def _pictures(raw: Raw, rows: Sequence[Row]) -> list[str]:
    if raw["scenario"] == "online":
        return [_curve(rows), _where(rows), _kept_up(rows)]
    drawn = []
    for kept in raw["rows"]:
        times, waiting = outstanding(kept)
        title = f"Requests without an answer, {kept['name']}"
        drawn.append(line_chart(title, [Line("waiting", times, waiting)], x_label="s", y_label="requests"))
        if raw["scenario"] != "offline":
            drawn.append(_over_time(kept))
        if raw["scenario"] == "soak" and kept["sizes"]:
            sizes = kept["sizes"]
            memory = Line("memory", sizes["at"], [each / 2**20 for each in sizes["memory_bytes"]])
            drawn.append(line_chart("Memory of all processes", [memory], x_label="s", y_label="MB"))
    return [*drawn, *([_bars(rows[0])] if rows else [])]


def _curve(rows: Sequence[Row]) -> str:
    lines = [
        Line(name, [each.offered for each in rows], [each.latency_ms[name] for each in rows])
        for name in ("p50", "p95", "p99")
    ]
    best = knee(list(rows))
    limit = (f"p95 at the knee, {best.name}", best.latency_ms["p95"]) if best else None
    return line_chart(
        "Latency over the offered rate", lines, x_label="offered/s", y_label="ms", y_scale="log10", limit=limit
    )


def _kept_up(rows: Sequence[Row]) -> str:
    offered = [each.offered for each in rows]
    lines = [
        Line("achieved", offered, [each.achieved for each in rows]),
        Line("offered", offered, offered, dashed=True),
    ]
    return line_chart("What was achieved", lines, x_label="offered/s", y_label="images/s")


def _where(rows: Sequence[Row]) -> str:
    lines = [
        Line(name, [each.offered for each in rows], [each.split_ms[name] or None for each in rows])
        for name in SPLIT
        if any(each.split_ms[name] for each in rows)
    ]
    return line_chart("Where the time goes, means", lines, x_label="offered/s", y_label="ms", y_scale="log10")


def _bars(each: Row) -> str:
    bars = [Bar(name, value, f"{value:,.1f}") for name, value in each.split_ms.items() if value is not None]
    return bar_chart(f"Where the time goes, {each.name}", bars, x_label="ms, means") if bars else ""


def _over_time(kept: Raw) -> str:
    """Percentiles by the time at which requests were meant to be sent."""
    samples = kept["samples"]
    intended = np.asarray(samples["intended"])
    here = [samples["waited"] if each is None else each for each in samples["answered"]]
    latencies = (np.asarray(here) - intended) * 1000
    edges = np.linspace(0.0, max(float(intended.max()), 1e-9), BUCKETS + 1)
    place = np.minimum(np.searchsorted(edges, intended, "right") - 1, BUCKETS - 1)
    middle = ((edges[1:] + edges[:-1]) / 2).tolist()
    lines = []
    for at in (50, 95):
        found = [latencies[place == number] for number in range(BUCKETS)]
        values = [float(np.percentile(each, at, method="inverted_cdf")) if len(each) else None for each in found]
        lines.append(Line(f"p{at}", middle, values))
    return line_chart(f"Latency over time, {kept['name']}", lines, x_label="intended, s", y_label="ms")
