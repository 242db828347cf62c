"""Rotary frequencies and YaRN against the published numbers and the loops of reference.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from abyssal.config import ModelConfig, load_recipe
from abyssal.model.rope import rotary_frequencies, rotary_tables


@pytest.fixture(scope="module")
def released() -> ModelConfig:
    """The released model: YaRN by 40 from 4096 tokens."""
    yarn = {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    fields = load_recipe("v3_671b").model.model_dump()
    return ModelConfig.parse({**fields, "rope_scaling": yarn, "max_position_embeddings": 163840}, "released")


@pytest.mark.parametrize("seed", range(10), ids="seed{}".format)
def test_frequencies_equal_the_definition(seed: int, reference: Any, draw_config: Any) -> None:
    config = draw_config(seed, qk_rope_head_dim=2 * (seed + 1))
    expected = torch.tensor(reference.frequencies(config), dtype=torch.float64)
    torch.testing.assert_close(rotary_frequencies(config), expected, rtol=1e-12, atol=0)


def test_without_scaling_frequencies_fall_from_one(released: ModelConfig) -> None:
    plain = rotary_frequencies(load_recipe("v3_671b").model)
    assert plain.shape == (32,)
    assert plain[0] == 1.0
    assert plain[31].item() == pytest.approx(10000 ** (-62 / 64), rel=1e-12)


def test_yarn_keeps_10_pairs_slows_9_by_40_and_blends_between(released: ModelConfig) -> None:
    """The bounds for 64 rotary dims and 4096 tokens are low = 10 and high = 23."""
    ratio = rotary_frequencies(load_recipe("v3_671b").model) / rotary_frequencies(released)
    torch.testing.assert_close(ratio[:11], torch.ones(11, dtype=torch.float64))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 40.0, dtype=torch.float64))
    for j in range(10, 24):
        ramp = (j - 10) / 13
        assert 1 / ratio[j].item() == pytest.approx(ramp / 40 + 1 - ramp, rel=1e-12)


def test_the_softmax_scale_carries_m_squared(released: ModelConfig) -> None:
    assert load_recipe("v3_671b").model.softmax_scale == pytest.approx(0.0721688, abs=5e-8)
    assert released.softmax_scale == pytest.approx(0.1352338, abs=5e-8)
    assert released.softmax_scale * math.sqrt(192) == pytest.approx(1.8738542, abs=5e-8)


def test_the_packaged_long_context_recipe_has_the_released_yarn(released: ModelConfig) -> None:
    config = load_recipe("v3_671b_128k").model
    assert config.rope_scaling == released.rope_scaling
    assert torch.equal(rotary_frequencies(config), rotary_frequencies(released))


def test_the_amplitude_is_one_where_both_mscales_are_equal(released: ModelConfig) -> None:
    cos, sin = rotary_tables(released, torch.arange(50), torch.float64)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(50, 32, dtype=torch.float64))


@pytest.mark.parametrize(
    ("mscale", "all_dim", "amplitude", "m"),
    [(1.0, 0.0, 0.1 * math.log(8) + 1, 1.0), (0.7, 1.3, (0.07 * math.log(8) + 1) / (0.13 * math.log(8) + 1), None)],
)
def test_mscale_stretches_the_tables_and_mscale_all_dim_the_softmax(
    mscale: float, all_dim: float, amplitude: float, m: float | None, draw_config: Any
) -> None:
    yarn = {"factor": 8.0, "original_max_position_embeddings": 50, "mscale": mscale, "mscale_all_dim": all_dim}
    config = draw_config(0, rope_scaling=yarn)
    cos, sin = rotary_tables(config, torch.arange(9), torch.float64)
    torch.testing.assert_close((cos.square() + sin.square()).sqrt(), torch.full_like(cos, amplitude))
    m = 0.1 * all_dim * math.log(8) + 1 if m is None else m
    assert config.softmax_scale * math.sqrt(config.qk_head_dim) == pytest.approx(m**2, rel=1e-12)


def test_a_factor_of_one_is_no_scaling_at_all(draw_config: Any) -> None:
    yarn = {"factor": 1.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
    plain, scaled = draw_config(2, rope_scaling=None), draw_config(2, rope_scaling=yarn)
    torch.testing.assert_close(rotary_frequencies(plain), rotary_frequencies(scaled), rtol=1e-15, atol=0)
    assert plain.softmax_scale == scaled.softmax_scale


def test_angles_far_out_are_rounded_once(released: ModelConfig) -> None:
    position = 163_839
    cos, _ = rotary_tables(released, torch.tensor([position]), torch.float32)
    for j, frequency in enumerate(rotary_frequencies(released).tolist()):
        assert cos[0, j].item() == pytest.approx(math.cos(position * frequency), abs=1e-7)
