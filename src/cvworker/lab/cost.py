"""Dollars per million images on each machine of the catalogue, from profiles: measured there, or scaled to it.

A machine does as many images a second as the slowest of three lets through: its device, its vCPUs, which decode and
preprocess and run the worker itself, and its network, which carries the pictures in. Without a GPU the first two share
the same cores. What a million images cost is the hour's price / (images a second x 3600) x 10^6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cvworker.errors import StartupError
from cvworker.lab.catalogue import Catalogue, Machine
from cvworker.lab.recommend import recommend
from cvworker.lab.results import Point, Profile, rounded
from cvworker.report import Line, Page, line_chart

WORKER_MS = 1.8
"""CPU of the worker itself for each image, decoding apart: 1.5 ms in the I/O process and 0.3 ms in the model process,
as docs/performance.md has it from two cores of an AMD EPYC."""
COLUMNS = (
    *("machine", "$/million", "spot $/million", "images/s", "bound by", "batch ms p95", "$/h", "spot $/h", "device/s"),
    *("CPU/s", "network/s", "precision", "batch", "basis", "profile"),
)

Basis = Literal["measured", "scaled"]
Bound = Literal["device", "decode", "network"]
Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One machine with one profile. Rates are images a second, prices an hour or a million images."""

    machine: Machine
    profile: Profile
    point: Point
    basis: Basis
    how: str
    """What was scaled, by how much; empty for what was measured on this very machine."""
    device_s: float
    cpu_s: float | None
    """None where the profile has no host part."""
    network_s: float | None
    images_s: float
    bound: Bound
    latency_ms: float
    """95 % of batches, by the device."""

    @property
    def what(self) -> tuple[str, str, str | None]:
        """The machine, and what runs on it."""
        return self.machine.name, self.profile.module.name, self.profile.module.weights

    @property
    def per_million(self) -> float:
        """On demand."""
        return per_million(self.machine.on_demand, self.images_s)

    @property
    def spot_per_million(self) -> float | None:
        return None if self.machine.spot is None else per_million(self.machine.spot, self.images_s)


def per_million(hourly: float, images_s: float) -> float:
    """What a million images cost at ``hourly`` for an hour of ``images_s`` images a second."""
    return hourly / (images_s * 3600) * 1e6


def rows(
    profiles: Sequence[Profile],
    catalogue: Catalogue,
    *,
    machines: Sequence[str] = (),
    factors: Mapping[str, float] | None = None,
    latency_ms: float | None = None,
    image_bytes: int | None = None,
) -> tuple[list[Row], list[str]]:
    """A row for each machine and profile that can be brought together, cheapest first, and why others cannot.

    ``machines`` names those wanted, by default all. A machine that a profile was measured on has no row scaled from
    another profile. ``factors`` says how much faster than the profile's device that of a machine is, in the place of
    the catalogue's figures. Raises StartupError for a name that is not in the catalogue.
    """
    factors = factors or {}
    wanted = [catalogue.machine(name) for name in machines] or list(catalogue.machines.values())
    for name in factors:
        catalogue.machine(name)
    found: list[Row] = []
    without: dict[str, list[str]] = {}
    for profile in profiles:
        try:
            point = recommend(profile, latency_ms=latency_ms).point
        except LookupError as error:
            without[f"{profile.title}: {error.args[0]}"] = ["every machine"]
            continue
        for machine in wanted:
            factor = _factor(profile, machine, catalogue, factors.get(machine.name))
            if isinstance(factor, str):
                without.setdefault(f"{profile.title}: {factor}", []).append(machine.name)
            else:
                found.append(_row(profile, point, machine, factor, image_bytes))
    on_itself = {row.what for row in found if row.basis == "measured"}
    kept = [row for row in found if row.basis == "measured" or row.what not in on_itself]
    left_out = [f"{', '.join(names)} from {why}" for why, names in without.items()]
    return sorted(kept, key=lambda row: row.per_million), left_out


@dataclass(frozen=True, slots=True)
class _Factor:
    """How much faster than the profile's one device the machine's is, and where that is from."""

    times: float
    how: str


def _factor(profile: Profile, machine: Machine, catalogue: Catalogue, given: float | None) -> _Factor | str:
    """The factor, or why there is none."""
    here = profile.machine
    if here.type == machine.name:
        return _Factor(1.0, "" if machine.processors == 1 else f"{machine.processors} GPUs from one")
    if given is not None:
        return _Factor(given, f"device × {given:g} (given)")
    if not here.on_gpu:
        if machine.processor is not None:
            return "how much faster a GPU is than this CPU is not known; give --factor"
        times = machine.vcpus / here.cores
        return _Factor(times, f"device × {times:.2f} (vCPUs)")
    if machine.processor is None:
        return "how much slower a CPU is than this GPU is not known; give --factor"
    own = catalogue.processor_named(here.device_name)
    if own == machine.processor:
        return _Factor(1.0, f"the same {own}, other vCPUs")
    speeds = [catalogue.processors[name].relative if name else None for name in (machine.processor, own)]
    if speeds[0] is None or speeds[1] is None:
        unknown = machine.processor if speeds[0] is None else here.device_name
        return f"the catalogue has no relative speed of {unknown}; give --factor"
    times = speeds[0] / speeds[1]
    return _Factor(times, f"device × {times:.2f} ({machine.processor} ÷ {own}, published ResNet-50)")


