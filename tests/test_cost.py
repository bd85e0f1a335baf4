"""What a million images cost: the formula, the limits beside the device, and what is measured and what scaled."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from cvworker.cli import main
from cvworker.errors import StartupError
from cvworker.lab import catalogue, cost
from cvworker.lab.cost import WORKER_MS, Row, per_million
from cvworker.lab.results import Profile
from cvworker.lab.spot import with_spot_prices
from profiles import PICTURE, a_gpu, a_host, a_machine, a_point, a_profile
from world import BIN

KNOWN = catalogue.load()


def on_t4(**given: Any) -> Profile:
    """800 images/s on the T4 of a g4dn.xlarge, whose 4 vCPUs decode 400."""
    machine = a_gpu(type="g4dn.xlarge")
    return a_profile(a_point(8, 10), host=(a_host(4, 400),), machine=machine, **given)


def row(name: str, *profiles: Profile, **given: Any) -> Row:
    [found] = cost.rows(profiles, KNOWN, machines=[name], **given)[0]
    return found


def test_a_million_images_cost_the_hour_s_price_by_the_images_of_an_hour() -> None:
    assert per_million(3.6, 1000) == pytest.approx(1.0)
    assert per_million(0.526, 28) == pytest.approx(5.218, abs=1e-3)


@given(st.floats(0.01, 100), st.floats(0.1, 1e5))
def test_a_million_images_take_as_long_as_they_do_however_it_is_counted(hourly: float, images_s: float) -> None:
    hours = 1e6 / images_s / 3600
    assert per_million(hourly, images_s) == pytest.approx(hourly * hours)


def test_on_the_machine_that_was_profiled_nothing_is_scaled() -> None:
    found = row("g4dn.xlarge", on_t4())
    assert (found.basis, found.how) == ("measured", "")
    assert found.device_s == 800
    assert found.latency_ms == 10
    assert found.per_million == per_million(0.526, found.images_s)


def test_decoding_is_a_limit_and_counts_the_worker_s_own_work() -> None:
    found = row("g4dn.xlarge", on_t4())
    assert found.bound == "decode"
    assert found.images_s == found.cpu_s == pytest.approx(4 * 1000 / (10 + WORKER_MS))


def test_a_larger_machine_with_the_same_gpu_decodes_more_and_is_scaled() -> None:
    small, large = row("g4dn.xlarge", on_t4()), row("g4dn.2xlarge", on_t4())
    assert (large.basis, large.how) == ("scaled", "the same T4, other vCPUs")
    assert large.device_s == small.device_s
    assert large.cpu_s == pytest.approx(2 * (small.cpu_s or 0))


def test_another_gpu_is_scaled_by_published_figures_and_says_so() -> None:
    found = row("g5.xlarge", on_t4())
    assert found.basis == "scaled"
    assert found.how == "device × 2.13 (A10G ÷ T4, published ResNet-50)"
    assert found.device_s == pytest.approx(800 * 13000 / 6100)
    assert found.latency_ms == pytest.approx(10 * 6100 / 13000)


def test_a_machine_with_eight_gpus_does_eight_times_as_much_in_the_same_time() -> None:
    one, eight = row("p5.4xlarge", on_t4()), row("p5.48xlarge", on_t4())
    assert eight.device_s == pytest.approx(8 * one.device_s)
    assert eight.latency_ms == pytest.approx(one.latency_ms)


def test_eight_gpus_of_which_one_was_profiled_are_scaled() -> None:
    profile = a_profile(a_point(8, 10), machine=a_gpu("NVIDIA A100-SXM4-40GB", type="p4d.24xlarge"))
    found = row("p4d.24xlarge", profile)
    assert (found.basis, found.how, found.device_s) == ("scaled", "8 GPUs from one", 6400)


def test_the_network_is_a_limit_where_pictures_are_large() -> None:
    found = row("g5.xlarge", on_t4(), image_bytes=2_000_000)
    assert found.bound == "network"
    assert found.images_s == found.network_s == pytest.approx(2.5e9 / 8 / 2_000_000)


def test_without_a_size_given_pictures_are_as_large_as_the_one_that_was_profiled() -> None:
    assert row("g5.xlarge", on_t4()).network_s == pytest.approx(2.5e9 / 8 / PICTURE.bytes)


def test_without_a_gpu_decoding_and_computing_share_the_cores() -> None:
    # given 50 images/s computed, or 1000 / (10 + WORKER_MS) on each of four cores decoded
    found = row("c7i.xlarge", a_profile(a_point(1, 20), host=(a_host(4, 400),)))
    assert found.how == "device × 1.00 (vCPUs)"
    assert found.bound == "device"
    assert found.images_s == pytest.approx(1 / (1 / 50 + 1 / (found.cpu_s or 0)))


def test_what_cannot_be_scaled_is_left_out_and_named() -> None:
    found, left_out = cost.rows([a_profile(a_point(1, 20))], KNOWN, machines=["g5.xlarge", "c7i.2xlarge"])
    assert [each.machine.name for each in found] == ["c7i.2xlarge"]
    why = "how much faster a GPU is than this CPU is not known; give --factor"
    assert left_out == [f"g5.xlarge from threat on AMD EPYC (4 cores): {why}"]


def test_a_gpu_without_published_figures_is_left_out_and_named() -> None:
    found, left_out = cost.rows([on_t4()], KNOWN, machines=["g6e.xlarge"])
    assert not found
    assert "no relative speed of L40S" in left_out[0]


def test_a_factor_of_one_s_own_stands_in_for_what_is_not_known() -> None:
    found = row("g6e.xlarge", on_t4(), factors={"g6e.xlarge": 4.0})
    assert (found.device_s, found.how) == (3200, "device × 4 (given)")


def test_a_machine_that_was_profiled_has_no_scaled_row_beside_it() -> None:
    on_a10g = a_profile(a_point(8, 5), machine=a_gpu("NVIDIA A10G", type="g5.xlarge"), host=(a_host(4, 500),))
    found, _ = cost.rows([on_t4(), on_a10g], KNOWN, machines=["g4dn.xlarge", "g5.xlarge"])
    assert sorted((each.machine.name, each.basis) for each in found) == [
        ("g4dn.xlarge", "measured"),
        ("g5.xlarge", "measured"),
    ]


def test_rows_begin_with_the_cheapest() -> None:
    found, _ = cost.rows([on_t4()], KNOWN)
    prices = [each.per_million for each in found]
    assert prices == sorted(prices)


def test_a_latency_limit_chooses_the_batch() -> None:
    profile = on_t4(points=[a_point(1, 4), a_point(8, 10)])
    assert row("g4dn.xlarge", profile, latency_ms=5).point.batch == 1


def test_a_profile_of_which_nothing_can_be_taken_is_left_out() -> None:
    found, left_out = cost.rows([a_profile()], KNOWN)
    assert not found
    assert "nothing was measured" in left_out[0]


@pytest.mark.parametrize("given", ["g5.xlarge", "=2", "g5.xlarge=", "g5.xlarge=0", "g5.xlarge=nan", "g5.xlarge=inf"])
def test_a_factor_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(StartupError, match="is not MACHINE=NUMBER"):
        cost.parse_factors([given])


class TestSpot:
    def test_today_s_prices_are_ec2_s_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            found = with_spot_prices(KNOWN)
        finally:
            server.stop()
        assert all(machine.spot and machine.spot < 1e-4 for machine in found.machines.values())  # what moto sells at
        assert found.machine("g5.xlarge").on_demand == KNOWN.machine("g5.xlarge").on_demand

    def test_an_ec2_that_does_not_tell_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(StartupError, match=r"^spot: EC2 in us-east-1 did not tell its prices"):
            with_spot_prices(KNOWN)


class TestCommand:
    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        on_t4().save(tmp_path / "profile.json")
        return tmp_path

    def test_a_table_and_a_page_with_a_picture(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["cost", "profile.json"]) == 0
        told = capsys.readouterr()
        assert "prices: USD, us-east-1, 2026-07-15" in told.out
        assert "left out: g6e.xlarge" in told.err
        page = (here / "build/cost/cost.html").read_text()
        assert "Cost against latency" in page
        assert "g5.2xlarge" in page
        assert "scaled: device × 2.13 (A10G ÷ T4, published ResNet-50)" in page

    def test_prices_of_one_s_own_with_a_spot_price(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (here / "own.toml").write_text('date = 2026-11-01\n[machines."g4dn.xlarge"]\non_demand = 1.0\nspot = 0.25\n')
        assert main(["cost", "profile.json", "--prices", "own.toml", "--machines", "g4dn.xlarge"]) == 0
        told = capsys.readouterr().out
        assert "2026-11-01" in told
        [line] = [line for line in told.splitlines() if "measured" in line]
        dear, cheap = map(float, line.split()[1:3])
        assert cheap == pytest.approx(dear / 4, rel=1e-3)

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ([], "profiles: give the profile.json"),
            (["nowhere.json"], "nowhere.json cannot be read (No such file"),
            (["profile.json", "--machines", "g9.xlarge"], "there is no 'g9.xlarge' in the catalogue"),
            (["profile.json", "--factor", "g5.xlarge"], "is not MACHINE=NUMBER"),
            (["profile.json", "--prices", "nowhere.toml"], "nowhere.toml cannot be read"),
            (["profile.json", "--machines", "g6e.xlarge"], "no machine has a number"),
        ],
    )
    def test_a_mistake_is_told_in_one_line(
        self, here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
    ) -> None:
        assert main(["cost", *arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("cvworker cost: ")
        assert told in line

    def test_the_catalogue_can_be_printed_to_begin_one_s_own(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["cost", "--catalogue"]) == 0
        (here / "mine.toml").write_text(capsys.readouterr().out)
        assert catalogue.load(here / "mine.toml") == KNOWN

    def test_the_command_needs_no_torch(self, here: Path) -> None:
        code = "import sys; from cvworker.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
        done = subprocess.run([BIN / "python", "-c", code, "cost", "profile.json"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_profile_of_a_cpu_says_nothing_of_its_gpu() -> None:
    assert a_machine().on_gpu is False
    assert a_gpu().on_gpu is True
