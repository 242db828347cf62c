"""Multi-head latent attention against eq. 1-11 in loops; the absorbed core against the naive one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.model import AbsorbedCore, Context, NaiveCore, Transformer
from abyssal.ops.attention import attention, sdpa_attention

YARN = {"factor": 7.0, "original_max_position_embeddings": 30, "mscale": 1.0, "mscale_all_dim": 1.0}


@dataclass
class ListCache:
    """The least a cache can be: per layer and sequence the rows so far. It notes what was handed to it."""

    lengths: tuple[int, ...]
    rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def append(self, layer: int, c_kv: Tensor, k_rope: Tensor) -> list[Tensor]:
        everything = []
        for n, new in enumerate(zip(c_kv.split(self.lengths), k_rope.split(self.lengths), strict=True)):
            old = self.rows.get((layer, n))
            rows = new if old is None else (torch.cat((old[0], new[0])), torch.cat((old[1], new[1])))
            self.rows[layer, n] = rows
            everything.append(torch.cat(rows, -1))
        return everything


def absorb(model: Transformer) -> None:
    for n, layer in enumerate(model.model.layers):
        layer.self_attn.core = AbsorbedCore(model.config, n)  # type: ignore[union-attr]


@pytest.mark.parametrize("kernel", [attention, sdpa_attention])
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("q_lora_rank", [None, 6])
@pytest.mark.parametrize("seed", range(3), ids="seed{}".format)
def test_attention_equals_its_equations(
    seed: int, q_lora_rank: int | None, scaling: Any, kernel: Any, reference: Any, draw_config: Any, build: Any
) -> None:
    config = draw_config(seed, q_lora_rank=q_lora_rank, rope_scaling=scaling)
    model = build(config, seed)
    layer = model.model.layers[0].self_attn
    layer.core = NaiveCore(config, kernel)
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(9, config.hidden_size, dtype=torch.float64, generator=generator, requires_grad=True)
    coefficients = torch.randn(9, config.hidden_size, dtype=torch.float64, generator=generator)
    ctx = model.with_rotary(Context.packed((6, 3)))
    weights = dict(layer.named_parameters())
    leaves = [h, *weights.values()]
    out = layer(h, ctx)
    expected = torch.stack(
        [row for part in h.split((6, 3)) for row in reference.attention(list(part), weights, "", config)]
    )
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad((out * coefficients).sum(), leaves)
    oracle = torch.autograd.grad((expected * coefficients).sum(), leaves)
    for name, actual, gradient in zip(["h", *weights], gradients, oracle, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_the_weights_have_the_released_shapes(draw_config: Any, build: Any) -> None:
    config: ModelConfig = draw_config(1, q_lora_rank=6)
    heads, nope, rope, value = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    shapes = {n: tuple(p.shape) for n, p in build(config, 1).model.layers[0].self_attn.named_parameters()}
    assert shapes == {
        "q_a_proj.weight": (6, config.hidden_size),
        "q_a_layernorm.weight": (6,),
        "q_b_proj.weight": (heads * (nope + rope), 6),
        "kv_a_proj_with_mqa.weight": (config.kv_lora_rank + rope, config.hidden_size),
        "kv_a_layernorm.weight": (config.kv_lora_rank,),
        "kv_b_proj.weight": (heads * (nope + value), config.kv_lora_rank),
        "o_proj.weight": (config.hidden_size, heads * value),
    }


def test_the_norms_of_the_latents_have_the_eps_of_the_release(draw_config: Any, build: Any) -> None:
    layer = build(draw_config(1, q_lora_rank=6, rms_norm_eps=0.5), 1).model.layers[0]
    assert layer.self_attn.kv_a_layernorm.eps == layer.self_attn.q_a_layernorm.eps == 1e-6
    assert layer.input_layernorm.eps == layer.post_attention_layernorm.eps == 0.5


@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("seed", range(4), ids="seed{}".format)
def test_absorbed_attention_equals_naive(
    seed: int, scaling: Any, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    config = draw_config(seed, rope_scaling=scaling)
    model = build(config, seed)
    lengths = (1, 7, 3, 2)
    tokens = draw_tokens(config, sum(lengths), seed)
    naive = model(tokens, Context.packed(lengths))
    absorb(model)
    torch.testing.assert_close(model(tokens, Context.packed(lengths)), naive, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("chunks", [(1,) * 8, (5, 1, 1, 1), (3, 4, 1), (8,)], ids=str)
def test_decoding_over_a_cache_equals_the_whole_sequence(
    chunks: tuple[int, ...], scaling: Any, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    """Three sequences advance together by `chunks` tokens, the first starting 4 tokens earlier."""
    config = draw_config(7, rope_scaling=scaling)
    model = build(config, 7)
    ahead, total = 4, sum(chunks)
    lengths = (ahead + total, total, total)
    parts = draw_tokens(config, sum(lengths), 7).split(lengths)
    naive = model(torch.cat(parts), Context.packed(lengths)).split(lengths)

    absorb(model)
    cache = ListCache((ahead, 0, 0))
    first = Context((ahead,), torch.arange(ahead), cache=ListCache((ahead,)))
    found: list[list[Tensor]] = [[model(parts[0][:ahead], first)], [], []]
    cache.rows = dict(first.cache.rows)  # type: ignore[union-attr]
    done = 0
    for chunk in chunks:
        starts = (ahead + done, done, done)
        cache.lengths = (chunk,) * 3
        ctx = Context(
            lengths=cache.lengths,
            positions=torch.cat([torch.arange(start, start + chunk) for start in starts]),
            cache=cache,
        )
        tokens = torch.cat([part[start : start + chunk] for part, start in zip(parts, starts, strict=True)])
        for rows, new in zip(found, model(tokens, ctx).split(chunk), strict=True):
            rows.append(new)
        done += chunk
    for rows, expected in zip(found, naive, strict=True):
        torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-9, atol=1e-9)


def test_the_cache_holds_the_normed_latent_and_the_rotated_key_and_nothing_else(
    reference: Any, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    config = draw_config(8, rope_scaling=YARN)
    model = build(config, 8)
    absorb(model)
    tokens = draw_tokens(config, 5, 8)
    cache = ListCache((5,))
    model(tokens, Context((5,), torch.arange(5), cache=cache))
    assert sorted(cache.rows) == [(layer, 0) for layer in range(config.num_hidden_layers)]
    c_kv, k_rope = cache.rows[0, 0]
    assert c_kv.shape == (5, config.kv_lora_rank)
    assert k_rope.shape == (5, config.qk_rope_head_dim)
    layer = model.model.layers[0]
    weights = dict(layer.named_parameters())
    for t, x in enumerate(model.embed(tokens)):
        h = reference.rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
        both = weights["self_attn.kv_a_proj_with_mqa.weight"] @ h
        latent = reference.rms_norm(both[: config.kv_lora_rank], weights["self_attn.kv_a_layernorm.weight"], 1e-6)
        torch.testing.assert_close(c_kv[t], latent, rtol=1e-9, atol=1e-9)
        key = reference.rotate(both[config.kv_lora_rank :], t, config)
        torch.testing.assert_close(k_rope[t], key, rtol=1e-9, atol=1e-9)


def test_absorbed_gradients_equal_naive(draw_config: Any, build: Any, draw_tokens: Any) -> None:
    config = draw_config(9)
    model = build(config, 9)
    tokens = draw_tokens(config, 8, 9)
    ctx = replace(Context.packed((5, 3)), balance_weight=0.1)
    parameters = [parameter for name, parameter in model.named_parameters() if name != "lm_head.weight"]
    found = []
    for _ in range(2):
        found.append(torch.autograd.grad(model(tokens, ctx).pow(3).sum(), parameters))
        absorb(model)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
