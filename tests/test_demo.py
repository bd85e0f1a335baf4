"""The demo as a user runs it: what it prints and writes, and that nothing of it is left, however it ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from cvworker.embedded import pictures
from cvworker.embedded.exhibits import FLAWS, ORIENTATION, Exhibit, exhibit, flaws, label_rows, problems
from cvworker.embedded.receiver import Received
from cvworker.errors import JobError
from cvworker.images import decode
from cvworker.signing import Signer
from world import BIN, MEAN, MODULES, fetch, poll, status_of


class DemoProcess:
    """``cvworker demo`` in a folder of its own, and every process that it has started so far."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        self.out = folder / "out"
        self._said = folder / "said"
        with self._said.open("w") as file:
            self.process = psutil.Popen(
                [BIN / "cvworker", "demo", "--output", str(self.out), *flags],
                env={**os.environ, **environment},
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self.started: set[psutil.Process] = set()

    def text(self) -> str:
        self._look()
        return self._said.read_text()

    def says(self, pattern: str, timeout: float = 120) -> re.Match[str]:
        def said() -> re.Match[str] | None:
            match = re.search(pattern, self.text())
            assert match or self.process.poll() is None, f"ended with {self.process.poll()}: {self.text()}"
            return match

        return poll(said, timeout, pattern)

    def wait(self, timeout: float = 180) -> int:
        poll(lambda: self._look() or self.process.poll() is not None, timeout, "the demo ends")
        return self.process.wait()

    def left(self) -> list[psutil.Process]:
        return [each for each in self.started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    def _look(self) -> None:
        try:
            self.started.update(self.process.children(recursive=True))
        except psutil.NoSuchProcess:
            pass


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    demos: list[DemoProcess] = []

    def started(*flags: str, **environment: str) -> DemoProcess:
        demos.append(DemoProcess(tmp_path, *flags, **environment))
        return demos[-1]

    yield started
    for demo in demos:
        for process in [demo.process, *demo.left()]:
            if process.is_running():
                process.kill()


def gone(demo: DemoProcess) -> None:
    assert len(demo.started) >= 3  # the queue, the worker, its model process
    poll(lambda: not demo.left(), 10, "every process it started ends")


def test_the_demo_answers_every_picture_and_shows_it(start) -> None:
    # given settings of the user's own, some of which only other commands need
    demo = start(
        "--count", "24", "--module", MEAN, "--batch-size", "4",
        CVWORKER_LOG_LEVEL="debug", CVWORKER_QUEUE_URL="https://sqs.eu-west-1.amazonaws.com/1/mine",
        CVWORKER_CALLBACK_SECRET="not a secret", CVWORKER_ALLOW_PRIVATE_NETWORKS="true",
        AWS_ENDPOINT_URL_SQS="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9",
    )  # fmt: skip
    # when it has run
    assert demo.wait() == 0, demo.text()
    # then it says what was answered, how fast, and where the page is
    text = demo.text()
    assert "answered 24 of 24" in text
    assert re.search(r"ok +21\b", text)
    for code in FLAWS.values():
        assert re.search(rf"{code} +1\b", text)
    for figure in ("images/s", "latency p50", "latency p95", "in the queue", "preprocess"):
        assert figure in text
    assert "every picture was answered exactly once" in text
    assert f"contact sheet: {demo.out}/contact-sheet.html" in text
    # and nothing of the worker's log, which is in a file, is among it
    assert '"event"' not in text
    assert '"event": "ready"' in (demo.out / "worker.log").read_text()
    page = (demo.out / "contact-sheet.html").read_text()
    assert page.count("<article") == 24
    requests = [json.loads(line) for line in (demo.out / "requests.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (demo.out / "answers.jsonl").read_text().splitlines()]
    assert {each["id"] for each in requests} == {each["id"] for each in answers}
    assert len(requests) == len(answers) == 24
    gone(demo)


def test_keep_serving_leaves_the_status_page_up_until_ctrl_c(start) -> None:
    demo = start("--count", "3", "--module", MEAN, "--keep-serving")
    url = demo.says(r"status page: +(http://\S+/)")[1]
    assert status_of(url + "readyz") == 200
    assert "<html" in fetch(url)
    # the requests can be sent once more by the command it prints
    command = demo.says(r"\n  (AWS_\S+ .*cvworker send .*)\n")[1]
    subprocess.run(command.replace(" cvworker", f" {BIN}/cvworker"), shell=True, check=True, capture_output=True)
    poll(lambda: json.loads(fetch(url + "status.json"))["messages"].get("answered") == 6, 30, "six answers")
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait(15) == 0
    assert "Traceback" not in demo.text()
    gone(demo)


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGINT, "drawn 0"),
        (signal.SIGINT, r"drawn [2-9]\d of"),
        (signal.SIGINT, r"answered [1-9]\d* of"),
        (signal.SIGTERM, r"answered [1-9]\d* of"),
    ],
)
def test_a_signal_at_any_moment_ends_it_soon_with_one_line(start, number: signal.Signals, when: str) -> None:
    demo = start("--count", "60", "--module", f"{MODULES / 'mean.py'}:Slow", "--batch-size", "1")
    demo.says(when)
    began = time.monotonic()
    demo.process.send_signal(number)
    assert demo.wait(20) == 1
    assert time.monotonic() - began < 12
    last = demo.text().splitlines()[-1]
    assert last == "cvworker demo: interrupted"
    assert "Traceback" not in demo.text()
    poll(lambda: not demo.left(), 10, "every process it started ends")


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("no_such_module", "module: no module named 'no_such_module' is installed"),
        (f"{MODULES / 'mean.py'}:NoSuch", "module: .*mean.py has no class 'NoSuch'.*worker.log"),
    ],
)
def test_a_module_that_does_not_load_is_told_in_one_line(start, module: str, says: str) -> None:
    demo = start("--count", "2", "--module", module)
    assert demo.wait(60) == 2
    assert re.match(f"cvworker demo: {says}", demo.text().splitlines()[-1])
    assert "Traceback" not in demo.text()
    poll(lambda: not demo.left(), 10, "every process it started ends")


