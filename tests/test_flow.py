"""What is around the steps: where a job goes after each, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from cvworker.answer import WorkerInfo
from cvworker.arena import PAGE, Arena
from cvworker.errors import DownloadInterrupted, ImageNotFound, JobError, ProcessFailed, UrlNotAllowed
from cvworker.flow import Flow
from cvworker.job import Job
from cvworker.observe.metrics import Metrics
from cvworker.queues import JobQueue
from cvworker.sqs.outcome import ANSWERED, LEFT, LOST, RELEASED, End
from cvworker.steps.callback import CallbackRefused, Sent
from cvworker.steps.hosts import Hosts
from fakes import FakeSqs, Keeper, StepClock, open_queue

DEFAULT = "http://operator.test/answers"


class Fetched:
    """A fetcher: gives a slot, or raises."""

    def __init__(self, arena: Arena, error: Exception | None = None) -> None:
        self.arena, self.error = arena, error

    async def fetch(self, _url: str) -> Any:
        if self.error is not None:
            raise self.error
        return await self.arena.take(10)


class Posted:
    """A sender that notes what it is given, and raises what ``errors`` holds for a URL."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, str, dict[str, Any]]] = []
        self.errors: dict[str, Exception] = {}
        self.full = False

    def crowded(self, _url: str, *, last: bool) -> bool:
        return self.full

    def paused_for(self, _url: str) -> float:
        return 0.0

    async def post(self, url: str, webhook_id: str, body: bytes, *, last: bool = False) -> Sent:
        if url in self.errors:
            raise self.errors[url]
        self.answers.append((url, webhook_id, json.loads(body)))
        return Sent(200)


