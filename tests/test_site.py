"""The documentation as a site: every page is in it, and a link that leads nowhere fails the build."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-E", "-b", "html"]
    return subprocess.run([*command, str(source), str(target)], capture_output=True, text=True, timeout=200)


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path: Path) -> None:
    built = build(DOCS, tmp_path / "site")
    assert (built.returncode, built.stderr) == (0, "")
    pages = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    assert [str(page) for page in pages if not (tmp_path / "site" / page).is_file()] == []


def test_a_link_to_no_page_no_heading_or_no_file_is_found(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(DOCS / "conf.py", docs)
    (docs / "index.md").write_text("# Title\n\n[page](none.md), [heading](#nowhere), [file](../none.py)\n")
    built = build(docs, tmp_path / "site")
    assert built.returncode != 0
    assert built.stderr.count("WARNING") == 3
