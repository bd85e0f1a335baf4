"""Callbacks against a real server: what accepts an answer, what is tried again here, and what is left to SQS."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web

from cvworker.errors import UrlNotAllowed
from cvworker.net import AddressGuard, GuardedSession
from cvworker.signing import Signer
from cvworker.steps import callback
from cvworker.steps.callback import TRIES, CallbackRefused, CallbackSender, Sent
from cvworker.steps.hosts import FIRST_PAUSE_S, OPENS_AFTER, Hosts
from fakes import EPOCH, StepClock, serving

BODY = b'{"id":"mine"}'
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

Reply = int | web.Response | Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Host:
    """What a callback host answers, one reply after the other (the last for ever), and what it was sent."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.content.read()
        self.requests.append((request.path, {k.lower(): v for k, v in request.headers.items()}, body))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, int):
            return web.Response(status=reply)
        return reply if isinstance(reply, web.Response) else await reply(request)


class Pauses(list[float]):
    """Every pause the sender makes, over at once on the stepped clock."""

    def __init__(self, clock: StepClock, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        turn = asyncio.sleep

        async def sleep(seconds: float) -> None:
            if seconds > 0:
                self.append(seconds)
                clock.advance(seconds)
            await turn(0)

        monkeypatch.setattr(callback.asyncio, "sleep", sleep)


@pytest.fixture
def clock() -> StepClock:
    return StepClock()


@pytest.fixture
def pauses(clock: StepClock, monkeypatch: pytest.MonkeyPatch) -> Pauses:
    return Pauses(clock, monkeypatch)


def talk(
    host: Host,
    clock: StepClock,
    conversation: Callable[[CallbackSender, str], Coroutine[Any, Any, Any]],
    *,
    timeout: float = 10,
    concurrency: int = 8,
    private: bool = True,
    signer: Signer | None = None,
    called: Callable[[str, float], None] = lambda _class, _seconds: None,
) -> Any:
    async def main() -> Any:
        guard = AddressGuard(allow_private_networks=private)
        async with serving(host) as url, GuardedSession(guard) as session:
            sender = CallbackSender(
                session, signer=signer, timeout=timeout, clock=clock, concurrency=concurrency, called=called
            )
            return await asyncio.wait_for(conversation(sender, url), 20)

    return asyncio.run(main())


def post(host: Host, clock: StepClock, **more: Any) -> Sent:
    return talk(host, clock, lambda sender, url: sender.post(f"{url}/answers?to=me", "m1", BODY), **more)


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_any_2xx_accepts_the_answer(status: int, clock: StepClock, pauses: Pauses) -> None:
    host = Host(status)
    assert post(host, clock) == Sent(status)
    ((path, headers, body),) = host.requests
    assert (path, headers["webhook-id"], headers["content-type"], body) == ("/answers", "m1", "application/json", BODY)
    assert pauses == []


def test_gone_settles_as_acceptance_does(clock: StepClock) -> None:
    assert post(Host(410), clock) == Sent(410)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_failure_and_not_followed(status: int, clock: StepClock, pauses: Pauses) -> None:
    host = Host(web.Response(status=status, headers={"Location": "/elsewhere"}))
    with pytest.raises(CallbackRefused, match=f"HTTP {status}"):
        post(host, clock)
    assert [path for path, _, _ in host.requests] == ["/answers"]


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 422])
def test_other_4xx_are_left_to_sqs_at_once(status: int, clock: StepClock, pauses: Pauses) -> None:
    host = Host(status)
    with pytest.raises(CallbackRefused) as refused:
        post(host, clock)
    assert (len(host.requests), refused.value.retry_after) == (1, 0)


@pytest.mark.parametrize("passing", [500, 502, 503, 504, 429])
def test_a_failure_that_may_pass_is_tried_again_in_place(passing: int, clock: StepClock, pauses: Pauses) -> None:
    host = Host(passing, passing, 200)
    assert post(host, clock) == Sent(200)
    assert len(host.requests) == 3
    assert len(pauses) == 2
    assert sum(pauses) < 5


def test_a_host_that_goes_on_failing_is_left_to_sqs_after_a_few_tries(clock: StepClock, pauses: Pauses) -> None:
    host = Host(500)
    with pytest.raises(CallbackRefused, match="HTTP 500"):
        post(host, clock)
    assert len(host.requests) == TRIES


@pytest.mark.parametrize("status", [429, 503])
def test_a_short_retry_after_is_waited_out_here(status: int, clock: StepClock, pauses: Pauses) -> None:
    host = Host(web.Response(status=status, headers={"Retry-After": "12"}), 200)
    assert post(host, clock) == Sent(200)
    assert len(pauses) == 1
    assert pauses[0] >= 12


@pytest.mark.parametrize("status", [429, 503])
def test_a_long_retry_after_is_left_to_sqs_with_the_wish(status: int, clock: StepClock, pauses: Pauses) -> None:
    host = Host(web.Response(status=status, headers={"Retry-After": "600"}))
    with pytest.raises(CallbackRefused) as refused:
        post(host, clock)
    assert (len(host.requests), refused.value.retry_after) == (1, 600)


