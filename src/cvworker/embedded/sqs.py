"""The demo's queue: moto's SQS (and S3) in a process of its own, so that its work is not the worker's.

Run as a module this file is that process. Moto is made for unit tests, and as it is it would spoil a demo: two
receives at once may both return the same message, a delete at the same time as a send loses the new message, and
every call counts all messages several times over. :func:`_mend_moto` puts one lock around the queue operations and
counts quickly (2,000 messages queued: a send of ten from 420 ms to 8, a receive of ten from 1,400 ms to 16).
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from cvworker.errors import StartupError

if TYPE_CHECKING:
    from types_boto3_sqs import SQSClient
    from types_boto3_sqs.literals import QueueAttributeNameType

HOST = "127.0.0.1"
REGION = "us-east-1"
CREDENTIAL = "embedded"  # moto accepts any, but boto3 sends nothing without one
DEAD_LETTER_SUFFIX = "-dead"
START_TIMEOUT = 60.0
"""Seconds for the process to answer; it takes about one, and more where many others start at once."""
STOP_TIMEOUT = 5.0
"""Seconds between asking the process to end and killing it."""
CONNECTIONS = 32
"""That the client keeps open for the threads that share it."""
RECHECK = 0.2
"""Seconds between looks during a long poll: a message that becomes visible again by the clock wakes nobody."""


class EmbeddedSqs:
    """An SQS endpoint on a free port of 127.0.0.1, for as long as this context lasts.

    The process ends with its parent, however that ends, because it watches a pipe to it. It is in a process group of
    its own: Ctrl-C at a terminal reaches every process in the group, and the worker still needs its queue to drain.
    """

    def __init__(self, *, start_timeout: float = START_TIMEOUT) -> None:
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[str] | None = None
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._client: SQSClient | None = None
        self.endpoint = ""

    @property
    def pid(self) -> int:
        """The process's id, for those who test what happens without a queue."""
        if self._process is None:
            raise RuntimeError("the embedded queue is not started: use it in a with statement")
        return self._process.pid

    def start(self) -> None:
        """Start the process and return once it accepts connections.

        Raises :class:`StartupError` if it ends, or does not answer in time.
        """
        self._files = tempfile.TemporaryDirectory(prefix="cvworker-sqs-")
        Path(self._files.name, "config").write_text("[default]\n")
        log = Path(self._files.name, "log")
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "cvworker.embedded.sqs"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                process_group=0,
                env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            )
        try:
            self.endpoint = f"http://{HOST}:{self._announced_port(log)}"
        except BaseException:
            self.close()
            raise

    def _announced_port(self, log: Path) -> int:
        """The port, which the process writes once its socket listens: nothing to poll, and no port taken twice."""
        assert self._process is not None
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            ready, _, _ = select.select([stdout], [], [], self._start_timeout)
            line = stdout.readline() if ready else ""
        if line:
            return int(line)
        said = log.read_text(errors="replace").strip().splitlines()
        reason = said[-1] if said else "it said nothing"
        if ready:
            raise StartupError(f"the embedded queue ended as it started (is moto[server] installed?): {reason}")
        raise StartupError(f"the embedded queue did not answer within {self._start_timeout:g} s: {reason}")

    def environment(self) -> dict[str, str]:
        """Environment variables with which any process's boto3 speaks to this queue, and to nothing else.

        Service endpoints, profiles and proxies of the user's own would win over ``AWS_ENDPOINT_URL``; a variable can
        only be set here, not removed, so each is given a value that does no harm.
        """
        if self._files is None:
            raise RuntimeError("the embedded queue is not started: use it in a with statement")
        own_hosts = f"{HOST},localhost"
        unproxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        no_proxy = f"{unproxied},{own_hosts}" if unproxied else own_hosts
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_SQS": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": CREDENTIAL,
            "AWS_SECRET_ACCESS_KEY": CREDENTIAL,
            "AWS_SESSION_TOKEN": "",
            "AWS_PROFILE": "default",
            "AWS_DEFAULT_PROFILE": "default",
            "AWS_CONFIG_FILE": str(Path(self._files.name, "config")),
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def client(self) -> SQSClient:
        """A boto3 client of this queue, whatever profile, region or proxy the environment names; always the same one.

        Threads may share it, and making one takes longer than most of what it is used for.
        """
        if self._client is not None:
            return self._client
        import boto3
        import botocore.session
        from botocore.config import Config

        unset = (None, None, None, None)
        session = botocore.session.Session(
            session_vars={"profile": unset, "config_file": (None, None, os.devnull, None)}
        )
        session.set_credentials(CREDENTIAL, CREDENTIAL)
        own = boto3.Session(botocore_session=session, region_name=REGION)
        config = Config(proxies={}, max_pool_connections=CONNECTIONS)
        self._client = own.client("sqs", endpoint_url=self.endpoint, config=config)
        return self._client

    def create_queue(self, name: str, *, visibility_timeout: int = 30, max_receives: int | None = 5) -> str:
        """Create a queue and return its URL; with ``max_receives`` also ``{name}-dead``, where its messages end."""
        client = self.client()
        attributes: dict[QueueAttributeNameType, str] = {"VisibilityTimeout": str(visibility_timeout)}
        if max_receives is not None:
            dead = client.create_queue(QueueName=name + DEAD_LETTER_SUFFIX)["QueueUrl"]
            arn = client.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
            attributes["RedrivePolicy"] = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": max_receives})
        return client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]

    def count(self, queue_url: str) -> int:
        """How many messages a queue holds: visible, hidden and delayed."""
        names: Any = [f"ApproximateNumberOfMessages{which}" for which in ("", "NotVisible", "Delayed")]
        found = self.client().get_queue_attributes(QueueUrl=queue_url, AttributeNames=names)["Attributes"]
        return sum(map(int, found.values()))

    def close(self) -> None:
        """End the process; harmless when it is called twice, or when the process is gone already."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
        process, self._process = self._process, None
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def __enter__(self) -> EmbeddedSqs:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


# What follows runs in the process of the queue.


def _mend_moto() -> None:
    """Make moto's queue operations atomic and their cost small, without changing what they answer."""
    from moto.sqs.models import Queue, SQSBackend

    changed = threading.Condition()

    def atomic(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with changed:
                try:
                    return operation(*args, **kwargs)
                finally:
                    changed.notify_all()

        return run

    receive_now = SQSBackend.receive_message

    def receive_message(
        self: SQSBackend,
        queue_name: str,
        count: int,
        wait_seconds_timeout: int,
        visibility_timeout: int,
        message_attribute_names: list[str] | None = None,
    ) -> Any:
        deadline = time.monotonic() + wait_seconds_timeout
        with changed:
            while True:
                found = receive_now(self, queue_name, count, 0, visibility_timeout, message_attribute_names)
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                changed.wait(min(left, RECHECK))

    atomic_operations = (
        "send_message",
        "send_message_batch",
        "delete_message",
        "delete_message_batch",
        "change_message_visibility",
        "change_message_visibility_batch",
        "get_queue_attributes",
        "purge_queue",
    )
    methods = {name: atomic(getattr(SQSBackend, name)) for name in atomic_operations}
    for name, method in {**methods, "receive_message": receive_message}.items():
        setattr(SQSBackend, name, method)

    # Moto asks the clock for each message, through layers that make it settable, and asks for all of these counts
    # whenever it wants any one attribute.
    def visible(queue: Any) -> list[Any]:
        now = time.time() * 1000
        return [message for message in queue._messages if now > message.visible_at and now >= message.delayed_until]

    def hidden_count(queue: Any) -> int:
        now = time.time() * 1000
        return sum(message.visible_at >= now for message in queue._messages)

    def delayed_count(queue: Any) -> int:
        now = time.time() * 1000
        return sum(message.delayed_until > now for message in queue._messages)

    for name, count in {
        "messages": visible,
        "approximate_number_of_messages_not_visible": hidden_count,
        "approximate_number_of_messages_delayed": delayed_count,
    }.items():
        setattr(Queue, name, property(count))


def _end_with_parent(pipe: IO[str]) -> None:
    pipe.read()  # returns when the last process that holds the other end is gone
    os._exit(0)


def serve() -> None:
    """Be the embedded queue: announce the port on stdout and serve until the parent ends or asks for the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(sys.stdin,), daemon=True).start()

    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        disable_nagle_algorithm = True  # headers and body are two writes: without this, some answers take 40 ms

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    _mend_moto()
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server(HOST, 0, app, threaded=True, request_handler=Handler)
    print(server.server_port, flush=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads the pipe from here on; it must not fill up
    server.serve_forever()


if __name__ == "__main__":
    serve()
