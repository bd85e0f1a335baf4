"""What the documents say is what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cvworker.cli import COMMANDS
from cvworker.errors import JobError
from cvworker.observe.metrics import Metrics
from cvworker.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_settings_reference_is_what_the_settings_class_says() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "settings_reference.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_module_in_the_readme_runs(tmp_path: Path) -> None:
    code = re.search(r"```python\n(# brightness.py\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code
    assert len(code[1].splitlines()) <= 20
    (tmp_path / "brightness.py").write_text(code[1])
    command = [Path(sys.executable).parent / "cvworker", "check", "--module", "brightness.py:Brightness"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '"brightness": 0.' in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_variables_in_the_pages_exist(page: Path) -> None:
    text = page.read_text()
    for command in re.findall(r"(?:^|`|bin/)cvworker ([a-z]+)", text, re.MULTILINE):
        assert command in COMMANDS, command
    known = {f"CVWORKER_{name.upper()}" for name in Settings.model_fields} | {"CVWORKER_SECRETS_DIR"}
    for variable in re.findall(r"CVWORKER_[A-Z_]+[A-Z]", text):
        assert variable in known, variable


def test_the_messages_page_tells_every_error_code() -> None:
    text = (ROOT / "docs" / "messages.md").read_text()
    codes = {cls.code for cls in _subclasses(JobError)}
    assert {code for code in codes if f"| `{code}` |" not in text} == set()


def test_the_operations_page_tells_every_metric() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    for metric in Metrics().registry.collect():
        assert f"`{metric.name}" in text, metric.name


def _subclasses(cls: type[JobError]) -> list[type[JobError]]:
    return [each for sub in cls.__subclasses__() for each in (sub, *_subclasses(sub))]
