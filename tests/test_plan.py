"""``cvworker plan`` as users meet it: files that are wrong, machines that are known, settings that can be pasted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from cvworker.cli import main
from cvworker.lab import catalogue
from cvworker.lab.results import HostPoint, Latency, MachineInfo, ModuleInfo, Picture, Point, Profile
from cvworker.plan.autoscaler import Autoscaler, Fleet, Scaling
from cvworker.plan.capacity import BatchCurve, Worker
from cvworker.plan.fleet import SQS_IN_FLIGHT, MachineType, Wish
from cvworker.plan.machines import best_batch, from_profile, machine_types
from cvworker.plan.reading import EXAMPLE
from cvworker.plan.recommend import recommend, remarks
from cvworker.plan.report import best_of
from cvworker.plan.search import Planner
from cvworker.plan.simulate import Simulation
from cvworker.plan.traffic import Images, Traffic
from cvworker.plan.traffic import Latency as Wait

DEPLOY = Path(__file__).parents[1] / "deploy"


def profile(
    folder: Path, *, machine: str | None = "g4dn.xlarge", device: str = "cuda:0", name: str = "Tesla T4", cores: int = 4
) -> Path:
    """A profile.json: batches take 6 ms and 0.9 ms an image, decoding 1/350 s."""
    points = [
        Point(
            series="process",
            precision="fp16",
            format="channels-last",
            batch=size,
            status="ok",
            images_s=1000 * size / (6 + 0.9 * size),
            latency_ms=Latency(p50=6 + 0.9 * size, p90=0, p95=0, p99=0),
            device_memory_bytes=2**28 * size if device != "cpu" else None,
        )
        for size in (1, 2, 4, 8, 16, 32, 64)
    ]
    picture = Picture(format="JPEG", width=1024, height=683, bytes=130_000)
    made = Profile(
        made="2026-11-22T09:10:00+00:00",
        complete=True,
        seed=0,
        module=ModuleInfo(name="threat", spec="threat", sample="uint8 [3, 224, 224]"),
        machine=MachineInfo(
            type=machine, cpu="a CPU", cores=cores, memory_bytes=2**34, device=device, device_name=name, os="linux"
        ),
        versions={},
        settings={},
        points=points,
        host=[HostPoint(step="both", workers=0, picture=picture, status="ok", images_s=350.0)],
    )
    path = folder / "profile.json"
    made.save(path)
    return path


def traffic_file(folder: Path, text: str) -> Path:
    path = folder / "traffic.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate = 0", "rate: Input should be greater than 0 (it is 0)"),
        ("rte = 5", "rate: Field required"),
        ("rate = 5\nrte = 5", "rte: there is no such field"),
        ("rate = 5\ndaily = [1, 2]", "daily: "),
        ("rate = 5\ndaily = [" + "0," * 24 + "]", "daily: one of the numbers must be above 0"),
        ("rate = 5\n[[peaks]]\nat = '18:00'\nminutes = 5\nrate = 9\n[[peaks]]\nat = '25:00'\nminutes = 5\nrate = 9",
         "peaks, row 2, at: must be a time of the day such as 18:30 (it is '25:00')"),
        ("rate = 5\n[[images]]\nbytes = -1\nmegapixels = 1", "images, row 1, bytes: Input should be greater than 0"),
        ("rate = 5\n[host]\nlatency_ms = 100\np95_ms = 50", "host: p95_ms must not be below latency_ms"),
        ("rate = 5\n[spot]\nshare = 2", "spot, share: Input should be less than or equal to 1 (it is 2)"),
        ("rate = ", "it is not TOML"),
    ],
)  # fmt: skip
def test_a_wrong_traffic_file_is_one_line_with_row_and_field(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = traffic_file(tmp_path, text)
    assert main(["plan", str(path), "--profile", str(profile(tmp_path)), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"traffic: {path}: " in line
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[machines."g5.xlarge"]\non_demand = -1', "machines.g5.xlarge.on_demand"),
        ('[machines."mine"]\nvcpus = 4', "machines.mine.memory_gib"),
        ('[machines."g5.xlarge"]\nprice = 1', "machines.g5.xlarge.price"),
        ("machines = 3", "machines"),
        ("[[", "it is not TOML"),
    ],
)
def test_a_wrong_price_file_is_one_line_with_row_and_field(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    assert main(["plan", "--rate", "5", "--images-per-s", "20", "--prices", str(path)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert str(path) in line
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--example"),
        (["--rate", "5"], "profile: "),
        (["--rate", "5", "--peak", "2", "--images-per-s", "9"], "peak: "),
        (["missing.toml", "--images-per-s", "9"], "missing.toml cannot be read"),
        (["--rate", "5", "--images-per-s", "9", "--machines", "z9.huge"], "z9.huge"),
        (["--rate", "5", "--images-per-s", "9", "--machines", "g5.xlarge,g6.xlarge"], "images_s: "),
        (["--rate", "5", "--profile", "missing.json"], "missing.json cannot be read"),
        (["--rate", "5", "--profile", "x", "--measured", "g5.xlarge=fast"], "such as g5.xlarge=120"),
        (["--rate", "5", "--profile", "x", "--measured", "z9.huge=5"], "there is no 'z9.huge'"),
        (["--rate", "5", "--load-result", "missing.json"], "load_result: missing.json cannot be read"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert said in line


def load_result(folder: Path, **changed: object) -> Path:
    """The head of a raw file of ``python -m load.scenarios``, without its rows."""
    head = {"format": "cvworker load", "version": 1, "scenario": "offline", "workers": 2, "pace_images_s": 60.0}
    path = folder / "offline.json"
    path.write_text(json.dumps({**head, "machine": {"type": "g4dn.xlarge", "cores": 4}, "rows": [], **changed}))
    return path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": "cvworker profile"}, "format: not of 'python -m load.scenarios'"),
        ({"version": 9}, "version: 9, and this reads 1"),
        ({"scenario": "soak", "pace_images_s": None}, "pace_images_s: 'soak' tells none; give offline.json"),
        ({"pace_images_s": -1}, "pace_images_s: Input should be greater than 0 (it is -1)"),
        ({"workers": 0}, "workers: they ran elsewhere"),
        ({"machine": {"type": "z9.huge"}}, "machine: there is no 'z9.huge' in the catalogue"),
    ],
)
def test_a_wrong_load_result_is_one_line_with_the_field(
    changed: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = load_result(tmp_path, **changed)
    assert main(["plan", "--rate", "5", "--load-result", str(path), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"load_result: {path}" in line
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_load_result_says_what_measured_says(tmp_path: Path) -> None:
    # given a load test in which two workers together did 60 images a second
    path = load_result(tmp_path)

    def planned(name: str, *arguments: str) -> object:
        out = tmp_path / name
        main(["plan", "--rate", "50", *arguments, "--machines", "g4dn.xlarge", "--out", str(out)])
        return json.loads((out / "plan.json").read_text())

    # then it is as if 30 had been measured, with a profile and without one
    ours = ["--profile", str(profile(tmp_path))]
    assert planned("a", *ours, "--load-result", str(path)) == planned("b", *ours, "--measured", "g4dn.xlarge=30")
    assert planned("c", "--load-result", str(path)) == planned("d", "--images-per-s", "30")


def test_a_pace_of_an_unknown_machine_is_not_dropped_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = load_result(tmp_path, machine={"type": None})
    assert main(["plan", "--rate", "5", "--profile", str(profile(tmp_path)), "--load-result", str(path)]) == 2
    assert "load_result: its machine has no type" in capsys.readouterr().err


def test_the_example_is_a_traffic_file_and_the_plan_for_it_is_written_the_same_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # given the example and a profile of a T4
    assert main(["plan", "--example"]) == 0
    path = traffic_file(tmp_path, capsys.readouterr().out)
    arguments = [str(path), "--profile", str(profile(tmp_path)), "--machines", "g4dn.xlarge,g6.xlarge"]
    # when it is planned for twice
    for out in ("one", "two"):
        assert main(["plan", *arguments, "--out", str(tmp_path / out)]) == 0
    said = capsys.readouterr().out
    # then the terminal has the fleet and the lines to paste, and both reports are alike
    for text in ("Take g4dn.xlarge", "BacklogPerTask=", "MaxReceiveCount=", "queueLength:", "CVWORKER_BATCH_SIZE="):
        assert text in said
    for name in ("plan.html", "plan.json", "plan.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(each.name for each in (tmp_path / "one").iterdir()) == ["plan.csv", "plan.html", "plan.json"]
    # and the machine that was not measured is marked
    found = json.loads((tmp_path / "one" / "plan.json").read_text())
    notes = {fleet["machine"]: fleet["note"] for fleet in found["fleets"]}
    assert notes == {"g4dn.xlarge": "", "g6.xlarge": "scaled from T4: batches take 0.47 times as long"}


def test_no_fleet_can_be_faster_than_one_image_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rate", "5", "--images-per-s", "4", "--latency-s", "0.5", "--out", str(tmp_path)]
    assert main(["plan", *arguments]) == 1
    assert "No fleet here keeps 0.5 s" in capsys.readouterr().out


def names_in(template: str) -> set[str]:
    text = (DEPLOY / "cloudformation" / template).read_text()
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("!", lambda *_: None)  # type: ignore[attr-defined]
    return set(yaml.load(text, loader)["Parameters"])  # noqa: S506


def planned(traffic: Traffic, worker: Worker, latency_s: float = 30.0, **more: float) -> tuple[object, Wish]:
    wish = Wish(traffic, latency_s, **more)  # type: ignore[arg-type]
    return Planner(MachineType("g4dn.xlarge", worker, on_demand=0.5), wish).plan(), wish


def test_the_settings_have_the_names_that_the_templates_have() -> None:
    fleet, wish = planned(Traffic(3.0), Worker(BatchCurve.line(0.1, 0.1)), spot_share=0.5)
    settings = recommend(fleet, wish)  # type: ignore[arg-type]
    for text, template in (
        (settings.queue_parameters(), "queue.yaml"),
        (settings.service_parameters(), "service.yaml"),
    ):
        assert {pair.split("=")[0] for pair in text.split()} <= names_in(template)
    scaled = yaml.safe_load_all((DEPLOY / "kubernetes/base/scaledobject.yaml").read_text())
    spec = next(iter(scaled))["spec"]
    keda = yaml.safe_load(settings.keda())
    assert {*keda} <= {*spec, *spec["triggers"][0]["metadata"]}


def test_a_rate_that_one_task_can_do_takes_one_and_a_thousand_times_as_much_takes_hundreds() -> None:
    worker = Worker(BatchCurve.line(0.1, 0.05))
    one, _ = planned(Traffic(5.0), worker)
    many, _ = planned(Traffic(5000.0), worker)
    assert one.scaling.most == 1  # type: ignore[attr-defined]
    assert many.scaling.least >= 5000 / worker.pace(Traffic(1.0))  # type: ignore[attr-defined]
    assert one.keeps and many.keeps  # type: ignore[attr-defined]  # noqa: PT018


def test_a_shorter_latency_never_costs_less() -> None:
    worker = Worker(BatchCurve.line(0.2, 0.05))
    curve = tuple(1 + 0.9 * math.sin(hour / 24 * 2 * math.pi) for hour in range(24))
    months = [planned(Traffic(60.0, daily=curve), worker, latency)[0].month for latency in (1.5, 20, 600)]  # type: ignore[attr-defined]
    assert months == sorted(months, reverse=True)


@pytest.mark.parametrize(
    ("worker", "traffic", "limit"),
    [
        (Worker(BatchCurve.line(0.2, 0.1)), Traffic(1.0), "GPU"),
        (Worker(BatchCurve.line(0.001, 0.0001), decode_s=0.05), Traffic(1.0), "vCPU: decoding"),
        (Worker(BatchCurve.line(0.001, 0.0001), network_bytes_s=1e6), Traffic(1.0), "network"),
        (Worker(BatchCurve.line(0.001, 0.0001)), Traffic(1.0, host=Wait(4.0)), "downloads at once"),
        (Worker(BatchCurve.line(0.001, 0.0001)), Traffic(1.0, callback=Wait(4.0)), "callbacks at once"),
        (Worker(BatchCurve.line(0.02, 0.001), on_gpu=False), Traffic(1.0), "CPU: network and decoding"),
        (Worker(BatchCurve.line(0.02, 0.001), measured=5.0), Traffic(1.0), "pace as measured"),
    ],
)
def test_what_limits_a_worker_has_a_name(worker: Worker, traffic: Traffic, limit: str) -> None:
    assert worker.bound(traffic) == limit
    assert worker.pace(traffic) == min(worker.bounds(traffic).values())


def test_larger_pictures_cost_more_of_the_cores_and_of_the_network() -> None:
    worker = Worker(BatchCurve.line(0.001, 0.0001))
    small, large = Traffic(1.0), Traffic(1.0, images=(Images(1_300_000, 7.0),))
    for name in ("vCPU: decoding", "network"):
        assert worker.bounds(large)[name] < worker.bounds(small)[name]


def test_a_queue_that_would_have_too_much_in_flight_is_told_and_max_queue_size_is_lowered() -> None:
    fleet, wish = planned(Traffic(60_000.0), Worker(BatchCurve.line(0.02, 0.004), batch_size=32))
    assert fleet.in_flight > SQS_IN_FLIGHT  # type: ignore[attr-defined]
    settings = recommend(fleet, wish)  # type: ignore[arg-type]
    worker = fleet.machine.worker  # type: ignore[attr-defined]
    assert settings.max_queue_size < worker.queue_size(wish.traffic)
    assert any("120,000" in line for line in remarks(fleet, wish))  # type: ignore[arg-type]


def test_a_batch_curve_goes_through_what_was_measured_and_on_as_it_was_going() -> None:
    curve = BatchCurve(((2, 0.02), (4, 0.03), (8, 0.05)))
    table = curve.table(10)
    assert table[:1] == [0.0]
    assert [table[size] for size in (1, 2, 3, 4, 8)] == pytest.approx([0.02, 0.02, 0.025, 0.03, 0.05])
    assert table[10] == pytest.approx(0.06)


def test_the_batch_that_is_chosen_is_the_smallest_with_next_to_the_best_pace_within_the_target() -> None:
    curve = BatchCurve(((1, 0.1), (8, 0.2), (32, 0.5), (64, 0.99)))
    assert best_batch(curve, 30.0) == 32
    assert best_batch(curve, 1.0) == 8
    assert best_batch(curve, 0.1) == 1


def test_machines_are_those_with_the_same_gpu_or_one_that_can_be_scaled_to(tmp_path: Path) -> None:
    prices = catalogue.load()
    measured = [from_profile(Profile.load(profile(tmp_path)), prices)]
    found = machine_types(measured, prices, wanted=[], latency_s=30, batch_size=None, paces={})
    notes = {each.name: each.note for each in found}
    assert notes["g4dn.xlarge"] == ""
    assert "same GPU" in notes["g4dn.2xlarge"]
    assert "scaled from T4" in notes["g5.xlarge"]
    assert "g6e.xlarge" not in notes  # nothing is known of its GPU beside others
    assert "c7i.xlarge" not in notes  # and a GPU says nothing of a CPU
    by_name = {each.name: each for each in found}
    assert by_name["p5.48xlarge"].tasks == 8
    assert by_name["p5.48xlarge"].worker.vcpus == 24
    # and a batch that does not fit into the GPU's memory is not taken
    assert by_name["g4dn.xlarge"].worker.curve.points[-1][0] == 32


def test_a_machine_does_no_more_than_a_load_test_saw(tmp_path: Path) -> None:
    prices = catalogue.load()
    measured = [from_profile(Profile.load(profile(tmp_path)), prices)]
    [machine] = machine_types(
        measured, prices, wanted=["g4dn.xlarge"], latency_s=30, batch_size=8, paces={"g4dn.xlarge": 52.0}
    )
    traffic = Traffic(1.0)
    assert machine.worker.pace(traffic) == 52.0
    full = Simulation(traffic, machine.worker, Scaling(1, 1), seconds=1.0, arrivals=np.zeros(1000)).run()
    assert 1000 / float(full.done.max()) == pytest.approx(52.0, rel=0.05)


def test_a_cpus_profile_is_for_this_machine_and_for_others_without_a_gpu(tmp_path: Path) -> None:
    prices = catalogue.load()
    path = profile(tmp_path, machine=None, device="cpu", name="a CPU", cores=2)
    measured = [from_profile(Profile.load(path), prices)]
    found = machine_types(measured, prices, wanted=[], latency_s=30, batch_size=8, paces={})
    assert [each.name for each in found] == ["this machine", "c7i.xlarge", "c7i.2xlarge"]
    assert found[0].on_demand is None
    assert found[1].worker.curve.seconds(8) == pytest.approx(found[0].worker.curve.seconds(8) / 2)


def looked(scaling: Scaling, tasks: int, backlog: list[float]) -> list[int]:
    scaler = Autoscaler(scaling, tasks)
    return [scaler.look(60.0 * (n + 1), visible, 0.0) for n, visible in enumerate(backlog)]


def test_tasks_are_added_after_three_minutes_above_the_target_at_once_as_many_as_it_takes() -> None:
    wanted = looked(Scaling(1, 10, backlog_per_task=100), 1, [450] * 6)
    assert wanted == [1, 1, 1, 5, 5, 5]


def test_tasks_are_taken_away_after_fifteen_minutes_below_it() -> None:
    wanted = looked(Scaling(1, 10, backlog_per_task=100), 5, [150] * 20)
    assert wanted[:15] == [5] * 15
    assert wanted[-1] == 2


def test_from_none_the_first_is_added_after_two_minutes_with_requests() -> None:
    assert looked(Scaling(0, 10, backlog_per_task=100), 0, [5000] * 8) == [0, 0, 1, 1, 1, 50 // 5, 10, 10]


def test_a_machine_is_paid_for_from_its_start_until_it_is_given_back() -> None:
    fleet = Fleet(Scaling(0, 4, backlog_per_task=1, start_s=100, give_back_s=200), 1)
    fleet.autoscaler.desired = 2
    fleet.look(0.0, 0, 0)
    assert fleet.advance(99.0) == 0
    assert fleet.advance(100.0) == 1
    fleet.autoscaler.desired = 0
    assert fleet.look(100.0, 0, 0) == 2
    fleet.advance(400.0)
    assert fleet.bill.tasks == pytest.approx(2 * 100 + 2 * 200)
    fleet.advance(500.0)
    assert fleet.bill.tasks == pytest.approx(2 * 100 + 2 * 200)


def test_the_cheapest_that_keeps_the_target_is_the_best_whatever_the_order() -> None:
    wish = Wish(Traffic(5.0), 30.0)
    fleets = [
        Planner(MachineType(name, Worker(BatchCurve.line(0.1, 0.05)), on_demand=price), wish).plan()
        for name, price in (("dear", 2.0), ("cheap", 0.5))
    ]
    assert best_of(fleets).machine.name == best_of(fleets[::-1]).machine.name == "cheap"


def test_the_example_is_complete() -> None:
    from cvworker.plan.reading import TrafficFile

    assert all(name in EXAMPLE for name in TrafficFile.model_fields)
