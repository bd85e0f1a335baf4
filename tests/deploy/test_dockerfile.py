"""The image, without an engine to build it: its linter, and its steps followed in a clean folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from dockerfile import Build, Stage, context, ignore_rules, is_ignored, parse, words_of

from cvworker import __version__
from cvworker.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STAGES = {stage.name: stage for stage in parse((ROOT / "Dockerfile").read_text())}
WORKER = STAGES["worker"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The steps of all stages up to the worker's, done."""
    build = Build(ROOT, tmp_path_factory.mktemp("image"))
    for name in ("requirements", "dependencies", "wheel"):
        build.follow(STAGES[name])
        build.finish(STAGES[name])
    build.follow(WORKER)
    build.path("/var/cache/cvworker").mkdir(parents=True)  # among the steps that need root
    return build


def run(build: Build, *arguments: str, read_only: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    """The image's entry point with ``arguments``, in its environment and working directory."""
    environment = {**build.environment(WORKER.environment()), **variables}
    tini, _, *command = words_of(WORKER.all("ENTRYPOINT")[0])
    found = shutil.which(command[0], path=environment["PATH"])
    assert found == str(build.path("/opt/venv/bin/cvworker"))
    words = [found, *arguments]
    if installed := shutil.which(tini):
        words = [installed, "--", *words]
    if read_only:
        words = [*_read_only_but_for(build), *words]
    return subprocess.run(
        words, env=environment, cwd=build.path("/app"), capture_output=True, text=True, timeout=240, check=False
    )


def _read_only_but_for(build: Build) -> list[str]:
    """A prefix: every file system read-only, but for what the Dockerfile calls a volume."""
    volumes = [build.path(path) for path in words_of(WORKER.all("VOLUME")[0])]
    writable = " && ".join(f"mount --bind '{each}' '{each}'" for each in volumes)
    script = f'mount --make-rprivate / && {writable} && mount -o remount,bind,ro / && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def can_remount() -> bool:
    script = "mount --make-rprivate / && mount -o remount,bind,ro /"
    words = ["unshare", "--mount", "sh", "-c", script]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


def test_the_linter_finds_nothing() -> None:
    done = subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_base_is_slim_and_pinned_to_a_release() -> None:
    text = (ROOT / "Dockerfile").read_text()
    version = re.search(r"^ARG PYTHON=(.*)$", text, re.MULTILINE)
    assert version
    assert re.fullmatch(r"3\.\d+\.\d+-slim-[a-z]+", version[1])
    bases = {stage.base for stage in STAGES.values()}
    assert bases - set(STAGES) == {"python:${PYTHON}"}


def test_the_python_is_the_one_that_the_constraints_were_taken_with() -> None:
    taken = re.search(r"\(Python ([\d.]+),", (ROOT / "constraints.txt").read_text())
    assert taken
    assert f"ARG PYTHON={taken[1]}." in (ROOT / "Dockerfile").read_text()


def test_dependencies_do_not_depend_on_the_code() -> None:
    """A change of the source reuses their layer."""
    copied = " ".join(STAGES["dependencies"].all("COPY"))
    assert "src" not in copied
    assert "pyproject.toml" not in copied


def test_what_is_installed_is_what_pyproject_names(built: Build) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = (built._stages["dependencies"] / "build" / "requirements.txt").read_text().splitlines()
    assert asked == project["dependencies"]


def test_extras_can_be_added(tmp_path: Path) -> None:
    step = STAGES["requirements"].all("RUN")[0]
    words = {**os.environ, "EXTRAS": "onnx otel"}
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(["sh", "-e", "-c", step], cwd=tmp_path, env=words, check=True)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = (tmp_path / "requirements.txt").read_text().splitlines()
    assert asked[-3:] == [*extras["onnx"], *extras["otel"]]


def test_the_wheel_has_all_that_the_package_needs_and_nothing_else(built: Build) -> None:
    wheel = next((built._stages["wheel"] / "wheels").glob("*.whl"))
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "src"], cwd=ROOT, capture_output=True)
    sources = {line.removeprefix("src/") for line in tracked.stdout.decode().splitlines()}
    assert packed == {name for name in sources if (ROOT / "src" / name).is_file()}


def test_only_debians_packages_and_the_user_were_left_out(built: Build) -> None:
    assert len(built.not_followed) == 1
    assert "useradd --uid 10001" in built.not_followed[0]


def test_the_entry_point_says_its_version(built: Build) -> None:
    done = run(built, "--version")
    assert (done.returncode, done.stdout) == (0, f"cvworker {__version__}\n"), done.stderr


def test_the_entry_point_answers_check_on_a_read_only_root(built: Build) -> None:
    read_only = can_remount()
    flags = ["--module", "threat", "--weights", "demo", "--precision", "fp32", "--optimize", "off"]
    done = run(built, "check", *flags, read_only=read_only)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cvworker check: threat is ready to run" in done.stdout
    if not read_only:
        pytest.skip("done, but on a root that can be written: to remount it takes root and unshare")


