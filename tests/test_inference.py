"""Inference: what is given to the model process and again to the next, and who is blamed when one ends."""

from __future__ import annotations

import asyncio
import io
import queue
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cvworker.arena import Arena
from cvworker.clock import Clock
from cvworker.errors import JobError, StartupError
from cvworker.job import Job
from cvworker.model.config import ModelConfig
from cvworker.observe.metrics import Metrics
from cvworker.queues import JobQueue
from cvworker.steps import inference as inference_module
from cvworker.steps.inference import MAX_RESTARTS, READY_LEAST_S, Inference
from fakes import StepClock, a_job, eventually

MIB = 1024 * 1024


def a_config(module: str = "mean", *, batch_size: int = 2, stall_timeout: float = 100) -> ModelConfig:
    return ModelConfig(
        module, None, "cpu", "fp32", batch_size, 20, 1, 10_000_000, stall_timeout, 4 * MIB, "console", "error"
    )


class Line:
    """An inference step with its inbox, and what became of each job."""

    def __init__(self, config: ModelConfig, clock: Clock) -> None:
        self.arena = Arena(config.arena_size)
        self.inbox = JobQueue("inference", 100, clock.monotonic)
        self.ended: dict[int, Any] = {}
        self.metrics = Metrics()
        self.room = threading.Event()
        self.room.set()
        self.step = Inference(
            config,
            self.arena.fd,
            self.inbox,
            clock=clock,
            alive=lambda job: not job.lease.lost,
            done=self._done,
            failed=lambda job, error: self._end(job, error),
            dropped=lambda job: self._end(job, "dropped"),
            batch_done=self.metrics.batch_done,
        )

    def put(self, *jobs: Job, image: bytes = b"image") -> list[Job]:
        for job in jobs:
            job.image = asyncio.run(self.arena.take(len(image)))
            job.image.write(image)
            self.inbox.put(job)
        return list(jobs)

    def wait(self, *jobs: Job, timeout: float = 60) -> list[Any]:
        """What became of these jobs."""
        numbers = [job.number for job in jobs]
        eventually(lambda: all(number in self.ended for number in numbers), f"{numbers} have ended", timeout)
        return [self.ended[number] for number in numbers]

    def _done(self, jobs: list[Job]) -> None:
        self.room.wait(20)
        for job in jobs:
            self._end(job, job.result)

    def _end(self, job: Job, how: Any) -> None:
        assert job.number not in self.ended, "ended once"
        self.ended[job.number] = how


class ScriptedLink:
    """A model process that says what the test lets it say."""

    made: list[ScriptedLink]
    fail_from = 100

    def __init__(self, _config: ModelConfig, _arena_fd: int) -> None:
        self.pid = len(self.made)
        self.submitted: list[tuple[int, int, int, bool]] = []
        self.killed = self.closed = self.stopped = False
        self._frames: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.made.append(self)

    def wait_ready(self, timeout: float) -> dict[str, Any]:
        self.patience = timeout
        if self.pid >= self.fail_from:
            raise StartupError("module: it cannot be loaded any more")
        return {"name": "mean"}

    def frames(self) -> Iterator[dict[str, Any]]:
        return iter(self._frames.get, None)

    def submit(self, jobs: list[tuple[int, int, int, bool]]) -> None:
        self.submitted += jobs

    def stop(self, _timeout: float) -> None:
        self.stopped = True
        self.end()

    def kill(self, *, dump: bool = False) -> None:
        self.killed = True
        self.end()

    def how_it_ended(self) -> str:
        return "SIGKILL"

    def close(self) -> None:
        self.closed = True

    # what the test lets it say

    @property
    def numbers(self) -> list[int]:
        return [number for number, *_ in self.submitted]

    def says(self, **frame: Any) -> None:
        self._frames.put(frame)

    def answers(self, *jobs: Job, **told: float) -> None:
        self.says(started=[job.number for job in jobs])
        self.says(done=[[job.number, 1.5, 2.5, {"seen": job.number}, None] for job in jobs], busy=0.01, **told)

    def end(self) -> None:
        self._frames.put(None)


@pytest.fixture
def clock() -> StepClock:
    return StepClock()


@pytest.fixture
def line(clock: StepClock, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Line]:
    """A started one; its parameter, where a test gives one, is ``stall_timeout``."""
    ScriptedLink.made, ScriptedLink.fail_from = [], 100
    monkeypatch.setattr(inference_module, "ModelLink", ScriptedLink)
    line = Line(a_config(stall_timeout=getattr(request, "param", 100)), clock)
    line.step.start()
    yield line
    line.room.set()
    line.inbox.close()
    line.step.stop(1)


