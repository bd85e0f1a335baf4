"""Two profiles side by side: two machines, two versions, or the same again."""

from __future__ import annotations

from dataclasses import dataclass

from cvworker.lab.results import AGREE, STRAY, HostPoint, Point, Profile, rounded
from cvworker.report import Line, Page, line_chart

COLUMNS = ("what", "batch", "A images/s", "B images/s", "B ÷ A", "A p95 ms", "B p95 ms", "A MiB", "B MiB", "")
MIB = 2**20

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Pair:
    """The same point in both profiles; ``ratio`` is B's images a second by A's."""

    name: str
    a: Point | HostPoint
    b: Point | HostPoint
    restless: bool = False
    """It is one machine, and the machine itself was faster in one of them."""

    @property
    def ratio(self) -> float | None:
        return self.b.images_s / self.a.images_s if self.a.images_s and self.b.images_s else None

    @property
    def verdict(self) -> str:
        """In a word; within the noise that a profile allows itself, two rates are the same."""
        if self.ratio is None:
            return " / ".join(sorted({side.status for side in (self.a, self.b)} - {"ok"}))
        if "unstable" in (self.a.status, self.b.status):
            return "unstable"
        if abs(self.ratio - 1) <= AGREE:
            return "the same"
        if self.restless:
            return "unstable"
        return "faster" if self.ratio > 1 else "slower"


def pairs(a: Profile, b: Profile) -> list[Pair]:
    """Points that both have, in A's order: series, batch size and megapixels agree, or step, picture and processes."""
    of_b = {_key(point): point for point in _all(b)}
    restless = a.machine.device_name == b.machine.device_name and abs((pace_ratio(a, b) or 1) - 1) > STRAY
    return [Pair(_name(one), one, other, restless) for one in _all(a) if (other := of_b.get(_key(one))) is not None]


def pace_ratio(a: Profile, b: Profile) -> float | None:
    """How much faster B's machine itself was than A's, by the fixed work that both did beside every point."""
    return b.pace / a.pace if a.pace and b.pace else None


def pace_told(a: Profile, b: Profile) -> str:
    """The same in a sentence; empty where one of them did not look."""
    ratio = pace_ratio(a, b)
    return "" if ratio is None else f"The machine itself, at fixed work beside every point: B did {ratio:.2f} of A's."


def only_in_one(a: Profile, b: Profile) -> list[str]:
    """A sentence for each series that only one of them has."""
    names_a, names_b = ({_name(point) for point in _all(each)} for each in (a, b))
    lines = [f"only A has {name}" for name in sorted(names_a - names_b)]
    return lines + [f"only B has {name}" for name in sorted(names_b - names_a)]


def rows(found: list[Pair]) -> list[list[Cell]]:
    """Cells for :data:`COLUMNS`."""
    return [
        [
            *(pair.name, _batch(pair.a), rounded(pair.a.images_s), rounded(pair.b.images_s), rounded(pair.ratio)),
            *(_p95(pair.a), _p95(pair.b), _mib(pair.a), _mib(pair.b), pair.verdict),
        ]
        for pair in found
    ]


def page(a: Profile, b: Profile) -> Page:
    """The report."""
    found = pairs(a, b)
    report = Page("Two profiles", f"A: {_called(a)}; B: {_called(b)}")
    report.heading("Where both were measured")
    report.table(COLUMNS, rows(found))
    report.text(
        "Rates within 10 % of each other are the same: so far apart may two runs be on one machine. Ratios of unstable "
        "points say little."
    )
    if told := pace_told(a, b):
        report.text(told)
    for name in dict.fromkeys(pair.name for pair in found if isinstance(pair.a, Point) and pair.a.megapixels is None):
        same = [pair for pair in found if pair.name == name and pair.ratio is not None]
        if len(same) > 1:
            xs = [_batch(pair.a) or 0 for pair in same]
            lines = [Line(side, xs, [getattr(pair, side.lower()).images_s for pair in same]) for side in "AB"]
            report.picture(line_chart(name, lines, x_label="batch size", y_label="images/s", x_scale="log2"))
    if single := only_in_one(a, b):
        report.heading("Only in one")
        for line in single:
            report.text(line)
    report.heading("What differs")
    report.table(("what", "A", "B"), differences(a, b))
    return report


def differences(a: Profile, b: Profile) -> list[list[Cell]]:
    """Facts about module, machine, versions and settings that are not the same."""
    of_a, of_b = (
        {**p.module.model_dump(), **p.machine.model_dump(), **p.versions, "commit": p.commit, **p.settings}
        for p in (a, b)
    )
    keys = [key for key in dict.fromkeys((*of_a, *of_b)) if of_a.get(key) != of_b.get(key)]
    return [[key, str(of_a.get(key, "–")), str(of_b.get(key, "–"))] for key in keys]


def _all(profile: Profile) -> list[Point | HostPoint]:
    return [*profile.points, *profile.host]


def _key(point: Point | HostPoint) -> tuple[object, ...]:
    if isinstance(point, Point):
        return point.series, point.precision, point.format, point.megapixels, point.batch
    return point.step, point.workers, point.picture.format, point.picture.width, point.picture.height


def _name(point: Point | HostPoint) -> str:
    if isinstance(point, Point):
        return point.name
    on = f"{point.workers} processes" if point.workers else "one core"
    step = "decode and preprocess" if point.step == "both" else point.step
    return f"{step}, {point.picture.megapixels:.2g} MP, {on}"


def _called(profile: Profile) -> str:
    return f"{profile.title}, {profile.made[:16]}"


def _batch(point: Point | HostPoint) -> int | None:
    return point.batch if isinstance(point, Point) else None


def _p95(point: Point | HostPoint) -> float | int | None:
    return rounded(point.latency_ms.p95) if isinstance(point, Point) and point.latency_ms else None


def _mib(point: Point | HostPoint) -> int | None:
    taken = point.memory_bytes() if isinstance(point, Point) else None
    return round(taken / MIB) if taken else None
