"""What this machine is, and the versions that its numbers depend on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cvworker import __version__, memory
from cvworker.lab.results import MachineInfo

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "onnxruntime")
DMI = Path("/sys/devices/virtual/dmi/id")
EC2 = "Amazon EC2"
CPUINFO = Path("/proc/cpuinfo")


def machine_info(device: torch.device, machine_type: str | None) -> MachineInfo:
    """The machine, with ``machine_type`` in place of what EC2 calls it, where given."""
    on_gpu = device.type == "cuda"
    cpu = cpu_model()
    return MachineInfo(
        type=machine_type or ec2_type(),
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory.total_bytes(),
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if on_gpu else cpu,
        device_memory_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        os=platform.platform(),
    )


def ec2_type(dmi: Path = DMI) -> str | None:
    """What EC2 calls this instance's type, from its firmware; None elsewhere."""
    try:
        if (dmi / "sys_vendor").read_text().strip() == EC2:
            return (dmi / "product_name").read_text().strip()
    except OSError:
        pass
    return None


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The model's name, as Linux tells it."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def gpu_utilisation(device: torch.device) -> float | None:
    """The share of the last moments in which the GPU ran something, as its driver tells; None where it does not."""
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # nvidia-ml-py is not installed, or the driver does not know
        return _by_nvidia_smi(device)


def _by_nvidia_smi(device: torch.device) -> float | None:
    try:
        place = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        command = ["nvidia-smi", "-i", place, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        return float(_said(*command)) / 100
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Of everything that the numbers depend on, as far as it is here."""
    found = {"cvworker": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found


def commit() -> str | None:
    """The commit of the repository that this runs in, with ``+`` where something is changed; None outside of one."""
    try:
        named = _said("git", "rev-parse", "--short=12", "HEAD")
        return named + ("+" if _said("git", "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
