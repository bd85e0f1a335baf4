"""What a module is run in: the fastest setup whose answers are fp32's, by scripted times and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from cvworker import Module
from cvworker.model import precision as precision_module
from cvworker.model.batcher import Sample
from cvworker.model.optimize import network_of
from cvworker.model.precision import Setup, Tuning, difference, lower_precisions, tune, variations
from cvworker.model.runner import Done, Runner

CPU = torch.device("cpu")


class ScriptedBench:
    """A runner whose batches take, and answer, what the test says for its precision."""

    def __init__(self, ms: dict[str, float], answers: Callable[[str], Any] = lambda _precision: 0.5) -> None:
        self.precision = ""
        self.ms = ms
        self.answers = answers
        self.ran: list[tuple[str, int]] = []

    def trial(self, samples: list[Sample]) -> list[Done]:
        self.ran.append((self.precision, len(samples)))
        answer = self.answers(self.precision)
        if isinstance(answer, Exception):
            raise answer
        took = self.ms[self.precision] * len(samples)
        return [Done(sample, took, result=json.dumps({"score": answer})) for sample in samples]

    def batches(self, precision: str) -> int:
        return sum(ran == precision for ran, _ in self.ran)


@pytest.fixture
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "lower_precisions", lambda _device: ["bf16"])


def samples(count: int = 4) -> list[Sample]:
    return [Sample(number, torch.tensor(float(number)), 0.0) for number in range(count)]


def chosen(bench: ScriptedBench, precision: str = "auto") -> str:
    setup, _ = tune(bench, samples(), None, CPU, precision=precision, optimize="auto")
    assert bench.precision == setup.precision, "what was chosen is in place"
    return str(setup)


@pytest.mark.usefixtures("with_bf16")
@pytest.mark.parametrize(
    ("ms", "precision"), [(4.0, "bf16"), (9.0, "bf16"), (9.5, "fp32"), (10.0, "fp32"), (20.0, "fp32")]
)
def test_another_precision_is_used_when_it_is_a_tenth_faster(ms: float, precision: str) -> None:
    assert chosen(ScriptedBench({"fp32": 10.0, "bf16": ms})) == precision


@pytest.mark.usefixtures("with_bf16")
@pytest.mark.parametrize(("answer", "precision"), [(0.515, "bf16"), (0.485, "bf16"), (0.53, "fp32"), ("0.5", "fp32")])
def test_another_precision_is_used_when_its_answers_agree(answer: Any, precision: str) -> None:
    bench = ScriptedBench({"fp32": 10.0, "bf16": 1.0}, lambda precision: answer if precision == "bf16" else 0.5)
    assert chosen(bench) == precision


@pytest.mark.usefixtures("with_bf16")
def test_what_a_module_raises_in_another_precision_is_a_reason_against_it() -> None:
    bench = ScriptedBench(
        {"fp32": 10.0, "bf16": 1.0}, lambda precision: ValueError("only floats") if precision == "bf16" else 0.5
    )
    setup, trials = tune(bench, samples(), None, CPU, precision="auto", optimize="off")
    assert (str(setup), bench.precision) == ("fp32", "fp32")
    assert [str(trial) for trial in trials] == ["bf16: not possible (ValueError: only floats)"]


@pytest.mark.usefixtures("with_bf16")
def test_an_explicit_precision_is_taken_as_given_and_nothing_is_run() -> None:
    bench = ScriptedBench({"fp32": 1.0, "bf16": 10.0})
    assert chosen(bench, "bf16") == "bf16"
    assert bench.ran == []


def test_a_device_without_another_precision_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "lower_precisions", lambda _device: [])
    bench = ScriptedBench({"fp32": 1.0})
    assert chosen(bench) == "fp32"
    assert bench.ran == []


@pytest.mark.usefixtures("with_bf16")
def test_what_was_measured_can_be_read_in_one_line() -> None:
    _, trials = tune(
        ScriptedBench({"fp32": 10.0, "bf16": 4.0}), samples(), None, CPU, precision="auto", optimize="auto"
    )
    assert [str(trial) for trial in trials] == [
        "bf16 16.0 ms, fp32 40.0 ms at batch 4: used, 2.50 times as fast",
    ]


@pytest.mark.usefixtures("with_bf16")
def test_a_slow_model_is_timed_with_few_and_small_batches_but_answers_for_a_full_one() -> None:
    bench = ScriptedBench({"fp32": 100.0, "bf16": 50.0})
    assert chosen(bench) == "bf16"
    assert [size for precision, size in bench.ran if precision == "bf16"] == [4, 2, 2, 2, 2]
    assert [size for precision, size in bench.ran if precision == "fp32"] == [4, 2, 2, 2, 2]


def test_nothing_is_tried_once_the_time_for_measuring_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "lower_precisions", lambda _device: ["fp16", "bf16"])
    bench = ScriptedBench({"fp32": 1000.0, "fp16": 2000.0, "bf16": 1.0})
    _, trials = tune(bench, samples(), None, CPU, precision="auto", optimize="auto")
    assert [str(trial) for trial in trials] == [
        "fp16 4000.0 ms, fp32 2000.0 ms at batch 2: not used, 0.50 times as fast",
        "bf16: not tried, the time for measuring is over",
    ]
    assert bench.precision == "fp32"


@pytest.mark.usefixtures("with_bf16")
def test_a_fast_model_is_timed_with_several_full_batches_but_not_where_it_is_hopeless() -> None:
    hopeful, hopeless = (ScriptedBench({"fp32": 1.0, "bf16": ms}) for ms in (0.5, 2.0))
    chosen(hopeful)
    chosen(hopeless)
    assert (hopeful.batches("bf16"), hopeless.batches("bf16")) == (8, 3)


def test_setups_that_cannot_be_made_leave_the_best_in_place() -> None:
    class Reluctant:
        name = "reluctant"

        def on(self) -> None:
            raise RuntimeError("no\ncompiler")

        def off(self) -> None:
            pass

    bench = ScriptedBench({"fp32": 1.0})
    tuning = Tuning(bench, samples(), Setup("fp32"))
    assert not tuning.try_("fp32", lambda: [Reluctant()])
    assert str(tuning.trials[0]) == "fp32 reluctant: not possible (RuntimeError: no compiler)"
    assert tuning.best == Setup("fp32")


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ({"a": [0.5, "x", True, None, 3]}, {"a": [0.51, "x", True, None, 3]}),
        ([100.0], [102.0]),
        ([3], [3.05]),
        ({}, {}),
    ],
    ids=repr,
)
def test_trees_agree_within_the_tolerance(expected: Any, found: Any) -> None:
    assert difference(expected, found) is None


@pytest.mark.parametrize(
    ("expected", "found", "where"),
    [
        ([{"a": 0.5}], [{"a": 0.6}], "results[0].a is 0.6, not 0.5"),
        ([100.0], [102.1], "results[0] is 102.1, not 100.0"),
        ({"label": "cat"}, {"label": "dog"}, 'results.label is "dog", not "cat"'),
        ({"class": 80}, {"class": 81}, "results.class is 81, not 80"),
        ({"a": 1}, {"b": 1}, 'results is {"b": 1}, not {"a": 1}'),
        ([1, 2], [1], "results is [1], not [1, 2]"),
        ([True], [1], "results[0] is 1, not true"),
        ([None], [0.0], "results[0] is 0.0, not null"),
        ([1.0], ["1.0"], 'results[0] is "1.0", not 1.0'),
        (["x" * 100], ["y"], 'results[0] is "y", not "' + "x" * 56 + "..."),
    ],
)
def test_where_trees_differ_is_told(expected: Any, found: Any, where: str) -> None:
    assert difference(expected, found) == where


@pytest.mark.parametrize(
    ("cpuinfo", "precisions"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", ["bf16"]),
        ("flags\t: fpu amx_tile amx_bf16", ["bf16"]),
        ("Features\t: fp asimd bf16 i8mm", ["bf16"]),
        ("flags\t: fpu avx2 avx512f", []),
        ("", []),
        (None, []),
    ],
    ids=["AVX512-BF16", "AMX", "ARM", "without", "nothing said", "not Linux"],
)
def test_bf16_is_tried_on_a_cpu_that_has_it(cpuinfo: str | None, precisions: list[str], tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    assert lower_precisions(CPU, path) == precisions


def test_warm_up_images_are_all_different_and_of_the_examples_type() -> None:
    class Pil(Told):
        image_type = "pil"

    for module in (Told(), Pil()):
        example = module.example()
        images = variations(example, 8)
        assert [type(image) for image in images] == [type(example)] * 8
        assert len({numpy.asarray(image).tobytes() for image in images}) == 8
        assert len(variations(example, 20)) == 20


class Told(Module):
    name = "told"

    def preprocess(self, image: Any) -> Any:
        return image

    def process(self, batch: Any) -> Any:
        return [{"mean": value} for value in batch.float().mean((1, 2, 3)).tolist()]


class Network(Told):
    """A network large enough for its format to matter, with an answer that may be asked to fail in bf16."""

    def __init__(self, *, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 36, 2)).eval()

    def process(self, batch: torch.Tensor) -> Any:
        outputs = self.model(batch.float() / 255)
        dtype = {"dtype": str(outputs.dtype)} if self.strict else {}
        return [{"scores": row, **dtype} for row in outputs.float().softmax(1).tolist()]


@pytest.mark.usefixtures("with_bf16")
@pytest.mark.parametrize("strict", [False, True])
def test_a_real_network_answers_the_same_after_tuning_whatever_was_chosen(strict: bool) -> None:
    torch.manual_seed(0)
    module = Network(strict=strict)
    runner = Runner(module, CPU, "fp32", 4)
    batch = [Sample(n, image, 0.0) for n, image in enumerate(variations(torch.full((3, 8, 8), 90).byte(), 4))]
    before = [json.loads(done.result or "") for done in runner.trial(batch)]
    setup, trials = tune(runner, batch, network_of(module), CPU, precision="auto", optimize="auto")
    after = [json.loads(done.result or "") for done in runner.run(runner.stage(batch))]
    assert difference(before, after) is None
    assert trials or setup.precision == "fp32"
    if strict:
        assert setup.precision == "fp32", "the type shows in the answers"
