"""The bias moves against the load of the whole batch."""

from __future__ import annotations

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.model import Transformer, initialise
from abyssal.train.balancing import add_loads, max_violation, update_biases


def test_bias_rises_for_underloaded_and_falls_for_overloaded_experts_mtp_included(tiny_config: ModelConfig) -> None:
    model = initialise(Transformer(tiny_config), seed=1)
    loads = {1: torch.tensor([9, 3, 4, 4, 0, 4]), 3: torch.tensor([1, 1, 1, 1, 1, 7])}
    update_biases(model, loads, speed=0.25)
    update_biases(model, loads, speed=0.25)
    first = model.model.layers[1].mlp.gate.e_score_correction_bias
    mtp = model.model.layers[3].mlp.gate.e_score_correction_bias
    torch.testing.assert_close(first, torch.tensor([-0.5, 0.5, 0.0, 0.0, 0.5, 0.0]), rtol=0, atol=0)
    torch.testing.assert_close(mtp, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, -0.5]), rtol=0, atol=0)
    assert not model.model.layers[2].mlp.gate.e_score_correction_bias.any()


def test_loads_of_micro_batches_add_up_by_layer() -> None:
    total: dict[int, torch.Tensor] = {}
    add_loads(total, {1: torch.tensor([1, 2]), 2: torch.tensor([5, 0])})
    add_loads(total, {1: torch.tensor([3, 0]), 2: torch.tensor([1, 1])})
    assert {layer: load.tolist() for layer, load in total.items()} == {1: [4, 2], 2: [6, 1]}


def test_max_violation_is_the_mean_over_layers_of_the_largest_excess() -> None:
    assert max_violation({0: torch.tensor([4, 4, 4]), 1: torch.tensor([9, 0, 0])}) == pytest.approx(1.0)
    assert max_violation({}) == 0.0
