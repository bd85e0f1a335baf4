"""``load.scenarios`` with real workers, generators and queues; how fast anything is, is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from load.scenarios.here import Wishes, here
from load.scenarios.rows import row
from PIL import Image

ROOT = Path(__file__).parents[1]
STALLING = f"{ROOT / 'tests' / 'modules' / 'stalling.py'}:Stalling"
MARK = "SCENARIOS_TEST_MARK"
PLAIN = {"CVWORKER_PREPROCESS_WORKERS": "1", "CVWORKER_OPTIMIZE": "off", "CVWORKER_PRECISION": "fp32"}
SLOW_S = 1.0
"""Nothing but the stall takes so long, on however busy a machine."""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 48), (number, 80, 160)).save(folder / f"{number}.png")
    return folder


def closed_loop(intended: list[float], answered: list[float]) -> list[float]:
    """What a client would have measured that sends the next request only when it has an answer to the last."""
    found, free_at = [], 0.0
    for at, done in zip(intended, answered, strict=True):
        if at >= free_at:
            found.append(done - at)
            free_at = done
    return found


def test_a_stall_in_the_middle_is_in_the_reported_p99(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trigger = tmp_path / "stall"
    for name, value in {**PLAIN, "STALL_FILE": str(trigger)}.items():
        monkeypatch.setenv(name, value)
    logs = tmp_path / "logs"
    logs.mkdir()
    stalls: list[int] = []

    def tell(news: dict[str, Any]) -> None:
        if news.get("answered", 0) >= 100 and not stalls:
            stalls.append(news["answered"])
            trigger.touch()

    # given a real worker that stalls for five seconds while requests come 25 a second
    with here(Wishes(module=STALLING, images=str(pictures), queue="ministack"), logs) as running:
        kept = running.offer("constant:25", 11.0, 1, tell)
    samples = kept["samples"]
    assert not trigger.exists()
    assert set(samples["code"]) == {"ok"}
    # then p99 shows the stall, and a fifth of the requests have seen it
    found = row({"name": "stalled", **kept})
    assert found.latency_ms["p99"] > 4000
    waits = np.asarray(samples["answered"]) - np.asarray(samples["intended"])
    assert (waits > SLOW_S).mean() > 0.2
    # which a client that waits for its answers would have met once, among all the others
    closed = closed_loop(samples["intended"], samples["answered"])
    assert sum(wait > SLOW_S for wait in closed) <= 2
    assert found.latency_ms["p95"] > 3000 > SLOW_S * 1000 > 1000 * float(np.quantile(closed, 0.9))


def test_a_scenario_leaves_its_files_and_nothing_that_runs(tmp_path: Path, pictures: Path) -> None:
    mark = {**PLAIN, MARK: str(tmp_path), "STALL_FILE": str(tmp_path / "never")}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "load.scenarios", "online", "--module", STALLING, "--images", str(pictures)]
    command += ["--pace", "40", "--shares", "0.25", "1.0", "--seconds", "2", "--queue", "fast", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | mark, capture_output=True, text=True)
    # then every request of every row is in the raw data
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "online.json").read_text())
    assert [each["name"] for each in found["rows"]] == ["25%", "100%"]
    for each in found["rows"]:
        samples = each["samples"]
        assert set(samples["code"]) == {"ok"}
        assert samples["repeats"] == 0
        assert all(sent >= at for sent, at in zip(samples["sent"], samples["intended"], strict=True))
        assert all(ms > 0 for ms in samples["total_ms"])
        assert each["counters"]["samples"] == len(samples["code"])
        assert each["counters"]["cpu_s"] > 0
    assert found["ceiling"]["host"] > 100
    assert found["ceiling"]["queue"] > 100
    assert found["pace_images_s"] > 0
    assert "achieved/s" in done.stdout
    # and the page is made of it alone
    command = [sys.executable, "-m", "load.scenarios", "report", str(out / "online.json"), "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in ("online.html", "online.csv"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    # and no process is left
    assert not [each for each in psutil.process_iter() if _mark(each) == str(tmp_path)]


def _mark(process: psutil.Process) -> str:
    try:
        return process.environ().get(MARK, "")
    except psutil.Error:  # another user's, or gone
        return ""
