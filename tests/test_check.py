"""``cvworker check``: what it shows of each hook, and what it says of one that fails."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from cvworker.cli import main
from cvworker.model.hooks import describe_value
from modules.mean import Mean
from world import BIN, MEAN, MODULES

BROKEN = MODULES / "broken.py"


def check(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(MODULES.parent), "CVWORKER_PREPROCESS_WORKERS": "1"}
    command = [BIN / "cvworker", "check", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a check that failed, which is the user's to mend."""
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("cvworker check: ")]
    assert "Traceback" not in done.stderr
    return line


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.jpg"
    Image.new("RGB", (200, 100), (100, 100, 100)).save(file)
    return file


def test_every_hook_is_shown_with_shapes_and_times_for_a_picture_of_ones_own(photo: Path, tmp_path: Path) -> None:
    done = check(tmp_path, "--module", MEAN, "--image", str(photo), "--batch-size", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row[0]: row[1:] for row in (re.split(" {2,}", line.strip()) for line in done.stdout.splitlines())}
    assert rows["hook"] == ["gets", "gives", "one image", "batch of 3"]
    assert rows["decode"][:2] == ["JPEG 200×100, 1 kB", "uint8 [3, 100, 200]"]
    assert rows["preprocess"][:2] == ["uint8 [3, 100, 200]", "float32 [3]"]
    assert rows["collate"][:2] == ["3 × float32 [3]", "float32 [3, 3]"]
    assert rows["process"][:2] == ["float32 [3, 3]", "3 × {mean}"]
    for hook in ("decode", "preprocess", "collate", "process"):
        assert all(re.fullmatch(r"\d+\.\d\d ms", time) for time in rows[hook][2:]), rows[hook]
    assert re.search(
        r"pace +1 DataLoader process prepares [\d,]+ images/s, the model takes [\d,]+ images/s", done.stdout
    )
    assert re.search(r'image +\{"mean": \[100, 100, 100\]\}', done.stdout)


def test_threads_that_wait_for_one_another_sleep_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "telling.py"
    module.write_text(
        "import os\n"
        "from modules.mean import Mean\n"
        "class Telling(Mean):\n"
        "    def setup(self, device):\n"
        "        open('told', 'w').write(os.environ.get('OMP_WAIT_POLICY', 'as OpenMP likes'))\n"
    )
    for variable, value, told in (
        (None, "", "passive"),
        ("OMP_WAIT_POLICY", "active", "active"),
        ("GOMP_SPINCOUNT", "300000", "as OpenMP likes"),
    ):
        with monkeypatch.context() as patched:
            for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
                patched.delenv(name, raising=False)
            if variable is not None:
                patched.setenv(variable, value)
            done = check(tmp_path, "--module", f"{module}:Telling")
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "told").read_text() == told


@pytest.mark.parametrize(
    ("name", "hook", "said"),
    [
        ("BadExample", "example", "return uint8 [3, H, W]"),
        ("BadPreprocess", "preprocess", "it gets uint8 [3, H, W] and returns one sample"),
        ("BadCollate", "collate", "write collate(samples)"),
        ("BadProcess", "process", "the result is not JSON"),
    ],
)
def test_a_hook_that_fails_is_named_in_one_line_with_what_to_do(
    name: str, hook: str, said: str, tmp_path: Path
) -> None:
    line = refusal(check(tmp_path, "--module", f"{BROKEN}:{name}"))
    assert line.startswith(f"cvworker check: module: mean.{hook} failed on the example: ")
    assert said in line
    if hook in ("preprocess", "collate"):
        assert re.search(rf"\(at {re.escape(str(BROKEN))}:\d+\)", line)


def test_pictures_of_different_sizes_that_cannot_share_a_batch_are_a_note(tmp_path: Path) -> None:
    done = check(tmp_path, "--module", f"{BROKEN}:ManySizes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"note +samples of pictures of different sizes cannot be collated .*collate\(samples\)", done.stdout
    )


def test_a_picture_of_ones_own_counts_in_the_place_of_an_example_that_fails(photo: Path, tmp_path: Path) -> None:
    flags = ["--module", f"{BROKEN}:DislikesNoise"]
    assert "mean.preprocess failed on the example: ValueError: there is nothing" in refusal(check(tmp_path, *flags))
    done = check(tmp_path, *flags, "--image", str(photo))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"note +the module's own example fails, so 'run' starts without a warm-up", done.stdout)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"<html>", "the answer to it would be image_unsupported"),
        (b"\xff\xd8\xff\xe0 cut", "the answer to it would be image_invalid"),
    ],
)
def test_a_picture_that_will_not_do_is_told_before_anything_starts(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "photo.jpg"
    if content is not None:
        file.write_bytes(content)
    assert main(["check", "--module", MEAN, "--image", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"cvworker check: image: {file}")
    assert said in printed.err
    assert printed.out == ""


def test_values_are_described_for_people() -> None:
    image = torch.zeros(3, 4, 5, dtype=torch.uint8)
    described = {
        "uint8 [3, 4, 5]": image,
        "PIL RGB 7×6": Image.new("RGB", (7, 6)),
        "{a: uint8 [3, 4, 5], n: int}": {"a": image, "n": 3},
        "[uint8 [3, 4, 5], str]": [image, "x"],
        "2 × uint8 [3, 4, 5]": (image, image),
        "[]": [],
        "float64 [2]": Mean().example().double().numpy()[0, 0, :2],
    }
    for text, value in described.items():
        assert describe_value(value) == text
