"""Ray: started quietly on this machine, or a cluster that is there; and how many actors it has room for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from cvworker.errors import StartupError
from cvworker.tuning import preprocess_workers

RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's own 15 would leave the machine to whatever else runs on it; nice(1) still can
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray hides the GPUs from actors that ask for none, and warns of it
}
LIGHT_CPUS = 0.25
"""What a download and an inference actor ask Ray for: one waits for the network, the other mostly for its device."""


@dataclass(frozen=True, slots=True)
class Pools:
    """Actors of each stage, and whether those that infer have a GPU each."""

    download: int
    preprocess: int
    infer: int
    gpus: int


@contextmanager
def own_stderr(*, shared: bool) -> Iterator[TextIO]:
    """The terminal for what cvworker says. Unless ``shared``, what else is written to stderr meanwhile is dropped.

    Ray tells of each restart in paragraphs, partly from C++, and no setting of its own keeps them out of a progress
    bar. They are in its logs as well.
    """
    if shared:
        yield sys.stderr
        return
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        with open(kept, "w", buffering=1, closefd=False) as stream:
            yield stream
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def ray_started(address: str | None, *, verbose: bool) -> Iterator[None]:
    """Ray for as long as this lasts; it is stopped at the end where it was started here. Raises StartupError."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.data import DataContext

    cores = os.cpu_count() or 1
    # One more than there are: the light actors take no core of their own, and each core is to preprocess.
    own: dict[str, Any] = {"num_cpus": cores + 1, "include_dashboard": False} if address is None else {}
    level = logging.INFO if verbose else logging.CRITICAL
    try:
        ray.init(address or "local", log_to_driver=verbose, logging_level=level, **own)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        what = f"the cluster at {address} cannot be used" if address else "Ray could not be started on this machine"
        raise StartupError(f"ray_address: {what}: {' '.join(str(error).split())[:300]}") from None
    try:
        logging.getLogger("ray.data").setLevel(level)
        context = DataContext.get_current()
        context.enable_progress_bars = verbose
        yield
    finally:
        ray.shutdown()


def pools(device: str, workers: Any, *, local: bool) -> Pools:
    """As many actors as the machines have room for. Raises StartupError where ``device`` is not to be had."""
    import ray

    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in known if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if device not in ("auto", "cpu", "cuda"):
        raise StartupError(f"device: {device} cannot be chosen here, Ray gives each actor a GPU; use auto, cpu or cuda")
    if device == "cuda" and not gpus:
        raise StartupError("device: Ray knows of no GPU; use cpu or auto")
    gpus = 0 if device == "cpu" else gpus
    if workers != "auto":
        return Pools(len(nodes), max(1, workers) * len(nodes), gpus or len(nodes), gpus)
    if local:
        each = preprocess_workers(os.cpu_count() or 1)
    else:
        light = LIGHT_CPUS * (1 + max(1, gpus / len(nodes)))
        each = max(1, int(min(node.get("CPU", 0) for node in nodes if node.get("CPU", 0)) - light))
    return Pools(len(nodes), each * len(nodes), gpus or len(nodes), gpus)
