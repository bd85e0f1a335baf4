"""A module in a test: through every real step in one call, or through its hooks alone where a debugger can follow.

::

    from cvworker.testing import run

    def test_a_red_picture_is_red():
        [answer] = run(MyModule, [Image.new("RGB", (320, 240), "red")])
        assert answer.result == {"red": 1.0, "green": 0.0, "blue": 0.0}

:func:`run` starts what production has, on free ports of 127.0.0.1: an SQS queue, an image host, a callback receiver
and the worker that ``cvworker run`` starts, with its model process and DataLoader processes. That takes some seconds,
so tests of one module share a :class:`Worker`::

    @pytest.fixture(scope="module")
    def worker():
        with Worker(MyModule, weights="my_module.safetensors") as worker:
            yield worker

:func:`call_hooks` takes the same pictures through the hooks in the test's own process, in milliseconds.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from cvworker.embedded.demo_worker import DemoWorker, free_port
from cvworker.embedded.image_host import ImageHost
from cvworker.embedded.receiver import CallbackReceiver
from cvworker.embedded.sqs import DEAD_LETTER_SUFFIX, EmbeddedSqs
from cvworker.module import Module
from cvworker.send import Request, send
from cvworker.settings import PREFIX, Settings

if TYPE_CHECKING:
    import numpy
    import torch
    from PIL import Image

__all__ = ["Answer", "Error", "RunFailed", "Worker", "call_hooks", "run"]

Picture: TypeAlias = "bytes | str | os.PathLike[str] | Image.Image | torch.Tensor | numpy.ndarray[Any, Any]"
"""The bytes of a file, the path of one, a PIL image, ``uint8 [3, H, W]``, or an array ``uint8 [H, W, 3]``."""

DEFAULTS = {"precision": "fp32", "optimize": "off", "preprocess_workers": "2", "log_format": "console"}
"""Answers that do not depend on which form of the network this machine is fastest with, and a short start."""
OWN = {
    "queue_url": "the queue",
    "callback_url": "the receiver",
    "allowed_hosts": "the image host and the receiver, which are allowed",
    "http_host": "the address of the endpoints",
    "http_port": "the port of the endpoints",
    "shutdown_grace": "the time for a stop",
    "module": "the module, which is the first argument",
}
"""Settings that a test cannot have, because what they name is brought along."""
START_S, ANSWER_S, STOP_S = 300.0, 120.0, 30.0
GRACE_S = 3.0
"""The worker's ``shutdown_grace``: a stop waits for the poll under way, which takes 0.4 times as long at most."""
LOOK_S = 0.1
LAST_LINES = 25


class RunFailed(AssertionError):
    """The worker did not start, ended, did not answer in time or did not stop in order; with its last lines."""


@dataclass(frozen=True, slots=True)
class Error:
    """Why a picture has no result, as the client is told."""

    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client's callback got for one picture."""

    body: Mapping[str, Any]
    """The whole of it: ``id``, ``status``, ``result`` or ``error``, ``timings_ms``, ``worker`` and so on."""

    @property
    def error(self) -> Error | None:
        """Why there is no result; None where there is one."""
        return Error(**self.body["error"]) if self.body["status"] == "error" else None

    @property
    def result(self) -> dict[str, Any]:
        """What ``process`` returned for the picture; an AssertionError with the reason if it has no result."""
        __tracebackhide__ = True
        if (error := self.error) is not None:
            raise AssertionError(f"the answer is an error: {error.code}: {error.message}")
        return dict(self.body["result"])


def run(
    module: type[Module] | str,
    pictures: Iterable[Picture],
    *,
    weights: str | os.PathLike[str] | None = None,
    timeout: float = ANSWER_S,
    **settings: Any,
) -> list[Answer]:
    """The answers to ``pictures``, in their order, from a worker started for them: see :class:`Worker`.

    Raises:
        RunFailed: an answer is missing after ``timeout`` seconds, or the worker did not start, go on or stop well.
    """
    __tracebackhide__ = True
    with Worker(module, weights=weights, **settings) as worker:
        return worker.run(pictures, timeout=timeout)


