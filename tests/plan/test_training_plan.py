"""Runs as phases: hours, ramps, layouts of longer sequences, and what is not divisible."""

from __future__ import annotations

from dataclasses import replace

import pytest

from abyssal.config import load_recipe
from abyssal.errors import UsageError
from abyssal.plan.calibration import Calibration
from abyssal.plan.hardware import packaged_chips, parse_cluster
from abyssal.plan.layout import PUBLISHED, Layout
from abyssal.plan.steps import count_steps, steps_by_batch_size
from abyssal.plan.training_plan import HOUR, plan_phase, plan_step, plan_training

CLUSTER = parse_cluster("h800:2048", packaged_chips())


def test_batches_add_up_to_the_steps_and_the_tokens() -> None:
    run = load_recipe("v3_671b")
    counted = list(steps_by_batch_size(run))
    assert sum(steps for _, steps in counted) == count_steps(run)
    tokens = sum(size * steps for size, steps in counted) * 4096
    assert 0 <= tokens - run.train.tokens < 15360 * 4096
    assert counted[0][0] == 3072
    assert counted[-1][0] == 15360


def test_phase_without_a_ramp_takes_its_steps_times_one_step() -> None:
    run = load_recipe("v3_671b_32k")
    phase = plan_phase(run, CLUSTER, replace(PUBLISHED, cp_size=8), Calibration())
    assert phase.seconds == pytest.approx(1000 * phase.step.seconds)
    assert phase.device_hours == pytest.approx(1000 * phase.step.seconds / HOUR * 2048)


def test_time_of_the_ramp_is_that_of_each_of_its_steps() -> None:
    """The line through two simulated sizes against a simulation of every size, where the schedule takes them."""
    ramp = "{start = 4096, segments = [{until = 3e9, shape = 'linear', to = 6144}]}"
    settings = ["train.tokens=4000000000", f"schedule.batch_size={ramp}", "train.batch_multiple=256"]
    run = load_recipe("v3_671b", settings)
    phase = plan_phase(run, CLUSTER, PUBLISHED, Calibration())
    apart = {
        size: plan_step(run, CLUSTER, PUBLISHED, Calibration(), size).seconds
        for size, _ in set(steps_by_batch_size(run))
    }
    assert len(apart) > 5
    exact = sum(steps * apart[size] for size, steps in steps_by_batch_size(run))
    assert phase.seconds == pytest.approx(exact, rel=0.005)


def test_longer_phase_takes_more_context_parallel_devices() -> None:
    runs = [load_recipe("v3_671b"), load_recipe("v3_671b_128k")]
    plan = plan_training(runs, CLUSTER, PUBLISHED, Calibration(), 3.0)
    first, second = (phase.step for phase in plan.phases)
    assert second.layout.cp_size == 32
    assert second.layout.tokens_of_rank(131072) == first.layout.tokens_of_rank(4096) == 4096
    assert second.micro_batches == 120
    # only attention and its latents grow: the same experts, slower by what scores over 128K cost
    assert 4 < second.seconds / first.seconds < 9
    assert plan.cost == pytest.approx(3.0 * plan.device_hours)
    assert replace(plan, other_hours=7.0).device_hours == pytest.approx(plan.device_hours + 7)


def test_shorter_phase_after_a_longer_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.sequence_length=4096: must be a multiple"):
        plan_training([load_recipe("v3_671b_32k"), load_recipe("v3_671b")], CLUSTER, PUBLISHED, Calibration(), 2.0)


def test_overlap_hides_communication_whether_or_not_the_schedule_pairs() -> None:
    run = load_recipe("v3_671b")
    for layout in (PUBLISHED, Layout(pp_size=16, ep_size=64, schedule="zb1p")):
        seconds = [
            plan_step(run, CLUSTER, replace(layout, overlap=how), Calibration()).seconds for how in (False, True)
        ]
        assert seconds[1] < 0.85 * seconds[0]


def test_fewer_micro_batches_leave_more_bubble() -> None:
    run = load_recipe("v3_671b")
    shares = []
    for batch in (4096, 8192, 15360):
        step = plan_step(run, CLUSTER, PUBLISHED, Calibration(), batch)
        shares.append(step.timeline.bubble / step.seconds)
        middle = step.timeline.parts(7)
        assert sum(middle.values()) == pytest.approx(step.timeline.makespan)
    assert shares == sorted(shares, reverse=True)


def test_muon_adds_its_products_to_the_step() -> None:
    run = load_recipe("demo")
    cluster = parse_cluster("h100:1", packaged_chips())
    adamw = load_recipe("demo", ["optimizer.name=adamw"])
    layout = Layout(precision="bf16", micro_batch_size=16)
    assert (
        plan_step(run, cluster, layout, Calibration()).optimizer_s
        > plan_step(adamw, cluster, layout, Calibration()).optimizer_s
    )
