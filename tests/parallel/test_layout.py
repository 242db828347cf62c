"""Ranks, experts and shares: every one exactly once, and refusals that name what would fit."""

from __future__ import annotations

import itertools
import random

import pytest

from abyssal.config import ModelConfig, load_recipe
from abyssal.config.parallel import ParallelConfig
from abyssal.errors import UsageError
from abyssal.parallel.layout import RankLayout, describe, lay_out


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return load_recipe("v3_671b").model


def test_every_coordinate_is_one_rank_and_experts_are_spread_over_neighbours() -> None:
    draw = random.Random(random.randrange(2**32))
    sizes = [draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 4), draw.choice((1, 2, 4))]
    layout = RankLayout(*sizes, node_size=2)
    found = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert found == list(itertools.product(*map(range, sizes)))  # the last axis is the fastest
    num_experts = 8 * layout.ep_size
    for first in range(0, layout.world_size, layout.ep_size):
        held = [expert for rank in range(first, first + layout.ep_size) for expert in layout.experts(rank, num_experts)]
        assert held == list(range(num_experts))
    shares = [layout.dp_rank(rank) for rank in range(layout.world_size)]
    assert shares == list(range(layout.dp_size)) * layout.pp_size


def test_the_published_layout_fits_2048_ranks(model: ModelConfig) -> None:
    layout = lay_out(ParallelConfig(pp_size=16, ep_size=64), model, 2048, 8)
    assert (layout.sizes, layout.dp_size) == ((16, 1, 2, 64), 128)
    text = describe(layout, model, most_rows=4)
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["0", "1", "...", "2046", "2047"]


@pytest.mark.parametrize(
    ("fields", "world_size", "sentence"),
    [
        ({"pp_size": 16, "ep_size": 64}, 2000, "nearest: 1024, 2048"),
        ({"ep_size": 24}, 24, "must divide model.n_routed_experts=256; nearest: 16, 32"),
        ({"dp_shard_size": 4, "ep_size": 2}, 8, "needs 4; start 4 ranks"),
        ({"dp_replicate_size": 3}, 4, "nearest: 3, 6"),
        ({}, 11, "nearest: 8, 16"),
        ({"ep_size": 8, "dispatch": "node_limited", "node_size": 3}, 8, "must divide"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    model: ModelConfig, fields: dict[str, object], world_size: int, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        lay_out(ParallelConfig.model_validate(fields), model, world_size, 8)
