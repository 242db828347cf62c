"""The search: complete on a small cluster, honest about what fails, ranked by the simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from abyssal.config import load_recipe
from abyssal.errors import UsageError
from abyssal.plan.calibration import Calibration
from abyssal.plan.hardware import packaged_chips, parse_cluster
from abyssal.plan.layout import Layout, check_layout, count_micro_batches
from abyssal.plan.rank_memory import memory_fault
from abyssal.plan.schedules import build_schedule
from abyssal.plan.search import candidates, check_micro_batches, nearest_fitting, search
from abyssal.plan.training_plan import plan_step

RUN = load_recipe("v3_16b", ["schedule.batch_size={start = 192, segments = []}"])
CLUSTER = parse_cluster("h100:16", packaged_chips())


def test_found_layouts_are_ranked_fit_and_nothing_faster_fits() -> None:
    limit = 60e9
    found = search(RUN, CLUSTER, Layout(), Calibration(), limit)
    times = [step.seconds for step in found.ranked]
    assert times == sorted(times)
    assert all(max(m.total for m in step.memory) <= limit for step in found.ranked)
    for layout in candidates(RUN, CLUSTER, Layout()):
        try:
            step = plan_step(RUN, CLUSTER, layout, Calibration())
        except UsageError:
            continue
        if memory_fault(layout, step.memory, limit) is None:
            assert step.seconds >= 0.97 * times[0], layout  # an estimate may prefer its neighbour


def test_every_candidate_divides_and_is_fitting_or_refused() -> None:
    found = search(RUN, CLUSTER, Layout(), Calibration(), 60e9)
    tried = list(candidates(RUN, CLUSTER, Layout()))
    for layout in tried:
        check_layout(layout, RUN.model, CLUSTER)
    assert len(found.fitting) + sum(refused.count for refused in found.refused) == len(tried)


def test_what_is_too_large_is_tried_again_with_more_recomputation() -> None:
    plenty, scarce = (search(RUN, CLUSTER, Layout(), Calibration(), limit) for limit in (200e9, 30e9))
    assert {layout.recompute for layout in plenty.fitting} == {"published"}
    assert "full" in {layout.recompute for layout in scarce.fitting}
    (memory,) = [refused for refused in scarce.refused if "GB too many" in refused.reason]
    assert memory.count > 0


def test_nothing_fits_into_nothing() -> None:
    found = search(RUN, CLUSTER, Layout(), Calibration(), 1e6)
    assert found.ranked == ()
    assert nearest_fitting(RUN, CLUSTER, Layout(), Calibration(), 1e6) is None


def test_nearest_layout_that_fits_is_near() -> None:
    wanted = Layout(pp_size=4, ep_size=4, schedule="1f1b")
    near = nearest_fitting(RUN, CLUSTER, wanted, Calibration(), 60e9)
    assert near == wanted  # itself, where it fits
    tight = nearest_fitting(RUN, CLUSTER, replace(wanted, pp_size=1, ep_size=1), Calibration(), 60e9)
    assert tight is not None
    assert memory_fault(tight, plan_step(RUN, CLUSTER, tight, Calibration()).memory, 62e9) is None


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"])
def test_quick_check_of_micro_batches_agrees_with_the_tables(schedule: str) -> None:
    for size in (2, 3, 4):
        for portions in (1, 3, 4, 6, 8, 9, 12):
            layout = Layout(pp_size=size, schedule=schedule)
            outcomes = []
            for attempt in (
                lambda layout=layout, portions=portions: check_micro_batches(layout, portions),
                lambda layout=layout, portions=portions: build_schedule(layout.schedule, layout.pp_size, portions),
            ):
                try:
                    attempt()
                    outcomes.append(True)
                except UsageError:
                    outcomes.append(False)
            assert outcomes[0] == outcomes[1], (schedule, size, portions)


def test_batch_that_does_not_divide_is_refused_with_its_sentence() -> None:
    run = load_recipe("v3_16b", ["schedule.batch_size={start = 4600, segments = []}", "train.batch_multiple=1"])
    with pytest.raises(UsageError, match="a step of 4600 sequences"):
        count_micro_batches(Layout(), run, CLUSTER, 4600)
    assert any(
        "a step of 4600 sequences" in r.reason for r in search(run, CLUSTER, Layout(), Calibration(), 60e9).refused
    )


@pytest.mark.slow
def test_layouts_whose_tables_would_be_too_large_are_refused_not_fatal() -> None:
    run = load_recipe("v3_16b", ["schedule.batch_size={start = 6400000, segments = []}", "train.batch_multiple=1"])
    found = search(run, CLUSTER, Layout(), Calibration(), 60e9)
    assert any("more than the" in refused.reason for refused in found.refused)
