"""``cvworker profile``."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import CLI_SUPPRESS, CliPositionalArg, NoDecode

from cvworker.errors import JobError, StartupError
from cvworker.settings import Settings, TextList, setting, unknown_variables

if TYPE_CHECKING:
    from cvworker.lab.profiling import Wishes
    from cvworker.lab.recommend import Recommendation
    from cvworker.lab.results import Profile as Results

SHOWN = ("module", "weights", "device", "max_image_pixels", "log_level", "allowed_hosts", "allow_private_networks")
"""Settings of the worker that this command has as well."""
PIPE_WIDTH = 190
"""Columns of the table where stdout is no terminal."""
LEFT = ("timed", "precision", "format", "state", "step", "on", "picture", "what", "")
"""Columns of texts."""
TINY = 1e-3
"""A megapixel or a second is at least this much of one."""


def _numbers(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


BatchSizes = Annotated[
    list[Annotated[int, Field(ge=1)]],
    NoDecode,
    BeforeValidator(_numbers),
    AfterValidator(lambda found: sorted(set(found))),
]
Megapixels = Annotated[list[Annotated[float, Field(ge=TINY, le=1000)]], NoDecode, BeforeValidator(_numbers)]


class Profile(Settings):
    """Measure a module on this machine: images a second, latency and memory over batch sizes, precisions and formats,
    and what decoding and preprocessing can keep up with. Writes profile.json, profile.csv and profile.html, and says
    which batch size and precision to run with, and what bounds it. Ctrl-C keeps what was measured until then.

    A module that keeps its network in self.model is measured in every format, with the network alone as well; any
    other as a whole, as it is. Lists are comma-separated.

    examples: cvworker profile --module threat --weights demo

              cvworker profile --module my_model.py:MyModel --batch-sizes 1,8,32 --precisions fp32,bf16 --latency-ms 50

              cvworker profile --module scene --weights scene.safetensors --exported scene.onnx --seconds 0.3

              cvworker profile --compare build/profile-threat/profile.json other/profile.json
    """

    profiles: CliPositionalArg[list[str]] = Field([], description="With --compare: two profile.json")
    compare: bool = Field(False, description="Put two profiles side by side, and measure nothing")
    batch_sizes: BatchSizes = setting(
        "Profile", [], "Default: doubling, until memory ends or the gain is under 5 % twice", "images"
    )
    precisions: TextList = setting("Profile", [], "fp32, tf32, bf16, fp16; default: what the device has arithmetic for")
    formats: TextList = setting(
        "Profile", [], "eager, channels-last, compiled, graphs, or several of them joined by +; default: all there are"
    )
    exported: TextList = setting(
        "Profile", [], "Files of exported networks that the module takes as weights, to be measured besides"
    )
    sizes: Megapixels = setting(
        "Profile", [], "For modules whose samples follow the picture's size; default: 0.25,1,4", "megapixels"
    )
    latency_ms: float | None = setting("Profile", None, "Recommended batches take no longer (95 %)", "ms", gt=0)
    memory_gb: float | None = setting("Profile", None, "Series end, and recommendations stay, below this", "GiB", gt=0)
    seconds: float = setting("Profile", 1.0, "For each point, twice", "seconds", ge=TINY, le=600)
    seed: int = setting("Profile", 0, "Of the random inputs", ge=0)
    image: Path | None = setting("Profile", None, "A picture of your own to decode, in place of a drawn one")
    machine_type: str | None = setting("Profile", None, "What the catalogue calls this machine; default: as EC2 says")
    out: Path | None = setting("Profile", None, "A folder for the results; default: build/profile-NAME")

    def main(self) -> int:
        for line in unknown_variables(set(type(self).model_fields)):
            print(f"note: {line}", file=sys.stderr)
        if self.compare:
            return self._compare()
        if self.profiles:
            raise StartupError(
                f"{self.profiles[0]}: files are for --compare; lists are comma-separated, as in --batch-sizes 1,2,4"
            )
        return self._profile()

    def _profile(self) -> int:
        from cvworker.lab.recommend import recommend
        from cvworker.observe.logs import configure

        configure(self.log_format, "error" if self.log_level == "info" else self.log_level)
        wishes = self._wishes()
        folder = self._folder(f"profile-{_plain(self.module or '')}")
        found, interrupted = self._measured(wishes)
        advice: Recommendation | str
        try:
            advice = recommend(found, latency_ms=self.latency_ms, memory_bytes=wishes.memory_bytes)
        except LookupError as error:
            advice = error.args[0]
        self._write(found, advice, folder)
        self._show(found, advice, folder)
        if interrupted:
            print("cvworker profile: interrupted; what was measured until then is written", file=sys.stderr)
        return 1 if interrupted else 0

    def _wishes(self) -> Wishes:
        """Everything that can be wrong with the settings is found here. Raises StartupError."""
        from cvworker import weights
        from cvworker.worker import guard_of, require

        require(self, "module")
        picture = self._picture()
        guard = guard_of(self)
        local = weights.local(self.weights, guard)
        exported = [weights.local(file, guard) or "" for file in self.exported]
        from cvworker.lab.profiling import Wishes
        from cvworker.model.process import device_named

        names = ("module", "weights", "device", "batch_sizes", "precisions", "formats", "exported", "sizes")
        settings = self.model_dump(mode="json", include={*names, "latency_ms", "memory_gb", "seconds", "seed", "image"})
        settings["weights"] = self.shown()["weights"]  # without the query string of its URL
        return Wishes(
            module=self.module or "",
            weights=local,
            device=device_named(self.device),
            exported=exported,
            precisions=self.precisions,
            formats=self.formats,
            batch_sizes=self.batch_sizes,
            megapixels=self.sizes,
            seconds=self.seconds,
            memory_bytes=math.floor(self.memory_gb * 2**30) if self.memory_gb else None,
            seed=self.seed,
            picture=picture,
            machine_type=self.machine_type,
            settings=settings,
        )

    def _measured(self, wishes: Wishes) -> tuple[Results, bool]:
        """The profile, and whether it was interrupted."""
        from cvworker.lab.profiling import Profiling
        from cvworker.lab.terminal import progress
        from cvworker.model.process import start_fork_server
        from cvworker.worker import FIRST_BATCH, model_config

        # A batch size that is to come from a profile may well have no file yet.
        config = model_config(self.model_copy(update={"batch_size": FIRST_BATCH}), wishes.weights, 0)
        start_fork_server(config)
        with progress("setting up") as bar:
            profiling = Profiling(wishes, config, bar.tell)
            bar.begin(profiling.steps)
            try:
                profiling.run(bar.step)
            except KeyboardInterrupt:
                return profiling.result, True
        return profiling.result, False

    def _write(self, found: Results, advice: Recommendation | str, folder: Path) -> None:
        from cvworker.lab.report import page

        found.save(folder / "profile.json")
        found.save_csv(folder / "profile.csv")
        page(found, advice).write(folder / "profile.html")

    def _show(self, found: Results, advice: Recommendation | str, folder: Path) -> None:
        from cvworker.lab import report, terminal

        console = terminal.console(PIPE_WIDTH)
        console.print(f"{found.title}, {found.module.sample}")
        terminal.print_table(console, report.COLUMNS, report.point_rows(found.points), left=LEFT)
        if found.host:
            terminal.print_table(console, report.HOST_COLUMNS, report.host_rows(found.host), left=LEFT)
        for note in found.notes:
            console.print(f"note: {note}")
        if isinstance(advice, str):
            console.print(f"nothing can be recommended: {advice}")
        else:
            console.print(report.summary(advice))
            for note in advice.notes:
                console.print(f"note: {note}")
            for line in advice.lines:
                console.print(f"  {line}")
        console.print(f"written to {folder}: profile.json, profile.csv, profile.html")

    def _compare(self) -> int:
        from cvworker.lab import compare, terminal
        from cvworker.lab.results import Profile as Results

        if len(self.profiles) != 2:
            raise StartupError(f"compare: takes two files, not {len(self.profiles)}: --compare a.json b.json")
        a, b = (Results.load(Path(path)) for path in self.profiles)
        found = compare.pairs(a, b)
        if not found:
            raise StartupError("compare: these profiles have no point in common; profile the same module both times")
        folder = self._folder("profile-compare")
        compare.page(a, b).write(folder / "compare.html")
        console = terminal.console(PIPE_WIDTH)
        console.print(f"A: {a.title}, {a.made[:16]}\nB: {b.title}, {b.made[:16]}")
        terminal.print_table(console, compare.COLUMNS, compare.rows(found), left=LEFT)
        if told := compare.pace_told(a, b):
            console.print(told)
        for line in compare.only_in_one(a, b):
            console.print(line)
        for what, of_a, of_b in compare.differences(a, b):
            console.print(f"differs: {what}: {of_a} | {of_b}")
        console.print(f"written to {folder / 'compare.html'}")
        return 0

    def _picture(self) -> bytes | None:
        """The bytes of ``image``, found to be a picture that ``run`` would accept."""
        if self.image is None:
            return None
        from cvworker.lab.host import picture_of

        try:
            data = self.image.read_bytes()
            picture_of(data, self.max_image_pixels)
        except OSError as error:
            raise StartupError(f"image: {self.image} cannot be read ({error.strerror}); give a picture") from None
        except JobError as error:
            raise StartupError(f"image: {self.image}: {error}; give a picture that 'run' would take") from None
        return data

    def _folder(self, usual: str) -> Path:
        folder = self.out or Path("build") / usual
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"out: {folder} cannot be made ({error.strerror}); give another --out") from None
        return folder


def _plain(spec: str) -> str:
    """A module's name as a part of a file name."""
    return spec.rpartition(":")[2].rpartition("/")[2].lower()


for _name in Settings.model_fields:
    if _name not in SHOWN:
        Profile.model_fields[_name].metadata.append(CLI_SUPPRESS)
