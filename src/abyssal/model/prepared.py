"""Weights made ready once for many products, in a whole model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from abyssal.model.feed_forward import StackedExperts
from abyssal.model.layers import Linear
from abyssal.model.transformer import Transformer
from abyssal.ops.linear import WeightGradients


def weighted_modules(model: nn.Module) -> Iterator[Linear | StackedExperts]:
    """Yield every module whose products read a weight that can be prepared."""
    return (module for module in model.modules() if isinstance(module, Linear | StackedExperts))


def prepare_weights(model: Transformer, deferred: WeightGradients | None = None) -> None:
    """Cast every weight of projections and experts to the compute dtype, for a step of many micro-batches.

    The casts are those of the weights as they are now, and cost their memory until `drop_prepared_weights`. With a
    store, backward passes return the gradients of inputs and leave those of the weights in it.
    """
    for module in weighted_modules(model):
        module.prepare(model.compute_dtype, deferred)


def drop_prepared_weights(model: nn.Module) -> None:
    """Cast weights on use again, in place."""
    for module in weighted_modules(model):
        module.prepared = None
