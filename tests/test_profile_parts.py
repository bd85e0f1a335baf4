"""The parts of a profile: windows, batch sizes that double, memory, variants, and series that end where they should."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cvworker import memory
from cvworker.errors import StartupError
from cvworker.lab import machine, timing
from cvworker.lab.results import Point, Split, steady, window_rate
from cvworker.lab.sweep import Plan, Sweep
from cvworker.lab.timing import MOST_WINDOWS
from cvworker.lab.variants import Variant, usual_formats, variants, wearing
from cvworker.model import batch_size
from cvworker.model.batch_size import Doubling, Room, smallest_good
from cvworker.model.optimize import has_compiler
from fakes import StepClock

CPU = torch.device("cpu")
MIB = 2**20
EAGER = Variant("fp32", "eager")


def taking(*milliseconds: float) -> Callable[[], Split]:
    """Batches that take so long, one after the other, and again from the first."""
    again = itertools.cycle(milliseconds)
    return lambda: Split(0.0, next(again), 0.0)


class TestTiming:
    def test_three_windows_that_agree_are_enough(self) -> None:
        windows = timing.measure(taking(100.0), 8, seconds=1.0)
        assert windows == [[Split(0, 100, 0)] * 2] * 3

    def test_a_window_holds_batches_for_a_fifth_of_the_time_and_at_least_one(self) -> None:
        assert [len(window) for window in timing.measure(taking(10.0), 8, seconds=1.0)] == [20, 20, 20]
        assert [len(window) for window in timing.measure(taking(5000.0), 8, seconds=1.0)] == [1, 1, 1]

    def test_windows_go_on_until_the_last_three_agree(self) -> None:
        slow_at_first = itertools.chain([500.0, 300.0], itertools.repeat(250.0))
        windows = timing.measure(lambda: Split(0.0, next(slow_at_first), 0.0), 1, seconds=1.0)
        assert [window[0].compute for window in windows] == [500, 300, 250, 250, 250]

    def test_what_never_agrees_ends_all_the_same(self) -> None:
        windows = timing.measure(taking(300.0, 200.0, 250.0), 1, seconds=1.0)
        assert len(windows) == MOST_WINDOWS

    @given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=30), st.integers(1, 64), st.floats(0.001, 10))
    def test_it_ends_early_if_and_only_if_the_last_three_agree(
        self, milliseconds: list[float], batch: int, seconds: float
    ) -> None:
        windows = timing.measure(taking(*milliseconds), batch, seconds)
        rates = [window_rate(window, batch) for window in windows]
        assert 3 <= len(windows) <= MOST_WINDOWS
        assert all(windows)
        assert steady(rates) or len(windows) == MOST_WINDOWS
        assert not any(steady(rates[:end]) for end in range(3, len(rates)))

    def test_batches_to_warm_up_are_not_among_the_samples(self) -> None:
        slow_at_first = itertools.chain([5000.0, 900.0], itertools.repeat(250.0))
        run = lambda: Split(0.0, next(slow_at_first), 0.0)  # noqa: E731
        timing.warm_up(run, seconds=1.0)
        assert timing.measure(run, 1, seconds=1.0) == [[Split(0, 250, 0)]] * 3


class TestDoubling:
    @staticmethod
    def tried(rate: Callable[[int], float], **given: Any) -> list[int]:
        steps, found = Doubling(**given), []
        while (batch := steps.next) is not None:
            found.append(batch)
            steps.measured(rate(batch))
        return found

    def test_it_goes_on_while_there_is_a_gain(self) -> None:
        assert self.tried(lambda batch: batch, largest=64) == [1, 2, 4, 8, 16, 32, 64]

    def test_it_ends_after_two_doublings_without_one(self) -> None:
        assert self.tried(lambda batch: min(batch, 4) * 10) == [1, 2, 4, 8, 16]

    def test_a_single_one_without_is_forgiven(self) -> None:
        rates = {1: 10, 2: 20, 4: 20, 8: 30, 16: 30, 32: 30}
        assert self.tried(lambda batch: rates[batch]) == [1, 2, 4, 8, 16, 32]

    def test_the_largest_need_be_no_power_of_two(self) -> None:
        assert self.tried(lambda batch: batch, largest=6) == [1, 2, 4, 6]

    @given(st.lists(st.floats(0.1, 1e4), min_size=20, max_size=20), st.integers(1, 5000))
    def test_it_always_ends_within_its_largest(self, rates: list[float], largest: int) -> None:
        found = self.tried(lambda batch: rates[batch.bit_length()], largest=largest)
        assert found[0] == 1
        assert found == sorted(set(found))
        assert found[-1] <= largest

    def test_the_smallest_batch_that_is_as_good_as_the_best_is_taken(self) -> None:
        assert smallest_good({1: 10, 2: 96, 4: 94, 8: 100}) == 2


class TestBatchSizeAtStart:
    """``batch_size: auto``, on a clock that the batches move on."""

    def measure(self, seconds: Callable[[int], float], **given: Any) -> tuple[int, dict[int, float]]:
        clock = StepClock()
        return batch_size.measure(lambda batch: clock.advance(seconds(batch)), clock.monotonic, **given)

    def test_the_batch_after_which_nothing_is_gained_is_taken(self) -> None:
        # given 10 ms for a batch and 1 ms for an image up to 8, beyond which each takes as long again
        chosen, rates = self.measure(lambda batch: 0.01 + 0.001 * batch if batch <= 8 else 0.018 * batch / 8)
        assert chosen == 8
        assert list(rates) == [1, 2, 4, 8, 16, 32]
        assert rates[8] == pytest.approx(8 / 0.018)

    def test_a_slow_first_batch_of_a_size_does_not_count(self) -> None:
        times = {1: iter([5e-1, 1e-2, 1e-2, 1e-2]), 2: iter([5e-1, 2e-2, 2e-2, 2e-2]), 4: iter([1, 4e-2, 4e-2, 4e-2])}
        chosen, rates = self.measure(lambda batch: next(times[batch]), largest=4)
        assert chosen == 1
        assert list(rates.values()) == [pytest.approx(100)] * 3

    def test_it_takes_no_longer_than_it_may(self) -> None:
        clock = StepClock()
        began = clock.monotonic()
        chosen, rates = batch_size.measure(
            lambda batch: clock.advance(0.3 + 0.01 * batch), clock.monotonic, budget_s=5.0
        )
        assert clock.monotonic() - began < 6
        assert chosen == max(rates)

    def test_a_model_that_takes_longer_than_all_the_time_gets_a_batch_of_one(self) -> None:
        assert self.measure(lambda batch: 60.0 * batch)[0] == 1

    def test_memory_that_ends_is_the_end(self) -> None:
        def seconds(batch: int) -> float:
            if batch > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 0.01

        assert self.measure(seconds)[0] == 4

    def test_what_does_not_fit_is_not_tried(self) -> None:
        chosen, rates = self.measure(lambda _batch: 0.01, fits=lambda batch: batch <= 16)
        assert (chosen, max(rates)) == (16, 16)

    @pytest.mark.parametrize("error", [ValueError("no"), torch.OutOfMemoryError("not even one")])
    def test_what_fails_with_one_image_is_the_module_s_to_explain(self, error: Exception) -> None:
        def seconds(_batch: int) -> float:
            raise error

        with pytest.raises(type(error)):
            self.measure(seconds)

    def test_room_is_what_the_machine_has_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        room = Room(on_device=False)
        peak = memory.resident_bytes() + 100 * MIB
        monkeypatch.setattr(memory, "peak_bytes", lambda: peak)
        monkeypatch.setattr(memory, "available_bytes", lambda: 1000 * MIB)
        assert room.fits(2)
        monkeypatch.setattr(memory, "available_bytes", lambda: 300 * MIB)
        assert not room.fits(2)
        assert Room(on_device=True).fits(2)


class TestMemory:
    def test_the_peak_is_that_since_it_was_reset(self) -> None:
        # In a process of its own: this one may have had far more before, and not every kernel lets us forget it.
        program = """
