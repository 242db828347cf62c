"""A rank fills its part of the initial weights with what one process would have there."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from abyssal.config import ModelConfig
from abyssal.model import Transformer, initialise
from abyssal.ranks.placements import local_shard
from ranks import run_ranks
from ranks.spread import LAYOUTS, SHAPE, spread

pytestmark = pytest.mark.slow


def whole(tensor: Tensor) -> Tensor:
    """The values of a tensor on all ranks, put together by torch."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill_in_every_layout(seed: int) -> set[str]:
    """Check the initial weights of each layout on this rank, and return which kinds of shards were met."""
    config, kinds = ModelConfig(**SHAPE), set()
    expected = initialise(Transformer(config), seed).state_dict()
    for name, layout in LAYOUTS.items():
        model = spread(Transformer(config), layout)
        for tensor in (*model.parameters(), *model.buffers()):
            local_shard(tensor)[0].fill_(torch.nan)
        initialise(model, seed, local_shard)
        for key, tensor in model.state_dict().items():
            assert torch.equal(whole(tensor), expected[key]), (name, key)
            kinds |= {"empty"} if local_shard(tensor)[0].numel() == 0 else set()
            kinds |= {repr(tensor.placements)} if isinstance(tensor, DTensor) else {"plain"}
    return kinds


def test_initial_weights_are_those_of_one_process_in_every_layout() -> None:
    seed = random.randrange(2**31)
    kinds = set().union(*run_ranks(4, fill_in_every_layout, seed))
    assert {"empty", "plain", "(Replicate(), Shard(dim=1), Shard(dim=0))"} <= kinds


def count_draws(layout: tuple[int, int, int]) -> int:
    """Return how many matrices a rank draws."""
    model, draws = spread(Transformer(ModelConfig(**SHAPE)), layout), 0
    module: Any = sys.modules["abyssal.model.initialise"]  # its name in the package is the function's
    draw = module.normal

    def counted(*arguments: Any) -> Tensor:
        nonlocal draws
        draws += 1
        return draw(*arguments)

    module.normal = counted
    initialise(model, 1, local_shard)
    return draws


def test_experts_of_other_ranks_and_rows_of_empty_shards_are_not_drawn() -> None:
    parameters = list(Transformer(ModelConfig(**SHAPE)).parameters())
    stacks = sum(parameter.dim() == 3 for parameter in parameters)
    matrices = sum(parameter.dim() == 2 for parameter in parameters)
    empty = sum(parameter.dim() == 2 and parameter.shape[0] == 9 for parameter in parameters)
    assert stacks == 4
    assert empty == 3
    expected = [matrices + stacks * 2] * 3 + [matrices - empty + stacks * 2]
    assert run_ranks(4, count_draws, LAYOUTS["ep 4"]) == expected
