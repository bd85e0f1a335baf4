"""The machines and prices, and the files that users put over them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cvworker.errors import StartupError
from cvworker.lab import catalogue


def test_the_built_in_catalogue_says_what_it_is_and_holds_the_usual_machines() -> None:
    found = catalogue.load()
    assert found.title == "USD, us-east-1, 2026-07-15"
    assert {"g4dn.xlarge", "g5.xlarge", "g6.xlarge", "p5.48xlarge", "c7i.2xlarge"} <= found.machines.keys()
    assert found.machine("g4dn.2xlarge").on_demand == 0.752
    assert found.machine("p4d.24xlarge").processors == 8
    assert found.machine("c7i.xlarge").processor is None


def test_a_larger_machine_of_a_family_costs_more_and_has_no_less_of_anything() -> None:
    machines = catalogue.load().machines
    for family in ("g4dn", "g5", "g6", "c7i"):
        small, large = machines[f"{family}.xlarge"], machines[f"{family}.2xlarge"]
        assert small.on_demand < large.on_demand
        assert small.vcpus < large.vcpus
        assert small.network_gbps <= large.network_gbps


def test_a_driver_s_name_of_a_gpu_is_known() -> None:
    found = catalogue.load()
    assert found.processor_named("NVIDIA A10G") == "A10G"
    assert found.processor_named("Tesla T4") == "T4"
    assert found.processor_named("AMD EPYC") is None


def test_prices_of_one_s_own_replace_fields_and_add_machines(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'date = 2026-11-01\n[machines."g5.xlarge"]\nspot = 0.4\n'
        "[processors.X1]\nmemory_gib = 8\nrelative = 100\n"
        "[machines.mine]\nprocessor = 'X1'\nvcpus = 2\nmemory_gib = 4\nnetwork_gbps = 1\non_demand = 0.1\n"
    )
    found = catalogue.load(own)
    assert found.date.isoformat() == "2026-11-01"
    assert (found.machine("g5.xlarge").spot, found.machine("g5.xlarge").on_demand) == (0.4, 1.006)
    assert found.machine("mine").name == "mine"
    assert found.machine("g4dn.xlarge").spot is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[machines."g5.xlarge"]\non_demand = -1\n', r"machines\.g5\.xlarge\.on_demand: Input should be greater than"),
        ('[machines."g5.xlarge"]\non_demand = "cheap"\n', r"machines\.g5\.xlarge\.on_demand: Input should be a valid"),
        ('[machines."g5.xlarge"]\nprice = 1\n', r"machines\.g5\.xlarge\.price: Extra inputs"),
        ("[machines.mine]\nvcpus = 2\n", r"machines\.mine\.memory_gib: Field required"),
        (
            '[machines."g5.xlarge"]\nprocessor = "A11"\n',
            r"machines\.g5\.xlarge\.processor: there is no processor 'A11'",
        ),
        ("[processors.T4]\nmemory_gib = 0\n", r"processors\.T4\.memory_gib: "),
        ("machines = 3\n", r"machines: must be tables"),
        ("[machines]\nmine = 3\n", r"machines: must be tables"),
        ("date = 'soon'\n", r"date: "),
        ("machines = [", r"it is not TOML: "),
    ],
)
def test_a_wrong_row_or_field_is_named_in_one_line(tmp_path: Path, text: str, named: str) -> None:
    own = tmp_path / "own.toml"
    own.write_text(text)
    with pytest.raises(StartupError, match=rf"^prices: {re.escape(str(own))}: {named}") as refused:
        catalogue.load(own)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"nowhere\.toml cannot be read \(No such file"):
        catalogue.load(tmp_path / "nowhere.toml")


def test_a_machine_that_is_not_there_is_named_beside_those_that_are() -> None:
    with pytest.raises(StartupError, match=r"no 'g9\.xlarge' in the catalogue \(g4dn\.xlarge, "):
        catalogue.load().machine("g9.xlarge")