async def _reset(request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def _silence(_request: web.BaseRequest) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


def test_a_reset_is_tried_again_in_place(clock: StepClock, pauses: Pauses) -> None:
    host = Host(_reset, _reset, 200)
    assert post(host, clock) == Sent(200)


def test_a_host_that_says_nothing_is_left_to_sqs_at_once(clock: StepClock, pauses: Pauses) -> None:
    host, seen = Host(_silence), list[str]()
    with pytest.raises(CallbackRefused, match="timed out"):
        post(host, clock, timeout=0.2, called=lambda code_class, _seconds: seen.append(code_class))
    assert (len(host.requests), seen) == (1, ["timeout"])


def test_a_host_that_refuses_connections_is_left_to_sqs(clock: StepClock, pauses: Pauses) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        with pytest.raises(CallbackRefused, match="Connect"):
            talk(Host(200), clock, lambda sender, _url: sender.post(url, "m1", BODY))
    assert len(pauses) == TRIES - 1


@pytest.mark.parametrize("drain", [0.1, 30.0], ids=["not read for long", "cut off by the time-out"])
def test_an_answer_is_accepted_with_its_status_however_slow_the_body_is(
    drain: float, clock: StepClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback, "DRAIN_S", drain)

    async def drip(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    host, seen = Host(drip), list[str]()
    assert post(host, clock, timeout=0.5, called=lambda code_class, _seconds: seen.append(code_class)) == Sent(200)
    assert (len(host.requests), seen) == (1, ["2xx"])


def test_an_answer_is_accepted_with_its_status_even_when_the_body_breaks_off(clock: StepClock) -> None:
    async def break_off(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x")
        return await _reset(request)

    host = Host(break_off)
    assert post(host, clock) == Sent(200)
    assert len(host.requests) == 1


def test_of_a_huge_response_only_the_beginning_is_read(clock: StepClock) -> None:
    written = 0

    async def flood(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse()
        await response.prepare(request)
        while written < 1_000_000_000:
            await response.write(b"x" * 100_000)
            written += 100_000
        return response

    assert post(Host(flood), clock) == Sent(200)
    assert written < 50_000_000  # what the sockets between take


def test_an_address_that_may_not_be_spoken_to_is_not(clock: StepClock, pauses: Pauses) -> None:
    host, seen = Host(200), list[str]()
    with pytest.raises(UrlNotAllowed):
        post(host, clock, private=False, called=lambda code_class, _seconds: seen.append(code_class))
    assert (host.requests, seen, pauses) == ([], ["refused"], [])


def test_each_try_is_signed_anew_under_the_same_id(clock: StepClock, pauses: Pauses) -> None:
    a_second_later = web.Response(status=503, headers={"Retry-After": "1"})
    host = Host(a_second_later, 200)
    post(host, clock, signer=Signer([SECRET]))
    stamps = [int(headers["webhook-timestamp"]) for _, headers, _ in host.requests]
    assert stamps[0] == int(EPOCH + 1000)
    assert stamps[0] < stamps[1]
    assert {headers["webhook-id"] for _, headers, _ in host.requests} == {"m1"}
    for _, headers, body in host.requests:
        signed = Signer([SECRET]).headers("m1", int(headers["webhook-timestamp"]), body)
        assert headers["webhook-signature"] == signed["webhook-signature"]


def test_no_more_are_under_way_than_the_concurrency_allows(clock: StepClock) -> None:
    under_way, most, gate = 0, 0, asyncio.Event()

    async def count(_request: web.BaseRequest) -> web.StreamResponse:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if under_way == 3:
            gate.set()
        await gate.wait()
        under_way -= 1
        return web.Response()

    async def many(sender: CallbackSender, url: str) -> list[Sent]:
        return await asyncio.gather(*(sender.post(url, f"m{n}", BODY) for n in range(7)))

    host = Host(count)
    assert talk(host, clock, many, concurrency=3) == [Sent(200)] * 7
    assert most == 3


def test_a_dead_host_is_left_alone_and_comes_back(clock: StepClock, pauses: Pauses) -> None:
    host = Host(*[500] * OPENS_AFTER, 200)

    async def three(sender: CallbackSender, url: str) -> None:
        with pytest.raises(CallbackRefused):
            await sender.post(url, "m1", BODY)
        assert await sender.post(url, "m2", BODY) == Sent(200)
        assert not sender.hosts.paused()

    talk(host, clock, three)
    assert sum(pauses[TRIES - 1 :]) >= FIRST_PAUSE_S, "between the last failure and the probe"
    assert len(host.requests) == OPENS_AFTER + 1


def test_a_probe_that_says_nothing_of_its_host_leaves_the_next_to_find_out(clock: StepClock) -> None:
    """Such as one whose name resolves to a refused address just then: the host must not stay paused for ever."""

    async def main() -> None:
        hosts = Hosts(lambda: 4, clock.monotonic)
        for _ in range(OPENS_AFTER):
            hosts.failed("h")
        clock.advance(FIRST_PAUSE_S)

        async def refused() -> None:
            async with hosts.slot("h"):
                assert hosts.paused_for("h") > 0
                raise UrlNotAllowed("resolves to 10.0.0.1")

        with pytest.raises(UrlNotAllowed):
            await refused()
        assert hosts.paused_for("h") == 0

    asyncio.run(main())
