"""``cvworker profile`` and ``batch_size: auto`` on real modules, on the CPU; what is measured is never compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from cvworker import images, memory
from cvworker.cli import main
from cvworker.errors import StartupError
from cvworker.lab import host
from cvworker.lab.results import EXPORTED, Point, Profile
from cvworker.lab.subject import Subject
from cvworker.lab.sweep import Plan, Sweep
from cvworker.lab.variants import Variant
from cvworker.modules.metadata import EXTRA_FILE
from cvworker.settings import Settings
from cvworker.worker import model_config
from modules.examples import spec_of
from profiles import a_point, a_profile
from world import BIN, MEAN, MODULES, World, poll

CPU = torch.device("cpu")
NETWORKS = MODULES / "small_networks.py"
EAGER = Variant("fp32", "eager")
QUICK = ("--seconds", "0.005", "--log-level", "error")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Two that wait for each other are slow while other tests take the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def command(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the cores are shared with other tests
    line = [BIN / "cvworker", "profile", *flags]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    path.write_bytes(host.photo(160, 120))
    return path


@pytest.fixture(scope="module")
def threat(tmp_path_factory: pytest.TempPathFactory, photo: Path) -> tuple[Path, str]:
    """The folder of a profile of the shipped classifier, and what was said on the terminal."""
    folder = tmp_path_factory.mktemp("threat")
    flags = ["--module", "threat", "--weights", "demo", "--batch-sizes", "1,2", "--formats", "eager,channels-last"]
    done = command(folder, *flags, "--precisions", "fp32,bf16", "--image", str(photo), *QUICK)
    assert done.returncode == 0, done.stderr
    return folder / "build" / "profile-threat", done.stdout


class TestWholeCommand:
    def test_every_precision_and_format_is_measured_for_the_network_and_for_process(
        self, threat: tuple[Path, str]
    ) -> None:
        found = Profile.load(threat[0] / "profile.json")
        assert found.complete
        assert set(found.series()) == {
            f"{kind} {precision} {form}"
            for kind in ("network", "process")
            for precision in ("fp32", "bf16")
            for form in ("eager", "channels-last")
        }
        assert all([point.batch for point in series] == [1, 2] for series in found.series().values())
        assert {point.status for point in found.points} <= {"ok", "unstable"}

    def test_every_point_has_its_samples_and_the_cpu_s_copies_take_no_time(self, threat: tuple[Path, str]) -> None:
        for point in Profile.load(threat[0] / "profile.json").points:
            assert len(point.passes) == 2
            assert all(3 <= len(windows) <= 10 for windows in point.passes)
            assert point.split_ms is not None
            assert (point.split_ms.to_device, point.split_ms.to_host) == (0, 0)
            assert point.split_ms.compute > 0
            assert point.host_memory_bytes
            assert point.device_memory_bytes is None

    def test_decode_and_preprocess_are_measured_on_one_core_and_in_processes(self, threat: tuple[Path, str]) -> None:
        found = Profile.load(threat[0] / "profile.json")
        alone = {point.step for point in found.host if point.workers == 0}
        assert alone == {"decode", "preprocess", "both"}
        cores = len(os.sched_getaffinity(0))
        assert [p.workers for p in found.host if p.workers] == host.worker_counts(cores)
        assert all(point.images_s for point in found.host)
        assert found.host[0].picture.width == 160

    def test_it_says_where_with_what_and_on_what_it_was_measured(self, threat: tuple[Path, str]) -> None:
        found = Profile.load(threat[0] / "profile.json")
        assert (found.module.name, found.module.sample) == ("threat", "uint8 [3, 128, 128]")
        assert found.module.weights is not None
        assert found.module.parameters
        assert found.machine.device == "cpu"
        assert found.versions["torch"] == torch.__version__.partition("+")[0]
        assert found.settings["batch_sizes"] == [1, 2]
        assert found.settings["weights"] == "demo"

    def test_table_advice_and_page_are_there(self, threat: tuple[Path, str]) -> None:
        folder, said = threat
        assert "threat on " in said
        assert "Bound by " in said
        for line in ("CVWORKER_BATCH_SIZE=", "CVWORKER_PRECISION=", "CVWORKER_PREPROCESS_WORKERS="):
            assert line in said
        assert (folder / "profile.html").read_text().count("<svg") >= 6
        assert len((folder / "profile.csv").read_text().splitlines()) == 1 + 16 + 3 + len(
            host.worker_counts(len(os.sched_getaffinity(0)))
        )
        assert sorted(path.name for path in folder.iterdir()) == ["profile.csv", "profile.html", "profile.json"]

    def test_it_can_be_put_beside_itself(
        self,
        threat: tuple[Path, str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        path = str(threat[0] / "profile.json")
        assert main(["profile", "--compare", path, path]) == 0
        told = capsys.readouterr().out
        assert "process bf16 channels-last" in told
        assert "faster" not in told
        assert (tmp_path / "build/profile-compare/compare.html").exists()

    def test_a_detector_and_its_example_work_too(self, tmp_path: Path, photo: Path) -> None:
        flags = ["--module", "detect", "--weights", "demo", "--batch-sizes", "2", "--formats", "eager"]
        done = command(tmp_path, *flags, "--precisions", "fp32", "--image", str(photo), "--out", "here", *QUICK)
        assert done.returncode == 0, done.stderr
        found = Profile.load(tmp_path / "here" / "profile.json")
        assert [(point.series, point.batch) for point in found.points] == [("network", 2), ("process", 2)]
        assert all(point.measured for point in found.points)

    def test_a_module_without_a_network_is_measured_as_a_whole_and_says_so(self, tmp_path: Path, photo: Path) -> None:
        flags = ["--module", spec_of("picture_quality"), "--batch-sizes", "1", "--formats", "eager,compiled"]
        done = command(tmp_path, *flags, "--image", str(photo), "--precisions", "fp32", "--out", "here", *QUICK)
        assert done.returncode == 0, done.stderr
        found = Profile.load(tmp_path / "here" / "profile.json")
        assert {point.name for point in found.points if point.megapixels is None} == {"process fp32 eager"}
        assert "keeps no network in self.model: process was measured as a whole" in found.notes[0]
        assert found.notes[0] in done.stdout

    def test_ctrl_c_keeps_what_was_measured_until_then(self, tmp_path: Path, photo: Path) -> None:
        # given a profile that would take many minutes
        flags = ["--module", f"{NETWORKS}:ResNet", "--precisions", "fp32", "--formats", "eager"]
        line = [BIN / "cvworker", "profile", *flags, "--seconds", "0.01", "--image", str(photo), "--out", "here"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CVWORKER_BATCH_SIZES": ",".join(map(str, range(1, 4000)))}
        with subprocess.Popen(
            line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as run:
            assert run.stderr is not None
            told = b""
            while b"batch 2" not in told:
                told += os.read(run.stderr.fileno(), 4096)
            # when
            run.send_signal(signal.SIGINT)
            _, error = run.communicate(timeout=60)
        # then
        assert run.returncode == 1
        assert b"interrupted; what was measured until then is written" in error
        found = Profile.load(tmp_path / "here" / "profile.json")
        assert not found.complete
        assert found.points[0].batch == 1
        assert all("interrupted before its second pass" in point.why for point in found.points)
        assert "It was interrupted" in (tmp_path / "here" / "profile.html").read_text()

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ([], "module is not set: give --module or CVWORKER_MODULE"),
            (["--module", "nothing"], "no module named 'nothing' is installed"),
            (["--module", "threat", "1", "2"], "1: files are for --compare; lists are comma-separated"),
            (["--module", "threat", "--batch-sizes", "1,0"], "batch_sizes"),
            (["--module", "threat", "--batch-sizes", "many"], "batch_sizes"),
            (["--module", "threat", "--image", "nowhere.jpg"], "nowhere.jpg cannot be read"),
            (["--module", "threat", "--weights", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
            (["--module", "threat", "--weights", "demo", "--device", "cuda:9"], "device: cuda:9 is not there"),
            (["--compare"], "takes two files, not 0"),
            (["--compare", "a.json", "b.json"], "a.json cannot be read"),
        ],
    )
    def test_a_mistake_is_told_in_one_line(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        told: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["profile", *arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("cvworker profile: ")
        assert told in line
        assert not list(tmp_path.iterdir())

    def test_a_wrong_precision_is_told_before_anything_is_measured(self, tmp_path: Path) -> None:
        done = command(tmp_path, "--module", "threat", "--weights", "demo", "--precisions", "int8")
        assert done.returncode == 2
        assert "precisions: there is no 'int8'; give some of fp32, tf32, bf16, fp16" in done.stderr.splitlines()[-1]


class TestSubjects:
    """Networks of several kinds, in this process."""

    @pytest.mark.parametrize(("name", "variant"), [("ResNet", EAGER), ("MobileNet", Variant("bf16", "channels-last"))])
    def test_a_network_is_measured_alone_and_in_process(self, name: str, variant: Variant) -> None:
        subject = Subject(f"{NETWORKS}:{name}", None, CPU)
        points = measured(subject, variant, kinds=("network", "process"))
        assert [(point.series, point.batch, point.measured) for point in points] == [
            *(("network", 1, True), ("network", 2, True)),
            *(("process", 1, True), ("process", 2, True)),
        ]

    def test_random_inputs_have_the_shapes_that_process_gives_the_network(self) -> None:
        subject = Subject(f"{NETWORKS}:ResNet", None, CPU)
        seen: list[torch.Tensor] = []
        assert subject.network is not None
        subject.network.register_forward_pre_hook(lambda _network, args: seen.append(args[0]))
        subject.network_batch(3)()
        expected, given = seen[0], seen[-1]
        assert (given.shape, given.dtype) == (expected.shape, expected.dtype) == ((3, 3, 32, 32), torch.float32)
        assert not torch.equal(given, expected)
        assert given.mean().item() == pytest.approx(expected.mean().item(), abs=0.1)

    def test_the_same_seed_gives_the_same_inputs(self) -> None:
        def inputs(seed: int) -> torch.Tensor:
            subject = Subject(f"{NETWORKS}:ResNet", None, CPU, seed=seed)
            seen: list[torch.Tensor] = []
            assert subject.network is not None
            run = subject.network_batch(2)
            subject.network.register_forward_pre_hook(lambda _network, args: seen.append(args[0]))
            run()
            return seen[0]

        assert torch.equal(inputs(1), inputs(1))
        assert not torch.equal(inputs(1), inputs(2))

    @pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
    def test_an_exported_network_is_measured_as_it_is(self, tmp_path: Path, suffix: str) -> None:
        path = exported(tmp_path / f"small{suffix}")
        variant = Variant(EXPORTED, path.name)
        points = measured(Subject("scene", str(path), CPU), variant, kinds=("network", "process"))
        assert [(point.name, point.measured) for point in points] == [
            *[(f"network exported {path.name}", True)] * 2,
            *[(f"process exported {path.name}", True)] * 2,
        ]

    def test_time_is_the_clock_s(self) -> None:
        ticks = iter(range(100))
        subject = Subject(f"{NETWORKS}:ResNet", None, CPU, clock=lambda: next(ticks))
        assert subject.network_batch(1)() == (0, 1000, 0)
        assert subject.process_batch(1)() == (0, 1000, 0)

    def test_a_module_whose_network_is_not_called_itself_says_so(self) -> None:
        subject = Subject(f"{NETWORKS}:Parts", None, CPU)
        with pytest.raises(LookupError, match=r"parts\.process does not call self\.model"):
            subject.network_batch(1)
        assert subject.process_batch(1)().compute > 0

    def test_samples_that_follow_the_picture_are_measured_by_megapixels(self) -> None:
        subject = Subject(f"{NETWORKS}:Sharper", None, CPU)
        assert subject.follows_size
        assert subject.samples(1, 0.03)[0].value.shape == (3, 150, 200)
        assert not Subject(f"{NETWORKS}:ResNet", None, CPU).follows_size

    def test_memory_that_ends_on_the_cpu_ends_the_series_and_not_the_process(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # given a machine with 400 MiB left, and a network that takes 64 MiB for each image
        monkeypatch.setattr(memory, "available_bytes", lambda: 400 * 2**20)
        sweep = Sweep(seconds=0.001, batches=[1, 8])
        sweep.rise(Plan(Subject(f"{NETWORKS}:Greedy", None, CPU), "process", EAGER))
        sweep.fall()
        assert [(point.batch, point.status) for point in sweep.points] == [
            (1, sweep.points[0].status),
            (8, "out of memory"),
        ]
        # and one of 320 MiB that no smaller batch has told of
        sweep = Sweep(seconds=0.001, batches=[8])
        sweep.rise(Plan(Subject(f"{NETWORKS}:Greedy", None, CPU), "process", EAGER))
        sweep.fall()
        assert [(point.batch, point.status) for point in sweep.points] == [(8, "out of memory")]
        assert "can't allocate memory" in sweep.points[0].why

    def test_a_module_that_dislikes_its_own_example_is_refused(self) -> None:
        with pytest.raises(StartupError, match="its example fails in mean"):
            Subject(f"{MODULES / 'mean.py'}:TooFew", None, CPU)


def measured(subject: Subject, variant: Variant, kinds: tuple[str, ...]) -> list[Point]:
    sweep = Sweep(seconds=0.001, batches=[1, 2])
    for kind in kinds:
        sweep.rise(Plan(subject, kind, variant))  # type: ignore[arg-type]
    sweep.fall()
    return sweep.points


def exported(path: Path) -> Path:
    """A small classifier as the file's suffix has it, for ``scene``."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    metadata = {"architecture": "small", "classes": '["a", "b", "c"]', "input_size": "32"}
    metadata |= {"mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"}
    images, shapes = (torch.zeros(2, 3, 32, 32),), ({0: torch.export.Dim("batch", min=1, max=64)},)
    if path.suffix == ".pt2":
        program = torch.export.export(network, images, dynamic_shapes=shapes)
        torch.export.save(program, path, extra_files={EXTRA_FILE: json.dumps(metadata)})
        return path
    program = torch.onnx.export(network, images, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    model = program.model_proto  # made anew with each look at it
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


class TestPhoto:
    @pytest.mark.parametrize(("width", "height"), [(64, 48), (1024, 683)])
    def test_a_drawn_picture_is_an_ordinary_jpeg(self, width: int, height: int) -> None:
        data = host.photo(width, height)
        assert data == host.photo(width, height)
        assert host.picture_of(data, images.MAX_PIXELS).model_dump() == {
            "format": "JPEG",
            "width": width,
            "height": height,
            "bytes": len(data),
        }

    def test_the_usual_one_is_as_large_as_photographs_of_the_web_are(self) -> None:
        assert 100_000 < len(host.photo()) < 200_000


class TestBatchSizeOfTheWorker:
    def test_auto_measures_at_start_and_the_worker_answers_with_what_it_found(self, fast_world: World) -> None:
        worker = fast_world.worker("--batch-size", "auto", module=MEAN).ready()
        [line] = worker.lines("batch size")
        assert worker.status()["model"]["batch_size"] == line["chosen"] >= 1
        assert line["images_a_second"].startswith("1: ")
        fast_world.send(*(fast_world.request(number) for number in range(20)))
        assert fast_world.receiver.wait_for(20, 60)
        worker.signal()
        assert worker.wait(30) == 0

    def test_pipelines_measure_once_and_take_the_same(self, fast_world: World) -> None:
        worker = fast_world.worker("--batch-size", "auto", "--processes", "2", module=MEAN).ready()
        poll(lambda: len(worker.lines("ready")) >= 2, 60, "both pipelines are ready")
        assert len(worker.lines("batch size")) == 1
        worker.signal()
        assert worker.wait(30) == 0

    def test_a_profile_s_recommendation_is_taken(self, tmp_path: Path) -> None:
        a_profile(a_point(1, 10), a_point(5, 10)).save(tmp_path / "profile.json")
        settings = Settings.model_validate({"module": "threat", "batch_size": f"auto:{tmp_path / 'profile.json'}"})
        config = model_config(settings, None, 0)
        assert (config.batch_size, config.auto_batch) == (5, False)

    def test_a_number_is_a_number(self) -> None:
        config = model_config(Settings.model_validate({"module": "threat", "batch_size": "7"}), None, 0)
        assert (config.batch_size, config.auto_batch) == (7, False)

    def test_a_profile_that_will_not_do_is_told_at_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        a_profile(a_point(1, 10)).save(tmp_path / "profile.json")
        assert main(["check", "--module", MEAN, "--batch-size", "auto:profile.json"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "batch_size: profile.json is a profile of threat, not of" in line

    def test_check_shows_the_batch_size_that_was_found(self, tmp_path: Path) -> None:
        flags = ["--module", MEAN, "--batch-size", "auto", "--preprocess-workers", "1"]
        done = subprocess.run([BIN / "cvworker", "check", *flags], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "batch of " in done.stdout

    @pytest.mark.parametrize(
        ("given", "found"), [("16", 16), (16, 16), ("auto", "auto"), ("auto:a/b.json", "auto:a/b.json")]
    )
    def test_the_setting_takes_a_number_auto_or_a_profile(self, given: object, found: object) -> None:
        assert Settings.model_validate({"batch_size": given}).batch_size == found

    @pytest.mark.parametrize("given", ["0", "-1", "1.5", "many", "auto:", "Auto", "", True, 2.5])
    def test_anything_else_is_refused_with_what_it_takes(self, given: object) -> None:
        with pytest.raises(ValidationError, match="takes a whole number from 1, auto, or auto:FILE"):
            Settings.model_validate({"batch_size": given})


def test_a_profile_is_json_that_anything_can_read(threat: tuple[Path, str]) -> None:
    found = json.loads((threat[0] / "profile.json").read_text())
    assert (found["format"], found["version"]) == ("cvworker profile", 1)