MODULE = """
import torch
from cvworker import Module

class MyModel(Module):
    def setup(self, device):
        self.model = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 9, padding=4) for _ in range(4)))

    def preprocess(self, image):
        return image[:, :32, :32].float() / 255

    def process(self, batch):
        return [{"mean": value} for value in self.model(batch).mean((1, 2, 3)).tolist()]
"""


def test_a_module_of_the_users_own_takes_three_lines_and_goes_on_without_a_compiler(built: Build) -> None:
    # given the lines that the page shows
    shown = re.search(r"```dockerfile\n(FROM cvworker.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    assert shown
    assert len(shown[1].strip().splitlines()) == 3
    extended = parse(shown[1])[0]
    source, target = extended.all("COPY")[0].split()
    (built.path(target) / source).write_text(MODULE)
    module = extended.environment()["CVWORKER_MODULE"].replace("/app", str(built.path("/app")))
    # when it is to be compiled, and there are no programs but the image's own
    path = str(built.path("/opt/venv/bin"))
    done = run(built, "check", "--optimize", "full", "--log-level", "debug", CVWORKER_MODULE=module, PATH=path)
    # then it works, and one line says what fell back and why
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "no C++ compiler" in line]
    assert len(lines) == 1, done.stdout + done.stderr


def test_the_user_is_numeric_and_not_root_in_every_image() -> None:
    for stage in (WORKER, STAGES["compiler"]):
        assert stage.all("USER")[-1] == "10001:10001"


def test_programs_are_started_without_a_shell_and_below_an_init() -> None:
    assert words_of(WORKER.all("ENTRYPOINT")[0]) == ["tini", "--", "cvworker"]
    assert words_of(WORKER.all("CMD")[0]) == ["run"]
    health = WORKER.all("HEALTHCHECK")[0]
    assert words_of(health[health.index("[") :]) == ["cvworker", "healthcheck"]


def test_a_gpu_is_asked_for_computing_and_nothing_else() -> None:
    assert WORKER.environment()["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


def test_the_image_is_labelled() -> None:
    labels = dict(re.findall(r'(org\.opencontainers\.image\.\w+)="([^"]*)"', WORKER.all("LABEL")[0]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert labels["org.opencontainers.image.title"] == project["name"]
    assert labels["org.opencontainers.image.description"] == project["description"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]


def test_only_the_compiler_stage_has_a_compiler() -> None:
    assert "g++" in " ".join(STAGES["compiler"].all("RUN"))
    assert STAGES["compiler"].base == "worker"
    installed = re.findall(r"install --yes --no-install-recommends ([^&]*)", " ".join(WORKER.all("RUN")))
    assert [names.split() for names in installed] == [["tini"]]


def test_without_a_target_the_worker_is_built() -> None:
    last = list(STAGES.values())[-1]
    assert (last.base, last.steps) == ("worker", [])


def test_no_index_is_named_and_the_one_for_cpus_is_empty() -> None:
    assert STAGES["dependencies"].all("ARG") == ['TORCH_INDEX=""']
    assert not re.findall(r"https?://\w", (ROOT / "Dockerfile").read_text())


@pytest.mark.parametrize("index", ["", "http://127.0.0.1:9/simple"])
def test_the_index_for_cpus_is_asked_for_torch_only(index: str, tmp_path: Path) -> None:
    # given a pip that notes how it is called
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@" >> calls\n')
    (tmp_path / "pip").chmod(0o755)
    step = re.sub(r"--mount=\S+\s*", "", STAGES["dependencies"].all("RUN")[-1])
    # when
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_INDEX": index}
    subprocess.run(["sh", "-e", "-c", step], cwd=tmp_path, env=environment, check=True)
    # then
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [("--index-url" in call, call.split()[-2:]) for call in calls] == [
        *([(True, ["torch", "torchvision"])] if index else []),
        (False, ["--requirement", "requirements.txt"]),
    ]


def test_variables_in_the_image_are_settings() -> None:
    names = [name for name in WORKER.environment() if name.startswith(PREFIX)]
    assert names
    for name in names:
        assert name.removeprefix(PREFIX).lower() in Settings.model_fields, name


@pytest.mark.parametrize(
    "path", [".env", ".git/config", ".venv/bin/python", "secret.pem", "docs/a.md", "tests/a.py", "src/a/__pycache__/b"]
)
def test_what_the_image_does_not_need_stays_out_of_the_build(path: str) -> None:
    assert is_ignored(path, ignore_rules(ROOT))


def test_what_is_copied_is_all_that_goes_in() -> None:
    copied = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src"}
    assert {path.partition("/")[0] for path in context(ROOT)} == copied
    copies = " ".join(text for stage in STAGES.values() for text in stage.all("COPY") if "--from" not in text)
    assert copied <= set(copies.split())


def test_a_stage_is_parsed_as_it_is_written() -> None:
    stages = parse("ARG A=1\nFROM x AS y\n# no\nRUN a && \\\n    b\nENV A=1 \\\n  B=$A/2\nFROM y\n")
    assert stages == [Stage("y", "x", [("RUN", "a && b"), ("ENV", "A=1 B=$A/2")]), Stage("", "y")]
    assert stages[0].environment() == {"A": "1", "B": "$A/2"}