def link(number: int) -> ScriptedLink:
    """The scripted process of that number, once it has been started and given what there was."""
    eventually(lambda: len(ScriptedLink.made) > number)
    return ScriptedLink.made[number]


def given(number: int, *jobs: Job) -> ScriptedLink:
    eventually(lambda: sorted(link(number).numbers) == sorted(job.number for job in jobs))
    return link(number)


def test_results_come_back_with_their_timings_and_the_image_is_freed(line: Line) -> None:
    (job,) = line.put(a_job())
    given(0, job).answers(job)
    assert line.wait(job) == [{"seen": job.number}]
    assert job.timings_ms == {"preprocess": 1.5, "process": 2.5}
    assert line.arena.used == 0
    assert len(line.step) == 0


def test_batches_are_counted_and_where_there_was_a_copy_to_the_device_it_is_told(line: Line) -> None:
    jobs = line.put(a_job("on a CPU"), a_job("on a GPU"))
    given(0, *jobs).answers(jobs[0])
    line.wait(jobs[0])
    assert "cvworker_to_device_seconds_count 0.0" in line.metrics.text().decode()
    link(0).answers(jobs[1], to_device=0.004)
    line.wait(jobs[1])
    told = line.metrics.text().decode()
    for sample in ("cvworker_to_device_seconds_count 1.0", "cvworker_to_device_seconds_sum 0.004"):
        assert sample in told
    assert "cvworker_batch_size_count 2.0" in told


def test_no_more_images_are_given_than_the_window_holds(line: Line) -> None:
    window = a_config().window
    jobs = line.put(*(a_job(f"m{n}") for n in range(window + 5)))
    given(0, *jobs[:window]).answers(*jobs[:3])
    line.wait(*jobs[:3])
    given(0, *jobs[: window + 3])
    assert len(line.inbox) == 2


def test_a_message_received_again_and_again_is_run_alone(line: Line) -> None:
    jobs = line.put(a_job(attempt=3), a_job(attempt=4))
    assert [alone for *_, alone in given(0, *jobs).submitted] == [False, True]


def test_nothing_is_run_for_a_message_that_is_somebody_elses_by_now(line: Line) -> None:
    lost, held = a_job(), a_job()
    lost.lease.lost = True
    line.put(lost, held)
    given(0, held)
    assert line.wait(lost) == ["dropped"]


@pytest.mark.parametrize("name", ["ImageInvalid", "PreprocessFailed"])
def test_an_error_is_of_the_class_it_had_in_the_process(line: Line, name: str) -> None:
    (job,) = line.put(a_job())
    given(0, job).says(failed=[job.number, name, "why"])
    (error,) = line.wait(job)
    assert (type(error).__name__, error.message) == (name, "why")


def test_when_the_process_ends_between_batches_everything_begins_again_and_nobody_is_blamed(line: Line) -> None:
    jobs = line.put(a_job(), a_job(), a_job())
    given(0, *jobs).answers(jobs[0])
    line.wait(jobs[0])
    link(0).end()
    again = given(1, *jobs[1:])
    assert link(0).closed
    assert not any(alone for *_, alone in again.submitted)
    again.answers(*jobs[1:])
    line.wait(*jobs)
    assert line.step.restarts == 1


def test_when_the_process_ends_in_a_batch_its_images_run_alone_and_the_guilty_one_fails(line: Line) -> None:
    bad, good, other = line.put(a_job(), a_job(), a_job())
    given(0, bad, good, other).says(started=[bad.number, good.number])
    link(0).end()
    second = given(1, bad, good, other)
    assert {number for number, *_, alone in second.submitted if alone} == {bad.number, good.number}
    second.says(started=[bad.number])
    second.end()
    given(2, good, other).answers(good)
    link(2).answers(other)
    error, *results = line.wait(bad, good, other)
    assert (error.code, "SIGKILL" in error.message) == ("process_failed", True)
    assert results == [{"seen": good.number}, {"seen": other.number}]
    assert line.arena.used == 0


def test_an_image_alone_when_its_process_ends_gets_one_more_try(line: Line) -> None:
    (job,) = line.put(a_job())
    given(0, job).says(started=[job.number])
    link(0).end()
    given(1, job).answers(job)
    assert line.wait(job) == [{"seen": job.number}]


