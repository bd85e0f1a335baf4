"""What a worker learns from the machine it is on: that ECS may not end its task now, and that EC2 is about to.

Both are for those who run it on ECS or EC2, and cost nobody else anything: an endpoint that is not there is not asked
again, and nothing is said about it. The endpoints are the operator's own, so the address check does not apply.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import structlog

from cvworker.clock import Clock

PROTECTION_MIN = 10
"""Minutes that a protection lasts, unless it is renewed. One that outlives its worker keeps ECS from scaling in."""
PROTECTION_PATH = "/task-protection/v1/state"
LOOK_S = 1.0
IDLE_S = 10.0
"""Without messages for so long, the task may be ended. Less would change its mind with each message of a slow queue,
and ECS limits how often it may be asked."""
AGENT_TIMEOUT_S = 10.0
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 5.0, 300.0

MACHINE_SAYS = {"/sys/devices/virtual/dmi/id/sys_vendor": "amazon ec2", "/sys/hypervisor/uuid": "ec2"}
METADATA = "http://169.254.169.254"
METADATA_IPV6 = "http://[fd00:ec2::254]"
FIRST_ASK_TIMEOUT_S = 1.0
"""Outside EC2 nobody answers, and this is what it costs, once."""
POLL_S = 5.0
"""What EC2 recommends: of the two minutes' notice this wastes little."""
POLL_TIMEOUT_S = 2.0
TOKEN_TTL_S = 21600

log = structlog.get_logger(__name__)

_UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError)


class Surroundings:
    """Protects the ECS task while messages are held, and watches for the interruption notice of a spot instance.

    ``held`` is how many messages are held just now. ``on_notice`` is called once, with the action (``terminate``,
    ``stop``, ``hibernate``) and the time as EC2 writes them. Found by the environment: ``ECS_AGENT_URI``, which ECS
    sets in its tasks; ``AWS_EC2_METADATA_SERVICE_ENDPOINT`` and ``AWS_EC2_METADATA_DISABLED``, as the AWS SDKs do.
    """

    def __init__(
        self,
        held: Callable[[], int],
        on_notice: Callable[[str, str], object],
        clock: Clock,
        *,
        max_lease: float = 900,
        environment: Mapping[str, str] = os.environ,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        agent = environment.get("ECS_AGENT_URI")
        self._protection = TaskProtection(agent, held, clock, max_lease) if agent else None
        self._metadata = _metadata_endpoint(environment)
        self._on_notice = on_notice
        self._sleep = sleep

    async def run(self) -> None:
        """Run until cancelled, or until there is nothing left to do. Raises nothing: the worker works without it."""
        # A connection of its own for each call: they are rare, and one that idled may be closed at the other end.
        connector = aiohttp.TCPConnector(force_close=True)
        jar = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(connector=connector, cookie_jar=jar, trust_env=False) as session:
            await asyncio.gather(_harmless(self._protect(session)), _harmless(self._watch(session)))

    async def _protect(self, session: aiohttp.ClientSession) -> None:
        while self._protection is not None:
            await self._protection.look(session)
            await self._sleep(LOOK_S)

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        if self._metadata is None:
            return
        spot = SpotNotice(self._metadata)
        if not await spot.answers(session):
            return
        while (notice := await spot.look(session)) is None:
            await self._sleep(POLL_S)
        self._on_notice(*notice)


class TaskProtection:
    """ECS scale-in protection of this task: on while messages are held, off once there have been none for a while.

    A deployment waits for it as well. It expires by itself, no later than the worker would let go of its messages
    (``max_lease``), and is renewed when half of that has passed; what cannot be set is told once, and tried again later
    and later.
    """

    def __init__(self, agent: str, held: Callable[[], int], clock: Clock, max_lease: float) -> None:
        self.minutes = max(2, min(PROTECTION_MIN, math.ceil(max_lease / 60)))
        self._url = agent.rstrip("/") + PROTECTION_PATH
        self._held = held
        self._clock = clock
        self._until = self._busy_at = self._again_at = -math.inf
        self._failures = 0

    async def look(self, session: aiohttp.ClientSession) -> None:
        """Ask for what is wanted now, if that is not what is known to be set."""
        now = self._clock.monotonic()
        if self._held() > 0:
            self._busy_at = now
        wanted = now - self._busy_at < IDLE_S
        left = self._until - now
        if now < self._again_at or not (left < self.minutes * 30 if wanted else left > 0):
            return
        try:
            await self._put(session, wanted)
        except (*_UNREACHABLE, ValueError) as error:
            delay = min(FIRST_BACKOFF_S * 2.0 ** min(self._failures, 10), LONGEST_BACKOFF_S)
            self._failures, self._again_at = self._failures + 1, self._clock.monotonic() + delay
            if self._failures == 1:
                what = " ".join(str(error).split()) or type(error).__name__
                log.warning("ecs task protection cannot be set; trying again quietly", enabled=wanted, error=what)
            return
        if self._failures:
            log.info("ecs task protection can be set again", enabled=wanted, failures=self._failures)
        self._failures, self._until = 0, now + self.minutes * 60 if wanted else -math.inf

    async def _put(self, session: aiohttp.ClientSession, enabled: bool) -> None:
        """Raises ValueError with the agent's reason where it did not do it: that may come with status 200."""
        wish: dict[str, Any] = {"ProtectionEnabled": enabled}
        if enabled:
            wish["ExpiresInMinutes"] = self.minutes
        timeout = aiohttp.ClientTimeout(total=AGENT_TIMEOUT_S)
        async with session.put(self._url, json=wish, timeout=timeout, allow_redirects=False) as response:
            body = await response.text(errors="replace")
        answer = _object(body)
        if refused := answer.get("failure") or answer.get("error"):
            raise ValueError(f"HTTP {response.status}: {json.dumps(refused)[:500]}")
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}")


