"""``cvworker bulk`` as a user runs it: stopped in two ways, gone on with, and compared with the worker's answers."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.dataset
import pytest
from PIL import Image

from world import BIN, MODULES, World, poll, world

PRINTS = f"{MODULES / 'prints.py'}:Prints"
PARTITION = 15
ROWS = 120
MAX_PIXELS = 1_000_000


class BulkProcess:
    """A ``cvworker bulk`` of its own, with every process that Ray starts for it."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        self._err = folder / "bulk.err"
        self._known: dict[int, psutil.Process] = {}
        with self._err.open("w") as err:
            self.process = subprocess.Popen(
                [BIN / "cvworker", "bulk", *flags],
                env={**os.environ, **environment},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                start_new_session=True,
            )

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def look(self) -> BulkProcess:
        """Remember the processes there are: those of one that is killed have no parent to be found by."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        self._known.update((child.pid, child) for child in children)
        return self

    def until(self, condition: Callable[[], bool], timeout: float = 240) -> None:
        def there() -> bool:
            self.look()
            assert self.process.poll() is None, self.stderr
            return condition()

        poll(there, timeout, self.stderr)

    def kill_all(self) -> None:
        """SIGKILL to the command and to every process of Ray's."""
        self.look()
        self.process.kill()
        for each in self._known.values():
            try:
                each.kill()
            except psutil.NoSuchProcess:
                pass
        self.wait()

    def wait(self, timeout: float = 300) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, out

    def left_behind(self) -> list[psutil.Process]:
        _, alive = psutil.wait_procs(list(self._known.values()), timeout=20)
        return [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]

    def close(self) -> None:
        if self.process.poll() is None or self.left_behind():
            self.kill_all()


def print_picture(number: int, green: int = 200) -> bytes:
    """A JPEG that is no two times the same, turned by its EXIF every third time, larger than ``min_side`` needs."""
    pixels = np.random.default_rng(number).integers(0, 256, (70 + number % 30, 90, 3), np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    if green < 10:
        Image.new("RGB", (40, 40), (0, green, 0)).save(file, "PNG")
        return file.getvalue()
    exif = image.getexif()
    exif[0x0112] = (1, 6, 3)[number % 3]
    image.save(file, "JPEG", exif=exif, quality=85)
    return file.getvalue()


def requests_of(here: World) -> list[dict[str, Any]]:
    """Requests of every kind: most are pictures, and one each for what may be wrong with a row."""
    green = {11: 1, 47: 3}
    rows: list[dict[str, Any]] = []
    for number in range(ROWS):
        url = here.images.add(f"/{number}.jpg", print_picture(number, green.get(number, 200)))
        rows.append({"id": f"req-{number}", "image_url": url, "metadata": {"n": number, "text": "ü\ud800"}})
    rows[3]["image_url"] = here.images.url_of("/missing.jpg")
    rows[5]["image_url"] = here.images.add("/broken.jpg", print_picture(5)[:900])
    rows[7]["image_url"] = here.images.add("/text.jpg", b"no picture at all")
    rows[9]["image_url"] = "http://127.0.0.1:9/"
    rows[13]["image_url"] = "s3://not-allowed/picture.jpg"
    rows[15]["task"] = "another"
    rows[17]["metadata"] = ["no", "object"]
    rows[19] = {"id": "req-19"}
    rows[21]["image_url"] = here.images.add("/forbidden.jpg", b"")
    here.images.fail["/forbidden.jpg"] = 403
    file = io.BytesIO()
    Image.new("L", (1001, 1000)).save(file, "PNG")
    rows[23]["image_url"] = here.images.add("/large.png", file.getvalue())
    rows[25]["id"] = 25  # type: ignore[assignment]
    rows[27]["image_url"] = here.images.add("/killer.png", print_picture(27, green=2))
    return rows


@dataclass
class Story:
    """One output: begun, killed, gone on with, stopped by Ctrl-C, gone on with to its end, and run once more."""

    folder: Path
    rows: list[dict[str, Any]]
    worker: dict[str, Any]
    killed_with: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_by_kill: list[psutil.Process] = field(default_factory=list)
    stopped: tuple[int, str] = (0, "")
    stopped_with: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_by_stop: list[psutil.Process] = field(default_factory=list)
    ended: tuple[int, str, str] = (0, "", "")
    requests_before_last: dict[str, int] = field(default_factory=dict)
    requests_at_end: dict[str, int] = field(default_factory=dict)
    again: tuple[int, str] = (0, "")

    @property
    def output(self) -> Path:
        return self.folder / "results"

    def files(self) -> dict[str, tuple[int, int]]:
        """The partitions that are there, each with what no second writing leaves as it was."""
        found = {path.name: path.stat() for path in self.output.glob("part-*.parquet")}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}

    def answers(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pyarrow.dataset.dataset(self.output).to_table().sort_by("row").to_pylist()
        return rows


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("bulk")
    with world(folder, max_receives=None) as here:
        rows = requests_of(here)
        told = Story(folder, rows, _by_the_worker(here, rows))
        manifest = folder / "images.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--module", PRINTS, "--input", "images.jsonl", "--output", "results"]
        flags += ["--partition-rows", str(PARTITION), "--max-image-pixels", str(MAX_PIXELS), "--precision", "fp32"]
        flags += ["--allow-private-networks", "--preprocess-workers", "1"]

        def run(**environment: str) -> BulkProcess:
            runs.append(BulkProcess(folder, *flags, **environment))
            return runs[-1]

        runs: list[BulkProcess] = []
        try:
            _killed(told, run(PRINTS_S="0.02"))
            _stopped(told, run(PRINTS_S="0.02"))
            told.requests_before_last = _requests(here)
            last = run()
            poll(lambda: last.look().process.poll() is not None, 240, "the end")
            told.ended = (*last.wait(), last.stderr)
            told.requests_at_end = _requests(here)
            told.again = run().wait()
        finally:
            for each in runs:
                each.close()
        yield told


