"""The average of the weights: its rule, its copy, its place."""

from __future__ import annotations

import torch

from abyssal.train.average import WeightAverage


def test_average_follows_its_rule_and_begins_quickly() -> None:
    weights = {"a": torch.tensor([1.0, 2.0, 4.0])}
    average = WeightAverage(weights, decay=0.5)
    expected = weights["a"].clone()
    for step in range(1, 12):
        weights["a"] += 0.25
        average.update(weights, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights["a"]
    torch.testing.assert_close(average.tensors["a"], expected)


def test_average_is_fp32_on_the_cpu_and_a_copy() -> None:
    weights = {"a": torch.full((3, 2), 1.5, dtype=torch.float64)}
    average = WeightAverage(weights, decay=0.9)
    weights["a"].fill_(7.0)
    assert average.tensors["a"].dtype == torch.float32
    assert average.tensors["a"].unique().tolist() == [1.5]
    alias = average.tensors["a"]
    average.reset(weights)
    assert average.tensors["a"] is alias
    assert alias.unique().tolist() == [7.0]
