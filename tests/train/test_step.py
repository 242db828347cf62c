"""One optimizer step: what it changes, and what it leaves alone when something is wrong."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from abyssal.config import ModelConfig, RunConfig, load_recipe
from abyssal.errors import TrainingError
from abyssal.model import Transformer, initialise
from abyssal.ops.kernels import choose_kernels
from abyssal.train.optimizer import Optimizers, build_optimizer, clip_gradients
from abyssal.train.step import train_step

FAST = choose_kernels(torch.device("cpu"), torch.float32, "train")


@pytest.fixture
def config(tiny_config: ModelConfig) -> RunConfig:
    demo = load_recipe("demo", ["train.tokens=4000", "train.sequence_length=12", "train.micro_batch_size=2"])
    return demo.model_copy(update={"model": tiny_config})


def build(config: RunConfig, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Optimizers]:
    model = initialise(Transformer(config.model, FAST, dtype), seed=2).to(dtype)
    return model, build_optimizer(model, config.optimizer)


def gradient(model: Transformer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_loss_falls_when_the_same_batch_comes_again(config: RunConfig) -> None:
    model, optimizer = build(config)
    windows = torch.randint(97, (4, 13))
    losses = [train_step(model, optimizer, windows, config, tokens_seen=400).loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5


def test_step_does_not_depend_on_the_size_of_micro_batches(config: RunConfig) -> None:
    """In float64: a sum in another order, which moves a token to another expert where two are equal in fp32."""
    windows = torch.randint(97, (5, 13))
    results, weights = [], []
    for size in (1, 5):
        model, optimizer = build(config, torch.float64)
        sized = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": size})})
        results.append(train_step(model, optimizer, windows, sized, tokens_seen=400))
        weights.append(model.lm_head.weight.detach().clone())
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-12)
    assert results[0].gradient_norm == pytest.approx(results[1].gradient_norm, rel=1e-9)
    assert results[0].expert_load == results[1].expert_load
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-9)


def test_load_counts_every_choice_once_mtp_module_included(config: RunConfig) -> None:
    model, optimizer = build(config)
    result = train_step(model, optimizer, torch.randint(97, (4, 13)), config, tokens_seen=400)
    assert {layer: sum(load) for layer, load in result.expert_load.items()} == {
        1: 4 * 12 * 2,
        2: 4 * 12 * 2,
        3: 4 * 11 * 2,
    }


def test_non_finite_gradient_leaves_weights_moments_and_biases(config: RunConfig) -> None:
    model, optimizer = build(config)
    windows = torch.randint(97, (4, 13))
    train_step(model, optimizer, windows, config, tokens_seen=400)
    before = copy.deepcopy((model.state_dict(), optimizer.tensors(dict(model.named_parameters()))))
    hook = model.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(TrainingError, match="not finite; this update was not applied"):
        train_step(model, optimizer, windows, config, tokens_seen=448)
    hook.remove()
    after = (model.state_dict(), optimizer.tensors(dict(model.named_parameters())))
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)


def test_norm_scales_do_not_decay_and_matrices_do(config: RunConfig) -> None:
    model, optimizer = build(config)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == {id(p) for p in model.parameters()}
    assert decay[id(model.model.norm.weight)] == 0.0
    assert decay[id(model.model.layers[1].mlp.experts.down_proj)] == config.optimizer.weight_decay


def test_clipping_bounds_the_joint_norm_and_returns_the_norm_before(config: RunConfig) -> None:
    model, _ = build(config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    expected = torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
    norm = clip_gradients(model, 0.5)
    after = torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    assert after.item() == pytest.approx(0.5, rel=1e-4)


def test_masked_step_does_not_depend_on_the_size_of_micro_batches(config: RunConfig) -> None:
    windows, lengths = torch.randint(97, (5, 13)), ((12,), (3, 9), (1, 1, 10), (6, 6), (12,))
    gradients = []
    for size in (1, 2, 5):
        model, optimizer = build(config, torch.float64)
        train = config.train.model_copy(update={"micro_batch_size": size})
        run = config.model_copy(update={"train": train})
        train_step(model, optimizer, windows, run, tokens_seen=400, lengths=lengths)
        gradients.append(gradient(model))
    model, optimizer = build(config, torch.float64)
    train_step(model, optimizer, windows, config, tokens_seen=400)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-9, atol=1e-12)
    assert (gradient(model) - gradients[0]).norm() > 0.01 * gradients[0].norm()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_belongs_to_one_optimizer_and_moves(config: RunConfig, name: str) -> None:
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"name": name})})
    model, optimizer = build(config)
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_step(model, optimizer, torch.randint(97, (4, 13)), config, tokens_seen=400)
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    by_muon = {n for n, state in optimizer.tensors(dict(model.named_parameters())).items() if "momentum" in state}
    assert not [n for n in by_muon if "norm" in n or "embed" in n or "lm_head" in n or n.endswith("gate.weight")]
    assert ("model.layers.1.mlp.experts.gate_up_proj" in by_muon) == (name == "muon")


def test_each_optimizer_multiplies_the_schedules_learning_rate_by_its_own_scale(config: RunConfig) -> None:
    scales = {"name": "muon", "muon_lr_scale": 0.25, "beside_muon_lr_scale": 3.0}
    model, optimizer = build(config.model_copy(update={"optimizer": config.optimizer.model_copy(update=scales)}))
    optimizer.step(0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.lm_head.weight)] == 1.5
    assert rates[id(model.model.layers[1].mlp.experts.down_proj)] == 0.125
    _, optimizer = build(config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"name": "adamw"})}))
    optimizer.step(0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_the_device_is_read_once_a_step(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of training or of the network reads a value before all are read together, nor reads the device again."""
    model, optimizer = build(config)
    reads: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: Any) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            if any(f"/abyssal/{package}/" in caller for package in ("train", "model")):
                reads.append(name)
            return original(self, *args)

        return read

    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    train_step(model, optimizer, torch.randint(97, (4, 13)), config, tokens_seen=400)
    assert reads[0] == "cpu"
    assert reads.count("cpu") == 1
