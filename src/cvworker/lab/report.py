"""A profile for people: the page with its tables and pictures, and the same tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cvworker.lab.recommend import Recommendation
from cvworker.lab.results import HostPoint, Point, Profile, Series, processes, rounded
from cvworker.report import Line, Page, line_chart, pictures_missing

MIB = 2**20
COLUMNS = (
    *("timed", "precision", "format", "MP", "batch", "images/s", "p50 ms", "p90 ms", "p95 ms", "p99 ms"),
    *("to device ms", "compute ms", "to host ms", "memory MiB", "GPU", "state"),
)
HOST_COLUMNS = ("step", "on", "picture", "images/s", "ms an image", "state")
KINDS: dict[Series, str] = {"process": "process as a whole", "network": "the network alone"}
METHOD = (
    "Every batch size is run to warm up, then timed in windows until the last three agree within 10 %; once while "
    "batch sizes rise and, when all series have risen, once more while they fall. A point is unstable where windows or "
    "passes differ by more, or where the machine itself, timed at fixed work beside each pass, was more than 5 % from "
    "its usual pace. Images a second is the median over all windows, of batches run one after the other, with "
    "nothing overlapped; percentiles are over all batches. 'network' is self.model alone, on random inputs; 'process' "
    "is collate, copy, process and its results as JSON, on variations of the module's example. Memory is the peak on "
    "the GPU, or on the CPU the whole process's, libraries included."
)


def page(profile: Profile, advice: Recommendation | str) -> Page:
    """The report; ``advice`` is a recommendation, or why there is none."""
    found = Page(f"Profile of {profile.title}", _subtitle(profile))
    if missing := pictures_missing():
        found.text(missing)
    if not profile.complete:
        found.text("It was interrupted: what follows is what was measured until then.")
    found.heading("What to run with")
    if isinstance(advice, str):
        found.text(f"Nothing can be recommended: {advice}.")
    else:
        found.text(summary(advice))
        found.code("\n".join(advice.lines))
        for note in advice.notes:
            found.text(f"Note: {note}.")
    _pictures(found, profile)
    found.heading("Every point")
    chosen = None if isinstance(advice, str) else advice.point
    marked = [number for number, each in enumerate(profile.points) if each is chosen]
    found.table(COLUMNS, point_rows(profile.points), marked=marked)
    if profile.host:
        found.heading("Decode and preprocess")
        found.table(HOST_COLUMNS, host_rows(profile.host))
    found.heading("How it was measured")
    found.text(METHOD)
    for note in profile.notes:
        found.text(f"Note: {note}.")
    found.table(("what", "value"), _facts(profile))
    return found


def summary(advice: Recommendation) -> str:
    """The recommendation in one sentence."""
    point = advice.point
    assert point.latency_ms is not None
    return (
        f"Batch {point.batch} in {point.precision}, {point.format}: {point.sure_images_s:,.1f} images/s, "
        f"{point.latency_ms.p95:.1f} ms a batch (95 %). Bound by {advice.bound}: {advice.why}."
    )


def point_rows(points: Sequence[Point]) -> list[list[str | int | float | None]]:
    """Cells for :data:`COLUMNS`."""
    rows: list[list[str | int | float | None]] = []
    for point in points:
        latency = list(point.latency_ms.model_dump().values()) if point.latency_ms else [None] * 4
        split = list(point.split_ms) if point.split_ms else [None] * 3
        taken = point.memory_bytes()
        rows.append(
            [
                *(point.series, point.precision, point.format, point.megapixels, point.batch, rounded(point.images_s)),
                *(rounded(each) for each in (*latency, *split)),
                *(round(taken / MIB) if taken else None, _share(point.utilisation), _state(point)),
            ]
        )
    return rows


def host_rows(points: Sequence[HostPoint]) -> list[list[str | int | float | None]]:
    """Cells for :data:`HOST_COLUMNS`."""
    return [
        [
            "decode and preprocess" if point.step == "both" else point.step,
            processes(point.workers) if point.workers else "one core",
            f"{point.picture.format} {point.picture.width}×{point.picture.height}, {point.picture.bytes / 1000:.0f} kB",
            rounded(point.images_s),
            rounded(1000 / point.images_s) if point.images_s and not point.workers else None,
            _state(point),
        ]
        for point in points
    ]


def _pictures(found: Page, profile: Profile) -> None:
    charts: list[tuple[str, str, Callable[[Point], float | None]]] = [
        ("Throughput against batch size", "images/s", lambda point: point.images_s),
        ("Latency against batch size", "ms for a batch (median)", lambda p: p.latency_ms.p50 if p.latency_ms else None),
        ("Memory against batch size", "MiB at most", lambda point: (point.memory_bytes() or 0) / MIB),
    ]
    found.heading("Pictures")
    for kind, what in KINDS.items():
        for title, label, value in charts:
            lines = [
                Line(name.removeprefix(f"{kind} "), [point.batch for point in points], [value(p) for p in points])
                for name, each in profile.series(kind).items()
                if (points := [point for point in each if point.measured])
            ]
            if lines:
                drawn = line_chart(f"{title}: {what}", lines, x_label="batch size", y_label=label, x_scale="log2")
                found.picture(drawn)
    lines = _over_megapixels(profile)
    if lines:
        title = "Time against megapixels"
        found.picture(line_chart(title, lines, x_label="megapixels of the picture", y_label="ms for one"))
    if lines := _over_workers(profile):
        title = "Decode and preprocess against DataLoader processes"
        found.picture(line_chart(title, lines, x_label="DataLoader processes", y_label="images/s"))


def _over_megapixels(profile: Profile) -> list[Line]:
    lines = [
        Line(name, [point.megapixels or 0 for point in points], [_ms_for_one(point) for point in points])
        for name, each in profile.series(sizes=True).items()
        if (points := [point for point in each if point.measured])
    ]
    for step in ("decode", "preprocess"):
        alone = [p for p in profile.host if p.step == step and p.workers == 0 and p.images_s]
        alone.sort(key=lambda point: point.picture.megapixels)
        if len(alone) > 1:
            xs = [point.picture.megapixels for point in alone]
            lines.append(Line(f"{step}, one core", xs, [1000 / (point.images_s or 1) for point in alone]))
    return lines


def _ms_for_one(point: Point) -> float | None:
    return point.latency_ms.p50 / point.batch if point.latency_ms else None


def _over_workers(profile: Profile) -> list[Line]:
    together = [point for point in profile.host if point.workers and point.images_s]
    if len(together) < 2:
        return []
    return [Line("images/s", [point.workers for point in together], [point.images_s for point in together])]


def _subtitle(profile: Profile) -> str:
    commit = f", commit {profile.commit}" if profile.commit else ""
    return f"{profile.made}, cvworker {profile.versions.get('cvworker', '?')}{commit}"


def _facts(profile: Profile) -> list[list[str]]:
    module = {key: str(value) for key, value in profile.module.model_dump().items() if value is not None}
    machine = {key: str(value) for key, value in profile.machine.model_dump().items() if value is not None}
    settings = {f"setting {key}": str(value) for key, value in profile.settings.items()}
    return [[key, value] for each in (module, machine, profile.versions, settings) for key, value in each.items()]


def _state(point: Point | HostPoint) -> str:
    return f"{point.status}: {point.why}" if point.why else point.status


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"
