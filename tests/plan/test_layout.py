"""Layouts: what does not divide is refused with what would, and stages hold every block once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.config import ModelConfig, load_recipe
from abyssal.errors import UsageError
from abyssal.plan.hardware import packaged_chips, parse_cluster
from abyssal.plan.layout import PUBLISHED, Layout, assign_stages, check_layout, count_micro_batches, divisors

TIMES = {"layer": 1.0, "mtp": 1.3, "head": 1.7}


def model(**changes: int) -> ModelConfig:
    return load_recipe("v3_671b").model.model_copy(update=changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pp_size": 3}, "pp_size * tp_size * cp_size=3: must divide devices=2048; nearest: 2, 4"),
        ({"ep_size": 48}, "ep_size=48: must divide n_routed_experts=256; nearest: 32, 64"),
        ({"ep_size": 256}, "ep_size=256: must divide the devices of a stage=128; nearest: 128"),
        ({"tp_size": 16}, "tp_size=16: must divide node_size=8; nearest: 8"),
        ({"pp_size": 64, "ep_size": 32}, "pp_size=64: 64 stages, but the model has num_hidden_layers=61"),
        ({"micro_batch_size": 0}, "micro_batch_size=0: must be at least 1"),
        ({"cp_size": -2}, "cp_size=-2: must be at least 1"),
        ({"schedule": "dualpip"}, "nearest: dualpipe"),
        ({"precision": "fp16"}, "precision=fp16: must be one of fp8, bf16"),
        ({"recompute": "all"}, "recompute=all: must be one of published, none, full"),
    ],
)
def test_layout_that_cannot_be_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_layout(
            replace(PUBLISHED, **changes),  # type: ignore[arg-type]
            model(),
            parse_cluster("h800:2048", packaged_chips()),
        )
    assert sentence in str(caught.value)


def test_fp8_on_a_chip_without_it_is_refused() -> None:
    with pytest.raises(UsageError, match="a100 has no FP8; nearest: bf16"):
        check_layout(PUBLISHED, model(), parse_cluster("a100:2048", packaged_chips()))


def test_batch_that_does_not_divide_names_its_neighbours() -> None:
    run, cluster = load_recipe("v3_671b"), parse_cluster("h800:2048", packaged_chips())
    assert count_micro_batches(PUBLISHED, run, cluster, 15360) == 120
    with pytest.raises(UsageError, match=r"128 \* 1 = 128; nearest: 15360, 15488"):
        count_micro_batches(PUBLISHED, run, cluster, 15400)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"]),
    st.integers(1, 6),
    st.integers(12, 70),
    st.integers(0, 4),
    st.integers(0, 2),
)
def test_stages_hold_every_block_once_and_no_rank_two_layers_more(
    schedule: str, half: int, layers: int, dense: int, modules: int
) -> None:
    layout = Layout(pp_size=2 * half, schedule=schedule)
    config = model(num_hidden_layers=layers, first_k_dense_replace=dense, num_nextn_predict_layers=modules)
    if layout.num_stages > layers:
        return
    stages = assign_stages(layout, config, TIMES)
    assert len(stages) == layout.num_stages
    assert sum(stage.dense for stage in stages) == dense
    assert sum(stage.dense + stage.moe for stage in stages) == layers
    assert [stage.embedding for stage in stages] == [True] + [False] * (len(stages) - 1)
    assert [(s.heads, s.mtp) for s in stages] == [(0, 0)] * (len(stages) - 1) + [(1 + modules, modules)]
    first_moe = next((n for n, stage in enumerate(stages) if stage.moe), len(stages))
    assert all(stage.dense == 0 for stage in stages[first_moe + 1 :])  # dense layers come first
    last = modules * TIMES["mtp"] + (1 + modules) * TIMES["head"]
    held = layout.stages_of_ranks
    loads = [
        sum(stages[n].dense + stages[n].moe + (last if stages[n].heads else 0) for n in set(ranks)) for ranks in held
    ]
    free = [load for load, ranks in zip(loads, held, strict=True) if len(stages) - 1 not in ranks]
    assert max(free, default=0) - min(free, default=0) <= 1


def test_every_stage_of_the_published_layout_is_on_two_ranks() -> None:
    held = PUBLISHED.stages_of_ranks
    assert held[0] == [0, 15]
    assert held[3] == held[12] == [3, 12]
    assert sorted(stage for stages in held for stage in stages) == sorted([*range(16)] * 2)


@given(st.integers(1, 5000))
def test_divisors_are_all_and_in_order(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
