"""The guide "Write a module", followed to the letter by somebody with an empty folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from test_new import ran

GUIDE = Path(__file__).parent.parent / "docs" / "write-a-module.md"
NOT_HERE = "cvworker run "
"""What names a queue in AWS; the same module has run by way of ``cvworker demo`` by then."""


@pytest.mark.timeout(600)  # it starts five workers
def test_the_guide_leads_from_nothing_to_a_module_that_runs(tmp_path: Path) -> None:
    site = tmp_path / "site"
    folder, said = tmp_path, []
    for command, code in steps(GUIDE.read_text()):
        if command.startswith("cd "):
            folder /= command.removeprefix("cd ")
            Image.effect_noise((1280, 960), 90).convert("RGB").save(folder / "photo.jpg")
        elif command.startswith("replace "):
            file = folder / command.removeprefix("replace ")
            kept = "" if "tests/" in command else file.read_text().partition("class ")[0]
            file.write_text(kept + code)
        elif not command.startswith(NOT_HERE):
            offline = {"PIP_TARGET": str(site), "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
            path = os.pathsep.join(map(str, (site, folder)))
            said.append(
                (command, ran(["bash", "-c", command], folder, PYTHONPATH=path, CVWORKER_COUNT="20", **offline))
            )
    tests = [text for command, text in said if command == "python -m pytest"]
    assert [re.findall(r"\d+ passed", text) for text in tests] == [["4 passed"], ["3 passed"]]
    checks = [text for command, text in said if command.startswith("cvworker check")]
    assert len(checks) == 2
    for hook in ("decode", "preprocess", "collate", "process"):
        assert shape_of(hook, checks[0]) == shape_of(hook, GUIDE.read_text())
    assert "JPEG 1280×960" in checks[1]
    assert "batch of 32" in checks[1]
    assert any(command.startswith("cvworker demo") and "contact sheet" in text for command, text in said)


def steps(guide: str) -> Iterator[tuple[str, str]]:
    """The commands of a page, in order; code comes as ``replace FILE``, the file that the text names last before it."""
    named = ""
    for text, kind, block in re.findall(r"(.*?)```(\w*)\n(.*?)```\n", guide, re.DOTALL):
        named = (re.findall(r"`([\w/]+\.py)`", text) or [named])[-1]
        if kind == "python":
            yield f"replace {named}", block
        elif not kind:
            for line in block.splitlines():
                if re.match(r"(cvworker \w+|python|cd) ", line):
                    yield line, ""


def shape_of(hook: str, text: str) -> list[str]:
    """What a row of the table says but for the times."""
    row = re.search(rf"^ ?{hook} .*", text, re.MULTILINE)
    assert row, hook
    return re.split(r" {2,}", row[0].strip())[:3]