def _row(profile: Profile, point: Point, machine: Machine, factor: _Factor, image_bytes: int | None) -> Row:
    measured = not factor.how
    count = 1 if machine.processor is None else machine.processors
    device = point.sure_images_s * factor.times * count
    cpu = _cpu(profile, machine, measured)
    picture = profile.picture()
    size = image_bytes or (picture.bytes if picture else None)
    network = machine.network_gbps * 1e9 / 8 / size if size else None
    limits: dict[Bound, float] = {"device": device}
    if machine.processor is None and cpu is not None:  # the same cores do both
        limits = {"decode" if cpu < device else "device": 1 / (1 / device + 1 / cpu)}
    elif cpu is not None:
        limits["decode"] = cpu
    if network is not None:
        limits["network"] = network
    bound = min(limits, key=lambda name: limits[name])
    assert point.latency_ms is not None
    return Row(
        machine=machine,
        profile=profile,
        point=point,
        basis="measured" if measured else "scaled",
        how=factor.how,
        device_s=device,
        cpu_s=cpu,
        network_s=network,
        images_s=limits[bound],
        bound=bound,
        latency_ms=point.latency_ms.p95 / factor.times,
    )


def _cpu(profile: Profile, machine: Machine, measured: bool) -> float | None:
    """Images a second that the machine's vCPUs decode, preprocess and carry through the worker.

    From what the DataLoader processes did together, by the core, where the profile has that: two threads of one core
    do less than twice as much as one alone.
    """
    together, cores = profile.host_images_s(), profile.machine.cores
    if together is None:
        return None
    each_ms = 1000 * min(cores, profile.best_workers() or cores) / together + WORKER_MS
    return (cores if measured else machine.vcpus) * 1000 / each_ms


def table(found: Sequence[Row]) -> tuple[Sequence[str], list[list[Cell]]]:
    """:data:`COLUMNS`, and a row of cells for each machine; without the spot prices where there are none."""
    rows = [dict(zip(COLUMNS, _cells(row), strict=True)) for row in found]
    spot = any(row.machine.spot for row in found)
    columns = [name for name in COLUMNS if spot or not name.startswith("spot")]
    return columns, [[row[name] for name in columns] for row in rows]


def _cells(row: Row) -> list[Cell]:
    return [
        *(row.machine.name, rounded(row.per_million), rounded(row.spot_per_million), rounded(row.images_s), row.bound),
        *(rounded(row.latency_ms), row.machine.on_demand, row.machine.spot, rounded(row.device_s)),
        *(rounded(row.cpu_s), rounded(row.network_s), f"{row.point.precision} {row.point.format}", row.point.batch),
        *(f"{row.basis}: {row.how}" if row.how else row.basis, row.profile.title),
    ]


def page(found: Sequence[Row], left_out: Sequence[str], catalogue: Catalogue) -> Page:
    """The report."""
    report = Page("Cost per million images", f"Prices: {catalogue.title}. {catalogue.source}")
    report.picture(picture(found))
    report.table(*table(found))
    report.text(
        "Images/s is the least of what the device, the vCPUs (decode, preprocess and the worker itself, "
        f"{WORKER_MS:g} ms an image) and the network let through; without a GPU device and decode share the cores. "
        "'measured' means on a machine of this type; 'scaled' numbers are estimates, and say what they were scaled by. "
        "The published figures behind it are of one network; others differ."
    )
    for line in left_out:
        report.text(f"Left out: {line}.")
    return report


def picture(found: Sequence[Row]) -> str:
    """Cost against latency: a point for each machine, those that were scaled in a series of their own."""
    lines = []
    for name in dict.fromkeys(row.profile.title for row in found):
        for basis in ("measured", "scaled"):
            some = sorted((r for r in found if (r.profile.title, r.basis) == (name, basis)), key=lambda r: r.latency_ms)
            if some:
                xs, ys = [row.latency_ms for row in some], [row.per_million for row in some]
                names = [row.machine.name for row in some]
                lines.append(Line(f"{name}, {basis}", xs, ys, dashed=basis == "scaled", names=names))
    if not lines:
        return ""
    return line_chart("Cost against latency", lines, x_label="ms for a batch (95 %)", y_label="$ per million images")


def parse_factors(given: Sequence[str]) -> dict[str, float]:
    """``NAME=NUMBER`` each. Raises StartupError for what is not."""
    return numbers_by_name(given, "factor: {!r} is not MACHINE=NUMBER, such as g5.xlarge=2.5")


def numbers_by_name(given: Sequence[str], refusal: str) -> dict[str, float]:
    """Positive numbers from ``NAME=NUMBER``. Raises StartupError, ``refusal`` with the text in it, for what is none."""
    found = {}
    for each in given:
        name, _, number = each.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = 0.0
        if not name or not 0 < found[name] < float("inf"):
            raise StartupError(refusal.format(each))
    return found
