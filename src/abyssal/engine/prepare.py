"""What inference puts into the seams of a built model: attention over the cache, packed weights, a plain dispatcher.

Legend: T packed tokens, D hidden, K experts a token, M = T * K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.model import AbsorbedCore, Transformer
from abyssal.model.dispatcher import InFlight, LocalDispatcher
from abyssal.model.feed_forward import DenseFFN, StackedExperts
from abyssal.model.layers import Linear
from abyssal.ops.version import cast

#: Read as they are: by the absorbed attention core, and by whoever needs logits or a loss.
UNPACKED = ("kv_b_proj", "lm_head")


def prepare_for_inference(model: Transformer) -> None:
    """Do everything, in this order, that makes a model generate fast; in place, for good.

    Memory holds a packed weight and the stored one of a single module at most. `state_dict` no longer lists what was
    packed.
    """
    use_latent_cache(model)
    dispatch_plainly(model)
    pack_weights(model)


def use_latent_cache(model: Transformer) -> None:
    """Let the layers of `model` attend over the latent cache of their context; changes the model in place.

    The main layers share one cache; each MTP module is the only layer of a cache of its own.
    """
    main_layers = model.config.num_hidden_layers
    for number, layer in model.model.layers.items():
        place = number if number < main_layers else 0
        layer.self_attn.core = AbsorbedCore(model.config, place, model.kernels.latent_attention)


def dispatch_plainly(model: Transformer) -> None:
    """Bring rows to experts without the autograd functions that training needs, in place."""
    for module in model.modules():
        dispatcher = getattr(module, "dispatcher", None)
        if type(dispatcher) is LocalDispatcher:
            module.dispatcher = PlainDispatcher(dispatcher.num_experts, dispatcher.top_k)  # type: ignore[assignment]


@torch.no_grad()
def pack_weights(model: Transformer) -> None:
    """Lay the weights of `model` out for good, in place, where its kernels are versions that want it."""
    dtype, linear, experts = model.compute_dtype, model.kernels.linear, model.kernels.experts
    for name, module in model.named_modules():  # a network before its projections, two of which it takes
        if isinstance(module, StackedExperts) and experts.prepare is not cast:
            module.prepare_for_good(experts, dtype)
        elif linear.prepare is cast:
            continue
        elif isinstance(module, DenseFFN) or (
            isinstance(module, Linear) and module.weight is not None and name.rpartition(".")[2] not in UNPACKED
        ):
            module.prepare_for_good(linear, dtype)


class PlainDispatcher(LocalDispatcher):
    """Brings rows to experts that all live here; values only, no gradients."""

    def start_dispatch(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> InFlight:
        """Sort the (token, choice) pairs by expert."""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        places = torch.arange(len(order), device=order.device)
        rows = hidden.index_select(0, order // self.top_k)  # [M, D]
        row_weights = weights.flatten().index_select(0, order)  # [M]
        counts = torch.bincount(flat, minlength=self.num_experts)
        inverse = torch.empty_like(order).scatter_(0, order, places)
        return InFlight((rows, row_weights), handle=(counts, (order, inverse)))

    def start_combine(self, rows: Tensor, origin: tuple[Tensor, Tensor]) -> InFlight:
        """Sum each token's rows, in fp32 inside: [M, D] -> [T, D]."""
        rows = rows.index_select(0, origin[1])  # [M, D], the K of a token together
        return InFlight((rows.view(-1, self.top_k, rows.shape[-1]).sum(1),))
