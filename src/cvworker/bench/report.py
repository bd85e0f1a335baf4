"""A run of the ladder for people: the table for the terminal, and the page with its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cvworker.bench.results import Bench, Row
from cvworker.report import Bar, Page, bar_chart, pictures_missing

MIB = 2**20
COLUMNS = (
    *("rung", "requests/s", "× before", "× first", "CPU %", "CPU ms", "GPU %", "GPU MiB", "MiB"),
    *("errors", "repeats", "lost"),
)
METHOD = (
    "Every rung answers the same endless queue with the same steps: receive, guarded download, decode, the module's "
    "preprocess, collate and process, signed callback, delete. Queue, image host and callback receiver are one process "
    "on this machine, new for each rung. After its first answer a rung warms up, then answers are counted over a "
    "window; CPU time is that of all the worker's processes, as a share of all cores. Then the queue gives out nothing "
    "new, and every message that it gave out has to be answered once. With several rounds the rungs run in turn, and "
    "medians are shown; × is a ratio within a round."
)
CAPTION = (
    "CPU % is of all cores, CPU ms for one answer, MiB the most that all the worker's processes took together. Columns "
    "with nothing in them are left out."
)
NOTICED = 0.1
"""A share of the machine, or a difference of rounds, that is worth a sentence."""


def table(bench: Bench) -> list[list[str | None]]:
    """Cells for :data:`COLUMNS`."""
    return [
        [
            row.rung,
            _figure(row.requests_s),
            _times(row.over_before),
            _times(row.over_first),
            f"{100 * row.cpu_share:.0f}",
            None if row.cpu_ms is None else f"{row.cpu_ms:.1f}",
            None if row.gpu_share is None else f"{100 * row.gpu_share:.0f}",
            None if row.gpu_memory_bytes is None else f"{row.gpu_memory_bytes / MIB:,.0f}",
            f"{row.memory_bytes / MIB:,.0f}",
            *(str(count) for count in (row.errors, row.repeats, row.unanswered)),
        ]
        for row in bench.rows
    ]


def narrow(columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> tuple[list[str], list[list[str | None]]]:
    """A table without the columns in which nothing is, or only zeros, for terminals."""
    kept = [n for n in range(len(columns)) if any(row[n] not in (None, "0") for row in rows)]
    return [columns[n] for n in kept], [[row[n] for n in kept] for row in rows]


def summary(bench: Bench) -> str:
    """What came of it, in a sentence or two."""
    rows = bench.rows
    last, first = rows[-1], rows[0]
    found = f"{last.rung}: {_figure(last.requests_s)} requests/s"
    if last.over_first is not None:
        found += f", {last.over_first:.1f} times {first.rung}"
    steps = [row for row in rows if row.over_before is not None]
    if len(steps) > 1:
        largest = max(steps, key=lambda row: row.over_before or 0)
        found += f". The largest step: {largest.rung}, {largest.over_before:.1f} times the rung before it"
    if not bench.problems:
        found += (
            f". All {sum(sample.given for sample in bench.samples):,} messages were answered once, every answer signed"
        )
    return found + "."


def setting(bench: Bench) -> str:
    """The circumstances, in one line."""
    return (
        f"{bench.pictures}; image host {bench.host_latency_ms:g} ms, callback {bench.callback_latency_ms:g} ms; "
        f"{bench.seconds:g} s a rung, {bench.rounds} round{'s' if bench.rounds > 1 else ''}"
    )


def notes(bench: Bench) -> list[str]:
    """What a reader of the figures should know, a sentence each."""
    found = list(bench.notes)
    around = max(bench.rows, key=lambda row: row.around_cpu_share)
    if around.around_cpu_share >= NOTICED:
        found.append(
            f"queue, image host and callback receiver share the machine: {around.around_cpu_share:.0%} of its CPU time "
            f"went to them in {around.rung}, which a worker with remote ones has for itself"
        )
    uneven = [f"{row.rung} by {row.spread:.0%}" for row in bench.rows if row.spread > NOTICED]
    if uneven:
        found.append(f"rounds differ: {', '.join(uneven)}; something else ran, or the windows were short")
    failing = {sample.first_error for sample in bench.samples if sample.errors}
    if failing:
        found.append(f"some answers tell an error, such as {min(failing)}")
    return found


def page(bench: Bench) -> Page:
    """The report, without a clock or chance: the same bytes for the same run."""
    found = Page(f"The ladder: {bench.title}", f"{bench.made}, {_version(bench)}")
    if missing := pictures_missing():
        found.text(missing)
    found.text(f"{summary(bench)} {setting(bench)[:1].upper()}{setting(bench)[1:]}.")
    rows = bench.rows
    found.picture(
        bar_chart("Requests a second", [_bar(row) for row in rows], x_label="requests/s"),
        "Times the rung before it in brackets.",
    )
    columns, cells = narrow(COLUMNS, table(bench))
    found.table(columns, cells, marked=[len(rows) - 1], caption=CAPTION)
    found.picture(_shares("CPU", {row.rung: row.cpu_share for row in rows}))
    found.picture(_shares("GPU", {row.rung: row.gpu_share for row in rows if row.gpu_share is not None}))
    for problem in bench.problems:
        found.text(f"Not to be relied on: {problem}.")
    for note in notes(bench):
        found.text(f"Note: {note}.")
    found.heading("The rungs")
    for rung in bench.rungs:
        found.text(f"{rung.name}: {rung.on}. Off: {rung.off}.")
    found.heading("How it was measured")
    found.text(METHOD)
    found.table(("what", "value"), _facts(bench))
    return found


def _bar(row: Row) -> Bar:
    more = f" ({_times(row.over_before)})" if row.over_before is not None else ""
    return Bar(row.rung, row.requests_s, f"{_figure(row.requests_s)}{more}")


def _shares(what: str, shares: Mapping[str, float]) -> str:
    """A picture of how busy something was; the empty string where it is not known."""
    bars = [Bar(name, 100 * share, f"{share:.0%}") for name, share in shares.items()]
    return bar_chart(f"How busy the {what} was", bars, x_label="%") if bars else ""


def _facts(bench: Bench) -> Sequence[Sequence[str]]:
    machine = {key: str(value) for key, value in bench.machine.model_dump().items() if value is not None}
    settings = {f"setting {key}": str(value) for key, value in bench.settings.items()}
    return [[key, value] for each in (machine, bench.versions, settings) for key, value in each.items()]


def _version(bench: Bench) -> str:
    commit = f", commit {bench.commit}" if bench.commit else ""
    return f"cvworker {bench.versions.get('cvworker', '?')}{commit}"


def _figure(value: float) -> str:
    """To a tenth below a hundred: what is more is noise."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _times(value: float | None) -> str | None:
    return None if value is None else f"×{value:.2f}"