class Worker:
    """``cvworker run`` with a queue, an image host and a callback receiver of its own, while the context lasts.

    ``module`` is a class at the top of any file, the test's own included, or what ``--module`` takes. A class of a
    package is imported by its name, any other is loaded from its file. ``weights`` is a file, or "demo". ``settings``
    are those of ``cvworker run`` by name, such as ``batch_size=4``; unless they say otherwise, ``precision`` is fp32
    and ``optimize`` off, so that answers do not depend on the machine. Nothing else of the environment, of ``.env`` or
    of AWS reaches the worker. It runs in an empty directory, as in a container: a module finds its files next to
    ``__file__``, or by its weights.

    Raises:
        RunFailed: on entering, if the worker does not start; on leaving, if it does not stop with 0 and an empty queue.
        TypeError: a class that no file has at its top, or a setting that is none, or that the harness brings itself.
    """

    def __init__(
        self, module: type[Module] | str, *, weights: str | os.PathLike[str] | None = None, **settings: Any
    ) -> None:
        self._variables = {PREFIX + "MODULE": spec_of(module), **_variables(settings)}
        if weights is not None:
            self._variables[PREFIX + "WEIGHTS"] = _absolute(os.fspath(weights))
        self._stack = ExitStack()
        self._numbers = count()
        self._well = True

    def __enter__(self) -> Self:
        __tracebackhide__ = True
        with ExitStack() as stack:  # what was started ends if the rest cannot be
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cvworker-test-")))
            self._sqs = stack.enter_context(EmbeddedSqs())
            self._images = stack.enter_context(ImageHost())
            self._receiver = stack.enter_context(CallbackReceiver())
            self._queue_url = self._sqs.create_queue("images")
            self._log = folder / "worker.log"
            self._worker = self._start(folder)
            stack.callback(self._worker.close)
            self._wait_ready()
            self._stack = stack.pop_all()
        return self

    def run(self, pictures: Iterable[Picture], *, timeout: float = ANSWER_S) -> list[Answer]:
        """Send a request for each picture, and return their answers in the same order.

        Raises:
            RunFailed: an answer is missing after ``timeout`` seconds, or the worker ended.
        """
        __tracebackhide__ = True
        requests = [self._request(picture) for picture in pictures]
        ids = [str(request["id"]) for request in requests]
        until = time.monotonic() + timeout
        self._well = False
        send(self._sqs.client(), self._queue_url, requests)
        while missing := set(ids) - self._receiver.answers.keys():
            self._check()
            if time.monotonic() > until:
                some = f"{len(missing)} of {len(ids)} pictures"
                raise RunFailed(f"{some} not answered within {timeout:g} s; the worker said last:\n{self._said()}")
            self._receiver.wait_until(lambda: self._receiver.answers.keys() >= set(ids), LOOK_S)
        self._well = True
        return [Answer(self._receiver.answers[each]) for each in ids]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        __tracebackhide__ = True
        with self._stack:
            if kind is not None or not self._well:
                return
            code = self._worker.close(STOP_S)
            if code != 0:
                raise RunFailed(f"the worker stopped with exit code {code}; it said last:\n{self._said()}")
            if left := self._sqs.count(self._queue_url) + self._sqs.count(self._queue_url + DEAD_LETTER_SUFFIX):
                raise RunFailed(
                    f"{left} answered messages are still in the queue; the worker said last:\n{self._said()}"
                )

    def _request(self, picture: Picture) -> Request:
        name = f"{next(self._numbers)}"
        url = self._images.add(name, encoded(picture), "application/octet-stream")
        return Request({"id": name, "image_url": url}, f"picture {name}")

    def _start(self, folder: Path) -> DemoWorker:
        port = free_port()
        hosts = [server.url.removeprefix("http://") for server in (self._images, self._receiver)]
        forced = {
            "QUEUE_URL": self._queue_url,
            "CALLBACK_URL": f"{self._receiver.url}/answers",
            "ALLOWED_HOSTS": ",".join(hosts),
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": str(port),
            "SHUTDOWN_GRACE": str(GRACE_S),
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith((PREFIX, "AWS_"))}
        environment = inherited | self._variables | {PREFIX + name: value for name, value in forced.items()}
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(place) for place in sys.path)
        home = folder / "empty"
        home.mkdir()
        return DemoWorker(
            environment | self._sqs.environment(), log=self._log, url=f"http://127.0.0.1:{port}/", cwd=home
        )

    def _wait_ready(self) -> None:
        __tracebackhide__ = True
        until = time.monotonic() + START_S
        while self._worker.ready() is None:
            self._check()
            if time.monotonic() > until:
                raise RunFailed(f"the worker was not ready after {START_S:g} s; it said last:\n{self._said()}")
            time.sleep(LOOK_S)

    def _check(self) -> None:
        __tracebackhide__ = True
        if (code := self._worker.exit_code) is None:
            return
        if code == 2:
            *before, line = self._said().splitlines()
            told = "".join(f"\n{each}" for each in before)
            raise RunFailed(
                f"the worker did not start: {line.removeprefix('cvworker run: ')}{told and f'; it said before:{told}'}"
            )
        raise RunFailed(f"the worker ended with exit code {code}; it said last:\n{self._said()}")

    def _said(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]) or "(nothing)"


