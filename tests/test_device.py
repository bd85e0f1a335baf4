"""load.device runs, counts and reports; how fast anything is, is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from load.compare.ceiling import Ceiling
from load.device.alone import CPU_DECODE, DEVICE_DECODE, MODEL, Alone
from load.device.report import Report
from load.device.run import STAGES, Plan, Sample

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "load.device", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)


def sample(images_s: float, *, decode: str = "cpu", batch: int = 8, decoded_on: str = "") -> Sample:
    plan = Plan("cuda:0", "resnet50", decode, "auto", "auto", batch, 1)
    times = dict.fromkeys(STAGES, 1.0)
    return Sample(
        plan, 5.0, 100, images_s, 1.0, [90, 100], times, 0.2, times, 8.0, "fp16", "fp16 channels-last",
        decoded_on or decode, 2, 9.0, 1000.0, 0, 0, 0, 0, 0.1,
    )  # fmt: skip


def a_report() -> Report:
    alone = [(CPU_DECODE, 900.0, None, None), (DEVICE_DECODE, 5000.0, 64, None)]
    alone += [(MODEL, 2000.0, 8, "auto"), (MODEL, 3000.0, 32, "auto"), (MODEL, 4000.0, 8, "full")]
    return Report("cuda:0", 5.0, limits=[Alone(*each) for each in alone])


def test_a_run_is_compared_with_the_limits_that_are_its_own() -> None:
    report = a_report()
    for each in (sample(810), sample(1900, decode="device"), sample(2400, decode="device", batch=32)):
        report.add(each)
    assert [each.ratio for each in report.samples] == [0.9, 0.95, 0.8]
    assert [each.busy for each in report.samples] == [95, 95, 95]
    assert not report.notes


def test_what_is_not_what_it_seems_is_noted() -> None:
    report = a_report()
    report.ceiling = Ceiling(1000.0, 0.1)
    report.add(sample(810, decode="device", decoded_on="cpu"))
    assert len(report.notes) == 2
    assert "decoded on the cpu" in report.notes[0]
    assert "near what the world" in report.notes[1]


def test_without_limits_there_is_no_ratio(tmp_path: Path) -> None:
    report = Report("cuda:0", 5.0)
    report.add(sample(100))
    assert report.samples[0].ratio is None
    for path in report.write(tmp_path):
        assert path.exists()
    ElementTree.parse(tmp_path / "device.svg")  # noqa: S314 - our own


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is one")
def test_a_device_that_is_not_there_is_said_in_one_line() -> None:
    done = run("--device", "cuda:7")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["device: cuda:7 is not there; give --device cpu to try this without one"]


@pytest.mark.timeout(240)
def test_the_smallest_form_runs_the_whole_worker_on_the_cpu(tmp_path: Path) -> None:
    smallest = ["--network", "shufflenet_v2_x0_5", "--batch", "8", "--processes", "1", "--optimize", "off"]
    # when it runs
    done = run(
        "--device", "cpu", *smallest, "--precision", "fp32", "--seconds", "1", "--no-limits", "--out", str(tmp_path)
    )
    # then it has answered without an error, and tells where the time went
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "device.json").read_text())
    (one,) = found["samples"]
    assert one["answers"] > 0
    assert (one["errors"], one["repeats"], one["expired"], one["restarts"]) == (0, 0, 0, 0)
    assert one["plan"]["decode"] == one["decoded_on"] == "cpu"
    assert one["precision"] == "fp32"
    assert one["batch_mean"] > 0
    assert all(one["stage_ms"][name] > 0 for name in ("download", "preprocess", "process", "callback"))
    assert {"machine", "versions", "commit", "limits", "notes", "when"} <= found.keys()
    assert "1 runs, about" in done.stdout


def test_what_does_not_fit_into_the_time_is_left_out(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--batch", "8", "--minutes", "0", "--no-limits", "--out", str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.count("left out, the time is over") == 3