class SpotNotice:
    """EC2's instance metadata (version 2), asked whether this spot instance is to be interrupted."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token = ""

    async def answers(self, session: aiohttp.ClientSession) -> bool:
        """Whether there is such a service: asked once."""
        try:
            return await self._new_token(session, FIRST_ASK_TIMEOUT_S)
        except (*_UNREACHABLE, ValueError):
            return False

    async def look(self, session: aiohttp.ClientSession) -> tuple[str, str] | None:
        """The action and its time, once there is a notice. What goes wrong may be right at the next look."""
        url = f"{self._endpoint}/latest/meta-data/spot/instance-action"
        headers = {"X-aws-ec2-metadata-token": self._token}
        timeout = aiohttp.ClientTimeout(total=POLL_TIMEOUT_S)
        try:
            async with session.get(url, headers=headers, timeout=timeout, allow_redirects=False) as response:
                body = await response.text(errors="replace")
            if response.status == 401:  # the token has expired
                await self._new_token(session, POLL_TIMEOUT_S)
        except _UNREACHABLE:
            return None
        notice = _object(body) if response.status == 200 else {}
        action = notice.get("action")
        return (action, str(notice.get("time", ""))) if isinstance(action, str) else None

    async def _new_token(self, session: aiohttp.ClientSession, timeout_s: float) -> bool:
        url = f"{self._endpoint}/latest/api/token"
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with session.put(url, headers=headers, timeout=timeout, allow_redirects=False) as response:
            text = await response.text(errors="replace")
        if response.status != 200 or not text.isprintable():  # it goes into a header
            return False
        self._token = text
        return True


def _metadata_endpoint(environment: Mapping[str, str]) -> str | None:
    if environment.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return None
    named = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
    if named or not _on_ec2():
        return named
    ipv6 = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower() == "ipv6"
    return METADATA_IPV6 if ipv6 else METADATA


def _on_ec2() -> bool:
    """Whether the machine says that it is EC2's: elsewhere that address may be anybody's, and is not asked."""
    for path, begins in MACHINE_SAYS.items():
        try:
            if Path(path).read_text().lower().startswith(begins):
                return True
        except OSError:
            pass
    return False


async def _harmless(part: Awaitable[None]) -> None:
    try:
        await part
    except Exception:  # whatever it is, the worker's own work goes on
        log.exception("the surroundings are no longer watched")


def _object(body: str) -> dict[str, Any]:
    """A JSON object; empty where it is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
