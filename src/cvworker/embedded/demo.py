"""``cvworker demo`` from the first picture drawn to the last line printed."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shlex
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape

from cvworker.embedded.demo_view import Stand, View, report
from cvworker.embedded.demo_worker import DemoWorker, environment, free_port
from cvworker.embedded.exhibits import FLAWS, Exhibit, exhibit, flaws, label_rows, problems, tile
from cvworker.embedded.image_host import ImageHost
from cvworker.embedded.receiver import CallbackReceiver
from cvworker.embedded.sheet import Summary, Tally, thumbnail, write_sheet
from cvworker.embedded.sqs import DEAD_LETTER_SUFFIX, EmbeddedSqs
from cvworker.embedded.subjects import SUBJECTS, THREATS
from cvworker.errors import StartupError, WorkerFailed
from cvworker.loading import check_spec
from cvworker.send import read_requests, send
from cvworker.signing import Signer

if TYPE_CHECKING:
    from cvworker.commands.demo import Demo

QUEUE = "images"
LOOK_S = 0.1
"""Between two looks at what has changed."""
SETTLE_S = 15.0
"""For the queue to be empty after the last answer."""
FOR_SEND = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def run(demo: Demo) -> int:
    """Run it; the exit code. Raises KeyboardInterrupt, and what ends it early, once nothing of it is left."""
    check_spec(demo.module or "")
    folder = _folder(demo.output)
    with Interrupts() as interrupts, ExitStack() as stack:
        return _Run(demo, folder, interrupts, stack).main()


class Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal, noted at once and heeded where nothing is left half done.

    A KeyboardInterrupt might come between the start of a process and the line that remembers to end it.
    """

    def __init__(self) -> None:
        self.noted = False
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was one."""
        if self.noted:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's & have it
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: object) -> None:
        self.noted = True


class _Stalled(WorkerFailed):
    """Nothing moved for as long as the user wants to wait."""


class _Run:
    """One demo; ``stack`` ends whatever it starts."""

    def __init__(self, demo: Demo, folder: Path, interrupts: Interrupts, stack: ExitStack) -> None:
        self.demo, self.folder, self.interrupts, self.stack = demo, folder, interrupts, stack
        self.subject = SUBJECTS.get(demo.module or "")  # None where nobody knows what the module should answer
        self.secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        self.log = folder / "worker.log"
        self.sqs = EmbeddedSqs()
        stack.callback(self.sqs.close)
        self.images = stack.enter_context(ImageHost())
        self.receiver = stack.enter_context(CallbackReceiver())
        self.answers_url = f"{self.receiver.url}/answers"
        self.pool = ThreadPoolExecutor((os.cpu_count() or 1) + 1)  # one waits for the queue's process, the others draw
        stack.callback(self.pool.shutdown, cancel_futures=True)
        self.worker: DemoWorker | None = None
        self.failures: list[str] = []
        self.console = Console(highlight=False)
        self.stand = Stand(demo.count)
        self.view = View(self.console, demo.count)

    def main(self) -> int:
        self._say(
            f"[bold]cvworker demo[/]: {self.demo.count} pictures by way of a queue, an image host and a callback "
            "receiver on this machine"
        )
        with self.view:
            exhibits, queue_url, worker = self._prepare()
            seconds = self._exchange(exhibits, queue_url)
        self._settle(queue_url)
        if not self.demo.keep_serving:
            worker.ask_to_stop()  # it does so while the contact sheet is made
        self._report(exhibits, seconds)
        if self.demo.keep_serving:
            self._serve(worker, queue_url)
        return 1 if self.failures else 0

    def _prepare(self) -> tuple[list[Exhibit], str, DemoWorker]:
        """Draw the pictures while the queue and then the worker start."""
        flawed = flaws(self.demo.seed, self.demo.count)
        opening = self.pool.submit(self._open_queue)
        seed, subject = self.demo.seed, self.subject or THREATS
        drawing = [self.pool.submit(exhibit, seed, n, flawed.get(n), subject) for n in range(self.demo.count)]

        def drawn() -> bool:
            self.stand.drawn = sum(each.done() for each in drawing)
            return self.stand.drawn == self.demo.count

        self._until(lambda: (drawn(), opening.done())[1], "the queue started")
        queue_url = opening.result()
        worker = self.worker = self._start_worker(queue_url)
        self.stack.callback(worker.close)
        self._until(lambda: (drawn(), self._is_ready(worker))[1], "the worker started")
        self._until(drawn, "pictures were drawn")
        exhibits = [each.result() for each in drawing]
        for each in exhibits:
            if each.body is not None:
                self.images.add(each.name, each.body, each.content_type)
        return exhibits, queue_url, worker

    def _open_queue(self) -> str:
        self.sqs.start()
        return self.sqs.create_queue(QUEUE)

    def _start_worker(self, queue_url: str) -> DemoWorker:
        s = self.demo
        port = s.http_port or free_port()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(s.http_host, s.http_host)  # noqa: S104 - a comparison
        hosts = [server.url.removeprefix("http://") for server in (self.images, self.receiver)]
        forced = {
            "queue_url": queue_url,
            "callback_url": self.answers_url,
            "callback_secret": self.secret,
            "allowed_hosts": ",".join(hosts),
            "allow_private_networks": "false",
            "egress_proxy": "",
            "http_port": str(port),
        }
        variables = environment(s, forced) | self.sqs.environment()
        return DemoWorker(variables, log=self.log, url=f"http://{f'[{host}]' if ':' in host else host}:{port}/")

    def _is_ready(self, worker: DemoWorker) -> bool:
        if model := worker.ready():
            self.stand.ready = f"module {model['module']} on {model['device']}, {model['precision']}"
        return bool(model)

    def _exchange(self, exhibits: Sequence[Exhibit], queue_url: str) -> float:
        """Enqueue a request for each picture, by the code of ``send``, and wait for the answers; seconds it took."""
        requests = self.folder / "requests.jsonl"
        with requests.open("w") as file:
            for each in exhibits:
                url = self.images.url_of(each.name)
                print(json.dumps({"id": each.name, "image_url": url, "callback_url": self.answers_url}), file=file)
        self.stand.sending, began = True, time.monotonic()
        sending = self.pool.submit(send, self.sqs.client(), queue_url, read_requests(str(requests)))

        def answered() -> bool:
            self.stand.answered = len(self.receiver.answers)
            self.stand.rate = self.stand.answered / (time.monotonic() - began)
            if sending.done() and (failures := sending.result().failures):
                raise WorkerFailed(f"the queue did not take {failures[0].where}: {failures[0].message}")
            return self.stand.answered >= self.demo.count

        try:
            self._until(answered, "answers were awaited")
        except _Stalled as stalled:
            self.failures.append(str(stalled))
        return max((each.monotonic for each in self.receiver.accepted), default=began) - began

    def _settle(self, queue_url: str) -> None:
        """Wait until what was answered is deleted, which the worker does some at a time."""
        until = time.monotonic() + SETTLE_S
        while (left := self._left_in(queue_url)) and time.monotonic() < until and not self.failures:
            self.interrupts.check()
            time.sleep(LOOK_S)
        if left:
            self.failures.append(f"{left} messages are left in the queue or its dead-letter queue")

    def _left_in(self, queue_url: str) -> int:
        return self.sqs.count(queue_url) + self.sqs.count(queue_url + DEAD_LETTER_SUFFIX)

    def _report(self, exhibits: Sequence[Exhibit], seconds: float) -> None:
        """Judge the answers, write the contact sheet and print the table."""
        accepted, answers = self.receiver.accepted, self.receiver.answers
        (self.folder / "answers.jsonl").write_bytes(b"".join(each.body + b"\n" for each in accepted))
        self.failures += problems(exhibits, accepted, Signer([self.secret]))
        small = self.pool.map(lambda each: thumbnail(each.body) if each.body else None, exhibits)
        tiles = [tile(e, image, answers.get(e.name), self.subject) for e, image in zip(exhibits, small, strict=True)]
        expected = Counter(FLAWS[each.flaw] for each in exhibits if each.flaw)
        notes = [f"{expected.total()} of the pictures are damaged, missing or no pictures, on purpose.", *self.failures]
        summary = Summary("cvworker demo", self.stand.ready, seconds, notes=notes)
        sheet = write_sheet(self.folder / "contact-sheet.html", summary, tiles)
        self.interrupts.check()
        rows = list(label_rows(exhibits, answers, self.subject)) if self.subject else []
        self.console.print(report(Tally.of(tiles), rows, expected, seconds, self.console.width))
        for failure in self.failures:
            self._say(f"[red]✗[/] {escape(failure)}")
        if self.failures:
            self._say(f"  the worker's log: {escape(str(self.log))}")
        else:
            self._say("[green]✓[/] every picture was answered exactly once, every answer signed; the queue is empty")
        self._say(f"contact sheet: [link={sheet.as_uri()}]{escape(str(sheet))}[/link]")

    def _serve(self, worker: DemoWorker, queue_url: str) -> None:
        """Leave everything up until Ctrl-C."""
        variables = " ".join(f"{n}={value}" for n, value in self.sqs.environment().items() if n in FOR_SEND)
        requests = shlex.quote(str(self.folder / "requests.jsonl"))
        self._say(f"status page:   [link={worker.url}]{worker.url}[/link] until Ctrl-C; to send the requests again:")
        self._say(f"  {variables} cvworker send {escape(requests)} --queue-url {queue_url}")
        while not self.interrupts.noted:
            worker.check()
            time.sleep(LOOK_S)
        self._say("\nstopping")

    def _until(self, done: Callable[[], object], meanwhile: str) -> None:
        """Wait, showing how far it is. Raises what ends the demo early: a signal, the worker's end, no progress."""
        progress, moved_at = self.stand.progress, time.monotonic()
        while not done():
            self.interrupts.check()
            if self.worker is not None:
                self.worker.check()
            if self.stand.progress != progress:
                progress, moved_at = self.stand.progress, time.monotonic()
            elif time.monotonic() - moved_at > self.demo.patience:
                raise _Stalled(f"nothing moved for {self.demo.patience:g} s while {meanwhile}")
            self.view.show(self.stand)
            time.sleep(LOOK_S)
        self.view.show(self.stand)

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def _folder(path: Path) -> Path:
    """The folder for what the demo writes, which is there from now on."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "worker.log").touch()
    except OSError as error:
        raise StartupError(f"output: cannot write to {path} ({error.strerror}); choose another with --output") from None
    return path.resolve()