def _killed(told: Story, running: BulkProcess) -> None:
    running.until(lambda: len(told.files()) >= 2)
    running.kill_all()
    told.killed_with, told.left_by_kill = told.files(), running.left_behind()


def _stopped(told: Story, running: BulkProcess) -> None:
    running.until(lambda: len(told.files()) > len(told.killed_with))
    os.killpg(running.process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to all that are in the foreground
    code, _ = running.wait()
    told.stopped, told.stopped_with = (code, running.stderr), told.files()
    told.left_by_stop = running.left_behind()


def _requests(here: World) -> dict[str, int]:
    return {f"/{number}.jpg": here.images.requests_for(f"/{number}.jpg") for number in range(ROWS)}


def _by_the_worker(here: World, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same requests through the real worker: its answers by image, or by id where there is none."""
    worker = here.worker(
        "--max-image-pixels", str(MAX_PIXELS), "--precision", "fp32", "--max-attempts", "1",
        "--callback-url", here.receiver.url + "/answers", module=PRINTS,
    )  # fmt: skip
    here.send(*rows)
    poll(lambda: len(here.receiver.accepted) >= len(rows), 120, "all answers")
    worker.signal()
    worker.wait()
    return {_key(each.json): each.json for each in here.receiver.accepted}


def _key(answer: dict[str, Any]) -> str:
    return str(answer["image_url"] or answer["id"])


def test_every_row_of_the_manifest_is_there_once_and_in_order(story: Story) -> None:
    assert story.ended[0] == 0, story.ended[2]
    assert [row["row"] for row in story.answers()] == list(range(ROWS))
    assert (story.output / "_SUCCESS").exists()
    assert len(story.files()) == ROWS // PARTITION


def test_answers_are_those_of_the_worker_value_for_value(story: Story) -> None:
    for row in story.answers():
        answer = story.worker[_key(row)]
        if row["image_url"] and row["image_url"].endswith("killer.png"):
            continue  # told apart below: the worker knows the signal, bulk does not
        found = {
            "id": row["id"],
            "status": row["status"],
            "task": row["task"],
            "result": json.loads(row["result"]) if row["result"] else None,
            "error": row["error"],
            "image_url": row["image_url"],
            "metadata": json.loads(row["metadata"]),
            "worker": {name: value for name, value in row["worker"].items() if value is not None},
        }
        expected = {name: answer.get(name) for name in found}
        if story.rows[row["row"]].get("id") == 25:
            expected["id"] = "25"  # no id of its own: the message's there, the row's number here
        assert found == expected


def test_every_kind_of_error_is_a_row_with_the_worker_s_code(story: Story) -> None:
    rows = story.answers()
    codes = {row["row"]: row["error"]["code"] for row in rows if row["status"] == "error"}
    assert codes == {
        3: "image_not_found",
        5: "image_invalid",
        7: "image_unsupported",
        9: "download_failed",
        11: "preprocess_failed",
        13: "url_not_allowed",
        15: "unsupported_task",
        17: "invalid_message",
        19: "invalid_message",
        21: "download_failed",
        23: "image_too_large",
        25: "invalid_message",
        27: "preprocess_failed",
        47: "process_failed",
    }


def test_a_picture_that_kills_its_process_is_an_error_row_and_costs_no_other(story: Story) -> None:
    row = story.answers()[27]
    assert row["error"]["message"] == "its process ended while preparing this image"
    assert story.worker[_key(row)]["error"]["code"] == row["error"]["code"]


def test_partitions_that_were_finished_before_a_kill_are_not_touched_again(story: Story) -> None:
    assert 2 <= len(story.killed_with) < ROWS // PARTITION
    assert story.killed_with.items() <= story.stopped_with.items() <= story.files().items()


def test_no_picture_of_a_finished_partition_is_downloaded_again(story: Story) -> None:
    finished = [int(re.findall(r"\d+", name)[0]) for name in story.stopped_with]
    rows = [n for k in finished for n in range(k * PARTITION, (k + 1) * PARTITION)]
    before, after = story.requests_before_last, story.requests_at_end
    assert {n: after[f"/{n}.jpg"] for n in rows} == {n: before[f"/{n}.jpg"] for n in rows}
    assert after != before


def test_ctrl_c_ends_with_1_and_one_line_that_says_how_to_go_on(story: Story) -> None:
    code, err = story.stopped
    assert code == 1
    assert err.splitlines()[-1] == "cvworker bulk: stopped; the same command goes on from what is in results"
    assert "Traceback" not in err


def test_no_process_of_ray_outlives_the_command(story: Story) -> None:
    assert story.left_by_kill == []
    assert story.left_by_stop == []


def test_what_is_done_already_is_not_begun_again(story: Story) -> None:
    assert story.again == (0, f"{ROWS} images are done already in results\n")


def test_what_ray_has_to_say_of_its_restarts_stays_out_of_the_terminal(story: Story) -> None:
    assert "raylet" not in story.ended[2]
    assert "Traceback" not in story.ended[2]


def test_bad_weights_are_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "photo.jpg").write_bytes(print_picture(1))
    command = [BIN / "cvworker", "bulk", "--module", "threat", "--weights", "cut.safetensors"]
    command += ["--input", ".", "--output", "results"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "cut.safetensors" in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.fixture(autouse=True)
def _no_settings_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