def call_hooks(
    module: type[Module] | str,
    pictures: Iterable[Picture],
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """The results for ``pictures`` from the hooks alone, here and now: decode, preprocess, collate, process.

    No queue and no other process: breakpoints work, and what a hook raises comes out as it is. Results are as they
    are after the way through JSON.
    """
    import torch

    from cvworker.images import decode
    from cvworker.loading import load, make
    from cvworker.model.batcher import Sample
    from cvworker.model.runner import Runner

    cls = load(module) if isinstance(module, str) else module
    instance = make(cls, None if weights is None else os.fspath(weights))
    instance.setup(torch.device(device))
    runner = Runner(instance, torch.device(device), "fp32", batch_size)
    samples: list[Sample] = []
    for picture in pictures:
        image = decode(encoded(picture), image_type=instance.image_type, min_side=instance.min_side)
        samples.append(Sample(len(samples), instance.preprocess(image), 0.0))
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    return [json.loads(done.result or "null") for batch in batches for done in runner.trial(batch)]


def spec_of(module: type[Module] | str) -> str:
    """What ``--module`` must say for another process, in another directory, to find the same class.

    Raises:
        TypeError: no other process could.
    """
    if isinstance(module, str):
        place, colon, name = module.rpartition(":")
        return f"{os.path.abspath(place)}:{name}" if colon and (place.endswith(".py") or "/" in place) else module
    if not isinstance(module, type):
        raise TypeError(f"give the class, not {module!r}")
    name = module.__qualname__
    try:
        file = inspect.getsourcefile(module)
    except (OSError, TypeError):  # typed in at a prompt
        file = None
    if file is None or "." in name:
        raise TypeError(f"{name} must stand at the top of a file: the worker's processes load it from there")
    if "." in module.__module__ and _is_importable(module.__module__, file):
        return f"{module.__module__}:{name}"
    return f"{os.path.abspath(file)}:{name}"


def encoded(picture: Picture) -> bytes:
    """The bytes of an image file; pixels become a PNG, which loses nothing.

    Raises:
        TypeError: neither a file nor pixels.
    """
    from PIL import Image

    from cvworker.model.hooks import png

    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, str | os.PathLike):
        return Path(picture).read_bytes()
    if not isinstance(picture, Image.Image):
        shape: Sequence[int] = getattr(picture, "shape", ())
        if len(shape) != 3 or str(picture.dtype).rpartition(".")[2] != "uint8":
            kind = f"{picture.dtype} {list(shape)}" if hasattr(picture, "dtype") else type(picture).__name__
            raise TypeError(
                f"a picture must be uint8 [3, H, W], an array uint8 [H, W, 3], a file or a PIL image: {kind}"
            )
        picture = picture if hasattr(picture, "permute") else Image.fromarray(picture)
    return png(picture)


def _is_importable(name: str, file: str) -> bool:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None and os.path.samefile(found.origin, file)


def _variables(settings: Mapping[str, Any]) -> dict[str, str]:
    for name in settings:
        if name in OWN:
            raise TypeError(f"{name} cannot be given here: the harness brings {OWN[name]}")
        if name not in Settings.model_fields:
            close = difflib.get_close_matches(name, Settings.model_fields, n=1)
            raise TypeError(f"there is no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in settings.items() if v is not None}
    return {PREFIX + name.upper(): value for name, value in {**DEFAULTS, **texts}.items()}


def _absolute(weights: str) -> str:
    """A path from here; what is a URL or a name stays."""
    return os.path.abspath(weights) if Path(weights).is_file() else weights