def test_processes_that_end_again_and_again_without_an_answer_are_given_up(line: Line) -> None:
    (job,) = line.put(a_job())
    for number in range(MAX_RESTARTS + 1):
        given(number, job).end()
    failure = eventually(lambda: line.step.failure)
    assert "again and again" in str(failure)
    assert line.step.held() == [job], "for whoever gives it back"


def test_an_answer_shows_that_a_process_works(line: Line) -> None:
    jobs = line.put(*(a_job() for _ in range(2 * MAX_RESTARTS)))
    for number, job in enumerate(jobs):
        given(number, *jobs[number:]).answers(job)
        link(number).end()
    line.wait(*jobs)
    assert line.step.failure is None


def test_a_process_that_cannot_be_brought_back_is_a_failure(line: Line) -> None:
    ScriptedLink.fail_from = 1
    link(0).end()
    assert "cannot be loaded" in str(eventually(lambda: line.step.failure))
    assert link(1).killed


def test_a_replacement_may_load_for_about_as_long_as_the_first_did_and_not_for_ever(line: Line) -> None:
    (job,) = line.put(a_job())
    given(0, job).end()
    assert given(1, job).patience == a_config().stall_timeout < link(0).patience


@pytest.mark.parametrize("line", [3], indirect=True)
def test_a_replacement_may_load_for_a_minute_however_short_the_limit_for_a_batch(line: Line) -> None:
    (job,) = line.put(a_job())
    given(0, job).end()
    assert given(1, job).patience == READY_LEAST_S


def test_a_process_stuck_on_a_batch_is_ended_and_the_batch_blamed(line: Line, clock: StepClock) -> None:
    job, other = line.put(a_job(), a_job())
    given(0, job, other).says(started=[job.number])
    link(0).says(failed=[other.number, "ImageInvalid", "why"])
    line.wait(other)  # and so the first frame was read, too
    clock.advance(101)
    given(1, job)
    assert link(0).killed
    assert job.kills == 1


def test_a_process_that_holds_images_and_says_nothing_is_ended_and_nobody_blamed(line: Line, clock: StepClock) -> None:
    (job,) = line.put(a_job())
    given(0, job)
    clock.advance(151)
    given(1, job).answers(job)
    line.wait(job)
    assert job.kills == 0


def test_a_process_is_not_ended_because_its_results_wait_for_room(line: Line, clock: StepClock) -> None:
    line.room.clear()
    first, second = line.put(a_job(), a_job())
    given(0, first, second).answers(first)
    eventually(lambda: first.result is not None)
    for _ in range(4):
        clock.advance(100)
        threading.Event().wait(inference_module.LOOK_S / 2)  # several looks of the watch
    line.room.set()
    link(0).answers(second)
    line.wait(first, second)
    assert len(ScriptedLink.made) == 1


def test_a_stop_lets_the_process_finish(line: Line) -> None:
    jobs = line.put(a_job(), a_job())
    given(0, *jobs).answers(*jobs)
    line.inbox.close()
    line.step.stop(5)
    assert link(0).stopped
    assert len(line.wait(*jobs)) == 2
    assert not any(thread.is_alive() for thread in line.step.threads)


MODULE = '''
import os, torch
from cvworker import JobError, Module

class OwnError(JobError):
    """A module may have errors of its own."""

class Odd(Module):
    """What a picture does is in its red: below 100 in preprocess, from 100 in process; its green comes back."""

    def preprocess(self, image):
        red, green = int(image[0, 0, 0]), int(image[1, 0, 0])
        if red == 1: raise ValueError("this picture is too red")
        if red == 2: os.abort()
        if red == 3: return torch.ones(2, requires_grad=True) * torch.tensor([float(red), float(green)])
        if red == 4: raise OwnError("not this one")
        if red == 5: return lambda: "what is in here cannot be told to another process"
        if red == 6: return torch.tensor([255.0, float(green)]).to_sparse()
        return torch.tensor([float(red), float(green)])

    def collate(self, samples):
        return torch.stack([sample.to_dense() for sample in samples])

    def process(self, batch):
        results = []
        for red, green in batch.tolist():
            if red == 100: raise ValueError("no")
            if red == 101: os.abort()
            if red == 102: results.append({"names": sorted(os.environ)})
            else: results.append({"green": green, "batch": len(batch)})
        return results
'''  # fmt: skip


