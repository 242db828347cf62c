"""Multi-token prediction against eq. 21-25, position by position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.model import Context, RouterStatistics, next_tokens
from abyssal.model.mtp import MTPBlock
from abyssal.ops.kernels import Kernels, choose_kernels

FAST = choose_kernels(torch.device("cpu"), torch.float32, "train")

LENGTHS = (6, 4, 5)


def starts(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[:n]) for n in range(len(lengths))]


@pytest.mark.parametrize("kernels", [Kernels(), FAST], ids=["definitions", "fast"])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(3), ids="seed{}".format)
def test_mtp_equals_its_equations(
    seed: int, depth: int, kernels: Kernels, reference: Any, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    """Hidden states, the positions they belong to, and every gradient of L_MTP (eq. 24, 25)."""
    config = draw_config(seed, num_nextn_predict_layers=depth, num_hidden_layers=2)
    model = build(config, seed, kernels=kernels)
    following = draw_tokens(config, sum(LENGTHS) + len(LENGTHS), seed).split([n + 1 for n in LENGTHS])
    tokens = torch.cat([part[:-1] for part in following])
    targets = torch.cat([part[1:] for part in following])  # the next token of every position
    statistics = RouterStatistics()
    ctx = replace(Context.packed(LENGTHS), statistics=statistics)
    h = model(tokens, ctx)
    found = list(model.predict_further(h, next_tokens(tokens, depth), ctx))

    parameters = dict(model.named_parameters())
    weights = {**parameters, **dict(model.named_buffers())}
    loads: dict[int, list[int]] = {}
    results = [reference.Result(part[:-1].tolist(), weights, config, loads) for part in following]
    assert len(found) == depth
    for k, (hidden, kept) in enumerate(found, start=1):
        # eq. 21: i = 1 .. T-k of every sequence
        assert kept.tolist() == [a + i for a, n in zip(starts(LENGTHS), LENGTHS, strict=True) for i in range(n - k)]
        expected = torch.stack([row for result in results for row in result.depths[k - 1]])
        torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9, msg=lambda t, k=k: f"depth {k}: {t}")
    assert {layer: load.tolist() for layer, load in statistics.expert_load.items()} == loads
    if depth == 0:
        return

    per_token = torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in LENGTHS])
    loss = torch.zeros((), dtype=torch.float64)
    for k, (hidden, kept) in enumerate(found, start=1):
        log_p = model.logits(hidden).log_softmax(-1).gather(1, targets[kept + k][:, None])[:, 0]
        loss = loss - (log_p * per_token[kept]).sum() / depth
    oracle = sum(
        reference.mtp_loss(result.depths, part.tolist(), weights, config)
        for result, part in zip(results, following, strict=True)
    )
    torch.testing.assert_close(loss, oracle, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    expected_gradients = torch.autograd.grad(oracle, list(parameters.values()))
    for name, actual, gradient in zip(parameters, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("kernels", [Kernels(), FAST], ids=["definitions", "fast"])
@pytest.mark.parametrize("lengths", [(1, 5, 2, 3), (1, 2)], ids=str)
def test_sequences_shorter_than_the_depth_take_no_part(
    lengths: tuple[int, ...], kernels: Kernels, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    config = draw_config(9, num_nextn_predict_layers=2)
    model = build(config, 9, kernels=kernels)
    statistics = RouterStatistics()
    ctx = replace(Context.packed(lengths), statistics=statistics, balance_weight=0.1)
    tokens = draw_tokens(config, sum(lengths), 9)
    found = list(model.predict_further(model(tokens, ctx), next_tokens(tokens, 2), ctx))
    for k, (hidden, kept) in enumerate(found, start=1):
        assert len(hidden) == len(kept) == sum(max(n - k, 0) for n in lengths)
        # the longest sequence alone gives the same
        longest, start = max(lengths), sum(lengths[: lengths.index(max(lengths))])
        part = tokens[start : start + longest]
        alone = Context.packed((longest,))
        expected = list(model.predict_further(model(part, alone), next_tokens(part, 2), alone))[k - 1][0]
        mine = hidden[(kept >= start) & (kept < start + longest)]
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    assert all(loss.isfinite() for loss in statistics.balance_loss.values())
    sum(hidden.sum() for hidden, _ in found).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def first_module(draw_config: Any, build: Any) -> tuple[Any, MTPBlock, Tensor, Tensor, Context]:
    config = draw_config(4, num_nextn_predict_layers=1)
    model = build(config, 4)
    generator = torch.Generator().manual_seed(4)
    h, embedding = (torch.randn(5, config.hidden_size, dtype=torch.float64, generator=generator) for _ in range(2))
    (module,) = model.mtp_modules
    return model, module, h, embedding, model.with_rotary(Context.packed((5,)))


def test_the_embedding_comes_first_in_the_concatenation(reference: Any, draw_config: Any, build: Any) -> None:
    """The order of the released weights: [enorm(embedding); hnorm(hidden)], each with its own norm."""
    model, module, h, embedding, ctx = first_module(draw_config, build)
    seen: list[Tensor] = []
    module.eh_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module.predict(h, embedding, ctx)
    width, eps = model.config.hidden_size, model.config.rms_norm_eps
    (joined,) = seen
    for t in range(5):
        left = reference.rms_norm(embedding[t], module.enorm.weight, eps)
        right = reference.rms_norm(h[t], module.hnorm.weight, eps)
        torch.testing.assert_close(joined[t, :width], left, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(joined[t, width:], right, rtol=1e-12, atol=1e-12)


def test_the_output_is_normed_by_the_modules_own_final_norm(draw_config: Any, build: Any) -> None:
    _, module, h, embedding, ctx = first_module(draw_config, build)
    with torch.no_grad():
        before = module.predict(h, embedding, ctx)
        module.shared_head.norm.weight.mul_(3.0)
        torch.testing.assert_close(module.predict(h, embedding, ctx), 3 * before, rtol=1e-12, atol=1e-12)


def test_modules_are_the_layers_after_the_main_ones_under_the_released_names(draw_config: Any, build: Any) -> None:
    config = draw_config(5, num_nextn_predict_layers=2, first_k_dense_replace=1, q_lora_rank=None)
    model = build(config, 5)
    assert model.mtp_modules == [model.model.layers[3], model.model.layers[4]]
    own = {
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
    }
    main = {n.removeprefix("model.layers.2.") for n in model.state_dict() if n.startswith("model.layers.2.")}
    for layer in (3, 4):
        prefix = f"model.layers.{layer}."
        names = {n.removeprefix(prefix) for n in model.state_dict() if n.startswith(prefix)}
        assert names == main | own  # embedding and head are the main model's: no copies


def test_mtp_leaves_the_main_model_as_it_is(draw_config: Any, build: Any, draw_tokens: Any) -> None:
    config = draw_config(6, num_nextn_predict_layers=2)
    model = build(config, 6)
    tokens = draw_tokens(config, 9, 6)
    with_mtp = model(tokens, Context.packed((9,)))
    for module in model.mtp_modules:
        for parameter in module.parameters():
            parameter.data.fill_(float("nan"))
    assert torch.equal(model(tokens, Context.packed((9,))), with_mtp)


def test_shared_embedding_and_head_learn_from_both_sides(draw_config: Any, build: Any, draw_tokens: Any) -> None:
    """A token that only MTP reads (the last one) gets a gradient through the shared embedding."""
    config = draw_config(7, num_nextn_predict_layers=1, vocab_size=40, tie_word_embeddings=False)
    model = build(config, 7)
    tokens = torch.arange(10, 16)
    ctx = Context.packed((6,))
    ((hidden, kept),) = model.predict_further(model(tokens, ctx), next_tokens(tokens, 1), ctx)
    assert kept.tolist() == [0, 1, 2, 3, 4]
    (gradient,) = torch.autograd.grad(hidden.square().sum(), model.model.embed_tokens.weight)
    assert (gradient.abs().sum(-1) > 0).nonzero().flatten().tolist() == [10, 11, 12, 13, 14, 15]


def test_a_depth_sees_no_token_beyond_the_one_it_is_given(draw_config: Any, build: Any) -> None:
    config = draw_config(8, num_nextn_predict_layers=2, vocab_size=40, tie_word_embeddings=False)
    model = build(config, 8)
    tokens = torch.arange(20, 27)
    ctx = Context.packed((7,))
    for k, (hidden, _) in enumerate(model.predict_further(model(tokens, ctx), next_tokens(tokens, 2), ctx), start=1):
        (gradient,) = torch.autograd.grad(hidden[2].pow(3).sum(), model.model.embed_tokens.weight, retain_graph=True)
        reached = (gradient.abs().sum(-1) > 0).nonzero().flatten().tolist()
        assert reached == list(range(20, 20 + 2 + k + 1))  # tokens 0 .. 2 and the k after them
