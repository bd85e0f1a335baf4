"""``cvworker plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg

from cvworker.errors import StartupError
from cvworker.settings import AutoInt, CommandLine, TextList, how_to_set

if TYPE_CHECKING:
    from cvworker.lab.catalogue import Catalogue
    from cvworker.plan.fleet import Fleet, MachineType, Wish

PIPE_WIDTH = 200
PEAK_AT_S, PEAK_S = 18 * 3600.0, 3600.0


class Plan(CommandLine):
    """How many of which machine a traffic needs, at what latency, for how much a month.

    Takes what 'cvworker profile' measured, a day of traffic and a latency target; simulates the queue, the workers with
    their batches, the scaling and spot interruptions; and prints for each machine type the cheapest fleet that keeps
    the target, with the lines to paste into deploy/. A report is written to --out.

    examples: cvworker plan traffic.toml --profile build/profile-threat/profile.json --latency-s 30

              cvworker plan --rate 50 --peak 200 --latency-s 30 --images-per-s 120 --machines g4dn.2xlarge

              cvworker plan --rate 50 --load-result build/load/offline.json

              cvworker plan --example > traffic.toml
    """

    traffic: CliPositionalArg[Path | None] = Field(None, description="A TOML file; --example prints one")
    profile: TextList = Field(
        [], description="profile.json of 'cvworker profile'; several: comma-separated or repeated"
    )
    measured: TextList = Field(
        [], description="MACHINE=IMAGES_S: what a load test saw one task do at most; its plan goes no further"
    )
    load_result: TextList = Field(
        [], description="offline.json or online.json of 'python -m load.scenarios': its pace, as by --measured"
    )
    prices: Path | None = Field(None, description="TOML with machines and prices, over those of the catalogue")
    machines: TextList = Field([], description="Machine types to look at; default: all that something is known of")
    latency_s: float = Field(30.0, gt=0, description="95 of 100 images of the day are answered within this [seconds]")
    batch: AutoInt = Field("auto", description="Images in a batch at most; auto chooses for each machine type")
    rate: float | None = Field(None, gt=0, le=1e6, description="Without a file: images a second, all day")
    peak: float | None = Field(None, gt=0, le=1e6, description="Without a file: images a second from 18:00 to 19:00")
    images_per_s: float | None = Field(None, gt=0, description="Without a profile: what one task does a second")
    start_s: float = Field(240.0, ge=0, description="From the wish for a task to its first receive [seconds]")
    seed: int = Field(0, ge=0, description="Of everything that comes by chance")
    out: Path = Field(Path("build/plan"), description="Folder for plan.html, plan.json and plan.csv")
    example: bool = Field(False, description="Print a traffic file with every field, and end")

    def main(self) -> int:
        from cvworker.plan.reading import EXAMPLE

        if self.example:
            print(EXAMPLE, end="")
            return 0
        import sys

        from rich.console import Console

        from cvworker.lab import catalogue
        from cvworker.plan import report

        prices = catalogue.load(self.prices)
        wish = self._wish()
        machines = self._machines(prices)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"out: {self.out} cannot be written ({error.strerror}); give another folder") from None
        fleets = _planned(machines, wish)
        terminal = sys.stdout.isatty()
        console = Console(width=None if terminal else PIPE_WIDTH, highlight=False)
        report.print_plan(fleets, wish, prices.title, console)
        try:
            report.write(self.out, fleets, wish, prices.title)
        except OSError as error:
            raise StartupError(f"out: {self.out} cannot be written ({error.strerror})") from None
        console.print(f"\nwritten to {self.out / 'plan.html'}, plan.json and plan.csv", markup=False, soft_wrap=True)
        return 0 if any(fleet.keeps for fleet in fleets) else 1

    def _wish(self) -> Wish:
        from cvworker.plan.fleet import Wish
        from cvworker.plan.reading import TrafficFile, read_traffic
        from cvworker.plan.traffic import Peak, Traffic

        if (self.traffic is None) == (self.rate is None):
            raise StartupError(
                "traffic: give a file ('cvworker plan --example' prints one), or the simple case by "
                f"{how_to_set('rate')}, and not both"
            )
        if self.traffic is not None:
            file: TrafficFile = read_traffic(self.traffic)
            spot = file.spot
            return Wish(
                file.traffic(),
                self.latency_s,
                self.start_s,
                spot_share=spot.share,
                interruptions_a_month=spot.interruptions_per_month,
                without_notice=spot.without_notice,
                seed=self.seed,
            )
        if self.peak is not None and self.peak < (self.rate or 0):
            raise StartupError(f"peak: {self.peak:g} is below the rate ({self.rate:g}), which is the day's mean")
        peaks = () if self.peak is None else (Peak(PEAK_AT_S, PEAK_S, self.peak),)
        return Wish(Traffic(self.rate or 0.0, peaks=peaks), self.latency_s, self.start_s, seed=self.seed)

    def _machines(self, prices: Catalogue) -> list[MachineType]:
        from cvworker.lab.results import Profile
        from cvworker.plan.machines import HERE, by_hand, from_profile, machine_types

        known = {*prices.machines, HERE}
        batch_size = None if self.batch == "auto" else self.batch
        loads = _load_results(self.load_result, known)
        paces = _paces(self.measured, known) | loads
        if self.images_per_s is not None and not self.profile:
            return by_hand(self.images_per_s, prices, wanted=self.machines, batch_size=batch_size)
        if loads and not self.profile:
            wanted = [name for name in loads if not self.machines or name in self.machines]
            if not wanted:
                raise StartupError(f"machines: the load results are of {', '.join(loads)}; name one of these")
            return [
                machine
                for name in wanted
                for machine in by_hand(
                    loads[name], prices, wanted=[] if name == HERE else [name], batch_size=batch_size
                )
            ]
        if not self.profile:
            raise StartupError(
                "profile: give what 'cvworker profile' wrote, by --profile PATH; or a task's pace, by --images-per-s "
                "or --load-result"
            )
        measured = [from_profile(Profile.load(Path(path)), prices) for path in self.profile]
        if HERE in loads and all(each.machine in prices.machines for each in measured):
            raise StartupError(
                "load_result: its machine has no type, and the profiles' have; measure with --machine-type, or give "
                "its pace by --measured MACHINE=IMAGES_S"
            )
        return machine_types(
            measured,
            prices,
            wanted=self.machines,
            latency_s=self.latency_s,
            batch_size=batch_size,
            paces=paces,
        )


def _paces(given: list[str], known: set[str]) -> dict[str, float]:
    """Images a second by machine type. Raises StartupError for what is none."""
    from cvworker.lab.cost import numbers_by_name

    refusal = "measured: {!r} must be a machine and images a second, such as g5.xlarge=120"
    found = numbers_by_name(given, refusal)
    for name in found:
        if name not in known:
            raise StartupError(f"measured: there is no {name!r} in the catalogue; add it by --prices FILE")
    return found


def _load_results(given: list[str], known: set[str]) -> dict[str, float]:
    """Images a second of one task, by machine type, as load tests saw them. Raises StartupError for what is none."""
    from cvworker.plan.machines import HERE
    from cvworker.plan.reading import read_load_result

    found = {}
    for path in given:
        machine, pace = read_load_result(Path(path))
        if machine is not None and machine not in known:
            raise StartupError(
                f"load_result: {path}, machine: there is no {machine!r} in the catalogue; add it by --prices FILE"
            )
        found[machine or HERE] = pace
    return found


def _planned(machines: list[MachineType], wish: Wish) -> list[Fleet]:
    """Each machine type's fleet, with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from cvworker.plan.search import Planner

    fleets = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(machines))
        for machine in machines:
            planner = Planner(
                machine,
                wish,
                tell=lambda what, name=machine.name: bar.update(task, description=f"{name}: {what}"),  # type: ignore[misc]
            )
            fleets.append(planner.plan())
            bar.advance(task)
    return fleets
