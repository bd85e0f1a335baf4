"""Profiles for tests, made of numbers that the test says."""

from __future__ import annotations

from typing import Any

from cvworker.lab.results import HostPoint, MachineInfo, ModuleInfo, Picture, Point, Profile, Split, measured

PICTURE = Picture(format="JPEG", width=1000, height=700, bytes=125_000)


def a_point(batch: int, ms: float, *, copy_ms: float = 0.0, memory: int | None = 2**30, **given: Any) -> Point:
    """A steady point of ``process`` in fp32: each batch takes ``copy_ms`` of copying and ``ms`` of computing."""
    passes = given.pop("passes", [[[Split(copy_ms, ms, 0.0)]] * 3] * 2)
    about = {"series": "process", "precision": "fp32", "format": "eager", "host_memory_bytes": memory}
    return Point(**{**about, **measured(passes, batch), "batch": batch, "passes": passes, **given})


def a_wall(batch: int, **given: Any) -> Point:
    """Where a series ended."""
    about = {"series": "process", "precision": "fp32", "format": "eager", "status": "out of memory", "why": "too large"}
    return Point(**{**about, "batch": batch, **given})


def a_host(workers: int, images_s: float, **given: Any) -> HostPoint:
    passes = [[images_s] * 3] * 2
    about = {"step": "both", "picture": PICTURE, "status": "ok", "passes": passes}
    return HostPoint(**{**about, "workers": workers, "images_s": images_s, **given})


def a_machine(**given: Any) -> MachineInfo:
    about = {"cpu": "AMD EPYC", "cores": 4, "memory_bytes": 2**34, "device": "cpu", "device_name": "AMD EPYC"}
    return MachineInfo(**{**about, "os": "Linux", **given})


def a_gpu(name: str = "Tesla T4", **given: Any) -> MachineInfo:
    return a_machine(device="cuda:0", device_name=name, device_memory_bytes=2**34, **given)


def a_profile(
    *points: Point, host: tuple[HostPoint, ...] = (), machine: MachineInfo | None = None, **given: Any
) -> Profile:
    about: dict[str, Any] = {
        "made": "2026-11-22T09:00:00+00:00",
        "complete": True,
        "seed": 0,
        "module": ModuleInfo(name="threat", spec="threat", weights="sha256:00", sample="uint8 [3, 64, 64]"),
        "versions": {"cvworker": "0.1.0", "torch": "2.14.1"},
        "settings": {},
    }
    return Profile(**{**about, "machine": machine or a_machine(), "points": points, "host": host, **given})
