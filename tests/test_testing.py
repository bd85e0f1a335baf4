"""The harness for tests of modules: what it gives, what it refuses, and what it says when a run does not end well."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cvworker import Module
from cvworker.testing import RunFailed, Worker, call_hooks, encoded, run, spec_of
from modules.mean import Mean, Poisonous
from world import MEAN, picture

COLOUR = (10, 20, 30)


class Corner(Module):
    """A module in a test's own file: the pixel in the top left corner, and what the worker's process sees."""

    image_type = "pil"

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        if image.size == (13, 13):
            raise ValueError("thirteen")
        return torch.tensor(image.getpixel((0, 0)))

    def process(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        names = sorted(name for name in os.environ if name.startswith(("AWS_", "CVWORKER_CALLBACK_SECRET")))
        here = {"pid": os.getpid(), "files": os.listdir(), "secrets": names}
        return [{"pixel": row, **here} for row in batch.tolist()]


class Hanging(Corner):
    def setup(self, device: torch.device) -> None:
        self.warm = False

    def process(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        if batch.tolist()[0] == list(COLOUR):
            import time

            time.sleep(600)
        return super().process(batch)


class Dying(Corner):
    def setup(self, device: torch.device) -> None:
        print("the file of labels is missing", flush=True)
        os._exit(3)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(Corner) as worker:
        yield worker


def test_a_module_of_the_tests_own_file_is_answered_in_a_process_of_its_own(worker: Worker) -> None:
    [answer] = worker.run([Image.new("RGB", (64, 48), COLOUR)])
    assert answer.result["pixel"] == list(COLOUR)
    assert answer.result["pid"] != os.getpid()
    assert answer.error is None
    assert answer.body["task"] == "corner"
    assert answer.body["timings_ms"]["total"] > 0


def test_answers_come_in_the_order_of_the_pictures(worker: Worker) -> None:
    answers = worker.run(Image.new("RGB", (64 + n % 7, 48), (n, n, n)) for n in range(60))
    assert [answer.result["pixel"][0] for answer in answers] == list(range(60))


def test_every_kind_of_picture_is_taken(worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(picture(5))
    pixels = np.full((40, 50, 3), COLOUR, np.uint8)
    kinds = [
        picture(5),
        file,
        str(file),
        Image.new("RGB", (50, 40), COLOUR),
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
    ]
    found = [answer.result["pixel"] for answer in worker.run(kinds)]
    assert found == [[5, 0, 77]] * 3 + [list(COLOUR)] * 3


def test_an_error_is_an_answer_with_its_code(worker: Worker) -> None:
    broken, refused, well = worker.run([picture(1)[:40], Image.new("RGB", (13, 13)), picture(1)])
    assert broken.error is not None
    assert broken.error.code == "image_invalid"
    assert refused.error is not None
    assert (refused.error.code, refused.error.retryable) == ("preprocess_failed", False)
    assert well.error is None
    with pytest.raises(AssertionError, match=r"the answer is an error: preprocess_failed: ValueError: thirteen"):
        _ = refused.result


def test_nothing_of_the_surroundings_reaches_the_module(worker: Worker) -> None:
    result = worker.run([picture(1)])[0].result
    assert (result["files"], result["secrets"]) == ([], [])


def test_no_pictures_have_no_answers(worker: Worker) -> None:
    assert worker.run([]) == []


def test_a_run_leaves_no_process_behind(tmp_path: Path) -> None:
    import psutil

    before = set(psutil.Process().children(recursive=True))
    answers = run(MEAN, [picture(7)], batch_size=2, precision="fp32")
    assert answers[0].result == {"mean": [7, 0, 77]}
    assert set(psutil.Process().children(recursive=True)) == before


def test_what_the_environment_says_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("CVWORKER_WEIGHTS=nowhere.safetensors\nCVWORKER_EGRESS_PROXY=http://127.0.0.1:1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CVWORKER_CALLBACK_SECRET", "no secret")
    monkeypatch.setenv("AWS_PROFILE", "production")
    assert run(Mean, [picture(7)])[0].error is None


def test_a_worker_that_cannot_start_says_why_in_one_line() -> None:
    with pytest.raises(RunFailed, match=r"^the worker did not start: batch_size .*takes a whole number from 1"):
        run(Mean, [picture(1)], batch_size=0)


def test_a_worker_that_ends_is_told_with_its_last_lines() -> None:
    with pytest.raises(
        RunFailed, match=r"(?s)did not start: module: its process ended.*exit code 3.*the file of labels is missing"
    ):
        run(Dying, [picture(1)])


def test_a_picture_that_is_not_answered_in_time_is_told_with_the_last_lines() -> None:
    with pytest.raises(RunFailed, match=r"(?s)1 of 1 pictures not answered within 1 s; the worker said last:\n.*ready"):
        run(Hanging, [Image.new("RGB", (64, 48), COLOUR)], timeout=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batchsize": 4}, r"no setting 'batchsize'; did you mean 'batch_size'"),
        ({"queue_url": "http://host/queue"}, r"queue_url cannot be given here: the harness brings the queue"),
    ],
)
def test_settings_that_cannot_be_given_are_refused_before_anything_starts(settings: dict, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Worker(Mean, **settings)


def test_a_class_is_named_so_that_another_process_finds_it() -> None:
    assert spec_of(Corner) == f"{os.path.abspath(__file__)}:Corner"
    assert spec_of("threat") == "threat"
    assert spec_of("cvworker.modules.threat:Threat") == "cvworker.modules.threat:Threat"
    assert spec_of(os.path.relpath(MEAN)) == MEAN
    from cvworker.modules.threat import Threat

    assert spec_of(Threat) == "cvworker.modules.threat:Threat"


def test_a_class_within_a_function_is_refused() -> None:
    class Inner(Corner):
        pass

    with pytest.raises(TypeError, match="must stand at the top of a file"):
        run(Inner, [])
    with pytest.raises(TypeError, match="give the class"):
        run(Inner(), [])  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", [5, np.zeros((4, 4)), torch.zeros(3, 4, 4)], ids=["number", "2d", "floats"])
def test_what_is_no_picture_is_refused(odd: Any) -> None:
    with pytest.raises(TypeError, match="a picture must be"):
        encoded(odd)


def test_hooks_alone_give_the_same_results_here_and_what_they_raise() -> None:
    pictures = [picture(n) for n in range(11)]
    assert call_hooks(Mean, pictures, batch_size=4) == [{"mean": [n, 0, 77]} for n in range(11)]
    [result] = call_hooks(f"{__file__}:Corner", [picture(3)])
    assert result["pid"] == os.getpid()
    with pytest.raises(ValueError, match="too red"):
        call_hooks(Poisonous, [Image.new("RGB", (8, 8), (250, 0, 0))])