class Stage:
    """A flow on a fake queue, with its two outboxes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, default_callback: str | None = None) -> None:
        self.clock = StepClock()
        self.sqs = FakeSqs(self.clock, max_receives=3)
        self.keeper = Keeper(open_queue(self.sqs, monkeypatch), self.clock, default_callback=default_callback)
        self.inference = JobQueue("inference", 10, self.clock.monotonic)
        self.results = JobQueue("results", 10, self.clock.monotonic)
        self.metrics = Metrics()
        self.arena = Arena(10 * PAGE)
        self.flow = Flow(
            self.keeper.custody,
            inference_queue=self.inference,
            results_queue=self.results,
            metrics=self.metrics,
            clock=self.clock,
            default_callback=default_callback,
        )
        self.flow.info = WorkerInfo("0.1.0", "mean", None)
        self.posted = Posted()
        self.flow.sender = self.posted  # type: ignore[assignment]

    def job(self, body: str | None = None) -> Job:
        if body is None:
            self.sqs.send()
        else:
            self.sqs.send(body)
        jobs = self.keeper.receive()
        return jobs[0]

    def download(self, job: Job, error: Exception | None = None) -> None:
        hosts = Hosts(lambda: 8, self.clock.monotonic)
        asyncio.run(self.flow.download(job, Fetched(self.arena, error), hosts))  # type: ignore[arg-type]

    def answer(self, job: Job) -> None:
        asyncio.run(self.flow.answer(job))

    def ending(self) -> Any:
        """The outcome of the one message."""
        return self.keeper.wait_ended()[0][1]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_downloaded_image_goes_to_the_model(stage: Stage) -> None:
    job = stage.job()
    stage.download(job)
    assert stage.inference.get(timeout=0) == [job]
    assert job.image is not None
    assert job.timings_ms["download"] >= 0


def test_a_download_that_failed_for_good_is_answered(stage: Stage) -> None:
    job = stage.job()
    stage.download(job, ImageNotFound("the image host answered 404"))
    assert stage.results.get(timeout=0) == [job]
    stage.answer(job)
    (_, webhook_id, answer) = stage.posted.answers[0]
    assert webhook_id == "m1"
    assert answer["error"] == {"code": "image_not_found", "message": "the image host answered 404", "retryable": False}
    assert stage.ending() == ANSWERED
    assert stage.metrics.totals(stage.metrics.errors) == {"image_not_found": 1}


def test_a_download_that_may_succeed_later_is_left_to_sqs_and_nobody_is_told(stage: Stage) -> None:
    stage.download(stage.job(), DownloadInterrupted("reset"))
    assert stage.ending().end is End.LATER
    assert len(stage.results) == len(stage.posted.answers) == 0


def test_on_the_last_receive_the_client_is_told_that_it_may_try_again(stage: Stage) -> None:
    job = stage.job()
    for _ in range(2):
        stage.clock.advance(31)
        assert stage.keeper.receive() == [], "held, so it stays the same job"
    stage.download(job, DownloadInterrupted("reset"))
    stage.answer(job)
    assert stage.posted.answers[0][2]["error"]["retryable"] is True
    assert stage.posted.answers[0][2]["attempt"] == 3


def test_nothing_is_downloaded_for_a_message_that_is_somebody_elses_by_now(stage: Stage) -> None:
    job = stage.job()
    stage.clock.advance(31)
    stage.download(job)
    assert stage.ending() == LOST
    assert job.image is None


def test_nothing_is_downloaded_for_a_callback_host_that_too_many_answers_wait_for(stage: Stage) -> None:
    job = stage.job()
    stage.posted.full = True
    stage.download(job)
    assert stage.ending().end is End.LATER
    assert job.image is None


def test_a_result_is_answered_with_its_timings(stage: Stage) -> None:
    stage.sqs.send()
    stage.clock.advance(2)
    (job,) = stage.keeper.receive()
    stage.download(job)
    job.timings_ms |= {"preprocess": 6.1, "process": 11.9}
    job.result = {"label": "cat"}
    stage.flow.inferred([job])
    assert stage.results.get(timeout=0) == [job]
    stage.clock.advance(1.5)
    stage.answer(job)
    answer = stage.posted.answers[0][2]
    assert (answer["status"], answer["result"], answer["worker"]["module"]) == ("ok", {"label": "cat"}, "mean")
    assert answer["timings_ms"] | {"download": 0} == {
        "queue": 2000.0, "download": 0, "preprocess": 6.1, "process": 11.9, "total": 3500.0,
    }  # fmt: skip
    assert stage.ending() == ANSWERED
    assert stage.sqs.messages == {}
    assert stage.arena.used == 0


def test_a_result_that_cannot_be_written_is_answered_as_process_failed(stage: Stage) -> None:
    job = stage.job()
    job.result = {"score": float("nan")}
    stage.answer(job)
    assert stage.posted.answers[0][2]["error"]["code"] == "process_failed"
    assert stage.ending() == ANSWERED


def test_an_answer_that_was_not_accepted_is_left_to_sqs(stage: Stage) -> None:
    job = stage.job()
    stage.posted.errors[job.request.callback_url or ""] = CallbackRefused("HTTP 503", retry_after=700)
    stage.answer(job)
    outcome = stage.ending()
    assert (outcome.end, outcome.delay >= 700) == (End.LATER, True)
    assert list(stage.sqs.messages) == ["m1"]


def test_nobody_is_told_of_a_message_without_any_callback(stage: Stage) -> None:
    job = stage.job('{"image_url": "http://host/a.jpg"}')
    stage.answer(job)
    assert stage.ending() == LEFT
    assert stage.posted.answers == []


def test_a_callback_that_may_not_be_called_is_never_called_and_the_default_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(monkeypatch, default_callback=DEFAULT)
    job = stage.job()
    job.result = {"label": "cat"}
    stage.posted.errors[job.request.callback_url or ""] = UrlNotAllowed("client.test resolves to 10.0.0.1")
    stage.answer(job)
    ((url, _, answer),) = stage.posted.answers
    assert (url, answer["error"]["code"]) == (DEFAULT, "url_not_allowed")
    assert stage.ending() == ANSWERED


@pytest.mark.parametrize("default", [None, DEFAULT])
def test_a_message_is_left_when_no_callback_may_be_called(monkeypatch: pytest.MonkeyPatch, default: str | None) -> None:
    stage = Stage(monkeypatch, default_callback=default)
    job = stage.job()
    for url in (job.request.callback_url or "", DEFAULT):
        stage.posted.errors[url] = UrlNotAllowed("refused")
    stage.answer(job)
    assert stage.ending() == LEFT


def test_nobody_is_told_of_a_message_whose_lease_is_lost(stage: Stage) -> None:
    job = stage.job()
    stage.keeper.leases.lose(job.lease, "m1/1")
    stage.answer(job)
    assert stage.ending() == LOST
    assert stage.posted.answers == []


def test_a_request_that_was_refused_is_answered_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, default_callback=DEFAULT)
    job = stage.job('{"image_url": "", "id": "mine"}')
    stage.download(job)
    stage.answer(stage.results.get(timeout=0)[0])
    answer = stage.posted.answers[0][2]
    assert (answer["id"], answer["error"]["code"]) == ("mine", "invalid_message")


def test_a_step_that_raised_what_it_should_not_have_loses_no_message(stage: Stage) -> None:
    stage.flow.surprised(stage.job(), ZeroDivisionError())
    assert stage.ending().end is End.LATER


def test_a_released_job_is_visible_at_once_and_can_end_no_second_time(stage: Stage) -> None:
    job = stage.job()
    stage.download(job)
    stage.flow.release(job)
    stage.flow.settle(job, ANSWERED)
    assert stage.ending() == RELEASED
    assert stage.sqs.hidden_for("m1") == 0
    assert stage.arena.used == 0


def test_each_job_that_ends_is_one_line_in_the_log(stage: Stage) -> None:
    with capture_logs() as lines:
        job = stage.job()
        stage.flow.failed(job, ProcessFailed("ValueError: no"))
        stage.answer(job)
        stage.flow.release(job)
    (line,) = [line for line in lines if "message_id" in line]
    assert line["event"] == "answered"
    assert (line["id"], line["code"], line["callback_status"]) == ("m1", "process_failed", 200)


def test_an_error_that_is_kept_pins_nothing_of_where_it_was_raised(stage: Stage, no_gc: None) -> None:
    class Picture:
        """A large thing on the way."""

    def refuse() -> JobError:
        picture = Picture()
        seen.append(weakref.ref(picture))
        try:
            try:
                raise OSError("reset") from KeyError("because")
            except OSError:
                raise DownloadInterrupted("the connection failed") from None
        except JobError as error:
            return error

    seen: list[weakref.ref[Any]] = []
    job = stage.job()
    job.lease.attempt = 3
    stage.download(job, refuse())
    assert isinstance(job.error, DownloadInterrupted)
    assert seen[0]() is None
