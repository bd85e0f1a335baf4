"""One batch through ``process``: results in order, and only the guilty fail."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cvworker import Module
from cvworker.errors import ProcessFailed
from cvworker.model.batcher import Sample
from cvworker.model.runner import MAX_PATIENCE, PATIENCE, Done, Runner

CPU = torch.device("cpu")


class Told(Module):
    """``process`` is what the test says; by default each value doubled."""

    name = "told"

    def __init__(self, process: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self._process = process or (lambda batch: [{"doubled": 2 * value} for value in batch.tolist()])
        self.sizes: list[int] = []

    def preprocess(self, image: Any) -> Any:
        return image

    def process(self, batch: Any) -> Any:
        self.sizes.append(len(batch))
        return self._process(batch)


def samples(*values: float) -> list[Sample]:
    return [Sample(number, torch.tensor(float(value)), 1.0) for number, value in enumerate(values, 1)]


def run(module: Module, batch: list[Sample], *, precision: str = "fp32", batch_size: int = 8) -> list[Done]:
    runner = Runner(module, CPU, precision, batch_size)
    return runner.run(runner.stage(batch))


def codes(done: list[Done]) -> list[str]:
    return ["ok" if each.error is None else each.error.code for each in done]


@pytest.fixture
def no_gc() -> Iterator[None]:
    """What is freed here is freed because nothing holds it, not because a cycle was found."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_each_sample_gets_its_own_result_in_order() -> None:
    done = run(Told(), samples(1, 2, 3))
    assert [each.sample.number for each in done] == [1, 2, 3]
    assert [json.loads(each.result or "") for each in done] == [{"doubled": 2}, {"doubled": 4}, {"doubled": 6}]
    assert len({each.process_ms for each in done}) == 1


def test_if_process_raises_the_samples_are_tried_one_by_one_and_only_the_guilty_fails() -> None:
    def process(batch: torch.Tensor) -> list[dict[str, float]]:
        if 2.0 in batch:
            raise ValueError("two\nis too much")
        return [{"value": value} for value in batch.tolist()]

    module = Told(process)
    done = run(module, samples(1, 2, 3))
    assert codes(done) == ["ok", "process_failed", "ok"]
    assert done[1].error is not None
    assert done[1].error.message == "ValueError: two is too much"
    assert module.sizes == [3, 1, 1, 1]


@pytest.mark.parametrize(
    "results",
    [[], [{}], [{}] * 4, None, {"a": 1}, "abc", torch.zeros(3), ({} for _ in range(3))],
    ids=["none", "too few", "too many", "None", "a mapping", "a string", "a tensor", "a generator"],
)
def test_anything_but_one_result_for_each_sample_is_treated_like_an_exception(results: Any) -> None:
    module = Told(lambda batch: results if len(batch) == 3 else [{"fine": True}])
    assert codes(run(module, samples(1, 2, 3))) == ["ok"] * 3
    assert module.sizes == [3, 1, 1, 1]


@pytest.mark.parametrize(
    "result",
    [{"p": float("nan")}, {"p": float("inf")}, {"p": torch.tensor(1)}, {"p": {1, 2}}, ["no mapping"], None, {(1,): 2}],
    ids=repr,
)
def test_a_result_that_is_no_json_object_fails_by_itself(result: Any) -> None:
    module = Told(lambda batch: [{"fine": True}, result, {"fine": True}])
    done = run(module, samples(1, 2, 3))
    assert codes(done) == ["ok", "process_failed", "ok"]
    assert module.sizes == [3], "the others need no other try"


def test_samples_that_do_not_collate_are_tried_one_by_one() -> None:
    batch = [Sample(1, torch.zeros(2), 1.0), Sample(2, torch.zeros(3), 1.0)]
    module = Told(lambda batch: [{"size": list(each.shape)} for each in batch])
    assert [each.result for each in run(module, batch)] == ['{"size": [2]}', '{"size": [3]}']


def test_out_of_memory_halves_the_batch_and_loses_nothing() -> None:
    def process(batch: torch.Tensor) -> list[dict[str, float]]:
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [{"value": value} for value in batch.tolist()]

    module = Told(process)
    runner = Runner(module, CPU, "fp32", 12)
    done = runner.run(runner.stage(samples(*range(12))))
    assert [json.loads(each.result or "")["value"] for each in done] == list(range(12))
    assert runner.batch_size == 3


class Device:
    """A device whose memory holds so many samples, and a runner on it with batches of eight."""

    def __init__(self, holds: int) -> None:
        self.holds = holds
        self.module = Told(self._process)
        self.runner = Runner(self.module, CPU, "fp32", 8)

    def _process(self, batch: torch.Tensor) -> list[dict[str, float]]:
        if len(batch) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [{}] * len(batch)

    def run(self, batches: int, size: int | None = None) -> int:
        """Run full batches, or batches of ``size``; the batch size after them."""
        for _ in range(batches):
            done = self.runner.run(self.runner.stage(samples(*range(size or self.runner.batch_size))))
            assert set(codes(done)) == {"ok"}
        return self.runner.batch_size

    def until_tried_again(self) -> int:
        """Full batches until a larger one is tried."""
        size = self.runner.batch_size
        return next(count for count in range(1, 100_000) if self.run(1) > size)


