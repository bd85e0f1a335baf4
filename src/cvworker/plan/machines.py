"""Which machines can be planned for: profiles, load results and the catalogue turned into the planner's own terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cvworker.errors import StartupError
from cvworker.lab.catalogue import Catalogue, Machine
from cvworker.lab.results import Profile
from cvworker.plan.capacity import STAGED_AHEAD, BatchCurve, Worker
from cvworker.plan.fleet import MachineType

FORMATS = ("eager", "channels-last")
"""What ``optimize auto`` may run a network in."""
PRECISIONS = ("fp32", "bf16", "fp16")
ENOUGH = 0.95
"""The smallest batch within this share of the best pace is taken: larger ones only wait longer."""
OF_TARGET = 0.25
"""Share of the latency target that one batch may take."""
MEMORY_SHARE = 0.9
"""Of a GPU's memory that a batch may need."""
UNKNOWN_NETWORK_GBPS = 1.0
HERE = "this machine"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one profile says: a curve for each precision and format, and the CPU's part."""

    curves: dict[str, tuple[tuple[int, float, int], ...]]
    """Batch size, seconds, and bytes of memory, by the name of the series."""
    decode_s: float | None
    megapixels: float | None
    on_gpu: bool
    cores: int
    machine: str | None
    processor: str | None

    def points(self, name: str, memory_bytes: float) -> list[tuple[int, float]]:
        return [(batch, seconds) for batch, seconds, memory in self.curves[name] if memory <= memory_bytes]


def from_profile(profile: Profile, catalogue: Catalogue) -> Measured:
    """Raises StartupError for a profile without a single batch of ``process``."""
    curves = {}
    for name, points in profile.series("process").items():
        if any(f"process {precision} {each}" == name for precision in PRECISIONS for each in FORMATS):
            rows = [
                (point.batch, point.latency_ms.p50 / 1000, point.device_memory_bytes or 0)
                for point in points
                if point.latency_ms
            ]
            if rows:
                curves[name.removeprefix("process ")] = tuple(rows)
    if not curves:
        raise StartupError(f"profile: {profile.title} has no batch of process; make it anew with 'cvworker profile'")
    machine, picture, host_ms = profile.machine, profile.picture(), profile.host_ms()
    known = catalogue.machines.get(machine.type or "")
    return Measured(
        curves=curves,
        decode_s=None if host_ms is None else host_ms / 1000,
        megapixels=picture.megapixels if picture else None,
        on_gpu=machine.on_gpu,
        cores=machine.cores,
        machine=machine.type,
        processor=(known.processor if known else None) or catalogue.processor_named(machine.device_name),
    )


def machine_types(
    measured: Sequence[Measured],
    catalogue: Catalogue,
    *,
    wanted: Sequence[str],
    latency_s: float,
    batch_size: int | None,
    paces: dict[str, float],
) -> list[MachineType]:
    """Those of the catalogue that something is known of, ``wanted`` or all; in the catalogue's order.

    ``paces`` are images a second that load tests saw, by machine type. Raises StartupError for a wanted machine that
    nothing is known of.
    """
    found = []
    for name in wanted or catalogue.machines:
        machine = catalogue.machine(name)
        best = _closest(machine, measured, catalogue)
        if best is None and wanted:
            raise StartupError(
                f"machines: nothing is known of {name}: its processor, {machine.processor or 'none'}, is in no profile "
                "and the catalogue has no 'relative' to scale one to it; run 'cvworker profile' there"
            )
        if best is not None:
            found.append(_machine_type(machine, *best, catalogue, latency_s, batch_size, paces.get(name)))
    if not wanted:
        for each in measured:
            if not each.on_gpu and each.machine not in catalogue.machines:
                found.insert(0, _here(each, latency_s, batch_size, paces.get(HERE)))
    if not found:
        raise StartupError(
            "machines: no machine of the catalogue has the profile's processor; name it by --prices FILE"
        )
    return found


