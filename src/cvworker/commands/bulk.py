"""``cvworker bulk``."""

from __future__ import annotations

import os
import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pydantic_settings import CLI_SUPPRESS

from cvworker.errors import StartupError
from cvworker.settings import AutoInt, Settings, setting, unknown_variables

if TYPE_CHECKING:
    from cvworker.bulk.job import Counts, Job

NOT_HERE = ("Queue", "Callbacks", "Endpoints", "Flow")
"""Groups of settings that are a worker's only: they are read as ever, and not shown."""
HERE = ("max_inflight_bytes", "log_level")
NOT_HERE_EITHER = ("max_wait_ms", "download_threads")


class Bulk(Settings):
    """Run a module over a manifest of stored images, on Ray Data: this machine, or the cluster of --ray-address.

    The input is a Parquet, CSV or JSON-lines file with image_url (and id, task, metadata), a folder of images, or an
    s3:// prefix of images. Results are Parquet partitions in the output; the same command goes on where it stopped.

    examples: cvworker bulk --module threat --weights demo --input photos/ --output results/

              cvworker bulk --module my_model.py:MyModel --input images.parquet --output s3://bucket/results/

              cvworker bulk --module scene --input s3://bucket/2026/ --output results/ --ray-address auto
    """

    input: str | None = setting("Bulk", None, "A Parquet, CSV or JSON-lines file, a folder of images, or s3://...")
    output: str | None = setting("Bulk", None, "A folder or s3://bucket/prefix for the partitions")
    partition_rows: int = setting(
        "Bulk", 500, "Rows in a partition: what a restart may have to do again, and the size of files", "rows", ge=1
    )
    ray_address: str | None = setting(
        "Bulk",
        None,
        "host:port of a Ray cluster, ray://host:port, or auto for the one on this machine; default: Ray is started "
        "here. Without it RAY_ADDRESS is read, as by Ray's own tools",
    )
    preprocess_workers: AutoInt = setting("Module", "auto", "CPU actors that decode and preprocess, on each machine")
    download_concurrency: AutoInt = setting("Images", "auto", "Downloads under way at once on each machine; auto is 64")

    @property
    def cluster(self) -> str | None:
        """The cluster to run on; None starts Ray here."""
        return self.ray_address or os.environ.get("RAY_ADDRESS") or None

    def main(self) -> int:
        for line in unknown_variables(set(type(self).model_fields)):
            print(f"note: {line}", file=sys.stderr)
        if not all(map(find_spec, ("ray", "pyarrow"))):
            raise StartupError("bulk needs Ray and PyArrow: pip install 'cvworker[ray]'")
        from cvworker.bulk.job import Job

        job = Job(self)
        if job.finished:
            print(f"{len(job.manifest):,} images are done already in {job.store.place}")
            return 0
        try:
            return self._run(job)
        except KeyboardInterrupt:
            print(f"cvworker bulk: stopped; the same command goes on from what is in {self.output}", file=sys.stderr)
            return 1

    def _run(self, job: Job) -> int:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from cvworker.bulk.cluster import own_stderr

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
        )
        began: list[float] = []
        with (
            own_stderr(shared=self.log_level == "debug") as stream,
            Progress(*columns, console=Console(file=stream)) as bar,
        ):
            task = bar.add_task(f"starting {job.name}", total=None, pace="")

            def show(counts: Counts) -> None:
                began.append(time.monotonic())
                pace = f"{counts.done / max(began[-1] - began[0], 1e-6):.1f}/s" if counts.done else ""
                errors = f", {counts.errors:,} errors" if counts.errors else ""
                done = counts.rows - counts.left + counts.done
                bar.update(task, description=job.name, completed=done, total=counts.rows, pace=pace + errors)

            try:
                counts = job.run(show)
            except (StartupError, KeyboardInterrupt):
                bar.update(task, visible=bool(began))  # a bar that never moved says nothing
                raise
        before = counts.rows - counts.left
        earlier = f", {before:,} of them before" if before else ""
        print(f"{counts.rows:,} images in {counts.partitions} partitions in {job.store.place}{earlier}")
        if counts.errors:
            print(f"{counts.errors:,} of this run's are errors: rows with status 'error'")
        return 0


for _name, _field in Bulk.model_fields.items():
    _group = (_field.json_schema_extra or {}).get("group") if isinstance(_field.json_schema_extra, dict) else None
    if (_group in NOT_HERE and _name not in HERE) or _name in NOT_HERE_EITHER:
        _field.metadata.append(CLI_SUPPRESS)
