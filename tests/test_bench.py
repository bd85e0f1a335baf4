"""``cvworker bench``: every rung answers everything exactly once, and what it wrote can be written anew."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cvworker.bench.gpu import Gpu
from cvworker.bench.results import Bench
from cvworker.bench.rungs import LADDER, RUNGS
from cvworker.embedded.demo_worker import DemoWorker
from cvworker.embedded.exhibits import genuine
from cvworker.embedded.image_host import ImageHost
from cvworker.embedded.receiver import CallbackReceiver
from cvworker.embedded.sqs import EmbeddedSqs
from cvworker.send import read_requests, send
from cvworker.signing import Signer
from world import BIN, MEAN, colour_of, picture, poll

ROOT = Path(__file__).parents[1]
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
COUNT = 24


def bench(*flags: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("CVWORKER_")}
    return subprocess.run(
        [BIN / "cvworker", "bench", *flags], cwd=cwd, env=own | environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "more" / "3.png").write_bytes(picture(3))
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(picture(4))
    return folder


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The whole ladder once, with a module that is nearly free and a second for each rung."""
    folder = tmp_path_factory.mktemp("climbed")
    flags = ["--module", MEAN, "--images", str(photos), "--seconds", "1", "--batch-size", "4", "--device", "cpu"]
    done = bench(
        *flags, "--host-latency-ms", "5", "--callback-latency-ms", "5", "--preprocess-workers", "1", cwd=folder,
        CVWORKER_QUEUE_URL="https://sqs.eu-west-1.amazonaws.com/1/mine", AWS_ENDPOINT_URL_SQS="http://127.0.0.1:9",
        AWS_PROFILE="none-such", HTTP_PROXY="http://127.0.0.1:9",
    )  # fmt: skip
    return folder / "build" / "bench", done


@pytest.fixture(scope="module")
def found(climbed: tuple[Path, subprocess.CompletedProcess[str]]) -> Bench:
    assert climbed[1].returncode == 0, climbed[1].stdout + climbed[1].stderr
    return Bench.load(climbed[0] / "bench.json")


def test_every_rung_answers_every_message_once_and_signed(found: Bench) -> None:
    assert [sample.rung for sample in found.samples] == [rung.name for rung in LADDER]
    for sample in found.samples:
        assert sample.answers > 0, sample
        assert sample.given >= sample.answers
        counts = (sample.unanswered, sample.repeats, sample.unsigned, sample.errors)
        assert counts == (0, 0, 0, 0), sample
        assert sample.cpu_s > 0
        assert sample.memory_bytes > 0
        assert (sample.gpu_share, sample.gpu_memory_bytes) == (None, None)
    assert found.settings == {"device": "cpu", "batch_size": 4, "preprocess_workers": 1}


def test_each_rung_has_the_processes_that_its_design_says(found: Bench) -> None:
    processes = {sample.rung: sample.processes for sample in found.samples}
    assert (processes["sequential"], processes["threads"]) == (1, 1)
    assert processes["dataloader"] >= 3  # itself, the fork server, a DataLoader process
    assert processes["everything"] > processes["dataloader"]  # and a model process


def test_the_table_tells_every_rung_and_where_the_files_are(
    climbed: tuple[Path, subprocess.CompletedProcess[str]], found: Bench
) -> None:
    folder, done = climbed
    for rung in RUNGS:
        assert f" {rung} " in done.stdout
        assert (folder / f"{rung}.log").exists()
    assert "4 pictures of your own" in done.stdout
    assert "note: left out, as 'run' would not take them: notes.txt" in done.stdout
    assert "written to build/bench: bench.json, bench.csv, bench.html" in done.stdout
    rows = list(csv.DictReader((folder / "bench.csv").read_text().splitlines()))
    assert [row["rung"] for row in rows] == list(RUNGS)
    for row, sample in zip(rows, found.samples, strict=True):
        assert float(row["requests_s"]) == pytest.approx(sample.requests_s, rel=1e-3)
    page = (folder / "bench.html").read_text()
    assert "<svg" in page
    assert "src=" not in page


