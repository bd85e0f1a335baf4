"""One open-loop run: every request is sent when the schedule says, and its answer awaited, whatever the others do.

Latency counts from the *intended* time. A client that waits for an answer before it sends the next, or that counts from
the moment it got round to sending, leaves out what a stall does to the requests that should have come meanwhile
(coordinated omission). Runs in locust's process, on its greenlets.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from gevent.event import Event
from gevent.pool import Pool
from load.scenarios.arrivals import Floats
from load.scenarios.world import TIMINGS

from cvworker import aws
from cvworker.sqs.wire import caller

TOGETHER = 10
"""Requests in one call at most; only those that are due go together."""
SENDERS = 64
"""Calls under way at once. While all are, the next waits, and is counted as late."""
LEAD_S = 0.5
"""From everything being ready to the schedule's zero."""
GIVE_UP_S = 60.0
"""Without an answer for so long, what is missing counts as lost."""
TELL_S = 0.25
UNSENT, LOST = "not sent", "lost"
Fire = Callable[..., Any]


class Offer:
    """Sends requests for ``urls``, in turn, at ``times``; :meth:`run` returns what became of each.

    ``fire`` is locust's request event. ``receiver`` is the world's address here, ``shown`` the one for the workers.
    """

    def __init__(
        self, queue_url: str, receiver: str, shown: str, urls: Sequence[str], times: Floats, fire: Fire
    ) -> None:
        self._urls, self._times, self._fire = urls, times.tolist(), fire
        self._queue_url, self._receiver = queue_url, receiver
        self._run = secrets.token_hex(4)
        self._callback = f"{shown}/answers/{self._run}"
        session = aws.session()
        client = session.client("sqs", config=Config(max_pool_connections=SENDERS, retries={"total_max_attempts": 1}))
        self._call = caller(session, client)
        self._began = self._cpu = 0.0
        count = len(self._times)
        self._sent: list[float | None] = [None] * count
        self._answered: list[float | None] = [None] * count
        self._codes: list[str] = [""] * count
        self._attempts, self._ms = [0] * count, [[None] * len(TIMINGS)] * count
        self._missing, self._repeats = count, 0
        self._moved_at = 0.0
        self._listening = Event()

    def run(self, tell: Callable[[dict[str, Any]], None], give_up_s: float = GIVE_UP_S) -> dict[str, Any]:
        """Send everything and wait for the answers; ``tell`` is told of the beginning and of the progress."""
        reader = gevent.spawn(self._listen)
        if not self._listening.wait(10):
            raise ConnectionError(f"the receiver at {self._receiver} does not tell of its callbacks")
        self._call("GetQueueAttributes", {"QueueUrl": self._queue_url, "AttributeNames": ["QueueArn"]})
        self._began = self._moved_at = time.monotonic() + LEAD_S
        self._cpu = time.process_time()
        tell({"began": self._began, "requests": len(self._times)})
        teller = gevent.spawn(self._tell, tell)
        pool = Pool(SENDERS)
        number = 0
        while number < len(self._times):
            gevent.sleep(max(0.0, self._began + self._times[number] - time.monotonic()))
            last, now = number + 1, time.monotonic() - self._began
            while last < len(self._times) and last - number < TOGETHER and self._times[last] <= now:
                last += 1
            pool.spawn(self._send, range(number, last))
            number = last
        pool.join()
        self._moved_at = max(self._moved_at, time.monotonic())
        while self._missing and time.monotonic() - self._moved_at < give_up_s:
            gevent.sleep(0.02)
        gevent.killall([reader, teller])
        for code in self._codes:
            if not code:
                self._fire("SQS", "image", (time.monotonic() - self._began) * 1000, 0, exception=RuntimeError(LOST))
        return self._found()

    def _send(self, numbers: range) -> None:
        began = time.monotonic()
        for number in numbers:
            self._sent[number] = began - self._began
        entries = [{"Id": str(number), "MessageBody": self._body(number)} for number in numbers]
        try:
            answer = self._call("SendMessageBatch", {"QueueUrl": self._queue_url, "Entries": entries})
            failed = {int(entry["Id"]): str(entry["Code"]) for entry in answer.get("Failed", [])}
        except (ClientError, BotoCoreError) as error:
            failed = dict.fromkeys(numbers, " ".join(str(error).split())[:200])
        for number, why in failed.items():
            self._missing -= 1
            self._codes[number] = UNSENT
            self._fire("SQS", "send", (time.monotonic() - began) * 1000, 0, exception=RuntimeError(why))

    def _body(self, number: int) -> str:
        url = self._urls[number % len(self._urls)]
        return json.dumps({"id": f"{self._run}-{number}", "image_url": url, "callback_url": self._callback})

    def _listen(self) -> None:
        place = urlsplit(self._receiver)
        with socket.create_connection((place.hostname, place.port), timeout=None) as line:
            line.sendall(f"GET /events/{self._run} HTTP/1.1\r\nHost: {place.netloc}\r\n\r\n".encode())
            lines = line.makefile("rb")
            while lines.readline().strip():  # the head
                pass
            self._listening.set()
            for each in lines:
                self._take(json.loads(each), len(each))

    def _take(self, told: dict[str, Any], size: int) -> None:
        number = int(told["id"].rpartition("-")[2])
        self._moved_at = told["at"]
        if self._answered[number] is not None:
            self._repeats += 1
            return
        self._missing -= 1
        answered = self._answered[number] = told["at"] - self._began
        self._codes[number], self._attempts[number], self._ms[number] = told["code"], told["attempt"], told["ms"]
        latency_ms = (answered - self._times[number]) * 1000
        wrong = None if told["code"] == "ok" else RuntimeError(told["code"])
        self._fire("SQS", "image", latency_ms, size, exception=wrong)

    def _tell(self, tell: Callable[[dict[str, Any]], None]) -> None:
        while True:
            gevent.sleep(TELL_S)
            sent = sum(each is not None for each in self._sent)
            tell({"sent": sent, "answered": len(self._times) - self._missing})

    def _found(self) -> dict[str, Any]:
        """The samples as columns; seconds from the beginning, to the microsecond, and milliseconds as answered."""

        def rounded(column: Sequence[float | None]) -> list[float | None]:
            return [None if each is None else round(each, 6) for each in column]

        return {
            "intended": rounded(self._times),
            "sent": rounded(self._sent),
            "answered": rounded(self._answered),
            "code": [code or LOST for code in self._codes],
            "attempt": self._attempts,
            **{f"{name}_ms": [ms[place] for ms in self._ms] for place, name in enumerate(TIMINGS)},
            "repeats": self._repeats,
            "cpu_s": round(time.process_time() - self._cpu, 3),
            "waited": round(time.monotonic() - self._began, 6),
        }


def write(path: Path, found: dict[str, Any]) -> None:
    """The samples, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(found))
    part.replace(path)
