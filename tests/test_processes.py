"""Several pipelines in one container: as one worker to those outside, and never fewer than asked for."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cvworker.pipeline import Pipeline
from cvworker.settings import Settings
from cvworker.worker import Worker
from world import MODULES, WorkerProcess, World, fetch, poll, status_of

SLOW = f"{MODULES / 'mean.py'}:Slow"
WAITING = f"{MODULES / 'waiting.py'}:Waiting"
TWO = ("--processes", "2")
FOUR = ("--processes", "4")


def pids(worker: WorkerProcess) -> list[int]:
    """The pipelines that run, by the number of their process."""
    return [each["pid"] for each in worker.status()["processes"] if each["pid"]]


def family(worker: WorkerProcess) -> list[psutil.Process]:
    return psutil.Process(worker.process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


def answers_a_second(here: World, count: int) -> float:
    """Measured between two of the answers yet to come, after the first batches, which may have been partial ones."""
    first = len(here.receiver.accepted) + 16
    assert here.receiver.wait_for(first + count + 1, 60)
    times = [each.monotonic for each in here.receiver.accepted]
    return count / (times[first + count] - times[first])


def test_four_pipelines_answer_every_message_once_and_are_one_worker_to_those_outside(fast_world: World) -> None:
    # given four pipelines that are ready
    here = fast_world
    worker = here.worker(*FOUR).ready()
    assert status_of(worker.url() + "livez") == 200
    assert len(set(pids(worker))) == 4
    # when they have 300 messages
    here.send(*(here.request(n) for n in range(300)))
    assert here.receiver.wait_for(300, 60)
    poll(lambda: here.counts() == (0, 0), 20, "all are deleted")
    # then each is answered once, rightly
    assert {each.id for each in here.receiver.accepted} == {f"req-{n}" for n in range(300)}
    assert not here.receiver.duplicates
    assert all(here.right(answer) for answer in here.receiver.answers.values())
    # and the numbers of all are one
    poll(lambda: worker.metric("cvworker_messages_total", outcome="answered") == 300, 10, "all are counted")
    assert worker.metric("cvworker_end_to_end_seconds_count") == 300
    assert worker.metric("cvworker_stage_duration_seconds_count", stage="download") == 300
    assert worker.metric("cvworker_inflight_messages") == 0
    status = worker.status()
    assert status["messages"] == {"answered": 300}
    assert sum(each["messages"].get("answered", 0) for each in status["processes"]) == 300
    assert all(each["messages"]["answered"] > 0 for each in status["processes"]), "all had work"
    assert status["model"]["module"] == "mean"
    assert status["queue"] == {"url": here.queue_url, "reachable": True, "max_receives": 5}


def test_the_endpoints_of_two_pipelines_are_formed_like_those_of_one(fast_world: World) -> None:
    # given one worker of one pipeline, and one of two
    here = fast_world
    one, two = here.worker().ready(), here.worker(*TWO, "--max-inflight-bytes", "100MiB").ready()
    # then the status has the same shape, and what is the container's is shared out
    mine, theirs = one.status(), two.status()
    assert list(theirs) == [*mine, "processes"]
    nested = [name for name, value in mine.items() if isinstance(value, dict) and name not in ("messages", "settings")]
    assert {name: set(theirs[name]) for name in nested} == {name: set(mine[name]) for name in nested}
    assert theirs["model"] | {"pid": 0} == mine["model"] | {"pid": 0, "preprocess_workers": 2}
    assert theirs["settings"]["processes"] == 2
    shares = [each["settings"] for each in theirs["processes"]]
    assert [each["max_inflight_bytes"] for each in shares] == [50 * 2**20] * 2
    assert [each["preprocess_workers"] for each in shares] == [1] * 2 or (psutil.cpu_count() or 1) > 3
    # and so have the metrics, each told once
    texts = [fetch(each.url() + "metrics") for each in (one, two)]
    heads = [[line for line in text.splitlines() if line.startswith("#")] for text in texts]
    known = [[line for line in lines if "_created" not in line] for lines in heads]  # there from the first sample on
    assert known[1] == known[0]
    assert len(set(heads[1])) == len(heads[1])
    limits = [each.metric("cvworker_queue_limit", queue="download") for each in (one, two)]
    assert limits[1] == 2 * limits[0]
    busy = next(f for f in text_string_to_metric_families(texts[1]) if f.name == "cvworker_stage_busy_ratio")
    assert all(0 <= sample.value <= 1 for sample in busy.samples)
    # and the page is there, as guarded as ever
    headers = []
    for each in (one, two):
        with urllib.request.urlopen(each.url()) as page:
            headers.append({name: page.headers[name] for name in ("Content-Security-Policy", "Cache-Control")})
    assert headers[1] == headers[0]


def test_two_pipelines_with_a_module_that_waits_are_almost_twice_as_fast_as_one(fast_world: World) -> None:
    here, rates = fast_world, []
    for flags in ((), TWO):
        # given more messages than are measured
        worker = here.worker(*flags, "--shutdown-grace", "3", "--precision", "fp32", module=WAITING).ready()
        here.send(*(here.request(n) for n in range(200)))
        # when they are answered
        rates.append(answers_a_second(here, 96))
        worker.signal()
        assert worker.wait(10) == 0
    # then two are faster, by almost as much as could be
    assert rates[1] / rates[0] >= 1.6, rates


def test_a_killed_pipeline_is_replaced_and_everything_is_answered(fast_world: World) -> None:
    # given four pipelines in the middle of their work
    here = fast_world
    here.client.set_queue_attributes(QueueUrl=here.queue_url, Attributes={"VisibilityTimeout": "5"})
    worker = here.worker(*FOUR, module=SLOW).ready()
    here.send(*(here.request(n) for n in range(300)))
    assert here.receiver.wait_for(60, 60)
    before = worker.metric("cvworker_messages_total", outcome="answered")
    # when one of them is killed
    victim = psutil.Process(pids(worker)[0])
    relatives = victim.children(recursive=True)
    victim.kill()
    # then it is seen, another takes its place, and all is answered
    poll(lambda: status_of(worker.url() + "livez") == 503, 5, "not all live")
    poll(lambda: status_of(worker.url() + "readyz") == 200 and len(pids(worker)) == 4, 60, "all are back")
    assert status_of(worker.url() + "livez") == 200
    assert victim.pid not in pids(worker)
    assert gone(relatives)
    poll(lambda: len({each.id for each in here.receiver.accepted}) == 300, 90, "all are answered")
    # and no total has gone back
    assert worker.metric("cvworker_messages_total", outcome="answered") >= before
    assert worker.lines("a pipeline ended; it is replaced")[0]["ended"] == "SIGKILL"


def test_a_pipeline_that_ends_again_and_again_ends_the_worker_with_1(fast_world: World) -> None:
    # given two idle pipelines
    worker = fast_world.worker(*TWO).ready()
    relatives = family(worker)
    # when one of them is killed whenever it is there
    until = time.monotonic() + 90
    while worker.process.poll() is None and time.monotonic() < until:
        try:
            first = worker.status()["processes"][0]["pid"]
        except OSError:  # it is about to end
            first = None
        if first and psutil.pid_exists(first):
            psutil.Process(first).kill()
        time.sleep(0.2)
    # then the worker gives up, and stops the other in order
    assert worker.wait(10) == 1
    assert "again and again (SIGKILL)" in worker.lines("failed")[0]["error"]
    assert [line["pipeline"] for line in worker.lines("stopped") if "pipeline" in line] == [2]
    poll(lambda: gone(relatives), 5, "none is left")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_stops_both_in_time_and_loses_nothing(fast_world: World, number: signal.Signals) -> None:
    # given two pipelines with more work than they can finish
    here = fast_world
    here.client.set_queue_attributes(QueueUrl=here.queue_url, Attributes={"VisibilityTimeout": "600"})
    here.send(*(here.request(n) for n in range(600)))
    worker = here.worker(*TWO, "--shutdown-grace", "15", module=SLOW).ready()
    assert here.receiver.wait_for(30, 60)
    relatives = family(worker)
    # when the worker is told to stop
    began = time.monotonic()
    worker.signal(number)
    assert worker.wait(20) == 0
    assert time.monotonic() - began < 16
    # then every message is answered or visible, none hidden, and no process is left
    visible, hidden = here.counts()
    assert hidden == 0
    assert len({each.id for each in here.receiver.accepted}) + visible == 600
    assert not here.receiver.duplicates
    poll(lambda: gone(relatives), 5, "none is left")


def test_a_signal_to_every_process_at_once_is_one_signal(fast_world: World) -> None:
    # given messages under way, and a service manager that signals the whole group of processes
    here = fast_world
    here.send(*(here.request(n) for n in range(300)))
    worker = here.worker(*TWO, module=SLOW).ready()
    assert here.receiver.wait_for(16, 60)
    # when the supervisor and the pipelines hear of it
    for pid in pids(worker):
        psutil.Process(pid).terminate()
    worker.signal()
    # then they stop in order
    assert worker.wait(30) == 0
    assert len([line for line in worker.lines("stopped") if "pipeline" in line]) == 2


def test_a_second_signal_ends_all_at_once_with_1(fast_world: World) -> None:
    here = fast_world
    here.send(*(here.request(n) for n in range(200)))
    worker = here.worker(*TWO, module=SLOW).ready()
    assert here.receiver.wait_for(1, 30)
    relatives = family(worker)
    worker.signal()
    poll(lambda: worker.lines("stopping"), 10)
    began = time.monotonic()
    worker.signal()
    assert worker.wait(10) == 1
    assert time.monotonic() - began < 3
    poll(lambda: gone(relatives), 5, "none is left")


def test_a_signal_while_the_first_pipeline_starts_ends_with_0(fast_world: World) -> None:
    worker = fast_world.worker(*TWO)
    worker.url()
    began = time.monotonic()
    worker.signal()
    assert worker.wait(10) == 0
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--module", "nobody-has-this"), "nobody-has-this"),
        (("--max-inflight-bytes", "30MiB"), "--max-inflight-bytes"),
    ],
)
def test_what_is_wrong_at_the_start_is_told_once_with_2(fast_world: World, flags: tuple[str, str], names: str) -> None:
    worker = fast_world.worker(*TWO, *flags)
    assert worker.wait(30) == 2
    told = [line for line in worker.text().splitlines() if not line.startswith("{")]
    assert len(told) == 1
    assert told[0].startswith("cvworker run: ")
    assert names in told[0]


def test_a_port_that_is_taken_is_told_with_2(fast_world: World) -> None:
    other = fast_world.worker()
    port = other.url().rstrip("/").rpartition(":")[2]
    worker = fast_world.worker(*TWO, "--http-port", port)
    assert worker.wait(30) == 2
    assert "http_port" in worker.text()


def test_pipelines_end_in_order_when_their_supervisor_is_killed(fast_world: World) -> None:
    # given pipelines that hold messages
    here = fast_world
    here.client.set_queue_attributes(QueueUrl=here.queue_url, Attributes={"VisibilityTimeout": "600"})
    here.send(*(here.request(n) for n in range(300)))
    worker = here.worker(*TWO, "--shutdown-grace", "5", module=SLOW).ready()
    assert here.receiver.wait_for(16, 30)
    relatives = family(worker)
    assert len(relatives) >= 4
    # when nobody is left to tell them
    worker.kill()
    # then they end by themselves, and nothing stays hidden
    poll(lambda: gone(relatives), 10, "none is left")
    assert here.counts()[1] == 0


@pytest.mark.parametrize("end", ["closed", "reset"])
def test_a_pipeline_stops_however_the_line_to_its_supervisor_ends(end: str) -> None:
    async def scenario() -> None:
        reader = asyncio.StreamReader()
        pipeline = Pipeline(Settings(), reader, cast(asyncio.StreamWriter, None))
        pipeline.worker = cast(Worker, object())
        if end == "closed":
            reader.feed_eof()
        else:  # as when the supervisor is killed with a report unread
            reader.set_exception(ConnectionResetError())
        await pipeline._listen()
        assert pipeline._stop_asked.is_set()

    asyncio.run(scenario())


def test_idle_pipelines_end_with_0_when_asked_to(fast_world: World) -> None:
    here = fast_world
    here.send(*(here.request(n) for n in range(50)))
    worker = here.worker(*TWO, "--exit-when-idle", "3")
    assert worker.wait(60) == 0
    assert {each.id for each in here.receiver.accepted} == {f"req-{n}" for n in range(50)}
    assert not worker.lines("a pipeline ended; it is replaced")
    assert len(worker.lines("idle; ending as asked")) == 2


def test_the_task_is_protected_by_one_call_while_any_of_them_holds_messages(fast_world: World) -> None:
    # given an agent of ECS
    asked: list[Any] = []

    class Agent(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Agent) as agent:
        threading.Thread(target=agent.serve_forever, daemon=True).start()
        here = fast_world
        # when two pipelines work
        worker = here.worker(*TWO, module=SLOW, ECS_AGENT_URI=f"http://127.0.0.1:{agent.server_port}/api").ready()
        assert asked == []
        here.send(*(here.request(n) for n in range(300)))
        assert here.receiver.wait_for(300, 60)
        assert all(each["messages"].get("answered") for each in worker.status()["processes"])
        agent.shutdown()
    # then the container has spoken once
    assert asked == [{"ProtectionEnabled": True, "ExpiresInMinutes": 10}]


def logged(worker: WorkerProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in worker.text().splitlines() if line.startswith("{")]


def test_every_line_of_a_pipeline_says_which_it_is(fast_world: World) -> None:
    here = fast_world
    worker = here.worker(*TWO).ready()
    here.send(*(here.request(n) for n in range(40)))
    assert here.receiver.wait_for(40, 60)
    poll(lambda: len([line for line in logged(worker) if line.get("event") == "answered"]) == 40, 10)
    assert {line["pipeline"] for line in logged(worker) if line["event"] == "answered"} <= {1, 2}
