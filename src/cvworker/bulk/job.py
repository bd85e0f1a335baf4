"""One run: read, check, set up once, then everything that is not written yet through Ray Data."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cvworker import weights
from cvworker.bulk import manifest as manifests
from cvworker.bulk import record as records
from cvworker.bulk.cluster import LIGHT_CPUS, Pools, pools, ray_started
from cvworker.bulk.download import PIECES_AT_ONCE, Download
from cvworker.bulk.infer import Infer
from cvworker.bulk.partitions import Partitions
from cvworker.bulk.preprocess import Preprocess
from cvworker.bulk.store import Store, open_store
from cvworker.bulk.suspects import Ledger
from cvworker.bulk.work import Work
from cvworker.errors import StartupError, WorkerFailed
from cvworker.loading import DEMO, load, make
from cvworker.settings import AUTO
from cvworker.worker import batch_size, guard_of, require

if TYPE_CHECKING:
    import pyarrow as pa

    from cvworker.commands.bulk import Bulk

DOWNLOADS = 64
"""Downloads under way at once with ``auto``, for each download actor: the images of one piece."""
INFLIGHT_FACTOR = 2
"""Object store for each byte of ``max_inflight_bytes``: images as they were downloaded, and samples of them."""


@dataclass
class Counts:
    """What became of the rows of this run, and how many there are in all."""

    rows: int
    left: int
    partitions: int = 0
    done: int = 0
    errors: int = 0


class Job:
    """Finds out what there is to do. Makes and writes nothing, and does not start Ray.

    Raises StartupError: settings, manifest, module, weights or output will not do.
    """

    def __init__(self, settings: Bulk) -> None:
        s = self._settings = settings
        require(s, "module", "input", "output")
        if s.batch_size == AUTO:
            raise StartupError("batch_size: bulk takes a number, or auto:FILE with a profile of 'cvworker profile'")
        self._batch_size = batch_size(s)
        self._guard = guard_of(s)
        self.store: Store = open_store(s.output or "")
        self._names = self.store.names()
        before = records.begun(self.store, self._names)
        self.manifest = manifests.read(s.input or "")
        self._spec = _absolute(s.module or "")
        cls = load(self._spec)
        local = weights.local(s.weights, self._guard)
        record = records.of_run(self.manifest, s.partition_rows, cls, make(cls, local))
        self._record = record
        if before is not None:
            records.check_same(before, record, self.store.place)
            if s.precision not in ("auto", before.precision):
                raise StartupError(f"precision: {self.store.place} was begun in {before.precision}; give that, or auto")
            self._record = before
        self._begun = before is not None
        # A path is told to the actors as it was found here; what must be fetched, each machine fetches for itself.
        place = s.weights.partition("#")[0] if s.weights else ""
        self._weights = (
            s.weights if s.weights in (None, DEMO) or "://" in place else f"{local}#{_digest(record.weights)}"
        )
        self.name = cls.name

    @property
    def finished(self) -> bool:
        return records.SUCCESS in self._names

    def run(self, progress: Callable[[Counts], object]) -> Counts:
        """Do what is left. ``progress`` is told at the start and with each part of the results.

        Raises StartupError before anything is written, WorkerFailed after that; KeyboardInterrupt for SIGTERM as well.
        """
        s = self._settings
        with ray_started(s.cluster, verbose=s.log_level == "debug"):
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            sizes = pools(s.device, s.preprocess_workers, local=s.cluster is None)
            work = self._probed(self._work(sizes), sizes)
            with self.store.alone():
                partitions = self._begin(work)
                counts = Counts(len(self.manifest), partitions.rows_left(), partitions.count)
                progress(counts)
                for results in _results(self._pieces(partitions, work.piece), work, sizes):
                    partitions.add(results)
                    counts.done += len(results)
                    counts.errors += results["status"].to_pylist().count("error")
                    progress(counts)
                if partitions.left:
                    raise WorkerFailed(f"{len(partitions.left)} partitions did not become whole; run it again to go on")
                self.store.write(records.SUCCESS, b"")
                return counts

    def _work(self, sizes: Pools) -> Work:
        s, begun = self._settings, self._begun
        concurrency = DOWNLOADS if s.download_concurrency == "auto" else s.download_concurrency
        return Work(
            module=self._spec,
            name=self.name,
            weights=self._weights,
            weights_digest=self._record.weights,
            device="cuda" if sizes.gpus else "cpu",
            precision=self._record.precision if begun else s.precision,
            forms=self._record.forms if begun else (),
            optimize="" if begun else s.optimize,
            batch_size=self._batch_size,
            guard=self._guard,
            buckets=self.manifest.buckets | weights.bucket_of(s.weights) | frozenset(s.allowed_buckets),
            base=self.manifest.base,
            download_timeout=s.download_timeout,
            download_concurrency=concurrency,
            max_image_bytes=int(s.max_image_bytes),
            max_image_pixels=s.max_image_pixels,
            max_inflight_bytes=int(s.max_inflight_bytes),
            stall_timeout=s.stall_timeout,
            path=tuple(path or os.getcwd() for path in sys.path),
            log_level=s.log_level,
        )

    def _probed(self, work: Work, sizes: Pools) -> Work:
        """Set the module up once where it will run: what is wrong with it is said before anything is written."""
        import ray

        from cvworker.bulk.engine import probe

        task = ray.remote(num_cpus=LIGHT_CPUS, num_gpus=1 if sizes.gpus else 0, max_retries=0)(probe)
        try:
            found: dict[str, Any] = ray.get(task.remote(work))
        except ray.exceptions.RayError as error:
            raise StartupError(f"module: it could not be set up: {_one_line(error)}") from None
        if "unusable" in found:
            raise StartupError(found["unusable"])
        return replace(work, precision=found["precision"], forms=tuple(found["forms"]), optimize="")

    def _begin(self, work: Work) -> Partitions:
        """Write what this output will be, unless it was begun before; what is left to do."""
        names = self.store.names()
        if records.RECORD not in names:
            self._record = replace(self._record, precision=work.precision, forms=work.forms)
            self.store.write(records.RECORD, self._record.dump())
        return Partitions(self.store, len(self.manifest), self._settings.partition_rows, names)

    def _pieces(self, partitions: Partitions, size: int) -> list[pa.Table]:
        """The rows that are left, a few at a time and never of two partitions at once."""
        import pyarrow as pa

        pieces = []
        for number in partitions.left:
            rows = partitions.rows_of(number)
            for start in range(rows.start, rows.stop, size):
                piece = range(start, min(start + size, rows.stop))
                bodies = self.manifest.bodies[piece.start : piece.stop]
                pieces.append(pa.table({"row": pa.array(piece, pa.int64()), "body": pa.array(bodies, pa.string())}))
        return pieces


def _results(pieces: list[pa.Table], work: Work, sizes: Pools) -> Iterator[pa.Table]:
    """download → preprocess → infer, as Ray Data streams it. Raises WorkerFailed."""
    if not pieces:
        return
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    context = DataContext.get_current()
    store = INFLIGHT_FACTOR * work.max_inflight_bytes * sizes.download
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=store)
    context.target_min_block_size = 0  # small answers are not to wait for more of them
    ledger = ray.remote(num_cpus=0)(Ledger).remote()
    at_once = {"max_concurrent_calls_per_actor": PIECES_AT_ONCE, "enable_true_multi_threading": True}

    def pool(most: int, **more: Any) -> ActorPoolStrategy:
        return ActorPoolStrategy(min_size=1, max_size=most, initial_size=most, **more)

    downloads = pool(sizes.download, max_tasks_in_flight_per_actor=2 * PIECES_AT_ONCE, **at_once)
    common: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    args: dict[str, Any] = {"work": work, "ledger": ledger}
    data = (
        ray.data.from_blocks(pieces)
        .map_batches(Download, compute=downloads, fn_constructor_args=(work,), num_cpus=LIGHT_CPUS, **common)
        .map_batches(
            Preprocess,
            compute=pool(sizes.preprocess),
            fn_constructor_kwargs={**args, "actors": sizes.preprocess},
            num_cpus=1,
            **common,
        )
        .map_batches(
            Infer,
            compute=pool(sizes.infer),
            fn_constructor_kwargs={**args, "actors": sizes.infer},
            num_cpus=LIGHT_CPUS,
            num_gpus=1 if sizes.gpus else 0,
            **common,
        )
    )
    try:
        yield from (table for table in data.iter_batches(batch_size=None, batch_format="pyarrow") if len(table))
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise WorkerFailed(f"{_one_line(error)}; run it again to go on") from None


def _digest(weights: str | None) -> str:
    """As a fragment of ``--weights``: what was checked here is what the actors load, exported programs included."""
    return (weights or "").replace("sha256:", "sha256=")


def _absolute(spec: str) -> str:
    """A path as the actors find it, whose working directory is another."""
    place, colon, name = spec.rpartition(":")
    return f"{os.path.abspath(place)}:{name}" if colon and (place.endswith(".py") or "/" in place) else spec


def _one_line(error: BaseException) -> str:
    """What Ray says of a failure is many lines, with the cause in the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"
