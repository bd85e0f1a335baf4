"""``cvworker bench``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_settings import CLI_SUPPRESS, NoDecode, SettingsConfigDict

from cvworker.errors import StartupError
from cvworker.settings import Settings, setting, unknown_variables

if TYPE_CHECKING:
    from cvworker.bench.pictures import Pictures
    from cvworker.bench.results import Bench as Results
    from cvworker.bench.results import Sample
    from cvworker.bench.rungs import Rung

SHOWN = ("module", "weights", "device", "precision", "batch_size", "max_wait_ms", "preprocess_workers")
"""Settings of the worker that the help tells of; the others are heeded as well."""
FORCED = ("queue_url", "callback_url", "callback_secret", "allowed_hosts", "allow_private_networks", "egress_proxy")
"""Settings that the bench brings its own of, and those of no meaning here."""
PIPE_WIDTH = 150
OUT = Path("build/bench")


def _names(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class Bench(Settings):
    """Climb the ladder on this machine with a module and pictures of yours: one message after the other, then threads,
    a DataLoader, batches, and everything that 'cvworker run' has. Tells requests a second, CPU, GPU and memory of each
    rung, and checks that every message was answered once. Needs no AWS and no network: queue, image host and callback
    receiver are a process on this machine.

    They answer after --host-latency-ms and --callback-latency-ms, as real ones do: waiting is what threads help with.
    Writes bench.json, bench.csv, bench.html and each rung's log to --out. About three minutes.

    examples: cvworker bench

              cvworker bench --module my_model.py:MyModel --weights my.safetensors --images photos --rounds 3

              cvworker bench --rung sequential,everything --host-latency-ms 20 --seconds 60

              cvworker bench --from build/bench/bench.json
    """

    model_config = SettingsConfigDict(cli_shortcuts={"from-file": "from"})

    module: str | None = Field("threat", description=Settings.model_fields["module"].description)
    images: Path | None = setting("Bench", None, "A folder with pictures of your own; default: drawn ones")
    rung: Annotated[list[str], NoDecode, BeforeValidator(_names)] = setting(
        "Bench", [], "sequential, threads, dataloader, batches, everything, or several of them; default: all"
    )
    seconds: float = setting("Bench", 20.0, "Window in which a rung's answers are counted", "seconds", ge=0.5, le=3600)
    rounds: int = setting("Bench", 1, "Times the whole ladder; medians are shown", ge=1, le=100)
    host_latency_ms: float = setting("Bench", 100.0, "The image host answers after this long", "ms", ge=0, le=10_000)
    callback_latency_ms: float = setting("Bench", 50.0, "The callback receiver does", "ms", ge=0, le=10_000)
    out: Path | None = setting("Bench", None, f"A folder for the results; default: {OUT}, with --from the file's own")
    from_file: Path | None = setting("Bench", None, "A bench.json: write its table and page anew, and measure nothing")

    def main(self) -> int:
        for line in unknown_variables(set(type(self).model_fields)):
            print(f"note: {line}", file=sys.stderr)
        if self.from_file is not None:
            from cvworker.bench.results import Bench as Results

            found = Results.load(self.from_file)
            folder = self._folder(self.out or self.from_file.parent)
        else:
            rungs = self._rungs()
            folder = self._folder(self.out or OUT)
            found = self._climbed(rungs, folder)
            found.save(folder / "bench.json")
        self._write(found, folder)
        self._show(found, folder)
        return 1 if found.problems else 0

    def _rungs(self) -> list[Rung]:
        from cvworker.bench.rungs import LADDER, RUNGS

        for name in self.rung:
            if name not in RUNGS:
                raise StartupError(f"rung: there is no {name!r}; the rungs are: {', '.join(RUNGS)}")
        return [rung for rung in LADDER if not self.rung or rung.name in self.rung]

    def _climbed(self, rungs: list[Rung], folder: Path) -> Results:
        """Every rung in turn, as many rounds as asked for. Raises KeyboardInterrupt once nothing of it is left."""
        import time

        from cvworker.bench.gpu import Gpu
        from cvworker.bench.measure import Plan, measure
        from cvworker.embedded.demo import Interrupts
        from cvworker.lab.terminal import progress

        settings = self._settings()
        made = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        samples: list[Sample] = []
        with Interrupts() as interrupts, self._pictures() as (images, pictures), progress("pictures") as bar:
            plan = Plan(settings, images, self.host_latency_ms, self.callback_latency_ms, self.seconds, folder)
            bar.begin(len(rungs) * self.rounds)
            with Gpu(self.device) as gpu:
                for number in range(1, self.rounds + 1):
                    for rung in rungs:
                        which = f"{rung.name}, round {number} of {self.rounds}" if self.rounds > 1 else rung.name
                        samples.append(
                            measure(
                                rung,
                                plan,
                                number,
                                gpu,
                                lambda what, which=which: bar.tell(f"{which}: {what}"),  # type: ignore[misc]
                                interrupts.check,
                            )
                        )
                        bar.step()
            bar.tell("this machine")
            interrupts.check()
            return self._result(made, rungs, samples, pictures)

    def _settings(self) -> Settings:
        """The worker's settings, with weights that are on this machine. Raises StartupError."""
        from cvworker import weights
        from cvworker.worker import batch_size, guard_of, require

        require(self, "module")
        batch_size(self)
        local = weights.local(self.weights, guard_of(self))
        if local is not None and local != "demo":
            local = f"{local}#{weights.sha256_of(Path(local)).replace(':', '=')}"
        return self.model_copy(update={"weights": local})

    @contextmanager
    def _pictures(self) -> Iterator[tuple[Path, Pictures]]:
        """A folder with the pictures, gone afterwards."""
        import tempfile

        from cvworker.bench import pictures

        with tempfile.TemporaryDirectory(prefix="cvworker-bench-") as name:
            folder = Path(name)
            if self.images is not None:
                yield folder, pictures.copy(self.images, folder, self)
            else:
                yield folder, pictures.draw(self.module or "", folder)

    def _result(self, made: str, rungs: list[Rung], samples: list[Sample], pictures: Pictures) -> Results:
        from cvworker.bench.results import Bench as Results
        from cvworker.bench.results import Design
        from cvworker.lab.machine import commit, machine_info, versions  # with torch, and only now a CUDA context
        from cvworker.model.process import device_named

        shown = self.shown()
        usual = {name: field.get_default(call_default_factory=True) for name, field in Settings.model_fields.items()}
        differing = {n: v for n, v in shown.items() if n not in (*FORCED, "module") and getattr(self, n) != usual[n]}
        return Results(
            made=made,
            commit=commit(),
            module=self.module or "",
            machine=machine_info(device_named(self.device), None),
            versions=versions(),
            settings=differing,
            pictures=pictures.told,
            seconds=self.seconds,
            rounds=self.rounds,
            host_latency_ms=self.host_latency_ms,
            callback_latency_ms=self.callback_latency_ms,
            rungs=[Design(name=rung.name, on=rung.on, off=rung.off) for rung in rungs],
            samples=samples,
            notes=list(pictures.notes),
        )

    def _write(self, found: Results, folder: Path) -> None:
        from cvworker.bench.report import page
        from cvworker.report import pictures_missing

        found.save_csv(folder / "bench.csv")
        if not pictures_missing():
            page(found).write(folder / "bench.html")

    def _show(self, found: Results, folder: Path) -> None:
        from cvworker.bench import report
        from cvworker.lab.terminal import console, print_table
        from cvworker.report import pictures_missing

        screen = console(PIPE_WIDTH)
        screen.print(f"{found.title}: {report.setting(found)}")
        print_table(screen, *report.narrow(report.COLUMNS, report.table(found)), left=("rung",))
        screen.print(report.summary(found))
        for note in report.notes(found):
            screen.print(f"note: {note}")
        for problem in found.problems:
            screen.print(f"not to be relied on: {problem}; its log: {folder / problem.partition(':')[0]}.log")
        missing = pictures_missing()
        if missing:
            screen.print(f"bench.html is left out; {missing}")
        screen.print(f"written to {folder}: bench.json, bench.csv{'' if missing else ', bench.html'}", soft_wrap=True)

    def _folder(self, folder: Path) -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"out: {folder} cannot be made ({error.strerror}); give another --out") from None
        return folder


for _name in Settings.model_fields:
    if _name not in SHOWN:
        Bench.model_fields[_name].metadata.append(CLI_SUPPRESS)
