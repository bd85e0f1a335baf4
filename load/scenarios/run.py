"""A run from the first picture to the raw data: the workers warmed up, then row after row of the scenarios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from load.scenarios import raw, rows
from load.scenarios.here import Here, Wishes, here
from load.scenarios.plans import MAKERS, PROBE, WARM, Offered, Sizes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cvworker.errors import StartupError, WorkerFailed


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be run."""

    scenarios: tuple[str, ...]
    wishes: Wishes
    sizes: Sizes
    out: Path
    command: str
    pace: float | None = None
    machine_type: str | None = None
    own: Offered | None = None
    """The traffic of ``offer``."""


class Run:
    """One run; :attr:`raws` grows by one with every scenario, each of them saved at once."""

    def __init__(self, order: Order, console: Console) -> None:
        self.order, self.console = order, console
        self.raws: list[raw.Raw] = []

    def run(self) -> list[raw.Raw]:
        """Everything; the raw data. Raises StartupError and WorkerFailed, with nothing left running."""
        order = self.order
        logs = order.out / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"out: {order.out} cannot be written ({error.strerror}); give another folder") from None
        with ExitStack() as stack:
            with self.console.status("") as status:
                opened = here(order.wishes, logs, lambda text: status.update(f"starting: {text}"))
                made = stack.enter_context(opened)
            self._scenarios(made)
        return self.raws

    def _scenarios(self, made: Here) -> None:
        notes = [made.queue.note] if made.queue.note else []
        if made.queue.kind == "ministack" and len(made.workers) > 1:
            notes.append(
                "MiniStack hands out unevenly to several workers; --queue fast does so by chance, as SQS does."
            )
        pace = self.order.pace
        if pace is None and self.order.scenarios != ("offer",):
            pace = self._warmed(made)
            if "offline" not in self.order.scenarios:
                [first] = MAKERS["offline"](pace, self.order.sizes)
                pace = rows.row(self._row(made, "pace", first)).achieved
                notes.append(f"Shares are of {pace:.1f} images/s, a full queue's pace, measured first.")
        elif pace is None:
            self._row(made, "warm-up", Offered("warm-up", f"full:{WARM}", 0.0))
        for scenario in self.order.scenarios:
            plan = [self.order.own] if self.order.own else MAKERS[scenario](pace or 0.0, self.order.sizes)
            found = [self._row(made, scenario, each) for each in plan]
            best = rows.row(found[0]).achieved if scenario == "offline" else None
            if scenario == "online":
                best = max((each.achieved for each in map(rows.row, found) if each.valid), default=None)
            pace = best if scenario == "offline" else pace
            self._keep(made, scenario, found, best, notes)

    def _warmed(self, made: Here) -> float:
        """Roughly what the workers do a second, once they are warm."""
        first = rows.row(self._row(made, "warm-up", Offered("warm-up", f"full:{WARM}", 0.0))).achieved
        if not first:
            raise WorkerFailed("the workers answered nothing; their logs are in " + str(self.order.out / "logs"))
        count = max(WARM, round(first * PROBE))
        return rows.row(self._row(made, "warm-up", Offered("warm-up", f"full:{count}", 0.0))).achieved

    def _row(self, made: Here, scenario: str, offered: Offered) -> dict[str, Any]:
        with _bar(self.console, f"{scenario} {offered.name}") as tell:
            found = made.offer(offered.traffic, offered.seconds, self.order.wishes.seed, tell)
        return {"name": offered.name, **found}

    def _keep(
        self, made: Here, scenario: str, found: list[dict[str, Any]], pace: float | None, notes: list[str]
    ) -> None:
        import torch

        from cvworker.lab import machine

        wishes, model = self.order.wishes, made.model
        on_gpu = bool(model) and model["device"] != "cpu" and torch.cuda.is_available()
        about = machine.machine_info(torch.device("cuda:0" if on_gpu else "cpu"), self.order.machine_type)
        kept: raw.Raw = {
            "scenario": scenario,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.order.command,
            "commit": machine.commit(),
            "seed": wishes.seed,
            "module": wishes.module,
            "workers": wishes.workers,
            "model": model,
            "machine": about.model_dump(),
            "versions": machine.versions(),
            "queue": made.queue.kind,
            "ceiling": asdict(made.ceiling),
            "pictures": made.pictures.told,
            "world": (
                f"image host {wishes.image_latency} ms and {wishes.image_errors:.1%} errors, receiver "
                f"{wishes.callback_latency} ms and {wishes.callback_errors:.1%} errors"
            ),
            "pace_images_s": pace,
            "notes": notes,
            "rows": found,
        }
        self.raws.append(kept)
        raw.save(kept, self.order.out / f"{scenario}.json")


@contextmanager
def _bar(console: Console, title: str) -> Iterator[Any]:
    """A progress bar for one row, told what the generator tells; a line where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    terminal = Console(stderr=True)
    if not terminal.is_terminal:
        console.print(title, highlight=False, markup=False)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def tell(told: dict[str, Any]) -> None:
            if "requests" in told:
                bar.update(task, total=told["requests"])
            if "answered" in told:
                bar.update(task, completed=told["answered"], description=f"{title}: {told['sent']} sent")

        yield tell


def passed(raws: Sequence[raw.Raw]) -> bool:
    """Whether each scenario has a row that counts, and no request was lost."""
    made = [[rows.row(each) for each in kept["rows"]] for kept in raws]
    return all(any(each.valid for each in found) and not any(each.lost for each in found) for found in made)
