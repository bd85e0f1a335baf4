"""Pictures, results, signatures and secrets live in memory only: nothing that a worker writes or shows has them."""

from __future__ import annotations

import base64
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from cvworker.observe.logs import configure
from world import MODULES, World, fetch, picture, poll

PIXELS = b"PIXELMARKERxyzzy"  # in the picture's bytes, and as its pixels
RESULT = "RESULTMARKERplugh"
SIGNATURE = "SIGNATUREMARKERabcdef0123456789"
KEY = b"SECRETMARKER-of-thirty-two-bytes"
SECRET = "whsec_" + base64.b64encode(KEY).decode()
CREDENTIAL = "AWSMARKERcredential"

MODULE = f"{MODULES / 'private.py'}:Private"


def marks() -> dict[str, list[bytes]]:
    """What must not be found, in the forms that it might be found in."""
    found = {
        "picture": [PIXELS, base64.b64encode(PIXELS)[:20], PIXELS.hex().encode(), str(list(PIXELS))[1:30].encode()]
    }
    found["result"] = [RESULT.encode()]
    found["signature"] = [SIGNATURE.encode()]
    found["secret"] = [KEY, SECRET.removeprefix("whsec_").encode()[:30]]
    found["credential"] = [CREDENTIAL.encode()]
    return found


def findings(what: str, data: bytes) -> list[str]:
    return [f"{kind} in {what}" for kind, forms in marks().items() for form in forms if form in data]


def marked(number: int) -> bytes:
    """A picture whose file and whose pixels both carry the mark; the red of its first pixel says what becomes of it."""
    import io

    row = bytes([number, 0, 77]) + PIXELS * 8
    image = Image.frombytes("RGB", (len(row) // 3, 1), row[: len(row) // 3 * 3]).resize(
        (len(row) // 3, 32), Image.Resampling.NEAREST
    )
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", PIXELS.decode())
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=text, compress_level=0)
    assert PIXELS in file.getvalue()
    return file.getvalue()


class Watched:
    """Every file under some directories, for as long as it is watched: what is there for a moment counts too."""

    def __init__(self, *roots: Path) -> None:
        self._roots = roots
        self._before = {path: path.stat().st_mtime_ns for path in self._files()}
        self.seen: set[Path] = set()
        self.found: set[str] = set()

    def _files(self) -> Iterator[Path]:
        for root in self._roots:
            for folder, _, names in os.walk(root):
                for name in names:
                    path = Path(folder, name)
                    if path.is_file() and not path.is_symlink():
                        yield path

    def look(self) -> None:
        for path in self._files():
            try:
                if self._before.get(path) != path.stat().st_mtime_ns:
                    self.seen.add(path)
                    self.found.update(findings(str(path), path.read_bytes()))
            except OSError:  # gone again
                pass


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_nothing_of_a_picture_or_a_result_is_written_or_shown_whatever_goes_wrong(
    fast_world: World, tmp_path: Path, log_format: str
) -> None:
    here = fast_world
    home, temporary = tmp_path / "home", Path(tempfile.mkdtemp())  # a long path would not be used as it is
    home.mkdir()
    watched = Watched(tmp_path, temporary, Path("/dev/shm"))
    # The console form needs the port from elsewhere, as its lines are not JSON.
    worker = here.worker(
        *("--log-level", "debug", "--log-format", log_format, "--batch-size", "2"),
        module=MODULE,
        CVWORKER_CALLBACK_SECRET=SECRET,
        CVWORKER_CALLBACK_URL=f"{here.receiver.url}/default?token={SIGNATURE}",
        AWS_SECRET_ACCESS_KEY=CREDENTIAL,
        HOME=str(home),
        TMPDIR=str(temporary),
        PYTHONFAULTHANDLER="1",
    )
    if log_format == "json":
        worker.ready()
    pictures = [*range(10), 240, 241, 242, 243, *range(10, 20)]
    for number in pictures:
        here.images.add(f"/{number}.png", marked(number), "image/png")
    here.images.add("/damaged.png", marked(1)[:-40], "image/png")
    here.images.add("/other.png", PIXELS * 100, "image/png")
    names = [*(f"{number}.png" for number in pictures), "damaged.png", "other.png", "missing.png"]
    query = f"X-Amz-Signature={SIGNATURE}&X-Amz-Credential={SIGNATURE}"
    here.send(
        *(
            {
                "id": name,
                "image_url": f"{here.images.url}/{name}?{query}",
                "callback_url": f"{here.receiver.url}/answers?{query}",
            }
            for name in names
        ),
        {"id": "refused", "image_url": f"ftp://images.example/?{query}"},
        {"id": "port", "image_url": f"http://images.example:99999/?{query}"},
        {"id": "closed", "image_url": f"http://127.0.0.1:1/a.png?{query}"},
        {"id": "gone", "callback_url": f"http://127.0.0.1:1/answers?{query}", "image_url": f"{here.images.url}/1.png"},
        f'{{"image_url": "http://a/?{SIGNATURE}"',
    )
    wanted = {*names, "refused", "port"}
    poll(lambda: (watched.look(), wanted <= set(here.receiver.answers))[1], 100, "every answer that can be given")
    answers = here.receiver.answers
    assert RESULT in str(answers["1.png"]["result"]), "the marks are there to be found"
    assert [answers[f"{n}.png"]["error"]["code"] for n in (240, 241)] == ["preprocess_failed"] * 2
    assert [answers[f"{n}.png"]["error"]["code"] for n in (242, 243)] == ["process_failed"] * 2
    if log_format == "json":
        for path in ("metrics", "status.json", "", "status.js", "livez", "readyz"):
            watched.found.update(findings(f"/{path}", fetch(worker.url() + path).encode()))
    worker.signal(signal.SIGTERM)
    worker.wait()
    watched.look()
    log = worker.log.read_bytes()
    assert worker.log in watched.seen
    assert b"too private" in log, "the failures are in the log, with their tracebacks"
    assert b"Traceback" in log or b'"frames"' in log
    assert watched.found | set(findings("the log", log)) == set()


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_traceback_in_the_log_has_no_local_variables(
    log_format: str, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging
    import sys

    import structlog

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    try:
        configure(log_format, "debug")
        local = PIXELS.decode() + "-as-a-local"
        try:
            raise ValueError("too private")
        except ValueError:
            structlog.get_logger("a").exception("raised")
            logging.getLogger("b").exception("raised as well")
        del local
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    shown = capsys.readouterr().out
    assert shown.count("too private") >= 2
    assert PIXELS.decode() + "-as-a-local" not in shown.replace('PIXELS.decode() + "-as-a-local"', "")


def test_the_marks_would_be_found(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    (tmp_path / "picture").write_bytes(marked(5))
    (tmp_path / "unmarked").write_bytes(picture(5))
    watched.look()
    assert watched.found == {f"picture in {tmp_path / 'picture'}"}
