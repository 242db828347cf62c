"""Initial weights are a function of seed, name and expert, of nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.model import Stage, Transformer, initialise
from abyssal.model.initialise import generator_for, normal


@pytest.fixture
def config(draw_config: Any) -> ModelConfig:
    return draw_config(  # type: ignore[no-any-return]
        1, num_nextn_predict_layers=2, first_k_dense_replace=1, tie_word_embeddings=False, initializer_range=0.006
    )


def numbers(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_weights(config: ModelConfig) -> None:
    assert equal(numbers(initialise(Transformer(config), 3)), numbers(initialise(Transformer(config), 3)))


def test_another_seed_changes_every_matrix(config: ModelConfig) -> None:
    a, b = (numbers(initialise(Transformer(config), seed)) for seed in (3, 4))
    for name in a:
        assert torch.equal(a[name], b[name]) == (a[name].dim() == 1), name


def test_the_global_generator_is_neither_read_nor_moved(config: ModelConfig) -> None:
    torch.manual_seed(0)
    a = numbers(initialise(Transformer(config), 3))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    b = numbers(initialise(Transformer(config), 3))
    assert equal(a, b)
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_no_two_matrices_and_no_two_experts_start_alike(config: ModelConfig) -> None:
    drawn = []
    for tensor in numbers(initialise(Transformer(config), 3)).values():
        drawn += [] if tensor.dim() == 1 else [tensor] if tensor.dim() == 2 else list(tensor)
    first = [tuple(tensor.flatten()[:4].tolist()) for tensor in drawn]
    assert len(set(first)) == len(first)


def test_the_order_in_which_parameters_are_visited_does_not_matter(config: ModelConfig) -> None:
    expected = numbers(initialise(Transformer(config), 3))
    model = Transformer(config)
    for module in model.modules():  # turn every module's parameters and children around
        for table in (module._parameters, module._modules):
            for name in list(table)[::-1]:
                table[name] = table.pop(name)  # type: ignore[assignment]
    names = list(dict(model.named_parameters()))
    assert names != list(dict(Transformer(config).named_parameters()))
    assert sorted(names) == sorted(dict(Transformer(config).named_parameters()))
    assert equal(numbers(initialise(model, 3)), expected)


def test_a_model_with_fewer_parts_gives_those_parts_the_same_weights(config: ModelConfig) -> None:
    """Without MTP, and with other layers left out as a pipeline stage would, the rest does not change."""
    whole = numbers(initialise(Transformer(config), 3))
    without = numbers(initialise(Transformer(config.model_copy(update={"num_nextn_predict_layers": 0})), 3))
    assert 0 < len(without) < len(whole)
    assert equal(without, {name: whole[name] for name in without})
    stages = (
        Stage(range(1), has_embedding=True),
        Stage(range(1, 2)),
        Stage(range(2, 3), has_head=True),
        Stage(range(2, 3), has_head=True, has_mtp=True),
        Stage(range(0)),
    )
    for stage in stages:
        part = numbers(initialise(Transformer(config, stage=stage), 3))
        assert equal(part, {name: whole[name] for name in part}), stage


def test_a_slice_of_experts_equals_the_slice_of_the_whole(config: ModelConfig) -> None:
    whole = numbers(initialise(Transformer(config), 3))
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts.down_proj"):
        stack = whole[name]
        for index in range(1, config.n_routed_experts - 1):
            alone = normal(stack[index].shape, config.initializer_range, generator_for(3, name, index))
            assert torch.equal(alone, stack[index])


def test_more_experts_leave_the_first_ones_as_they_were(config: ModelConfig) -> None:
    more = config.model_copy(update={"n_routed_experts": 2 * config.n_routed_experts})
    a, b = (initialise(Transformer(c), 3).state_dict() for c in (config, more))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(a[name], b[name][: config.n_routed_experts])


def test_bfloat16_weights_are_the_float32_weights_rounded(config: ModelConfig) -> None:
    exact = numbers(initialise(Transformer(config), 3))
    rounded = dict(initialise(Transformer(config).to(torch.bfloat16), 3).named_parameters())
    for name, parameter in rounded.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact[name].bfloat16()), name


def test_a_model_built_on_the_meta_device_starts_the_same(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))  # whatever memory held
    assert equal(numbers(initialise(model, 3)), numbers(initialise(Transformer(config), 3)))


def test_norms_start_at_one_biases_at_zero_and_matrices_with_the_deviation_of_the_recipe(draw_config: Any) -> None:
    config = draw_config(
        2, hidden_size=128, vocab_size=500, intermediate_size=96, moe_intermediate_size=64, num_nextn_predict_layers=1,
        initializer_range=0.006, first_k_dense_replace=1,
    )  # fmt: skip
    for name, tensor in numbers(initialise(Transformer(config), 5)).items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, torch.zeros_like(tensor)), name
        elif tensor.dim() == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            n = tensor.numel()
            # four standard errors of deviation and mean
            assert abs(tensor.std().item() / 0.006 - 1) < 4 / (2 * n) ** 0.5, name
            assert abs(tensor.mean().item()) < 4 * 0.006 / n**0.5, name


def test_every_number_is_written(config: ModelConfig) -> None:
    model = Transformer(config)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    assert all(t.isfinite().all() for t in numbers(initialise(model, 3)).values())