def picture(red: int = 255, green: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (red, green, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """One model process for all tests of it: each takes seconds to start."""
    path = tmp_path_factory.mktemp("module") / "odd.py"
    path.write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_SECRET_ACCESS_KEY", "ECS_AGENT_URI", "CVWORKER_CALLBACK_SECRET", "CVWORKER_BATCH_SIZE"):
            patch.setenv(name, "x")
        long = tmp_path_factory.mktemp("a-name-too-long-for-the-path-of-a-socket-in-it" * 2)
        patch.setenv("TMPDIR", str(long))
        patch.setattr(tempfile, "tempdir", None)
        line = Line(a_config(f"{path}:Odd", batch_size=4, stall_timeout=3), Clock())
        line.step.start()
    yield line
    line.step.kill()


def send(line: Line, *reds: int, image: Callable[[int], bytes] = picture) -> list[Job]:
    return [line.put(a_job(), image=image(red))[0] for red in reds]


def codes(ended: list[Any]) -> list[str]:
    return [each.code if isinstance(each, JobError) else "ok" for each in ended]


def test_each_picture_gets_its_own_result_and_is_timed(real: Line) -> None:
    greens = [random.Random(1).randrange(256) for _ in range(60)]
    jobs = [real.put(a_job(), image=picture(green=green))[0] for green in greens]
    results = real.wait(*jobs)
    assert [result["green"] for result in results] == greens
    assert max(result["batch"] for result in results) > 1
    assert all(job.timings_ms["preprocess"] > 0 and job.timings_ms["process"] > 0 for job in jobs)
    assert real.arena.used == 0


def test_only_the_guilty_fail_each_with_its_own_reason(real: Line) -> None:
    good = send(real, 255, 255)
    bad = [real.put(a_job(), image=data)[0] for data in (picture()[:50], b"GIF89a", b"no image at all")]
    raising = send(real, 1, 100)
    more = send(real, 255, 255)
    assert codes(real.wait(*bad)) == ["image_invalid", "image_invalid", "image_unsupported"]
    assert codes(real.wait(*raising)) == ["preprocess_failed", "process_failed"]
    assert codes(real.wait(*good, *more)) == ["ok"] * 4
    assert [each.message for each in real.wait(*raising)] == ["ValueError: this picture is too red", "ValueError: no"]


@pytest.mark.parametrize(
    ("red", "code"),
    [(3, "ok"), (4, "preprocess_failed"), (5, "preprocess_failed"), (6, "ok")],
    ids=["wants gradients", "an error of its own", "not to be pickled", "sparse"],
)
def test_a_module_may_be_careless(real: Line, red: int, code: str) -> None:
    assert codes(real.wait(*send(real, red, 255, red), timeout=20)) == [code, "ok", code]


def test_the_model_process_has_no_credentials(real: Line) -> None:
    (result,) = real.wait(*send(real, 102))
    assert "CVWORKER_BATCH_SIZE" in result["names"]
    assert not [name for name in result["names"] if name.startswith(("AWS_", "ECS_", "CVWORKER_CALLBACK_SECRET"))]


def test_a_temporary_directory_with_a_long_path_is_no_hindrance(real: Line) -> None:
    (result,) = real.wait(*send(real, 102))
    assert "TMPDIR" in result["names"], "which was too long, see the fixture"


def test_a_picture_that_ends_its_preprocess_process_fails_and_the_others_begin_again(real: Line) -> None:
    jobs = send(real, 255, 255, 2, 255, 255)
    assert codes(real.wait(*jobs)) == ["ok", "ok", "preprocess_failed", "ok", "ok"]
    assert real.step.restarts == 0


def test_a_picture_that_ends_the_model_process_fails_and_the_others_begin_again(real: Line) -> None:
    (suspect,) = real.put(a_job(kills=1), image=picture(101))
    jobs = send(real, 255, 255)
    assert codes(real.wait(suspect, *jobs)) == ["process_failed", "ok", "ok"]
    assert real.step.restarts == 1
    assert "SIGABRT" in real.wait(suspect)[0].message


def test_a_stop_finishes_what_the_process_holds_and_leaves_no_process_behind(real: Line) -> None:
    jobs = send(real, *[255] * 10)
    real.inbox.close()
    eventually(lambda: not len(real.inbox))
    real.step.stop(20)
    assert codes(real.wait(*jobs, timeout=0.1)) == ["ok"] * 10
    assert not any(thread.is_alive() for thread in real.step.threads)


def test_a_module_that_cannot_run_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(
        MODULE.replace("def preprocess", "def setup(self, device): raise OSError('no weights')\n    def preprocess")
    )
    line = Line(replace(a_config(f"{path}:Odd"), preprocess_workers=0), Clock())
    with pytest.raises(StartupError, match=r"module: odd\.setup raised OSError: no weights"):
        line.step.start()
    line.step.kill()
