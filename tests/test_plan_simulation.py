"""The simulations against what queueing theory says, and against each other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvworker.plan.aggregate import Aggregate, weighted_percentile
from cvworker.plan.autoscaler import Scaling
from cvworker.plan.capacity import BatchCurve, Worker
from cvworker.plan.simulate import Outcome, Simulation
from cvworker.plan.steady import Steady
from cvworker.plan.traffic import DAY_S, Images, Latency, Peak, Traffic

NOTHING = Latency(0.0)
BARE = Traffic(1.0, images=(Images(1, 1e-9),), host=NOTHING, callback=NOTHING)
"""Messages that take no time but that of their batch."""


def server(seconds: float, *, batch: int = 1, wait: float = 0.0, held: int = 10_000) -> Worker:
    """A device and nothing else."""
    curve = BatchCurve(((1, seconds), (2, seconds))) if batch > 1 else BatchCurve(((1, seconds),))
    return Worker(
        curve,
        batch_size=batch,
        max_wait_s=wait,
        ahead=0,
        vcpus=1e6,
        decode_s=1e-9,
        io_cpu_s=1e-9,
        model_cpu_s=1e-9,
        network_bytes_s=1e15,
        overhead_s=0.0,
        max_queue_size=held,
    )


def run(traffic: Traffic, worker: Worker, tasks: int = 1, *, seconds: float = 1000.0, seed: int = 1) -> Outcome:
    return Simulation(traffic, worker, Scaling(tasks, tasks), seed=seed, seconds=seconds).run()


workers = st.builds(
    Worker,
    curve=st.builds(BatchCurve.line, st.floats(0.001, 0.3), st.floats(0.0005, 0.05)),
    batch_size=st.integers(1, 32),
    max_wait_s=st.floats(0, 0.1),
    on_gpu=st.booleans(),
    ahead=st.integers(0, 2),
    vcpus=st.sampled_from([1.0, 2.0, 4.0, 8.0]),
    decode_s=st.floats(0.0005, 0.02),
    overhead_s=st.floats(0, 0.05),
    max_queue_size=st.sampled_from([None, 1, 4, 100]),
)
traffics = st.builds(
    Traffic,
    rate=st.floats(0.5, 30),
    burst=st.sampled_from([1, 1, 7, 40]),
    host=st.builds(Latency, st.floats(0.001, 0.5), st.floats(0, 2)),
    callback=st.builds(Latency, st.floats(0.001, 0.2)),
    host_errors=st.sampled_from([0.0, 0.0, 0.05]),
)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_device_without_batches_waits_as_an_m_d_1_queue(load: float) -> None:
    # given arrivals by chance and a service that always takes 0.1 s
    found = run(BARE.steady(load / 0.1), server(0.1), seconds=20_000)
    # then the mean wait is Pollaczek's and Khinchine's
    expected = load * 0.1 / (2 * (1 - load))
    assert float(found.latencies.mean()) - 0.1 == pytest.approx(expected, rel=0.06, abs=1e-4)


def test_workers_that_hold_much_wait_each_as_a_queue_of_its_own() -> None:
    # given four devices whose workers take whatever comes, each by the same chance
    found = run(BARE.steady(4 * 6.0), server(0.1), 4, seconds=5000)
    # then each is an M/D/1 queue with a quarter of the arrivals
    assert float(found.latencies.mean()) - 0.1 == pytest.approx(0.6 * 0.1 / (2 * 0.4), rel=0.06)


def test_a_device_that_takes_any_batch_in_the_same_time_keeps_up_with_eight_times_as_much() -> None:
    found = run(BARE.steady(70.0), server(0.1, batch=8), seconds=600)
    assert found.achieved == pytest.approx(70, rel=0.03)
    assert found.percentile(0.99) < 0.5


@settings(max_examples=40, deadline=None)
@given(workers, traffics, st.integers(1, 5), st.integers(0, 3))
def test_no_message_is_lost_none_is_faster_than_its_parts_and_littles_law_holds(
    worker: Worker, traffic: Traffic, tasks: int, seed: int
) -> None:
    # given any worker and any traffic, more than they can do included
    found = run(traffic, worker, tasks, seconds=20, seed=seed)
    # then every message is answered, after no less than its parts take
    assert np.isfinite(found.latencies).all()
    assert found.batched == len(found.arrived)
    if len(found.arrived):
        assert found.latencies.min() >= worker.least_s(traffic) - 1e-9
    # and what was counted in the queue, in the workers and in delays over time is the sum of all latencies
    counted = found.visible_s + found.in_flight_s + found.hidden_s
    assert counted == pytest.approx(float(found.latencies.sum()), rel=1e-6, abs=1e-6)
    # and no worker ever held more than it may
    assert found.most_in_flight <= tasks * max(1, worker.held(traffic))


@settings(max_examples=25, deadline=None, derandomize=True)  # its tolerance is for the last, partial batches
@given(workers, st.integers(1, 4))
def test_a_full_queue_is_drained_at_the_pace_that_the_limits_allow(worker: Worker, tasks: int) -> None:
    # given 600 messages for each worker that are there from the beginning
    worker = replace(worker, max_queue_size=None)
    traffic = Traffic(1.0)
    count = 600 * tasks
    found = Simulation(traffic, worker, Scaling(tasks, tasks), seconds=1.0, arrivals=np.zeros(count)).run()
    took = float(found.done.max())
    # then nobody is idle while there is work: the time is the slowest part's, and one message's way
    pace = worker.pace(traffic) * tasks
    assert took >= count / pace * 0.99
    assert took <= count / pace * 1.15 + 4 * worker.lone_s(traffic) + 0.5


@settings(max_examples=20, deadline=None)
@given(traffics, workers, st.integers(0, 5))
def test_the_same_seed_gives_the_same_run(traffic: Traffic, worker: Worker, seed: int) -> None:
    one, other = (run(traffic, worker, 2, seconds=10, seed=seed) for _ in range(2))
    assert np.array_equal(one.done, other.done)


@settings(max_examples=15, deadline=None, derandomize=True)  # percentiles vary by chance
@given(
    fixed=st.floats(0.005, 0.1),
    each=st.floats(0.002, 0.02),
    size=st.sampled_from([1, 4, 8, 16]),
    load=st.floats(0.05, 0.85),
    tasks=st.integers(1, 6),
    burst=st.sampled_from([1, 1, 5]),
)
def test_single_events_and_the_aggregate_agree_below_the_knee(
    fixed: float, each: float, size: int, load: float, tasks: int, burst: int
) -> None:
    # given a traffic that the workers keep up with
    worker = Worker(BatchCurve.line(fixed, each), batch_size=size, decode_s=0.001)
    traffic = Traffic(1.0, host=Latency(0.08, 0.2))
    traffic = replace(traffic.steady(load * tasks * worker.pace(traffic)), burst=burst)
    seconds = 20_000 / traffic.rate
    events = run(traffic, worker, tasks, seconds=seconds)
    flow = Aggregate(traffic, Steady(traffic, worker), Scaling(tasks, tasks), seconds=seconds).run()
    # then both say the same
    assert flow.achieved == pytest.approx(events.achieved, rel=0.06)
    assert flow.percentile(0.5) == pytest.approx(events.percentile(0.5), rel=0.12)
    assert flow.percentile(0.95) == pytest.approx(events.percentile(0.95), rel=0.25)


@pytest.mark.parametrize("over", [1.2, 3.0])
def test_they_agree_where_a_backlog_grows(over: float) -> None:
    worker, traffic = Worker(BatchCurve.line(0.05, 0.01)), Traffic(1.0)
    traffic = traffic.steady(over * 2 * worker.pace(traffic))
    events = run(traffic, worker, 2, seconds=200)
    flow = Aggregate(traffic, Steady(traffic, worker), Scaling(2, 2), seconds=200).run()
    for share in (0.5, 0.95, 0.99):
        assert flow.percentile(share) == pytest.approx(events.percentile(share), rel=0.08)
    assert flow.achieved == pytest.approx(events.achieved, rel=0.03)


def test_they_agree_on_workers_that_come_and_go_with_the_backlog() -> None:
    # given two workers that are enough but for half an hour
    worker, traffic = Worker(BatchCurve.line(0.05, 0.1)), Traffic(12.0, peaks=(Peak(3600, 1800, 40.0),))
    scaling = Scaling(2, 6, backlog_per_task=200)
    events = Simulation(traffic, worker, scaling, seconds=3 * 3600.0).run()
    flow = Aggregate(traffic, Steady(traffic, worker), scaling, seconds=3 * 3600.0).run()
    # then both add workers, and take them away again
    assert flow.bill.active == pytest.approx(events.bill.active, rel=0.1)
    assert flow.percentile(0.5) == pytest.approx(events.percentile(0.5), rel=0.2)
    assert flow.percentile(0.95) == pytest.approx(events.percentile(0.95), rel=0.2)
    assert events.bill.most_tasks > 1


def test_a_day_of_a_hundred_thousand_images_a_second_is_simulated() -> None:
    worker = Worker(BatchCurve.line(0.02, 0.004), batch_size=32)
    curve = tuple(1 + 0.8 * math.sin(hour / 24 * 2 * math.pi) for hour in range(24))
    traffic = Traffic(100_000.0, daily=curve)
    flow = Aggregate(traffic, Steady(traffic, worker), Scaling(900, 900)).run()
    assert flow.served == pytest.approx(traffic.a_day, rel=1e-6)
    assert math.isfinite(flow.percentile(0.99))


def test_an_image_that_fails_for_now_comes_back_later() -> None:
    found = run(replace(BARE.steady(5.0), host_errors=0.3), server(0.01), seconds=200)
    waited = found.latencies > 1
    assert 0.2 < waited.mean() < 0.4
    assert found.latencies[waited].min() >= 4.0  # 5 s, a fifth less at most


def test_what_a_machine_held_that_went_without_notice_comes_back_after_the_visibility_timeout() -> None:
    # given a spot machine that is lost about once in a minute, and always without notice
    worker = replace(server(0.5), visibility_s=30.0)
    scaling = Scaling(2, 2, start_s=5.0, on_demand=1, interruptions_per_hour=60.0)
    found = Simulation(BARE.steady(1.0), worker, scaling, seconds=1200, without_notice=1.0).run()
    # then nothing is lost, and some have waited for it
    assert np.isfinite(found.latencies).all()
    assert found.latencies.max() > 15.0
    # and with notice nobody waits for that
    orderly = Simulation(BARE.steady(1.0), worker, scaling, seconds=1200, without_notice=0.0).run()
    assert orderly.latencies.max() < 15.0


def test_arrivals_follow_the_curve_and_the_peaks() -> None:
    daily = tuple(float(1 + hour % 3) for hour in range(24))
    traffic = Traffic(2.0, daily=daily, peaks=(Peak(64_800.0, 1800.0, 50.0),))
    times = traffic.arrivals(np.random.default_rng(3), 0.0, DAY_S)
    assert len(times) == pytest.approx(traffic.a_day, rel=0.02)
    assert (np.diff(times) >= 0).all()
    inside = np.count_nonzero((times >= 64_800) & (times < 66_600))
    assert inside == pytest.approx(50 * 1800, rel=0.02)
    assert traffic.busiest == 50.0
    assert 64_000 <= traffic.busiest_stretch(1800) <= 65_000


def test_the_mean_of_a_curve_is_the_rate_whatever_its_unit() -> None:
    daily = tuple(float(hour) for hour in range(24))
    assert Traffic(7.0, daily=daily).a_day == pytest.approx(7.0 * DAY_S, rel=0.01)


def test_a_latency_has_the_median_and_the_95th_percentile_that_it_is_given() -> None:
    drawn = Latency(0.1, 0.4).draw(np.random.default_rng(0), 200_000)
    assert float(np.quantile(drawn, 0.5)) == pytest.approx(0.1, rel=0.02)
    assert float(np.quantile(drawn, 0.95)) == pytest.approx(0.4, rel=0.02)
    assert float(drawn.mean()) == pytest.approx(Latency(0.1, 0.4).mean_s, rel=0.02)


def test_a_weighted_percentile_is_the_value_that_so_much_weight_does_not_exceed() -> None:
    values, weights = np.asarray([3.0, 1.0, 2.0]), np.asarray([1.0, 8.0, 1.0])
    assert [weighted_percentile(values, weights, share) for share in (0.5, 0.85, 0.95)] == [1.0, 2.0, 3.0]
