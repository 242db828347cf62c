"""Tokens of several ranks that chose experts at random, and what one process with all of them and all experts makes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abyssal.model.dispatcher import Dispatcher, ExpertRows, LocalDispatcher
from abyssal.ops.experts import expert_ffn

INNER = 7


@dataclass(frozen=True)
class Choices:
    """How many tokens each rank has and how they choose; everything else follows from the seed."""

    name: str
    seed: int
    tokens: tuple[int, ...]  # of each rank
    experts: int  # on each rank
    top_k: int = 3
    width: int = 11
    among: tuple[int, ...] = ()  # the only experts that are chosen; none named: all may be
    dtype: torch.dtype = torch.float64

    @property
    def num_experts(self) -> int:
        return self.experts * len(self.tokens)

    def draw_experts(self, tokens: int, generator: torch.Generator) -> Tensor:
        """Return different experts for each token: [T, K]."""
        among = torch.tensor(self.among or range(self.num_experts))
        return among[torch.rand(tokens, len(among), generator=generator).argsort(1)[:, : self.top_k]]

    def draw(self) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
        """Return what each rank starts from, and the experts' weights; routing weights never below fp32."""
        generator = torch.Generator().manual_seed(self.seed)
        randn = partial(torch.randn, generator=generator, dtype=torch.float64)
        wide = torch.promote_types(self.dtype, torch.float32)
        inputs = [
            {
                "hidden": randn(tokens, self.width).to(self.dtype),
                "weights": randn(tokens, self.top_k).to(wide),
                "experts": self.draw_experts(tokens, generator),
                "coefficients": randn(tokens, self.width).to(self.dtype),
            }
            for tokens in self.tokens
        ]
        gate_up, down = randn(self.num_experts, 2 * INNER, self.width), randn(self.num_experts, self.width, INNER)
        return inputs, gate_up.to(self.dtype), down.to(self.dtype)

    def of_rank(self, rank: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return what a rank starts from, its experts' weights with it, everything a leaf."""
        inputs, gate_up, down = self.draw()
        here = slice(rank * self.experts, (rank + 1) * self.experts)
        return as_leaves(inputs[rank]), *(stack[here].clone().requires_grad_() for stack in (gate_up, down))

    def of_all(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the same of all ranks together."""
        parts, gate_up, down = self.draw()
        inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return as_leaves(inputs), gate_up.requires_grad_(), down.requires_grad_()


def as_leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weights")}


def draw_cases(ranks: int, **changed: Any) -> list[Choices]:
    """Draw seeds for every kind of case."""
    draw = random.randrange
    unequal = tuple(3 * rank + 2 for rank in reversed(range(ranks)))
    empty = draw(ranks)
    alone = draw(ranks)
    kinds: list[tuple[str, tuple[int, ...], int, dict[str, Any]]] = [
        ("unequal", unequal, 3, {}),
        ("an empty rank", tuple(0 if rank == empty else n for rank, n in enumerate(unequal)), 4, {}),
        ("one rank has tokens", tuple(5 * (rank == alone) for rank in range(ranks)), 3, {}),
        ("all to one expert", unequal, 2, {"among": (draw(2 * ranks),), "top_k": 1}),
        ("all to three experts", unequal, 3, {"among": (0, 2, 3 * ranks - 1)}),
        ("no tokens", (0,) * ranks, 2, {}),
    ]
    return [Choices(name, draw(2**31), tokens, n, **{**kind, **changed}) for name, tokens, n, kind in kinds]


def differentiated(inputs: dict[str, Tensor], output: Tensor, gate_up: Tensor, down: Tensor) -> dict[str, np.ndarray]:
    """Return the output and the gradients of sum(output * coefficients)."""
    (output * inputs["coefficients"]).sum().backward()
    return numbers(inputs, output, gate_up, down)


def numbers(inputs: dict[str, Tensor], output: Tensor, gate_up: Tensor, down: Tensor) -> dict[str, np.ndarray]:
    """Return the output and the gradients that were computed, as doubles."""
    leaves = {"hidden": inputs["hidden"], "weights": inputs["weights"], "gate_up": gate_up, "down": down}
    found = {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    assert all(value is not None for value in found.values()), found
    return {name: value.double().numpy() for name, value in found.items() if value is not None}  # bf16 has no numpy


def composed(dispatcher: Dispatcher, inputs: dict[str, Tensor], experts: Callable[[ExpertRows], Tensor]) -> Tensor:
    """Bring tokens to their experts and back, each start followed by its finish."""
    in_flight = dispatcher.start_dispatch(inputs["hidden"], inputs["weights"], inputs["experts"])
    received = dispatcher.finish_dispatch(in_flight)
    return dispatcher.finish_combine(dispatcher.start_combine(experts(received), received.origin))


def unchanged(rows: Tensor) -> Tensor:
    return rows


def in_one_process(
    case: Choices,
    kernel: Any = expert_ffn,
    sent: Callable[[Tensor], Tensor] = unchanged,
    returned: Callable[[Tensor], Tensor] = unchanged,
) -> dict[str, np.ndarray]:
    """Return what the seam's own dispatcher makes of all tokens, after `sent` and before `returned`."""
    inputs, gate_up, down = case.of_all()
    dispatcher = LocalDispatcher(case.num_experts, case.top_k)
    output = composed(
        dispatcher, inputs | {"hidden": sent(inputs["hidden"])}, lambda rows: kernel(*rows[:3], gate_up, down)
    )
    return differentiated(inputs, returned(output), gate_up, down)


def assert_equal_to_one_process(
    parts: list[dict[str, np.ndarray]], expected: dict[str, np.ndarray], what: str, tolerance: float = 1e-12
) -> None:
    """Hold the ranks' results, put together, against those of one process, by norm."""
    for name, value in expected.items():
        whole = np.concatenate([part[name] for part in parts])
        assert whole.shape == value.shape, f"{what}: {name}"
        error = np.linalg.norm(whole - value)
        assert error <= tolerance * np.linalg.norm(value), f"{what}: {name} is off by {error}"
