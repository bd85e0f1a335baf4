"""What a profile is kept as, what follows from its samples, and what is made of it: advice, comparison, report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvworker.errors import StartupError
from cvworker.lab import compare
from cvworker.lab.recommend import recommend, recommended_batch
from cvworker.lab.report import METHOD, page, summary
from cvworker.lab.results import (
    AGREE,
    STRAY,
    Profile,
    Split,
    beside,
    judged,
    measured,
    percentile,
    steady,
    usual_pace,
)
from profiles import a_host, a_machine, a_point, a_profile, a_wall

GIB = 2**30
rates = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=12)


def full_profile() -> Profile:
    return a_profile(
        a_point(1, 10.0),
        a_point(8, 40.0),
        a_point(16, 79.0),
        a_wall(32),
        a_point(1, 9.0, series="network"),
        a_point(1, 30.0, series="network", megapixels=1.0),
        host=(a_host(0, 100.0, step="decode"), a_host(0, 90.0), a_host(1, 80.0), a_host(2, 150.0), a_host(4, 155.0)),
        settings={"module": "threat", "latency_ms": None},
    )


class TestKeeping:
    def test_a_profile_that_was_saved_is_loaded_the_same(self, tmp_path: Path) -> None:
        found = full_profile()
        found.save(tmp_path / "profile.json")
        assert Profile.load(tmp_path / "profile.json") == found
        assert list(tmp_path.iterdir()) == [tmp_path / "profile.json"]

    def test_every_number_can_be_worked_out_again_from_the_samples(self, tmp_path: Path) -> None:
        full_profile().save(tmp_path / "profile.json")
        for point in Profile.load(tmp_path / "profile.json").points:
            if point.measured:
                again = measured(point.passes, point.batch)
                assert again == {name: getattr(point, name) for name in again}

    def test_the_table_has_a_line_for_each_point_and_nothing_but_numbers_in_its_columns_of_numbers(
        self, tmp_path: Path
    ) -> None:
        found = full_profile()
        found.save_csv(tmp_path / "profile.csv")
        with (tmp_path / "profile.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["series"] for row in rows] == [
            *(
                "process",
                "process",
                "process",
                "process",
                "network",
                "network",
                "decode",
                "both",
                "both",
                "both",
                "both",
            )
        ]
        assert [float(row["images_s"]) for row in rows if row["series"] == "process" and row["images_s"]] == [
            pytest.approx(100),
            pytest.approx(200),
            pytest.approx(16000 / 79),
        ]
        assert rows[3]["status"] == "out of memory"
        assert rows[-1]["workers"] == "4"

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"version": 2}, "version: Input should be 1"),
            ({"format": "something else"}, "format: Input should be 'cvworker profile'"),
            ({"points": [{"series": "process"}]}, "points.0.precision: Field required"),
            ({"machine": None}, "machine: "),
        ],
    )
    def test_what_is_no_profile_is_refused_by_its_first_wrong_field(
        self, tmp_path: Path, change: dict[str, object], named: str
    ) -> None:
        path = tmp_path / "profile.json"
        path.write_text(json.dumps({**json.loads(full_profile().model_dump_json()), **change}))
        with pytest.raises(StartupError) as refused:
            Profile.load(path)
        assert f"{path} is not a profile: {named}" in str(refused.value)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("text", ["", "{", "\udcff"])
    def test_what_is_no_json_is_refused_in_one_line(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "profile.json"
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(StartupError, match="cannot be read"):
            Profile.load(path)

    def test_a_field_of_a_later_version_does_no_harm(self, tmp_path: Path) -> None:
        path = tmp_path / "profile.json"
        path.write_text(json.dumps({**json.loads(full_profile().model_dump_json()), "weather": "fine"}))
        assert Profile.load(path) == full_profile()


class TestJudging:
    @given(rates)
    def test_windows_are_steady_if_and_only_if_the_last_three_lie_within_a_tenth(self, found: list[float]) -> None:
        last = found[-3:]
        assert steady(found) == (len(last) == 3 and (max(last) - min(last)) / median(last) <= AGREE)

    def test_a_point_is_unstable_where_the_last_windows_differ(self) -> None:
        assert judged([[5, 5, 100, 100, 100], [100, 100, 100]]) == ("ok", "")
        assert judged([[100, 100, 100, 100, 80]]) == ("unstable", "the last three windows differ by 20%")

    def test_a_point_is_unstable_where_its_passes_differ(self) -> None:
        assert judged([[100, 100, 100], [88, 88, 88]]) == ("unstable", "the two passes differ by 13%")

    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0.01, 1))
    def test_a_percentile_is_one_of_the_values_and_leaves_no_more_than_its_share_above(
        self, values: list[float], share: float
    ) -> None:
        found = percentile(values, share)
        assert found in values
        assert sum(value > found for value in values) <= (1 - share) * len(values) + 1e-6

    def test_a_point_beside_which_the_machine_itself_was_slower_is_unstable(self) -> None:
        usual, slow = a_point(1, 10, paces=[100, 101]), a_point(1, 10, paces=[99, 88])
        assert beside(100, usual) == usual
        marked = beside(100, slow)
        assert (marked.status, marked.why) == ("unstable", "the machine itself was 12% slower than usual beside it")
        assert beside(100, a_point(1, 10)).status == "ok", "a profile of a version that did not look"

    @given(st.lists(st.lists(st.floats(80, 120), min_size=1), min_size=1))
    def test_a_point_is_stable_if_and_only_if_the_machine_was_near_its_median_pace_all_along(
        self, paces: list[list[float]]
    ) -> None:
        points = [a_point(1, 10, paces=each) for each in paces]
        pace = usual_pace(points)
        assert pace == median(each for some in paces for each in some)
        for point in points:
            near = all(abs(each / pace - 1) <= STRAY for each in point.paces)
            assert (beside(pace, point).status == "ok") == near

    @given(
        st.integers(1, 64),
        st.lists(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=5), min_size=1, max_size=6),
    )
    def test_a_point_s_rate_and_percentiles_lie_within_what_was_measured(
        self, batch: int, windows: list[list[float]]
    ) -> None:
        numbers = measured([[[Split(0.0, ms, 0.0) for ms in window] for window in windows]], batch)
        all_ms = [ms for window in windows for ms in window]
        assert 1000 * batch / max(all_ms) * 0.999 <= numbers["images_s"] <= 1000 * batch / min(all_ms) * 1.001
        latency = numbers["latency_ms"]
        assert min(all_ms) <= latency.p50 <= latency.p90 <= latency.p95 <= latency.p99 <= max(all_ms)

    def test_an_unstable_point_counts_with_its_slower_pass(self) -> None:
        point = a_point(1, 0, passes=[[[Split(0, 10, 0)]] * 3, [[Split(0, 20, 0)]] * 3])
        assert point.status == "unstable"
        assert point.sure_images_s == 50


class TestWhatOthersRead:
    def test_a_curve_gives_the_seconds_of_each_batch(self) -> None:
        assert full_profile().curve("fp32", "eager") == [(1, 0.01), (8, 0.04), (16, 0.079)]
        assert full_profile().curve("fp32", "eager", "network") == [(1, 0.009)]
        assert full_profile().curve("bf16", "eager") == []

    def test_series_over_megapixels_are_apart_from_those_over_batch_sizes(self) -> None:
        assert list(full_profile().series()) == ["process fp32 eager", "network fp32 eager"]
        [(name, [point])] = full_profile().series(sizes=True).items()
        assert (name, point.megapixels) == ("network fp32 eager", 1.0)

    def test_the_host_s_part_is_told_by_core_and_for_the_best_number_of_processes(self) -> None:
        found = full_profile()
        assert found.host_ms() == pytest.approx(1000 / 90)
        assert found.host_ms("decode") == 10
        assert found.host_images_s() == 155
        assert found.best_workers() == 2
        assert a_profile().host_ms() is None
        assert a_profile().best_workers() is None


class TestAdvice:
    def test_the_highest_throughput_is_recommended_with_the_smallest_batch_that_reaches_it(self) -> None:
        # given 100, 200 and 202.5 images/s
        advice = recommend(full_profile())
        # then batch 16 gains too little over 8
        assert advice.point.batch == 8
        assert advice.lines[:2] == ["CVWORKER_BATCH_SIZE=8", "CVWORKER_PRECISION=fp32"]

    def test_a_faster_precision_is_recommended_with_a_word_about_its_answers(self) -> None:
        advice = recommend(a_profile(a_point(8, 40), a_point(8, 20, precision="bf16", format="channels-last")))
        assert advice.environment["CVWORKER_PRECISION"] == "bf16"
        assert "CVWORKER_OPTIMIZE" not in advice.environment
        assert any("answers in bf16 were not compared" in note for note in advice.notes)

    @pytest.mark.parametrize(
        ("point", "lines"),
        [
            ({"format": "compiled"}, {"CVWORKER_OPTIMIZE=full"}),
            ({"format": "channels-last+compiled"}, {"CVWORKER_OPTIMIZE=full"}),
            ({"precision": "tf32"}, {"CVWORKER_PRECISION=fp32", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1"}),
            ({"precision": "exported", "format": "a.onnx"}, {"CVWORKER_WEIGHTS=models/a.onnx"}),
            ({"precision": "exported", "format": "b.pt2"}, {"CVWORKER_WEIGHTS=b.pt2#sha256=00"}),
        ],
    )
    def test_the_environment_says_how_to_get_each_format(self, point: dict[str, str], lines: set[str]) -> None:
        exported = {"exported": ["models/a.onnx", "b.pt2#sha256=00"]}
        advice = recommend(a_profile(a_point(8, 40, **point), settings=exported))
        assert lines <= set(advice.lines)

    def test_a_latency_limit_leaves_out_what_is_slower_and_says_so(self) -> None:
        advice = recommend(full_profile(), latency_ms=20)
        assert advice.point.batch == 1
        assert any("without the limit of 20 ms" in note for note in advice.notes)

    def test_a_memory_limit_leaves_out_what_is_larger(self) -> None:
        found = a_profile(a_point(1, 10, memory=GIB), a_point(8, 20, memory=3 * GIB))
        advice = recommend(found, memory_bytes=2 * GIB)
        assert (advice.point.batch, advice.bound) == (1, "memory")

    @pytest.mark.parametrize("limits", [{"latency_ms": 5}, {"memory_bytes": GIB / 2}])
    def test_limits_that_nothing_meets_are_named(self, limits: dict[str, float]) -> None:
        with pytest.raises(LookupError, match=r"no batch is within (5 ms|0\.5 GiB)"):
            recommend(full_profile(), **limits)

    def test_where_nothing_was_measured_nothing_is_recommended(self) -> None:
        with pytest.raises(LookupError, match="nothing was measured"):
            recommend(a_profile(a_wall(1)))

    def test_a_fast_outlier_of_one_pass_does_not_win(self) -> None:
        jumpy = a_point(1, 0, precision="bf16", passes=[[[Split(0, 1, 0)]] * 3, [[Split(0, 50, 0)]] * 3])
        assert recommend(a_profile(jumpy, a_point(1, 10))).point.precision == "fp32"

    def test_an_unstable_point_that_is_chosen_is_told(self) -> None:
        jumpy = a_point(1, 0, passes=[[[Split(0, 10, 0)]] * 3, [[Split(0, 20, 0)]] * 3])
        assert any("not stable" in note for note in recommend(a_profile(jumpy)).notes)

    def test_decode_bounds_where_the_cores_prepare_fewer_than_the_device_takes(self) -> None:
        advice = recommend(a_profile(a_point(8, 40), host=(a_host(1, 60), a_host(4, 150))))
        assert advice.bound == "decode"
        assert advice.why == "the device takes 200 images/s, 4 DataLoader processes decode and preprocess 150"
        assert "CVWORKER_PREPROCESS_WORKERS=4" in advice.lines

    def test_transfer_bounds_where_copying_takes_longer_than_computing(self) -> None:
        assert recommend(a_profile(a_point(8, 10, copy_ms=11), host=(a_host(4, 10_000),))).bound == "transfer"

    def test_memory_bounds_where_the_next_batch_did_not_fit(self) -> None:
        advice = recommend(a_profile(a_point(4, 10), a_wall(8), host=(a_host(4, 10_000),)))
        assert (advice.bound, advice.why) == ("memory", "batch 8 does not fit: too large")

    def test_else_computing_bounds(self) -> None:
        advice = recommend(a_profile(a_point(8, 40), host=(a_host(4, 1000),)))
        assert advice.bound == "compute"
        assert "200 images/s, decoding and preprocessing would do 1,000" in advice.why

    def test_the_worker_takes_the_batch_size_from_a_profile_within_the_limits_it_was_made_with(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "profile.json"
        full_profile().save(path)
        assert recommended_batch(path, "threat") == 8
        full_profile().model_copy(update={"settings": {"latency_ms": 20}}).save(path)
        assert recommended_batch(path, "threat") == 1

    def test_a_profile_of_another_module_is_refused(self, tmp_path: Path) -> None:
        full_profile().save(tmp_path / "profile.json")
        with pytest.raises(StartupError, match="is a profile of threat, not of scene"):
            recommended_batch(tmp_path / "profile.json", "scene")

    def test_a_profile_without_a_recommendation_is_refused(self, tmp_path: Path) -> None:
        a_profile(a_wall(1)).save(tmp_path / "profile.json")
        with pytest.raises(StartupError, match="recommends nothing: nothing was measured"):
            recommended_batch(tmp_path / "profile.json", "threat")


class TestComparison:
    def test_two_profiles_are_put_side_by_side_where_both_were_measured(self) -> None:
        a = a_profile(a_point(1, 10), a_point(8, 40), host=(a_host(2, 100),))
        b = a_profile(a_point(1, 5), a_point(8, 41), a_point(8, 9, precision="bf16"), host=(a_host(2, 80),))
        found = compare.pairs(a, b)
        assert [(pair.name, pair.verdict) for pair in found] == [
            ("process fp32 eager", "faster"),
            ("process fp32 eager", "the same"),
            ("decode and preprocess, 0.7 MP, 2 processes", "slower"),
        ]
        assert found[0].ratio == 2
        assert compare.only_in_one(a, b) == ["only B has process bf16 eager"]

    def test_what_is_unstable_or_missing_gets_no_verdict(self) -> None:
        jumpy = a_point(1, 0, passes=[[[Split(0, 10, 0)]] * 3, [[Split(0, 20, 0)]] * 3])
        a, b = a_profile(jumpy, a_point(2, 1)), a_profile(a_point(1, 1), a_wall(2))
        assert [pair.verdict for pair in compare.pairs(a, b)] == ["unstable", "out of memory"]

    def test_a_machine_that_was_itself_faster_the_second_time_gets_no_verdict_but_its_pace_is_told(self) -> None:
        a, b = a_profile(a_point(1, 12, paces=[100.0])), a_profile(a_point(1, 10, paces=[115.0]))
        assert [pair.verdict for pair in compare.pairs(a, b)] == ["unstable"]
        assert compare.pace_told(a, b) == ("The machine itself, at fixed work beside every point: B did 1.15 of A's.")
        other = b.model_copy(update={"machine": a_machine(device_name="another")})
        assert [pair.verdict for pair in compare.pairs(a, other)] == ["faster"]

    def test_what_differs_between_the_machines_is_told(self) -> None:
        a, b = a_profile(), a_profile(machine=a_machine(cores=8), versions={"cvworker": "0.1.0", "torch": "3.0"})
        assert compare.differences(a, b) == [["cores", "4", "8"], ["torch", "2.14.1", "3.0"]]

    def test_the_page_shows_both(self) -> None:
        text = compare.page(full_profile(), full_profile()).html()
        assert "process fp32 eager" in text
        assert text.count("<svg") == 1  # one series has more than one batch size


class TestReport:
    def test_the_page_has_the_advice_every_point_the_pictures_and_the_method(self) -> None:
        found = full_profile()
        advice = recommend(found)
        text = page(found, advice).html()
        assert summary(advice).split(":")[0] in text
        assert "CVWORKER_BATCH_SIZE=8" in text
        for title in ("Throughput", "Latency", "Memory"):
            assert f"{title} against batch size: process as a whole" in text
        assert "Time against megapixels" in text
        assert "Decode and preprocess against DataLoader processes" in text
        assert METHOD[:60] in text
        assert "out of memory: too large" in text

    def test_the_same_profile_makes_the_same_page(self) -> None:
        found = full_profile()
        assert page(found, recommend(found)).html() == page(found, recommend(found)).html()

    def test_without_advice_the_page_says_why(self) -> None:
        assert "Nothing can be recommended: because" in page(a_profile(complete=False), "because").html()

    def test_an_interrupted_profile_says_that_it_is_one(self) -> None:
        assert "It was interrupted" in page(a_profile(complete=False), "because").html()
