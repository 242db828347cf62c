"""Weights prepared for a step, in a whole model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.model import Context, Transformer, drop_prepared_weights, next_tokens, prepare_weights
from abyssal.model.prepared import weighted_modules
from abyssal.ops.kernels import Kernels
from abyssal.ops.linear import WeightGradients

LENGTHS = (5, 3)


def micro_batch(model: Transformer, tokens: Tensor) -> None:
    """One forward and one backward pass with everything that has a weight."""
    ctx = replace(Context.packed(LENGTHS), balance_weight=0.3)
    h = model(tokens, ctx)
    ((further, kept),) = model.predict_further(h, next_tokens(tokens, 1), ctx)
    loss = model.logits(h).float().logsumexp(-1).sum() + model.logits(further).float().square().sum()
    (loss + h[kept].float().pow(3).sum()).backward()


@pytest.mark.parametrize("deferring", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_step_with_prepared_weights_gives_the_same_gradients_to_the_bit(
    tied: bool, dtype: torch.dtype, deferring: bool, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    config = draw_config(2, num_nextn_predict_layers=1, first_k_dense_replace=1, tie_word_embeddings=tied)
    tokens = draw_tokens(config, 2 * sum(LENGTHS), 2).split(sum(LENGTHS))
    gradients = []
    for prepared in (False, True):
        model = build(config, 2, torch.promote_types(dtype, torch.float32))
        model.compute_dtype = dtype
        deferred = WeightGradients()
        if prepared:
            prepare_weights(model, deferred if deferring else None)
        for part in tokens:
            micro_batch(model, part)
            assert (len(deferred) > 0) == (prepared and deferring)
            deferred.take().run()
        drop_prepared_weights(model)
        assert all(module.prepared is None for module in weighted_modules(model))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name
        assert expected.dtype == torch.promote_types(dtype, torch.float32)


def test_until_they_run_only_what_is_no_product_with_a_weight_has_its_gradient(
    draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    config = draw_config(2, num_nextn_predict_layers=1, first_k_dense_replace=1, tie_word_embeddings=False)
    model = build(config, 2, kernels=Kernels())
    deferred = WeightGradients()
    prepare_weights(model, deferred)
    micro_batch(model, draw_tokens(config, sum(LENGTHS), 2))
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {
        name for name, _ in model.named_parameters() if name.endswith(("_proj.weight", "_proj", "_with_mqa.weight"))
    }
    deferred.run()
    assert all(parameter.grad is not None for parameter in model.parameters())