def _closest(
    machine: Machine, measured: Sequence[Measured], catalogue: Catalogue
) -> tuple[Measured, float, str] | None:
    """The profile that says most about a machine, how much longer its batches take there, and a note on it."""
    for each in measured:
        if each.machine == machine.name:
            return each, 1.0, ""
    for each in measured:
        if machine.processor is not None and each.processor == machine.processor:
            where = f" (profile of {each.machine})" if each.machine else ""
            return each, 1.0, f"of the same GPU{where}" if where else ""
    for each in measured:
        if machine.processor is None:
            if not each.on_gpu:
                return each, each.cores / machine.vcpus, f"scaled from a CPU with {each.cores} cores by its vCPUs"
            continue
        source = catalogue.processors.get(each.processor or "")
        target = catalogue.processors[machine.processor]
        if source is not None and source.relative and target.relative:
            factor = source.relative / target.relative
            return each, factor, f"scaled from {each.processor}: batches take {factor:.2g} times as long"
    return None


def _machine_type(
    machine: Machine,
    measured: Measured,
    factor: float,
    note: str,
    catalogue: Catalogue,
    latency_s: float,
    batch_size: int | None,
    pace: float | None,
) -> MachineType:
    processor = catalogue.processors.get(machine.processor or "")
    memory = processor.memory_gib * 2**30 * MEMORY_SHARE if processor else float("inf")
    tasks = machine.processors if processor else 1
    worker = _worker(measured, factor, latency_s, batch_size, memory)
    worker = replace(
        worker,
        vcpus=machine.vcpus / tasks,
        network_bytes_s=machine.network_gbps * 1e9 / 8 / tasks,
        measured=pace,
    )
    return MachineType(machine.name, worker, tasks, machine.on_demand, machine.spot, note)


def _here(measured: Measured, latency_s: float, batch_size: int | None, pace: float | None) -> MachineType:
    worker = _worker(measured, 1.0, latency_s, batch_size, float("inf"))
    network = UNKNOWN_NETWORK_GBPS * 1e9 / 8
    note = f"of {measured.cores} cores, with a network of {UNKNOWN_NETWORK_GBPS:g} Gbit/s assumed"
    return MachineType(measured.machine or HERE, replace(worker, network_bytes_s=network, measured=pace), note=note)


def _worker(measured: Measured, factor: float, latency_s: float, batch_size: int | None, memory_bytes: float) -> Worker:
    """The fastest of the profile's variants that the worker would run, with the batch size that fits the target."""
    choices = []
    for name in measured.curves:
        if points := measured.points(name, memory_bytes):
            curve = BatchCurve(tuple((size, seconds * factor) for size, seconds in points))
            size = batch_size or best_batch(curve, latency_s)
            choices.append((size / curve.seconds(size), size, curve, name))
    if not choices:
        raise StartupError("profile: no batch fits into the memory of the machine's GPU; leave it out of --machines")
    _, size, curve, name = max(choices, key=lambda each: each[0])
    worker = Worker(
        curve,
        batch_size=size,
        on_gpu=measured.on_gpu,
        ahead=STAGED_AHEAD if measured.on_gpu else 0,
        vcpus=float(measured.cores),
        label=name,
    )
    if measured.decode_s is not None and measured.megapixels:
        worker = replace(worker, decode_s=measured.decode_s, decode_megapixels=measured.megapixels)
    return worker


def best_batch(curve: BatchCurve, latency_s: float) -> int:
    """The smallest measured size with next to the best pace, among those that leave time for everything else."""
    fitting = [(n, s) for n, s in curve.points if s <= latency_s * OF_TARGET] or [curve.points[0]]
    best = max(n / s for n, s in fitting)
    return next(n for n, s in fitting if n / s >= ENOUGH * best)


def by_hand(
    images_s: float, catalogue: Catalogue, *, wanted: Sequence[str], batch_size: int | None
) -> list[MachineType]:
    """A pace that somebody measured, on one machine: every batch is taken to last as long as a full one."""
    if len(wanted) > 1:
        raise StartupError("images_s: a pace is that of one machine; name one with --machines, or give profiles")
    size = batch_size or 8
    worker = Worker(BatchCurve(((size, size / images_s),)), batch_size=size, measured=images_s, label="by hand")
    if not wanted:
        return [MachineType(HERE, replace(worker, decode_s=0.0001, io_cpu_s=0.0001), note="as given")]
    machine = catalogue.machine(wanted[0])
    tasks = machine.processors if machine.processor else 1
    # The pace that was measured has the cores in it, whatever they are busy with.
    worker = replace(
        worker,
        vcpus=machine.vcpus / tasks,
        network_bytes_s=machine.network_gbps * 1e9 / 8 / tasks,
        decode_s=0.0001,
        io_cpu_s=0.0001,
    )
    return [MachineType(machine.name, worker, tasks, machine.on_demand, machine.spot, "as given")]
