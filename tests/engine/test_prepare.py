"""A model prepared for inference says what it said before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.engine import prepare_for_inference
from abyssal.engine.paged_cache import PagedLatentCache, TokenRange
from abyssal.engine.prepare import UNPACKED, PlainDispatcher, pack_weights
from abyssal.model import AbsorbedCore, Context, RouterStatistics, Transformer
from abyssal.model.feed_forward import DenseFFN, StackedExperts
from abyssal.model.layers import Linear
from abyssal.ops.kernels import choose_kernels, passed_over
from abyssal.ops.packed import why_not_packed

Build = Callable[..., Transformer]
CPU = torch.device("cpu")
PASSES = [(5, 3, 1), (1, 1, 1), (1, 0, 1), (0, 2, 1), (1, 1, 1)]  # new tokens of three sequences


class Sequences:
    """Sequences side by side in one cache, a page of 12 tokens each."""

    def __init__(self, config: ModelConfig, count: int, dtype: torch.dtype) -> None:
        self._cache = PagedLatentCache(config, count, 12, dtype, "cpu")
        self._lengths = [0] * count

    def begin(self, new: tuple[int, ...]) -> Context:
        ranges = [TokenRange([n], self._lengths[n], count) for n, count in enumerate(new) if count]
        self._lengths = [length + count for length, count in zip(self._lengths, new, strict=True)]
        return self._cache.begin(ranges)


def run_passes(model: Transformer) -> list[torch.Tensor]:
    """Return the logits of every pass, over one cache."""
    cache = Sequences(model.config, 3, model.compute_dtype)
    generator = torch.Generator().manual_seed(8)
    found = []
    with torch.inference_mode():
        for new in PASSES:
            tokens = torch.randint(model.config.vocab_size, (sum(new),), generator=generator)
            found.append(model.logits(model(tokens, cache.begin(new))))
    return found


def prepared(model: Transformer) -> Transformer:
    model.kernels = choose_kernels(CPU, model.compute_dtype, "decode")
    prepare_for_inference(model)
    return model


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str
)
def test_a_prepared_model_gives_the_same_logits(
    variant: ModelConfig, build: Build, dtype: torch.dtype, tolerance: float
) -> None:
    """Against the definitions in float64, with the weights rounded to the precision under test.

    In bf16 a near tie may send a token to another expert, so a share of the logits is looked at.
    """
    exact = build(variant, dtype=dtype).double()
    exact.compute_dtype = torch.float64
    for found, expected in zip(run_passes(prepared(build(variant, dtype=dtype))), run_passes(exact), strict=True):
        assert found.dtype == dtype
        error = (found.double() - expected).abs() / expected.abs().max()
        assert error.quantile(0.8 if dtype == torch.bfloat16 else 1.0) < tolerance


def test_sequences_over_one_cache_do_not_see_each_other(tiny_config: ModelConfig, build: Build) -> None:
    model = prepared(build(tiny_config))
    together = run_passes(model)
    generator = torch.Generator().manual_seed(8)
    tokens = [torch.randint(tiny_config.vocab_size, (sum(new),), generator=generator).split(new) for new in PASSES]
    for sequence in range(3):
        cache = Sequences(tiny_config, 1, torch.float64)
        for new, parts, logits in zip(PASSES, tokens, together, strict=True):
            if new[sequence]:
                alone = model.logits(model(parts[sequence], cache.begin((new[sequence],))))
                torch.testing.assert_close(logits.split(new)[sequence], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(bool(why_not_packed(CPU, torch.float32)), reason="weights are not packed here")
def test_everything_that_can_be_packed_is(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config, dtype=torch.float32)
    model.kernels = choose_kernels(CPU, torch.float32, "decode")
    pack_weights(model)
    weighted = dict(model.named_modules())
    left = [name for name, module in weighted.items() if isinstance(module, Linear) and module.weight is not None]
    assert {name.rpartition(".")[2] for name in left} == set(UNPACKED)
    for name, module in weighted.items():
        if isinstance(module, DenseFFN):
            assert module.gate_up is not None, name
        elif isinstance(module, StackedExperts):
            assert module.prepared is not None, name
        elif isinstance(module, Linear):
            assert (module.prepared is None) == (name.rpartition(".")[2] in {*UNPACKED, "gate_proj", "up_proj"}), name
    names = "\n".join(model.state_dict())
    assert "kv_b_proj" in names
    assert "o_proj" not in names
    assert "experts" not in names


def test_where_nothing_can_be_packed_the_rest_is_prepared(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config, cached=False)
    before = set(model.state_dict())
    assert passed_over(CPU, torch.float64, "decode")["linear"] == {
        "packed_linear": "the matrix library packs float32 and bfloat16 only"
    }
    prepared(model)
    assert set(model.state_dict()) == before
    for layer in model.model.layers:
        assert isinstance(layer.self_attn.core, AbsorbedCore)
        if hasattr(layer.mlp, "dispatcher"):
            assert isinstance(layer.mlp.dispatcher, PlainDispatcher)


def test_a_prepared_model_still_counts_its_load(tiny_config: ModelConfig, build: Build) -> None:
    tokens = torch.arange(9) * 5
    counted = []
    for model in (build(tiny_config), prepared(build(tiny_config))):
        statistics = RouterStatistics()
        packed = Context.packed([6, 3])
        model(tokens, Context(packed.lengths, packed.positions, statistics=statistics))
        counted.append({layer: load.tolist() for layer, load in statistics.expert_load.items()})
    assert counted[0] == counted[1]
    assert all(sum(load) == 9 * tiny_config.num_experts_per_tok for load in counted[0].values())