def test_table_and_page_are_written_anew_the_same_to_the_byte(
    climbed: tuple[Path, subprocess.CompletedProcess[str]], found: Bench, tmp_path: Path
) -> None:
    folder, _ = climbed
    before = {name: (folder / name).read_bytes() for name in ("bench.json", "bench.csv", "bench.html")}
    done = bench("--from", str(folder / "bench.json"), "--out", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("bench.csv", "bench.html"):
        assert (tmp_path / name).read_bytes() == before[name], name
    # and without --out beside the file, which stays as it is
    (folder / "bench.csv").unlink()
    (folder / "bench.html").write_text("old")
    assert bench("--from", str(folder / "bench.json"), cwd=tmp_path).returncode == 0
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_without_matplotlib_the_page_is_left_out_and_told(
    climbed: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'matplotlib' else find(name, *rest)\n"
    )
    out = tmp_path / "out"
    path = os.pathsep.join([str(tmp_path / "hidden"), os.environ.get("PYTHONPATH", "")])
    done = bench("--from", str(climbed[0] / "bench.json"), "--out", str(out), cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "bench.html is left out; no pictures: they need matplotlib: pip install 'cvworker[lab]'" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["bench.csv"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--module", "nothing"], "no module named 'nothing'"),
        (["--rung", "threads,fast"], "rung: there is no 'fast'; the rungs are: sequential, threads,"),
        (["--seconds", "0"], "seconds (--seconds or CVWORKER_SECONDS)"),
        (["--images", "none"], "images: none is no folder"),
        (["--images", "empty"], "images: empty holds no picture that 'run' would take"),
        (["--from", "none.json"], "from: none.json cannot be read (No such file or directory)"),
        (["--from", "other.json"], "from: other.json is no bench.json: format"),
        (["--out", "file"], "out: file cannot be made"),
        (["--weights", "none.safetensors"], "weights: none.safetensors does not exist"),
        (["--device", "cuda:77", "--rung", "sequential"], "device: cuda:77 is not there"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(flags: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other.json").write_text(json.dumps({"format": "cvworker profile"}))
    done = bench(*flags, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cvworker bench: ")
    assert said in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("bench.*"))


def test_ctrl_c_ends_everything_that_was_started(tmp_path: Path, photos: Path) -> None:
    flags = ["--module", MEAN, "--images", photos, "--rung", "batches", "--seconds", "600", "--out", tmp_path / "out"]
    process = psutil.Popen(
        [BIN / "cvworker", "bench", *flags], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    started: set[psutil.Process] = set()

    def answers() -> bool:
        started.update(process.children(recursive=True))
        log = tmp_path / "out" / "batches.log"
        return process.poll() is not None or (log.exists() and '"answered"' in log.read_text())

    try:
        poll(answers, 120, "the rung answers")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert said.strip().splitlines()[-1] == "cvworker bench: interrupted"
        assert process.returncode == 1
        assert len(started) >= 3  # what is around the worker, the worker, its DataLoader's processes
        poll(lambda: not any(each.is_running() for each in started), 10, "every process it started ends")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["batches.log"]
    finally:
        for each in [process, *started]:
            if each.is_running():
                each.kill()


@pytest.fixture(scope="module")
def sqs() -> Iterator[EmbeddedSqs]:
    with EmbeddedSqs() as running:
        yield running


@pytest.mark.parametrize("rung", [rung.name for rung in LADDER if not rung.worker])
def test_a_rung_gives_the_contracts_answers(rung: str, sqs: EmbeddedSqs, tmp_path: Path) -> None:
    signer = Signer([SECRET])
    with ImageHost() as host, CallbackReceiver() as receiver:
        # given pictures, of which one is missing and one is none
        for number in range(2, COUNT):
            host.add(f"{number}.png", picture(number))
        host.add("1.png", b"no picture")
        url = sqs.create_queue(f"{rung}-{os.getpid()}")
        lines = [
            {"id": str(n), "image_url": host.url_of(f"{n}.png"), "callback_url": receiver.url, "metadata": {"n": n}}
            for n in range(COUNT)
        ]
        (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
        send(sqs.client(), url, read_requests(str(tmp_path / "requests.jsonl")))
        settings = {
            "MODULE": MEAN,
            "QUEUE_URL": url,
            "CALLBACK_SECRET": SECRET,
            "ALLOWED_HOSTS": ",".join(each.url.removeprefix("http://") for each in (host, receiver)),
            "BATCH_SIZE": "4",
            "PREPROCESS_WORKERS": "1",
        }
        environment = {**os.environ, **sqs.environment(), **{f"CVWORKER_{n}": value for n, value in settings.items()}}
        # when a rung's worker has answered them
        worker = DemoWorker(environment, log=tmp_path / "log", command=RUNGS[rung].command)
        try:
            poll(lambda: worker.check() or receiver.count == COUNT, 120, "every message is answered")
            poll(lambda: sqs.count(url) == 0, 30, "every message is deleted")
        finally:
            worker.close()
        # then every answer is the contract's, once
        accepted = receiver.accepted
    assert len(accepted) == COUNT
    assert all(genuine(each, signer) for each in accepted)
    answers: dict[str, Any] = {each.id: each.json for each in accepted}
    assert answers["0"]["error"]["code"] == "image_not_found"
    assert answers["1"]["error"]["code"] == "image_unsupported"
    for number in range(2, COUNT):
        answer = answers[str(number)]
        assert answer["result"] == {"mean": list(colour_of(number))}
        assert (answer["status"], answer["metadata"], answer["attempt"]) == ("ok", {"n": number}, 1)
        assert set(answer["timings_ms"]) == {"queue", "download", "preprocess", "process", "total"}


def test_the_table_in_the_docs_is_that_of_the_run_beside_it(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "bench.md").read_text()
    (kept,) = re.findall(r"\]\((benchmarks/bench-[0-9-]+\.json)\)", text)
    done = bench("--from", str(ROOT / "docs" / kept), "--out", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = [line.split() for line in text.splitlines()]
    lines = [line.split() for line in done.stdout.splitlines() if line.split() and line.split()[0] in RUNGS]
    assert len(lines) == len(RUNGS)
    for line in lines:
        assert line in shown


def test_ratios_are_taken_within_a_round_and_medians_are_told(found: Bench) -> None:
    def sample(rung: str, round: int, answers: int, **more: Any) -> dict[str, Any]:
        return found.samples[0].model_dump() | {"rung": rung, "round": round, "answers": answers, "seconds": 10} | more

    # given a machine of which the second round got half
    rounds = [
        *(sample("sequential", 1, 40), sample("threads", 1, 80, cpu_s=10)),
        *(sample("sequential", 2, 20), sample("threads", 2, 40, cpu_s=10)),
        *(sample("sequential", 3, 40), sample("threads", 3, 84, cpu_s=8, repeats=2)),
    ]
    machine = found.machine.model_dump() | {"cores": 2}
    run = Bench.model_validate(
        found.model_dump() | {"samples": rounds, "rungs": [r.model_dump() for r in found.rungs[:2]], "machine": machine}
    )
    first, second = run.rows
    assert (first.requests_s, first.over_before, first.over_first) == (4.0, None, None)
    assert (second.requests_s, second.over_before, second.over_first) == (8.0, 2.0, 2.0)
    assert (second.cpu_share, second.cpu_ms) == (0.5, 125.0)
    assert run.problems == ["threads: 2 messages answered again"]


def test_the_gpu_is_watched_by_what_its_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a driver's program that says three things and goes on
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys, time\n"
        f"open({str(tmp_path / 'asked')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
        "print('10, 1000\\n[N/A], 3000\\n30, [N/A]', flush=True)\ntime.sleep(600)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    with Gpu("cuda:1") as gpu:
        poll(lambda: gpu.busy(0, math.inf) == pytest.approx(0.2), 30, "three lines are read")
        assert gpu.taken(0, math.inf) == [1000 * 2**20, 3000 * 2**20]
        assert (gpu.busy(0, 1), gpu.taken(0, 1)) == (None, [])
    assert (tmp_path / "asked").read_text().startswith("-i GPU-abc --query-gpu=utilization.gpu,memory.used")
    with Gpu("cpu") as none:
        assert (none.busy(0, math.inf), none.taken(0, math.inf)) == (None, [])