import json
from cvworker import memory

before = memory.peak_bytes()
block = bytearray(64 << 20)
held = memory.peak_bytes()
del block
may_reset = memory.reset_peak()
print(json.dumps([before, held, memory.peak_bytes(), may_reset]))
"""
        told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        before, held, afterwards, may_reset = json.loads(told)
        assert held - before > 48 * MIB
        assert (held - afterwards > 48 * MIB) == may_reset

    def test_a_kernel_that_does_not_forget_the_peak_is_no_failure(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memory, "CLEAR", tmp_path / "none" / "clear_refs")
        assert not memory.reset_peak()

    def test_what_there_is_is_no_more_than_the_machine_has(self) -> None:
        assert 0 < memory.available_bytes() <= memory.total_bytes()

    def test_a_container_s_limit_is_the_machine_s(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        limit, used = tmp_path / "max", tmp_path / "current"
        limit.write_text(f"{300 * MIB}\n")
        used.write_text(f"{100 * MIB}\n")
        monkeypatch.setattr(memory, "CGROUPS", ((limit, used),))
        assert memory.total_bytes() == 300 * MIB
        assert memory.available_bytes() == 200 * MIB
        limit.write_text("max\n")
        assert memory.total_bytes() > 300 * MIB

    def test_more_than_the_limit_fails_instead_of_being_killed(self) -> None:
        with memory.data_limit(200 * MIB):
            torch.ones(50 * MIB, dtype=torch.uint8)
            with pytest.raises(RuntimeError) as failed:
                torch.ones(800 * MIB, dtype=torch.uint8)
        assert memory.is_out_of_memory(failed.value)
        assert torch.ones(300 * MIB, dtype=torch.uint8).sum() > 0

    def test_other_errors_are_not_taken_for_it(self) -> None:
        assert memory.is_out_of_memory(MemoryError())
        assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
        assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class Scripted:
    """A subject whose batches the test scripts: milliseconds for a batch size, or what it raises."""

    def __init__(self, milliseconds: Callable[[int], float]) -> None:
        self.device = CPU
        self.network = None
        self.runner = SimpleNamespace(precision="fp32")
        self.made: list[int] = []
        self._milliseconds = milliseconds

    def process_batch(self, count: int, _megapixels: float | None) -> Callable[[], Split]:
        self.made.append(count)
        return lambda: Split(0.0, self._milliseconds(count), 0.0)

    network_batch = process_batch


def swept(subject: Any, variant: Variant = EAGER, size: float | None = None, **given: Any) -> list[Point]:
    sweep = Sweep(seconds=0.001, **given)
    sweep.rise(Plan(subject, "process", variant, size))
    sweep.fall()
    return sweep.points


class TestSeries:
    def test_each_batch_size_is_measured_on_the_way_up_and_on_the_way_down(self) -> None:
        subject = Scripted(lambda batch: 10 + batch)
        points = swept(subject, batches=[1, 2, 4])
        assert subject.made == [1, 2, 4, 4, 2, 1]
        assert [(point.batch, point.status, len(point.passes)) for point in points] == [
            (1, "ok", 2),
            (2, "ok", 2),
            (4, "ok", 2),
        ]
        assert points[2].images_s == pytest.approx(4000 / 14)
        assert points[2].split_ms == (0, 14, 0)

    def test_without_sizes_given_they_double_until_nothing_is_gained(self) -> None:
        points = swept(Scripted(lambda batch: 10 * max(batch, 4)))
        assert [point.batch for point in points] == [1, 2, 4, 8, 16]

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ],
    )
    def test_memory_that_ends_is_the_end_of_the_series_and_recorded(self, error: Exception) -> None:
        def milliseconds(batch: int) -> float:
            if batch >= 8:
                raise error
            return 10.0

        points = swept(Scripted(milliseconds))
        assert [(point.batch, point.status) for point in points] == [
            *((1, "ok"), (2, "ok"), (4, "ok")),
            (8, "out of memory"),
        ]
        assert "emory" in points[-1].why
        assert not points[-1].measured

    def test_any_other_failure_ends_the_series_with_its_reason(self) -> None:
        def milliseconds(batch: int) -> float:
            if batch >= 2:
                raise ValueError("batches of one only")
            return 10.0

        points = swept(Scripted(milliseconds), batches=[1, 2, 4])
        assert [(point.batch, point.status, point.why) for point in points] == [
            (1, "ok", ""),
            (2, "failed", "ValueError: batches of one only"),
        ]

    def test_what_fails_the_second_time_is_unstable(self) -> None:
        calls = itertools.count()

        def milliseconds(_batch: int) -> float:
            if next(calls) > 6:
                raise ValueError("tired")
            return 10.0

        [point] = swept(Scripted(milliseconds), batches=[1])
        assert (point.status, point.why) == ("unstable", "it failed in the second pass: ValueError: tired")

    def test_passes_that_differ_are_unstable(self) -> None:
        subject = Scripted(lambda batch: 10.0 if subject.made == [1] else 20.0)
        [point] = swept(subject, batches=[1])
        assert point.status == "unstable"
        assert "the two passes differ" in point.why

    def test_on_the_cpu_a_batch_that_would_not_fit_is_not_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # given 100 MiB for each image, of 1 GiB
        subject = Scripted(lambda batch: 10.0)
        base = memory.resident_bytes()
        monkeypatch.setattr(memory, "peak_bytes", lambda: base + 100 * MIB * subject.made[-1])
        monkeypatch.setattr(memory, "resident_bytes", lambda: base)
        monkeypatch.setattr(memory, "available_bytes", lambda: 1024 * MIB)
        points = swept(subject)
        assert [(point.batch, point.status) for point in points] == [
            *((1, "ok"), (2, "ok"), (4, "ok"), (8, "ok")),
            (16, "out of memory"),
        ]
        assert points[-1].why == "it would take 1.6 GiB of the 1.0 GiB that are free"

    def test_a_series_ends_with_the_first_batch_above_the_memory_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        subject = Scripted(lambda batch: 10.0)
        monkeypatch.setattr(memory, "peak_bytes", lambda: 100 * MIB * subject.made[-1])
        points = swept(subject, memory_limit=300 * MIB)
        assert [(point.batch, point.host_memory_bytes) for point in points] == [
            (1, 100 * MIB),
            (2, 200 * MIB),
            (4, 400 * MIB),
        ]

    def test_an_interruption_keeps_what_there_is_and_says_that_it_was_measured_once(self) -> None:
        def milliseconds(batch: int) -> float:
            if batch == 4:
                raise KeyboardInterrupt
            return 10.0

        sweep = Sweep(seconds=0.001)
        with pytest.raises(KeyboardInterrupt):
            sweep.rise(Plan(Scripted(milliseconds), "process", Variant("fp32", "eager")))  # type: ignore[arg-type]
        assert [(point.batch, point.status, point.why) for point in sweep.points] == [
            (1, "unstable", "interrupted before its second pass"),
            (2, "unstable", "interrupted before its second pass"),
        ]

    def test_a_series_over_megapixels_is_measured_at_one_batch_size(self) -> None:
        [point] = swept(Scripted(lambda batch: 10.0), size=2.5)
        assert (point.batch, point.megapixels, point.name) == (1, 2.5, "process fp32 eager 2.5 MP")

    @pytest.mark.parametrize("variant", [Variant("tf32", "eager"), Variant("fp32", "graphs")])
    def test_what_only_a_gpu_can_do_fails_on_the_cpu_and_says_so(self, variant: Variant) -> None:
        [point] = swept(Scripted(lambda batch: 10.0), variant)
        assert point.status == "failed"
        assert "GPU" in point.why or "CUDA" in point.why


class TestVariants:
    @pytest.fixture
    def subject(self) -> Any:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        return SimpleNamespace(device=CPU, network=network, runner=SimpleNamespace(precision="fp32"))

    def test_every_precision_comes_in_every_format(self, subject: Any) -> None:
        assert variants(subject.network, CPU, ["fp32", "bf16"], ["eager", "channels-last"]) == [
            Variant("fp32", "eager"),
            Variant("fp32", "channels-last"),
            Variant("bf16", "eager"),
            Variant("bf16", "channels-last"),
        ]

    def test_a_module_without_a_network_has_no_form_but_its_own(self) -> None:
        assert variants(None, CPU, ["fp32"], ["eager", "compiled"]) == [Variant("fp32", "eager")]

    def test_without_wishes_there_is_all_that_this_machine_can_do(self, subject: Any) -> None:
        expected = ["eager", "channels-last", *(["compiled"] if has_compiler() else [])]
        assert usual_formats(subject.network, CPU) == expected
        assert usual_formats(nn.Linear(2, 2), CPU) == [name for name in expected if name != "channels-last"]

    @pytest.mark.parametrize(
        ("precisions", "formats", "named"),
        [(["int8"], [], "precisions: there is no 'int8'"), ([], ["eager+fast"], "formats: there is no 'eager.fast'")],
    )
    def test_an_unknown_name_is_refused(self, precisions: list[str], formats: list[str], named: str) -> None:
        with pytest.raises(StartupError, match=named):
            variants(None, CPU, precisions, formats)

    def test_a_variant_is_on_for_as_long_as_it_is_worn_and_the_network_is_as_before_after_it(
        self, subject: Any
    ) -> None:
        batch = torch.randn(2, 3, 8, 8)
        before, weights = subject.network(batch), subject.network.state_dict()
        with wearing(subject, Variant("bf16", "channels-last")):
            assert subject.runner.precision == "bf16"
            assert subject.network[0].weight.is_contiguous(memory_format=torch.channels_last)
            assert subject.network[0].weight.dtype is torch.bfloat16
        assert subject.runner.precision == "fp32"
        assert all(torch.equal(value, subject.network.state_dict()[name]) for name, value in weights.items())
        assert torch.equal(subject.network(batch), before)


class TestMachine:
    def test_ec2_s_own_name_of_the_instance_is_taken(self, tmp_path: Path) -> None:
        assert machine.ec2_type(tmp_path) is None
        (tmp_path / "sys_vendor").write_text("Amazon EC2\n")
        (tmp_path / "product_name").write_text("g5.xlarge\n")
        assert machine.ec2_type(tmp_path) == "g5.xlarge"
        (tmp_path / "sys_vendor").write_text("QEMU\n")
        assert machine.ec2_type(tmp_path) is None

    def test_this_machine_says_what_it_is(self) -> None:
        found = machine.machine_info(CPU, "mine")
        assert (found.type, found.device, found.on_gpu) == ("mine", "cpu", False)
        assert found.device_name == found.cpu
        assert found.cores >= 1
        assert {"cvworker", "torch", "python"} <= machine.versions().keys()

    def test_a_repository_s_commit_is_told_and_none_is_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        assert machine.commit() is None