def test_what_the_module_cannot_answer_is_told_and_ends_with_1(start) -> None:
    demo = start("--count", "4", "--module", f"{MODULES / 'mean.py'}:TooFew")
    assert demo.wait() == 1
    assert "4 answered with process_failed instead of a result: 0000" in demo.text()
    assert f"the worker's log: {demo.out}/worker.log" in demo.text()
    gone(demo)


def test_it_gives_up_when_nothing_moves(start) -> None:
    demo = start("--count", "1", "--module", MEAN, "--patience", "0.3")
    assert demo.wait(60) == 1
    assert re.match("cvworker demo: failed: nothing moved for 0.3 s while .*", demo.text().splitlines()[-1])


def test_an_output_folder_that_cannot_be_is_told_in_one_line(start, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    demo = start()
    assert demo.wait(20) == 2
    assert re.fullmatch(r"cvworker demo: output: cannot write to .*/out \(.*\); choose .* --output\n", demo.text())


def test_pictures_are_upright_whatever_their_format_and_the_damaged_ones_fail_as_expected() -> None:
    damaged = flaws(seed=0, count=60)
    assert sorted(damaged.values()) == sorted(FLAWS)
    assert flaws(seed=0, count=5) == {}
    sizes, formats = set(), set()
    for number in range(60):
        shown = exhibit(0, number, damaged.get(number))
        if shown.body is None:
            assert shown.flaw == "missing"
        elif shown.flaw:
            with pytest.raises(JobError) as failed:
                decode(shown.body)
            assert failed.value.code == FLAWS[shown.flaw]
        else:
            with Image.open(io.BytesIO(shown.body)) as image:
                formats.add((image.format, image.getexif().get(ORIENTATION)))
            drawn = pictures.draw(number, decode(shown.body, image_type="pil").size)
            difference = np.abs(decode(shown.body).numpy() - np.asarray(drawn.image).transpose(2, 0, 1).astype(float))
            assert difference.mean() < 10
            assert set(shown.labels) == drawn.labels
            sizes.add(drawn.image.size)
    assert {name for name, _ in formats} == {"JPEG", "PNG", "WEBP"}
    assert {turn for _, turn in formats} == {None, 3, 6, 8}
    assert len(sizes) > 4


SIGNER = Signer(["whsec_" + "QUJD" * 8])
SHOWN = [
    Exhibit("a.jpg", b"", "image/jpeg", ("gun",), None),
    Exhibit("b.jpg", b"", "image/jpeg", (), None),
    Exhibit("c.jpg", None, "", (), "missing"),
]


def received(name: str, *labels: str, error: str = "", signer: Signer = SIGNER) -> Received:
    found = {"labels": [{"label": label, "score": 0.9} for label in labels]}
    answer = {"id": name, "status": "ok", "result": found}
    if error:
        answer = {"id": name, "status": "error", "error": {"code": error, "message": "because"}}
    body = json.dumps(answer).encode()
    return Received("/", signer.headers(f"message-{name}", 1_700_000_000, body), body, answer, 0.0, 0.0)


GOOD = [received("a.jpg", "gun"), received("b.jpg"), received("c.jpg", error="image_not_found")]


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        (GOOD, []),
        ([received("a.jpg", "knife"), *GOOD[1:]], []),  # a wrong answer is an answer
        (GOOD[:2], ["1 not answered: c.jpg"]),
        ([*GOOD, GOOD[0]], ["1 answered more than once: a.jpg"]),
        ([*GOOD, received("x.jpg")], ["1 not asked for: x.jpg"]),
        ([*GOOD[:2], received("c.jpg")], ["1 answered with a result instead of image_not_found: c.jpg"]),
        (
            [received("a.jpg", error="process_failed"), *GOOD[1:]],
            ["1 answered with process_failed instead of a result: a.jpg (because)"],
        ),
        (
            [received("a.jpg", "gun", signer=Signer(["whsec_" + "REVG" * 8])), *GOOD[1:]],
            ["1 not signed as it should be: a.jpg"],
        ),
        ([], ["3 not answered: a.jpg, b.jpg, c.jpg"]),
    ],
)
def test_whatever_is_missing_is_a_problem(answers: list[Received], found: list[str]) -> None:
    assert list(problems(SHOWN, answers, SIGNER)) == found


def test_labels_are_counted_against_what_the_pictures_show() -> None:
    answers = {each.id: each.json for each in [received("a.jpg", "knife"), *GOOD[1:]]}
    rows = {row.label: (row.answers, row.right, row.wrong, row.missed) for row in label_rows(SHOWN, answers)}
    assert rows == {
        "bomb": (0, 0, 0, 0),
        "fire": (0, 0, 0, 0),
        "gun": (0, 0, 0, 1),
        "knife": (1, 0, 1, 0),
        "safe": (1, 1, 0, 0),
    }
