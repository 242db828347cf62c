"""The whole network against the loops of reference.py, and what holds for it as a whole."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from abyssal.config import ModelConfig, load_recipe
from abyssal.model import Context, RouterStatistics, Transformer, next_tokens
from abyssal.ops.kernels import Kernels, choose_kernels

FAST = choose_kernels(torch.device("cpu"), torch.float32, "train")

LENGTHS = (5, 1, 4)


@pytest.mark.parametrize("seed", range(12), ids="seed{}".format)
def test_the_network_equals_its_equations(
    seed: int, reference: Any, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    config = draw_config(seed)
    model = build(config, seed)
    tokens = draw_tokens(config, sum(LENGTHS), seed)
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(sum(LENGTHS), config.vocab_size, dtype=torch.float64, generator=generator)
    statistics = RouterStatistics()
    alpha = 0.3
    ctx = replace(Context.packed(LENGTHS), statistics=statistics, balance_weight=alpha / len(LENGTHS))
    logits = model.logits(model(tokens, ctx))
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad((logits * coefficients).sum(), list(parameters.values()))

    weights = {**parameters, **dict(model.named_buffers())}
    loads: dict[int, list[int]] = {}
    results = [reference.Result(part.tolist(), weights, config, loads) for part in tokens.split(LENGTHS)]
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    expected = torch.stack([head @ h for result in results for h in result.hidden])
    balance = sum(loss for result in results for loss in result.balance_losses) / len(LENGTHS)
    oracle = torch.autograd.grad((expected * coefficients).sum() + alpha * balance, list(parameters.values()))

    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for name, actual, gradient in zip(parameters, gradients, oracle, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
    assert {layer: load.tolist() for layer, load in statistics.expert_load.items()} == loads
    if loads:
        reported = sum(statistics.balance_loss.values())
        torch.testing.assert_close(reported, balance.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(20, 26), ids="seed{}".format)
def test_the_fast_versions_give_the_same_network(seed: int, draw_config: Any, build: Any, draw_tokens: Any) -> None:
    config = draw_config(seed, num_nextn_predict_layers=1)
    tokens = draw_tokens(config, sum(LENGTHS), seed)
    found = []
    for kernels in (Kernels(), FAST):
        model = build(config, seed, kernels=kernels)
        ctx = replace(Context.packed(LENGTHS), balance_weight=0.1)
        h = model(tokens, ctx)
        loss = kernels.cross_entropy(h, model.head_weight, tokens.flip(0))
        for k, (further, kept) in enumerate(model.predict_further(h, next_tokens(tokens, 1), ctx), start=1):
            loss = loss + k * kernels.cross_entropy(further, model.head_weight, tokens[kept])
        found.append([h, *torch.autograd.grad(loss, list(model.parameters()))])
    for name, plain, fast in zip(["hidden", *dict(model.named_parameters())], *found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kernels", [Kernels(), FAST], ids=["definitions", "fast"])
@pytest.mark.parametrize("seed", range(30, 34), ids="seed{}".format)
def test_packed_sequences_never_see_each_other(
    seed: int, kernels: Kernels, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    config = draw_config(seed, num_nextn_predict_layers=1)
    model = build(config, seed, kernels=kernels)
    lengths = (4, 3, 5)
    before = draw_tokens(config, sum(lengths), seed)
    after = before.clone()
    after[4:7] = (before[4:7] + 1) % config.vocab_size
    outputs = []
    for tokens in (before, after):
        ctx = Context.packed(lengths)
        h = model(tokens, ctx)
        ((further, kept),) = model.predict_further(h, next_tokens(tokens, 1), ctx)
        outputs.append((h, further, (kept >= 4) & (kept < 7)))
    (h_1, m_1, middle), (h_2, m_2, _) = outputs
    others = torch.cat((torch.arange(4), torch.arange(7, 12)))
    # the experts' products have other row counts, so the last bit may differ where the routing of the middle changed
    torch.testing.assert_close(h_1[others], h_2[others], rtol=0, atol=1e-13)
    torch.testing.assert_close(m_1[~middle], m_2[~middle], rtol=0, atol=1e-13)
    assert (h_1[4:7] - h_2[4:7]).abs().min() > 1e-6
    assert (m_1[middle] - m_2[middle]).abs().min() > 1e-6


@pytest.mark.parametrize("kernels", [Kernels(), FAST], ids=["definitions", "fast"])
def test_other_sequences_are_bit_equal_where_no_expert_is_shared(
    kernels: Kernels, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    config = draw_config(40, first_k_dense_replace=3)
    model = build(config, 40, kernels=kernels)
    tokens = draw_tokens(config, 12, 40)
    changed = tokens.clone()
    changed[4:7] = (tokens[4:7] + 1) % config.vocab_size
    a, b = (model(t, Context.packed((4, 3, 5))) for t in (tokens, changed))
    assert torch.equal(a[:4], b[:4])
    assert torch.equal(a[7:], b[7:])
    assert not torch.equal(a[4:7], b[4:7])


@pytest.mark.parametrize("kernels", [Kernels(), FAST], ids=["definitions", "fast"])
def test_no_gradient_crosses_sequences_nor_runs_from_the_future(
    kernels: Kernels, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    config = draw_config(41, vocab_size=40)
    model = build(config, 41, kernels=kernels)
    tokens = torch.randperm(40, generator=torch.Generator().manual_seed(41))[
        :9
    ]  # all different, so that a row of the embedding belongs to one position
    h = model(tokens, Context.packed((5, 4)))
    (gradient,) = torch.autograd.grad(h[6].square().sum(), model.model.embed_tokens.weight)
    reached = gradient[tokens].abs().sum(-1) > 0
    assert reached.tolist() == [False] * 5 + [True, True, False, False]


def test_a_pack_equals_its_sequences_alone(draw_config: Any, build: Any, draw_tokens: Any) -> None:
    config = draw_config(42)
    model = build(config, 42)
    tokens = draw_tokens(config, 9, 42)
    packed = model(tokens, Context.packed((2, 7)))
    alone = [model(part, Context.packed((len(part),))) for part in tokens.split((2, 7))]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(50, 53), ids="seed{}".format)
def test_load_sums_to_tokens_times_choices_in_every_moe_layer(
    seed: int, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    config = draw_config(seed, num_nextn_predict_layers=2, first_k_dense_replace=1)
    model = build(config, seed)
    statistics = RouterStatistics()
    ctx = replace(Context.packed(LENGTHS[::2]), statistics=statistics)
    tokens = draw_tokens(config, 9, seed)
    list(model.predict_further(model(tokens, ctx), next_tokens(tokens, 2), ctx))
    k = config.num_experts_per_tok
    assert {layer: int(load.sum()) for layer, load in statistics.expert_load.items()} == {
        1: 9 * k,
        2: 9 * k,
        3: 7 * k,  # each MTP depth has one token fewer a sequence
        4: 5 * k,
    }
    assert all(load.shape == (config.n_routed_experts,) for load in statistics.expert_load.values())
    assert not statistics.balance_loss  # not computed where its weight is 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_the_load_and_the_balance_loss_once(
    reentrant: bool, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    config = draw_config(54, first_k_dense_replace=1)
    model = build(config, 54)
    tokens = draw_tokens(config, 9, 54)
    found = []
    for recompute in (False, True):
        model.zero_grad()
        statistics = RouterStatistics()
        ctx = model.with_rotary(replace(Context.packed((5, 4)), statistics=statistics, balance_weight=0.5))
        h = model.embed(tokens)
        for layer in model.model.layers:
            h = checkpoint(layer, h, ctx, use_reentrant=reentrant) if recompute else layer(h, ctx)
        h.square().sum().backward()
        found.append((statistics, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (again, repeated) = found
    loads = [{layer: load.tolist() for layer, load in s.expert_load.items()} for s in (plain, again)]
    assert loads[0] == loads[1]
    assert int(again.expert_load[1].sum()) == 9 * config.num_experts_per_tok
    assert plain.balance_loss == again.balance_loss
    assert gradients.keys() == repeated.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, repeated[name]), name


def test_bfloat16_trains_float32_weights_close_to_float32(draw_config: Any, build: Any, draw_tokens: Any) -> None:
    config = draw_config(
        60, hidden_size=48, intermediate_size=40, moe_intermediate_size=24, q_lora_rank=20, kv_lora_rank=28, n_group=1,
        topk_group=1, n_routed_experts=4, num_experts_per_tok=4, num_nextn_predict_layers=1, rope_scaling=None,
    )  # fmt: skip
    # all experts of a layer are chosen, so that no near tie can flip
    tokens = draw_tokens(config, 24, 60)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build(config, 60, torch.float32, kernels=FAST)
        model.compute_dtype = dtype
        ctx = replace(Context.packed((10, 14)), balance_weight=0.01)
        h = model(tokens, ctx)
        ((further, kept),) = model.predict_further(h, next_tokens(tokens, 1), ctx)
        assert h.dtype == further.dtype == dtype
        loss = FAST.cross_entropy(h, model.head_weight, tokens.roll(-1))
        loss = loss + FAST.cross_entropy(further, model.head_weight, tokens[kept])
        loss.backward()
        assert loss.dtype == torch.float32
        gradients = {n: p.grad for n, p in model.named_parameters()}
        assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
        found.append((h.detach().float(), loss.detach(), gradients))
    (h, loss, gradients), (h_low, loss_low, gradients_low) = found
    # bf16 keeps 8 bits; four blocks of a dozen roundings each leave a few percent, the loss averages them out
    assert ((h - h_low).norm() / h.norm()).item() < 0.03
    assert abs(loss_low / loss - 1).item() < 0.01
    for name, gradient in gradients.items():
        assert ((gradient - gradients_low[name]).norm() / gradient.norm()).item() < 0.1, name


def test_float64_is_computed_from_float32_weights_too(draw_config: Any, build: Any, draw_tokens: Any) -> None:
    config = draw_config(61)
    tokens = draw_tokens(config, 6, 61)
    model = build(config, 61, torch.float32)
    model.compute_dtype = torch.float64
    h = model(tokens, Context.packed((6,)))
    assert h.dtype == torch.float64
    torch.testing.assert_close(h, model.double()(tokens, Context.packed((6,))), rtol=1e-12, atol=1e-12)


def test_tied_embeddings_have_no_head_of_their_own(draw_config: Any, build: Any, draw_tokens: Any) -> None:
    config = draw_config(62, tie_word_embeddings=True)
    model = build(config, 62)
    assert "lm_head.weight" not in dict(model.named_parameters())
    h = model(draw_tokens(config, 3, 62), Context.packed((3,)))
    torch.testing.assert_close(model.logits(h), h @ model.model.embed_tokens.weight.T, rtol=1e-12, atol=1e-12)


def count(model: Transformer, config: ModelConfig) -> tuple[int, int]:
    """Numbers in main layers and in MTP layers, the routers' biases counted as the release counts them."""
    main = further = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= config.num_hidden_layers:
            further += tensor.numel()
        else:
            main += tensor.numel()
    return main, further


def test_the_671b_recipe_builds_on_the_meta_device_with_the_released_number_of_parameters() -> None:
    config = load_recipe("v3_671b").model
    with torch.device("meta"):
        model = Transformer(config)
    assert all(p.is_meta for p in model.parameters())
    assert count(model, config) == (671_026_419_200, 11_610_068_224)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["model.layers.0.self_attn.q_b_proj.weight"] == (24576, 1536)
    assert shapes["model.layers.2.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["model.layers.2.mlp.gate_proj.weight"] == (18432, 7168)
    assert shapes["model.layers.3.mlp.experts.gate_up_proj"] == (256, 4096, 7168)
    assert shapes["model.layers.60.mlp.experts.down_proj"] == (256, 7168, 2048)
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert shapes["model.layers.61.mlp.gate.e_score_correction_bias"] == (256,)


def test_building_and_running_warns_of_nothing(draw_config: Any, build: Any, draw_tokens: Any) -> None:
    config = draw_config(63)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(config, 63)(draw_tokens(config, 4, 63), Context.packed((4,))).sum().backward()
