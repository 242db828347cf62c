"""Dense networks and DeepSeekMoE against eq. 12-20 in loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.model import Context, RouterStatistics
from abyssal.model.dispatcher import InFlight, LocalDispatcher
from abyssal.model.feed_forward import DenseFFN, MixtureOfExperts, Router
from abyssal.ops.experts import expert_ffn, segmented_expert_ffn

LENGTHS = (4, 1, 6)


def run(mlp: Any, hidden: Tensor, ctx: Context) -> Tensor:
    """All steps, one after another."""
    output, rows, origin = mlp.compute(hidden, mlp.dispatch(hidden, mlp.route(hidden, ctx)))
    return mlp.finish(output, mlp.combine(rows, origin))  # type: ignore[no-any-return]


def draw_hidden(seed: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, coefficients = (
        torch.randn(sum(LENGTHS), width, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    return hidden.requires_grad_(), coefficients


@pytest.mark.parametrize("seed", range(3), ids="seed{}".format)
def test_the_dense_network_equals_the_definition(seed: int, reference: Any, draw_config: Any, build: Any) -> None:
    config = draw_config(seed, first_k_dense_replace=1)
    mlp = build(config, seed).model.layers[0].mlp
    assert isinstance(mlp, DenseFFN)
    hidden, coefficients = draw_hidden(seed, config.hidden_size)
    matrices = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    assert matrices[0].shape == (config.intermediate_size, config.hidden_size)
    out = run(mlp, hidden, Context.packed(LENGTHS))
    expected = torch.stack([reference.swiglu_network(u, *matrices) for u in hidden])
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for actual, oracle in zip(
        torch.autograd.grad((out * coefficients).sum(), [hidden, *matrices]),
        torch.autograd.grad((expected * coefficients).sum(), [hidden, *matrices]),
        strict=True,
    ):
        torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", [expert_ffn, segmented_expert_ffn])
@pytest.mark.parametrize("offset", [0.0, -3.0], ids=["mixed", "all_negative"])
@pytest.mark.parametrize("balance_lengths", [None, (1, sum(LENGTHS) - 1)], ids=["as_attention", "apart"])
@pytest.mark.parametrize("seed", range(8), ids="seed{}".format)
def test_the_mixture_equals_the_definition(
    seed: int,
    balance_lengths: tuple[int, ...] | None,
    offset: float,
    kernel: Any,
    reference: Any,
    draw_config: Any,
    build: Any,
) -> None:
    """Routed and shared experts, the load, and the balance loss through its gradient."""
    config = draw_config(seed, first_k_dense_replace=0)
    mlp = build(config, seed).model.layers[0].mlp
    assert isinstance(mlp, MixtureOfExperts)
    mlp.experts.kernel = kernel
    mlp.gate.e_score_correction_bias += offset
    hidden, coefficients = draw_hidden(seed, config.hidden_size)
    weights = {**dict(mlp.named_parameters()), **dict(mlp.named_buffers())}
    statistics = RouterStatistics()
    alpha = 0.7
    sequences = balance_lengths or LENGTHS
    ctx = replace(
        Context.packed(LENGTHS),
        statistics=statistics,
        balance_weight=alpha / len(sequences),
        balance_lengths=balance_lengths,
    )
    out = run(mlp, hidden, ctx)
    pairs = [reference.mixture(u, weights, "", config) for u in hidden]
    expected = torch.stack([value for value, _ in pairs])
    losses = [reference.balance_loss(list(part), weights, "", config) for part in hidden.split(sequences)]
    mean = sum(losses) / len(losses)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert statistics.expert_load[0].tolist() == [
        sum(expert in chosen for _, chosen in pairs) for expert in range(config.n_routed_experts)
    ]
    torch.testing.assert_close(statistics.balance_loss[0], mean.detach(), rtol=1e-9, atol=1e-9)
    assert not statistics.balance_loss[0].requires_grad

    leaves = [hidden, *mlp.parameters()]
    gradients = torch.autograd.grad((out * coefficients).sum(), leaves)
    oracle = torch.autograd.grad((expected * coefficients).sum() + alpha * mean, leaves)
    for name, actual, gradient in zip(["hidden", *dict(mlp.named_parameters())], gradients, oracle, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_without_balance_weight_the_router_gets_the_gradient_of_the_output_alone(
    reference: Any, draw_config: Any, build: Any
) -> None:
    config = draw_config(3, first_k_dense_replace=0)
    mlp = build(config, 3).model.layers[0].mlp
    hidden, coefficients = draw_hidden(3, config.hidden_size)
    weights = {**dict(mlp.named_parameters()), **dict(mlp.named_buffers())}
    out = run(mlp, hidden, Context.packed(LENGTHS))
    expected = torch.stack([reference.mixture(u, weights, "", config)[0] for u in hidden])
    (actual,) = torch.autograd.grad((out * coefficients).sum(), mlp.gate.weight)
    (oracle,) = torch.autograd.grad((expected * coefficients).sum(), mlp.gate.weight)
    torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


def test_the_balance_bias_is_a_float32_buffer_without_gradient(draw_config: Any) -> None:
    config = draw_config(4, first_k_dense_replace=0)
    router = Router(config)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert router.e_score_correction_bias.dtype == torch.float32
    assert router.e_score_correction_bias.shape == (config.n_routed_experts,)
    assert "e_score_correction_bias" in router.state_dict()


def test_shared_experts_are_one_network_as_wide_as_all_of_them(draw_config: Any, build: Any) -> None:
    config = draw_config(5, first_k_dense_replace=0, n_shared_experts=3)
    shared = build(config, 5).model.layers[0].mlp.shared_experts
    assert shared.gate_proj.weight.shape == (3 * config.moe_intermediate_size, config.hidden_size)


def test_layers_are_dense_up_to_first_k_and_mixtures_after(draw_config: Any, build: Any) -> None:
    config = draw_config(6, first_k_dense_replace=2, num_nextn_predict_layers=2)
    kinds = [type(layer.mlp) for layer in build(config, 6).model.layers]
    assert kinds == [DenseFFN, DenseFFN, MixtureOfExperts, MixtureOfExperts, MixtureOfExperts]


def test_a_dispatcher_is_replaced_without_touching_the_experts(draw_config: Any, build: Any) -> None:
    """The seam of expert parallelism: another order of the rows inside, the same output."""
    config = draw_config(7, first_k_dense_replace=0)
    mlp = build(config, 7).model.layers[0].mlp
    hidden, _ = draw_hidden(7, config.hidden_size)
    expected = run(mlp, hidden, Context.packed(LENGTHS))

    class Backwards(LocalDispatcher):
        """Hands the tokens on in reverse order."""

        def start_dispatch(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> InFlight:
            return super().start_dispatch(hidden.flip(0), weights.flip(0), experts.flip(0))

        def finish_combine(self, in_flight: InFlight) -> Tensor:
            return super().finish_combine(in_flight).flip(0)

    mlp.dispatcher = Backwards(config.n_routed_experts, config.num_experts_per_tok)
    torch.testing.assert_close(run(mlp, hidden, Context.packed(LENGTHS)), expected, rtol=1e-12, atol=1e-12)


def test_balancing_bias_stays_fp32_when_the_model_is_cast_down(draw_config) -> None:
    router = Router(draw_config(3))
    values = torch.randn(router.e_score_correction_bias.shape)
    router.e_score_correction_bias.copy_(values)
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, values)
    assert router.double().e_score_correction_bias.dtype == torch.float64


def test_the_router_reads_nothing_back_from_its_device(draw_config: Any) -> None:
    """On the meta device there are no values: whoever reads one fails."""
    config = draw_config(8, first_k_dense_replace=0)
    with torch.device("meta"):
        mlp = MixtureOfExperts(config, 0, expert_ffn)
        hidden = torch.empty(sum(LENGTHS), config.hidden_size, requires_grad=True)
    statistics = RouterStatistics()
    ctx = replace(Context.packed(LENGTHS, device="meta"), statistics=statistics, balance_weight=0.1)
    weights, experts = mlp.route(hidden, ctx)
    assert weights.shape == experts.shape == (sum(LENGTHS), config.num_experts_per_tok)
    assert statistics.expert_load[0].shape == (config.n_routed_experts,)
    assert {statistics.expert_load[0].device.type, statistics.balance_loss[0].device.type} == {"meta"}
    (weights.sum() + mlp.gate.weight.sum()).backward()
