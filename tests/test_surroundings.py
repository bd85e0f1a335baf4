"""Task protection and spot notices, against stand-ins for the ECS agent and EC2's metadata; time is stepped."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from cvworker import surroundings
from cvworker.surroundings import IDLE_S, LONGEST_BACKOFF_S, METADATA, POLL_S, Surroundings, _metadata_endpoint
from fakes import StepClock

NO_METADATA = {"AWS_EC2_METADATA_DISABLED": "true"}
PROTECTED = {"ProtectionEnabled": True, "ExpiresInMinutes": 10}
RELEASED = {"ProtectionEnabled": False}


class StandIn:
    """An HTTP server that notes what it is asked, when, and answers as ``answer`` says."""

    def __init__(self, clock: StepClock, answer: Callable[[web.Request, int], Awaitable[web.Response]]) -> None:
        self._clock = clock
        self._answer = answer
        self.asked: list[tuple[float, str, Any]] = []
        """The time, the method and path, and the body as JSON."""
        self.headers: list[Any] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        text = await request.text()
        self.asked.append((self._clock.now, f"{request.method} {request.path}", json.loads(text) if text else None))
        self.headers.append(request.headers)
        return await self._answer(request, len(self.asked))

    def times(self, body: Any) -> list[float]:
        return [time for time, _, each in self.asked if each == body]


@asynccontextmanager
async def serving(
    clock: StepClock, answer: Callable[[web.Request, int], Awaitable[web.Response]]
) -> AsyncIterator[StandIn]:
    stand_in = StandIn(clock, answer)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", stand_in.handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stand_in.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield stand_in
    finally:
        await runner.cleanup()


class Running:
    """Surroundings, one part of them at a time, whose sleeps end as the test moves the clock."""

    def __init__(self, clock: StepClock, environment: dict[str, str], **more: Any) -> None:
        self.clock = clock
        self.held = 0
        self.notices: list[tuple[str, str]] = []
        self._asleep = asyncio.Event()
        self._wake: asyncio.Future[None] | None = None
        self._until = 0.0
        self.task = asyncio.create_task(
            Surroundings(
                lambda: self.held,
                lambda *notice: self.notices.append(notice),
                clock,
                **{"environment": environment, "sleep": self._sleep, **more},
            ).run()
        )

    async def _sleep(self, seconds: float) -> None:
        self._wake, self._until = asyncio.get_running_loop().create_future(), self.clock.now + seconds
        self._asleep.set()
        await self._wake

    async def settled(self) -> None:
        """Until it sleeps, or has ended."""
        asleep = asyncio.create_task(self._asleep.wait())
        await asyncio.wait([asleep, self.task], timeout=20, return_when=asyncio.FIRST_COMPLETED)
        asleep.cancel()

    async def go(self, seconds: float) -> None:
        end = self.clock.now + seconds
        await self.settled()
        while not self.task.done() and self._until <= end:
            assert self._wake is not None
            self.clock.now = self._until
            self._asleep.clear()
            self._wake.set_result(None)
            await self.settled()
        self.clock.now = end

    async def __aenter__(self) -> Running:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def ok(_request: web.Request, _number: int) -> web.Response:
    return web.json_response({"protection": {"ProtectionEnabled": True, "TaskArn": "arn"}})


@pytest.fixture
def clock() -> StepClock:
    return StepClock()


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as lines:
        yield lines


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# Task protection


def protecting(
    clock: StepClock,
    scenario: Callable[[StandIn, Running], Awaitable[None]],
    answer: Callable[[web.Request, int], Awaitable[web.Response]] = ok,
    **more: Any,
) -> None:
    async def main() -> None:
        async with serving(clock, answer) as agent:
            environment = {"ECS_AGENT_URI": f"{agent.url}/api/task-1", **NO_METADATA}
            async with Running(clock, environment, **more) as running:
                await scenario(agent, running)

    asyncio.run(main())


def test_a_task_is_protected_while_it_holds_messages_and_not_while_it_is_idle(clock: StepClock):
    async def scenario(agent: StandIn, running: Running) -> None:
        await running.go(60)
        assert agent.asked == []  # it was never protected
        running.held = 3
        await running.go(2)
        assert [each[1:] for each in agent.asked] == [("PUT /api/task-1/task-protection/v1/state", PROTECTED)]
        running.held = 0
        await running.go(60)
        (released,) = agent.times(RELEASED)
        assert IDLE_S <= released - 1062 <= IDLE_S + 2

    protecting(clock, scenario)


def test_protection_is_renewed_well_before_it_expires(clock: StepClock):
    async def scenario(agent: StandIn, running: Running) -> None:
        running.held = 1
        await running.go(3600)
        times = agent.times(PROTECTED)
        gaps = [later - sooner for sooner, later in pairwise(times)]
        assert 299 <= min(gaps) <= max(gaps) <= 302
        assert clock.now - times[-1] <= 302

    protecting(clock, scenario)


def test_messages_that_come_and_go_do_not_make_it_flap(clock: StepClock):
    async def scenario(agent: StandIn, running: Running) -> None:
        for _ in range(20):
            running.held = 1
            await running.go(1)
            running.held = 0
            await running.go(7)
        assert len(agent.asked) == 1

    protecting(clock, scenario)


@pytest.mark.parametrize(("max_lease", "minutes"), [(30, 2), (200, 4), (900, 10), (43200, 10)])
def test_protection_outlives_a_dead_worker_by_little(clock: StepClock, max_lease: float, minutes: int):
    async def scenario(agent: StandIn, running: Running) -> None:
        running.held = 1
        await running.go(1)
        assert agent.asked[0][2]["ExpiresInMinutes"] == minutes

    protecting(clock, scenario, max_lease=max_lease)


async def failing(_request: web.Request, _number: int) -> web.Response:
    return web.json_response({"error": {"Code": "AccessDeniedException"}}, status=400)


async def failing_with_200(_request: web.Request, _number: int) -> web.Response:
    return web.json_response({"failure": {"Reason": "TASK_NOT_VALID", "Arn": "arn"}})


async def redirecting(request: web.Request, _number: int) -> web.Response:
    return web.Response(status=307, headers={"Location": "/elsewhere"})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (failing, "HTTP 400: .*AccessDenied"),
        (failing_with_200, "HTTP 200: .*TASK_NOT_VALID"),
        (redirecting, "HTTP 307"),
    ],
)
def test_an_agent_that_refuses_is_logged_once_and_asked_less_and_less(
    clock: StepClock, logs: list[Any], answer: Any, reason: str
):
    async def scenario(agent: StandIn, running: Running) -> None:
        running.held = 1
        await running.go(3600)
        times = agent.times(PROTECTED)
        gaps = [later - sooner for sooner, later in pairwise(times)]
        assert gaps == sorted(gaps)
        assert (gaps[0], gaps[-1]) == (5, LONGEST_BACKOFF_S)
        assert not running.task.done()

    protecting(clock, scenario, answer)
    (line,) = logs
    assert line["log_level"] == "warning"
    assert re.match(reason, line["error"])


def test_an_agent_that_recovers_protects_again(clock: StepClock, logs: list[Any]):
    async def answer(request: web.Request, number: int) -> web.Response:
        return await (failing if number <= 2 else ok)(request, number)

    async def scenario(agent: StandIn, running: Running) -> None:
        running.held = 1
        await running.go(120)
        assert len(agent.asked) == 3

    protecting(clock, scenario, answer)
    assert [line["log_level"] for line in logs] == ["warning", "info"]


def test_a_release_that_fails_is_tried_again_until_the_protection_has_expired(clock: StepClock, logs: list[Any]):
    async def answer(request: web.Request, number: int) -> web.Response:
        return await (ok if number == 1 else failing)(request, number)

    async def scenario(agent: StandIn, running: Running) -> None:
        running.held = 1
        await running.go(1)
        running.held = 0
        await running.go(3600)
        times = agent.times(RELEASED)
        assert len(times) > 3
        assert times[-1] <= 1000 + 600 + 1

    protecting(clock, scenario, answer)


def test_an_agent_that_hangs_or_is_gone_holds_up_nothing(
    clock: StepClock, logs: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(surroundings, "AGENT_TIMEOUT_S", 0.05)

    async def hanging(_request: web.Request, _number: int) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def scenario(agent: StandIn, running: Running) -> None:
        running.held = 1
        await running.go(30)
        assert len(agent.asked) == 3
        assert not running.task.done()

    protecting(clock, scenario, hanging)

    async def gone() -> None:
        async with Running(clock, {"ECS_AGENT_URI": closed_port(), **NO_METADATA}) as running:
            running.held = 1
            await running.go(30)
            assert not running.task.done()

    asyncio.run(gone())
    assert [line["error"][:14] for line in logs] == ["TimeoutError", "Cannot connect"]


# Spot notices


class Metadata:
    """EC2's instance metadata: its tokens, and what its next answers to the question are (the last stays)."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        self._answers = list(answers)
        self.tokens = 0

    async def __call__(self, request: web.Request, _number: int) -> web.Response:
        if request.path == "/latest/api/token":
            assert request.method == "PUT"
            assert 1 <= int(request.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
            self.tokens += 1
            return web.Response(text=f"token-{self.tokens}==")
        assert request.path == "/latest/meta-data/spot/instance-action"
        if request.headers.get("X-aws-ec2-metadata-token") != f"token-{self.tokens}==":
            return web.Response(status=401)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return web.Response(status=answer[0], text=answer[1])


NOTHING = (404, "not found")
NOTICE = (200, '{"action": "terminate", "time": "2026-07-01T12:00:00Z"}')


def watching(
    clock: StepClock,
    scenario: Callable[[StandIn, Running], Awaitable[None]],
    answer: Callable[[web.Request, int], Awaitable[web.Response]],
    **more: Any,
) -> None:
    async def main() -> None:
        async with (
            serving(clock, answer) as metadata,
            Running(clock, {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url + "/"}, **more) as running,
        ):
            await scenario(metadata, running)

    asyncio.run(main())


def test_a_notice_is_told_once_and_then_nothing_is_asked(clock: StepClock, logs: list[Any]):
    async def scenario(metadata: StandIn, running: Running) -> None:
        await running.go(14)
        assert running.notices == []
        await running.go(60)
        assert running.notices == [("terminate", "2026-07-01T12:00:00Z")]
        assert running.task.done()
        assert [time - 1000 for time, what, _ in metadata.asked if what.startswith("GET")] == [0, POLL_S, 10, 15]

    watching(clock, scenario, Metadata(NOTHING, NOTHING, NOTHING, NOTICE))
    assert logs == []


def test_what_goes_wrong_at_a_look_is_passed_over(clock: StepClock, logs: list[Any]):
    answers = [(500, ""), (200, "not JSON"), (200, "[]"), (200, '{"time": 1}'), (302, ""), NOTICE]

    async def scenario(_: StandIn, running: Running) -> None:
        await running.go(25)
        assert running.notices == [("terminate", "2026-07-01T12:00:00Z")]

    watching(clock, scenario, Metadata(*answers))
    assert logs == []


def test_a_token_that_has_expired_is_replaced(clock: StepClock):
    metadata = Metadata(NOTHING, NOTHING, NOTICE)

    async def scenario(_: StandIn, running: Running) -> None:
        await running.go(2)
        metadata.tokens += 1  # the one in use is not the newest any more
        await running.go(60)
        assert running.notices != []

    watching(clock, scenario, metadata)
    assert metadata.tokens == 3


def test_metadata_that_falls_silent_for_a_while_is_asked_on(clock: StepClock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(surroundings, "POLL_TIMEOUT_S", 0.05)
    metadata = Metadata(NOTHING, NOTICE)

    async def answer(request: web.Request, number: int) -> web.Response:
        if number in (3, 4):
            await asyncio.Event().wait()
        return await metadata(request, number)

    async def scenario(_: StandIn, running: Running) -> None:
        await running.go(60)
        assert running.notices != []

    watching(clock, scenario, answer)


def test_a_callback_that_fails_is_logged_and_harms_nothing(clock: StepClock, logs: list[Any]):
    def on_notice(*_: str) -> None:
        raise RuntimeError("no")

    async def main() -> None:
        async with serving(clock, Metadata(NOTICE)) as metadata:
            here = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url}
            await Surroundings(lambda: 0, on_notice, clock, environment=here).run()

    asyncio.run(main())
    assert [line["log_level"] for line in logs] == ["error"]


def test_outside_ec2_there_is_one_attempt_and_no_word_about_it(
    clock: StepClock, logs: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(surroundings, "FIRST_ASK_TIMEOUT_S", 0.05)

    async def hanging(_request: web.Request, _number: int) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def something_else(_request: web.Request, _number: int) -> web.Response:
        return web.Response(status=405)

    async def scenario(metadata: StandIn, running: Running) -> None:
        await running.task
        assert [what for _, what, _ in metadata.asked] == ["PUT /latest/api/token"]

    for answer in (hanging, something_else):
        watching(clock, scenario, answer)

    async def nobody() -> None:
        here = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": closed_port()}
        await Surroundings(lambda: 0, lambda *_: None, clock, environment=here).run()

    asyncio.run(nobody())
    assert logs == []


@pytest.mark.parametrize("said", ["true", "True"])
def test_nothing_is_asked_where_it_is_disabled(clock: StepClock, said: str):
    async def main() -> None:
        async with serving(clock, ok) as server:
            here = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": server.url, "AWS_EC2_METADATA_DISABLED": said}
            await Surroundings(lambda: 1, lambda *_: None, clock, environment=here).run()
            assert server.asked == []

    asyncio.run(main())


def test_proxies_of_the_environment_are_not_used(clock: StepClock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", closed_port())
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)

    async def scenario(_: StandIn, running: Running) -> None:
        await running.go(1)
        assert running.notices != []

    watching(clock, scenario, Metadata(NOTICE))


def test_no_metadata_service_is_asked_where_the_machine_is_not_ec2s(tmp_path, monkeypatch):
    monkeypatch.setattr("cvworker.surroundings.MACHINE_SAYS", {str(tmp_path / "vendor"): "amazon ec2"})
    assert _metadata_endpoint({}) is None
    (tmp_path / "vendor").write_text("QEMU\n")
    assert _metadata_endpoint({}) is None


def test_the_metadata_endpoint_is_found_as_the_sdks_find_it(tmp_path, monkeypatch):
    vendor = tmp_path / "vendor"
    vendor.write_text("Amazon EC2\n")
    monkeypatch.setattr("cvworker.surroundings.MACHINE_SAYS", {str(vendor): "amazon ec2"})
    assert _metadata_endpoint({}) == METADATA
    assert _metadata_endpoint({"AWS_EC2_METADATA_DISABLED": "false"}) == METADATA
    assert _metadata_endpoint({"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv6"}) == "http://[fd00:ec2::254]"
    assert _metadata_endpoint({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://a:1/"}) == "http://a:1/"
