"""The module on its device, in one actor: set up, in the form that was chosen, run batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

from cvworker import __version__, weights
from cvworker.bulk.work import Work, settle_in
from cvworker.errors import JobError, StartupError

if TYPE_CHECKING:
    from cvworker.model.batcher import Sample
    from cvworker.model.runner import Done, Staged


class Engine:
    """Makes a module and sets it up.

    Raises StartupError: module or weights will not do, or the weights are not those of the other machines.
    """

    def __init__(self, work: Work) -> None:
        cores = len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = str(cores)  # Ray gives an actor one thread for each CPU it has asked for
        settle_in(work)
        import torch

        from cvworker.loading import load, make
        from cvworker.model.runner import Runner

        torch.set_num_threads(cores)
        self.work = work
        self.module = make(load(work.module), weights.local(work.weights, work.guard))
        digest = weights.sha256_of(self.module.weights) if self.module.weights else None
        if digest != work.weights_digest:
            raise StartupError(f"weights: {work.weights} is another file on {os.uname().nodename} ({digest})")
        self.device = torch.device(work.device)
        try:
            self.module.setup(self.device)
        except StartupError:
            raise
        except Exception as error:
            raise StartupError(f"module: {work.name}.setup raised {type(error).__name__}: {error}") from error
        precision = "fp32" if work.precision == "auto" else work.precision
        self._runner = Runner(self.module, self.device, precision, work.batch_size)
        self._stager = ThreadPoolExecutor(1, "stage") if self.device.type == "cuda" else None
        self._digest = digest

    @property
    def info(self) -> dict[str, str | None]:
        """The answer's ``worker``."""
        return {
            "version": __version__,
            "module": self.module.name,
            "weights": self._digest,
            "precision": self._runner.precision,
        }

    def tune(self) -> tuple[str, tuple[str, ...]]:
        """Find the precision and the forms that are fastest at unchanged answers, as the worker does at its start."""
        from cvworker.model.batcher import Sample
        from cvworker.model.optimize import network_of
        from cvworker.model.precision import tune, variations

        work, first = self.work, self._runner.precision
        try:
            images = variations(self.module.example(), work.batch_size)
            samples = [Sample(0, self.module.preprocess(image), 0.0) for image in images]
            network = network_of(self.module)
            chosen, _ = tune(
                self._runner, samples, network, self.device, precision=work.precision, optimize=work.optimize
            )
        except Exception:  # the module dislikes its example: nothing can be measured
            return first, ()
        return chosen.precision, tuple(form.name for form in chosen.forms)

    def put_forms_on(self) -> None:
        """Give the network the forms that were chosen, in their order."""
        from cvworker.model.optimize import ChannelsLast, Compiled, Form, Graphs, network_of
        from cvworker.model.precision import PRECISIONS

        model = network_of(self.module)
        for name in self.work.forms:
            assert model is not None
            form: Form
            if name == "channels-last":
                form = ChannelsLast(model, PRECISIONS[self.work.precision])
            else:
                form = Compiled(model) if name == "compiled" else Graphs(model, self.work.batch_size)
            form.on()

    def warm_up(self) -> None:
        """A full batch of the example, and one alone: what is slow the first time is done. A failure is no matter."""
        from cvworker.model.batcher import Sample

        try:
            sample = self.module.preprocess(self.module.example())
            for size in (self.work.batch_size, 1):
                self._runner.trial([Sample(0, sample, 0.0)] * size)
        except Exception:  # noqa: S110 - a module may dislike its example; images of its own are what counts
            pass

    def batches(self, samples: Iterable[Sample]) -> Iterator[Staged]:
        """The samples in batches, on a GPU each copied there while the one before it computes."""
        rest = iter(samples)
        if self._stager is None:
            while batch := list(islice(rest, self._runner.batch_size)):
                yield self._runner.stage(batch)
            return

        def stage_next() -> Staged | None:
            batch = list(islice(rest, self._runner.batch_size))
            return self._runner.stage(batch) if batch else None

        ahead = self._stager.submit(stage_next)
        while (staged := ahead.result()) is not None:
            ahead = self._stager.submit(stage_next)
            yield staged

    def run(self, staged: Staged) -> list[Done]:
        return self._runner.run(staged)


def probe(work: Work) -> dict[str, Any]:
    """Set the module up once, before anything is written: what it will run in, or ``unusable`` and why."""
    try:
        engine = Engine(work)
        precision, forms = engine.tune() if work.optimize else (work.precision, work.forms)
        import torch

        cuda = engine.device.type == "cuda"
        name = torch.cuda.get_device_name(engine.device) if cuda else "cpu"
        return {"precision": precision, "forms": forms, "device_name": name}
    except (StartupError, JobError) as error:
        return {"unusable": str(error)}
