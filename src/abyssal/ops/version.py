"""What a version of an operation is: a function, and where and for what it is the one to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Purpose = Literal["train", "decode"]
PURPOSES: tuple[Purpose, ...] = ("train", "decode")
WhyNot = Callable[[torch.device, torch.dtype], str | None]


def anywhere(device: torch.device, dtype: torch.dtype) -> None:
    """Say that nothing speaks against a version."""


def on_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say that a version is for a CPU."""
    return None if device.type == "cpu" else f"laid out for a CPU's caches, not measured on {device.type}"


def why_not_bfloat16_products() -> str | None:
    """Return why products of bf16 are no faster than those of fp32 on this CPU, or None."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return "this CPU lacks the instructions for bfloat16 products"
    return None


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in the dtype in which it is used."""
    return weight.to(dtype)


@dataclass(frozen=True)
class Version:
    """One way to compute an operation, called like its function. The definition is a version too.

    A choice by shape is inside the function; where it runs and what for is decided by `why_not` and `purposes`.
    """

    function: Callable[..., Tensor]
    #: What it is made for. For training it has gradients; without, it may have none.
    purposes: frozenset[Purpose] = frozenset(PURPOSES)
    #: Why it is not the one for a device and dtype: those, a missing package, a CPU without the instructions.
    why_not: WhyNot = anywhere
    #: From a weight as it is stored, and the compute dtype, to what the function takes; once a step or once for all.
    prepare: Callable[[Tensor, torch.dtype], Any] = cast
    #: Its error against float64 in a dtype, of values and gradients, is at most so many times the definition's there.
    error_bound: float = 2.0

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the operation."""
        return self.function(*args, **kwargs)

    def with_weight(self, weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return a product's function of the rows alone, with its weight prepared once."""
        function, prepared = self.function, self.prepare(weight, dtype)
        return lambda x: function(x, prepared)

    def why_not_for(self, purpose: Purpose, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why this version is passed over, or None."""
        if purpose not in self.purposes:
            return "has no gradients" if purpose == "train" else "made for training"
        return self.why_not(device, dtype)


def decode_only(function: Callable[..., Tensor], why_not: WhyNot = anywhere, **options: Any) -> Version:
    """Return a version without gradients."""
    return Version(function, frozenset({"decode"}), why_not, **options)


def train_only(function: Callable[..., Tensor], why_not: WhyNot = anywhere, **options: Any) -> Version:
    """Return a version whose speed is that of its gradients."""
    return Version(function, frozenset({"train"}), why_not, **options)