def test_the_batch_size_recovers_step_by_step_once_the_memory_is_enough_again() -> None:
    device = Device(holds=2)
    assert device.run(1) == 2
    device.holds = 8
    assert device.run(PATIENCE - 5) == 2, "with the four parts of the first batch that is one less"
    assert device.run(1) == 4
    assert device.run(PATIENCE) == 8
    assert device.run(3 * PATIENCE) == 8, "and never more than was asked for"


def test_batches_that_are_not_full_do_not_show_that_more_would_fit() -> None:
    device = Device(holds=4)
    device.run(1)
    assert device.run(3 * PATIENCE, size=3) == 4


def test_each_vain_try_makes_the_next_one_later_up_to_a_limit() -> None:
    device = Device(holds=4)
    device.run(1)
    waits = []
    for _ in range(9):
        waits.append(device.until_tried_again())
        assert device.run(1) == 4
    assert waits[1:4] == pytest.approx([2 * PATIENCE, 4 * PATIENCE, 8 * PATIENCE], abs=2)
    assert waits[-1] == waits[-2] == pytest.approx(MAX_PATIENCE, abs=2)


def test_patience_is_short_again_after_the_first_size_has_gone_well_for_long() -> None:
    device = Device(holds=4)
    device.run(1)
    for _ in range(3):
        device.until_tried_again()
        device.run(1)
    device.holds = 8
    device.until_tried_again()
    device.run(MAX_PATIENCE)
    device.holds = 4
    device.run(1)
    assert device.until_tried_again() <= PATIENCE


def test_a_sample_too_large_for_the_memory_fails_alone() -> None:
    def process(batch: torch.Tensor) -> list[dict[str, float]]:
        if 9.0 in batch:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [{}] * len(batch)

    done = run(Told(process), samples(1, 2, 9, 4))
    assert codes(done) == ["ok", "ok", "process_failed", "ok"]
    assert done[2].error is not None
    assert "OutOfMemoryError" in done[2].error.message


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("no")], ids=repr)
def test_what_a_failed_try_held_is_free_before_the_next_one(error: Exception, no_gc: None) -> None:
    """Activations and the batch itself would otherwise fill the memory that the smaller batch needs."""
    held: list[weakref.ref[Any]] = []

    def process(batch: torch.Tensor) -> list[dict[str, int]]:
        assert [each() for each in held] == [None] * len(held)
        activations = batch * 2
        held.extend([weakref.ref(batch), weakref.ref(activations)])
        try:
            raise KeyError("something on the way")
        except KeyError:
            if len(batch) > 1:
                raise type(error)(*error.args) from None
        return [{}]

    assert codes(run(Told(process), samples(1, 2, 3, 4))) == ["ok"] * 4
    assert len(held) > 4


@pytest.mark.parametrize("where", ["process", "collate"])
def test_an_error_that_is_kept_keeps_nothing_else(where: str, no_gc: None) -> None:
    def refuse(_batch: Any) -> Any:
        try:
            raise KeyError("cause")
        except KeyError as cause:
            raise ValueError("no") from cause

    module = Told(refuse)
    if where == "collate":
        module.collate = refuse  # type: ignore[method-assign]
    (one,) = samples(1)
    value = weakref.ref(one.value)
    (done,) = run(module, [one])
    error = done.error
    assert isinstance(error, ProcessFailed)
    del one, done
    assert value() is None
    assert error.__context__ is error.__cause__ is error.__traceback__ is None


def test_process_runs_in_inference_mode_and_in_autocast_only_for_other_precisions() -> None:
    seen: list[tuple[bool, torch.dtype]] = []

    def process(batch: torch.Tensor) -> list[dict[str, float]]:
        weights = torch.eye(2)
        seen.append((torch.is_inference_mode_enabled(), (weights @ weights).dtype))
        return [{}] * len(batch)

    run(Told(process), samples(1))
    run(Told(process), samples(1), precision="bf16")
    assert seen == [(True, torch.float32), (True, torch.bfloat16)]


def test_a_trial_lets_out_what_the_module_raises() -> None:
    runner = Runner(Told(lambda _batch: 1 / 0), CPU, "fp32", 8)
    with pytest.raises(ZeroDivisionError):
        runner.trial(samples(1, 2))
    runner = Runner(Told(lambda batch: [{"p": float("nan")}] * len(batch)), CPU, "fp32", 8)
    with pytest.raises(ProcessFailed, match="not JSON"):
        runner.trial(samples(1, 2))
