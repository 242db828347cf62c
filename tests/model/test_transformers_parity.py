"""The whole network against transformers' own DeepSeek-V3, in fp32, values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.model import Context, Transformer
from abyssal.ops.kernels import Kernels, choose_kernels

FAST = choose_kernels(torch.device("cpu"), torch.float32, "train")

transformers = pytest.importorskip("transformers", reason="the oracle of this test is an extra")

TOLERANCE = 1e-5
#: A choice closer than this may flip between two fp32 implementations.
MARGIN = 1e-4
#: Where fp32 alone takes transformers' gradients further than this from float64, 1e-5 would measure the rounding.
ROUNDING = 3e-6

Gradients = dict[str, Tensor]


@contextmanager
def watched_routers(model: Any) -> Iterator[list[Tensor]]:
    """Collect each router's biased affinities [T, E] in float64."""
    found: list[Tensor] = []

    def note(router: Any, _: Any, output: Any) -> None:
        found.append(output[0].detach().double().sigmoid() + router.e_score_correction_bias)

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    yield found
    for hook in hooks:
        hook.remove()


def smallest_margin(routed: list[Tensor], config: ModelConfig) -> float:
    """The smallest distance between what was chosen and what was not, among groups and among experts."""
    margins = [float("inf")]
    for biased in routed:
        grouped = biased.unflatten(-1, (config.n_group, -1))
        if config.topk_group < config.n_group:
            values, order = grouped.topk(2, -1).values.sum(-1).sort(-1, descending=True)
            margins.append(float((values[:, config.topk_group - 1] - values[:, config.topk_group]).min()))
            kept = torch.zeros_like(values, dtype=torch.bool).scatter(-1, order[:, : config.topk_group], True)
            grouped = grouped.masked_fill(~kept[..., None], float("-inf"))
        values = grouped.flatten(-2).sort(-1, descending=True).values
        if config.num_experts_per_tok < config.n_routed_experts:
            k = config.num_experts_per_tok
            margins.append(float((values[:, k - 1] - values[:, k]).min()))
    return min(margins)


def build_theirs(config: ModelConfig, ours: Transformer) -> Any:
    """Build transformers' model from our config.json's fields and load our weights into it, every name matching."""
    model = transformers.DeepseekV3ForCausalLM._from_config(
        transformers.DeepseekV3Config.from_dict(config.to_hf(dtype="float32")),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    names = dict(ours.state_dict())
    if config.tie_word_embeddings:
        names["lm_head.weight"] = names["model.embed_tokens.weight"]
    model.load_state_dict(names, strict=True)
    return model


def run_theirs(model: Any, tokens: Tensor, lengths: tuple[int, ...], outward: Tensor) -> tuple[Tensor, Gradients]:
    """Return logits and gradients, one sequence a call."""
    logits = torch.cat([model(input_ids=part[None]).logits[0] for part in tokens.split(lengths)])
    (logits * outward).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def run_ours(model: Transformer, tokens: Tensor, lengths: tuple[int, ...], outward: Tensor) -> tuple[Tensor, Gradients]:
    """Return logits and gradients, all sequences in one pack."""
    logits = model.logits(model(tokens, Context.packed(lengths)))
    (logits * outward).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst(actual: Gradients, expected: Gradients) -> tuple[float, str]:
    """The largest norm-relative error of a parameter's gradient, and the parameter's name."""
    assert actual.keys() == expected.keys()
    errors = {n: float((actual[n].double() - g.double()).norm() / g.double().norm()) for n, g in expected.items()}
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


@pytest.mark.parametrize("seed", range(24), ids="seed{}".format)
def test_logits_and_gradients_equal_those_of_transformers(
    seed: int, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    """Weights and tokens are drawn again where a router's choice is too close or fp32 is too coarse to compare."""
    config = draw_config(seed)
    lengths = (9, 2 + seed % 5, 14)
    for attempt in range(20):
        drawn = 1000 * attempt + seed
        ours, tokens = build(config, drawn, torch.float32), draw_tokens(config, sum(lengths), drawn)
        outward = torch.randn(len(tokens), config.vocab_size, generator=torch.Generator().manual_seed(drawn))
        theirs = build_theirs(config, ours)
        with watched_routers(theirs) as routed:
            expected, gradients = run_theirs(theirs, tokens, lengths, outward)
        exact = Transformer(config, compute_dtype=torch.float64).double()
        exact.load_state_dict(ours.state_dict())
        rounding, _ = worst(gradients, run_ours(exact, tokens, lengths, outward.double())[1])
        if smallest_margin(routed, config) >= MARGIN and rounding <= ROUNDING:
            break
    else:
        pytest.fail(f"seed {seed}: no comparable draw in 20; the last one is {rounding:.1e} off float64")

    for kernels in (Kernels(), FAST):
        model = Transformer(config, kernels)
        model.load_state_dict(ours.state_dict())
        logits, found = run_ours(model, tokens, lengths, outward)
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
        error, name = worst(found, gradients)
        assert error <= TOLERANCE, f"seed {drawn}: {name}: {error:.2e}"


def test_a_batch_of_equal_sequences_equals_the_pack(draw_config: Any, build: Any, draw_tokens: Any) -> None:
    config = draw_config(3)
    ours, tokens = build(config, 3, torch.float32), draw_tokens(config, 24, 3)
    theirs = build_theirs(config, ours)
    with torch.no_grad():
        expected = theirs(input_ids=tokens.view(3, 8)).logits.flatten(0, 1)
        logits = ours.logits(ours(tokens, Context.packed((8, 8, 8))))
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
