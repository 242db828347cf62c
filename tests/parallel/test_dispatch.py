"""Experts across ranks against all experts in one process, over the tokens of all ranks together, in float64.

A process group of each size runs all of its cases in turn; tokens, choices and experts are drawn anew at each run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from abyssal.config.parallel import ParallelConfig
from abyssal.model.feed_forward import LocalDispatcher
from abyssal.ops.experts import expert_ffn, segmented_expert_ffn
from abyssal.parallel.dispatch import ExpertParallelDispatcher, expert_parallel_dispatcher
from abyssal.parallel.layout import RankLayout
from ranks import run_ranks

WIDTH, INNER = 11, 7
TOP_K = 3


@dataclass(frozen=True)
class Case:
    """Tokens of each rank and how they choose; everything else follows from the seed."""

    name: str
    seed: int
    tokens: tuple[int, ...]
    experts: int  # on each rank
    choose: str = "any"

    @property
    def num_experts(self) -> int:
        return self.experts * len(self.tokens)

    def draw_choices(self, tokens: int, generator: torch.Generator) -> Tensor:
        """Choose TOP_K experts a token, [T, K], all different: of all, or of the first ones only."""
        experts = {"any": self.num_experts, "first": TOP_K}[self.choose]
        return torch.rand(tokens, experts, generator=generator).argsort(1)[:, :TOP_K]

    def draw(self) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
        """Return what each rank starts from, and the experts' weights."""
        generator = torch.Generator().manual_seed(self.seed)
        randn = partial(torch.randn, generator=generator, dtype=torch.float64)
        inputs = [
            {
                "hidden": randn(tokens, WIDTH),
                "weights": randn(tokens, TOP_K),
                "experts": self.draw_choices(tokens, generator),
                "coefficients": randn(tokens, WIDTH),
            }
            for tokens in self.tokens
        ]
        return inputs, randn(self.num_experts, 2 * INNER, WIDTH), randn(self.num_experts, WIDTH, INNER)


def cases(ranks: int) -> list[Case]:
    draw = random.SystemRandom().randrange
    seeds = [draw(2**31) for _ in range(5)]
    unequal = tuple(3 * rank + 2 for rank in reversed(range(ranks)))
    empty = list(unequal)
    empty[draw(ranks)] = 0
    alone = [0] * ranks
    alone[draw(ranks)] = 5
    return [
        Case("unequal", seeds[0], unequal, 3),
        Case("an empty rank", seeds[1], tuple(empty), 4),
        Case("one rank has tokens", seeds[2], tuple(alone), 3),
        Case("all tokens to the first experts", seeds[3], unequal, 3, "first"),
        Case("no tokens", seeds[4], (0,) * ranks, 2),
    ]


def results(inputs: dict[str, Tensor], output: Tensor, gate_up: Tensor, down: Tensor) -> dict[str, Any]:
    """Differentiate sum(output * coefficients); everything as numpy."""
    (output * inputs["coefficients"]).sum().backward()
    named = {
        "output": output.detach(),
        "hidden": inputs["hidden"].grad,
        "weights": inputs["weights"].grad,
        "gate_up": gate_up.grad,
        "down": down.grad,
    }
    return {name: value.numpy() for name, value in named.items() if value is not None}


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def in_one_process(case: Case) -> dict[str, Any]:
    """The seam's own dispatcher on the tokens of all ranks together."""
    parts, gate_up, down = case.draw()
    inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    inputs["hidden"], inputs["weights"], gate_up, down = leaves(inputs["hidden"], inputs["weights"], gate_up, down)
    dispatcher = LocalDispatcher(case.num_experts, TOP_K)
    state = dispatcher.dispatch(inputs["hidden"], inputs["weights"], inputs["experts"])
    state["rows"] = expert_ffn(state["rows"], state.pop("row_weights"), state["counts"], gate_up, down)
    return results(inputs, dispatcher.combine(state), gate_up, down)


Run = Callable[[ExpertParallelDispatcher, dict[str, Tensor], Callable[..., Tensor]], Tensor]


def composed(dispatcher: ExpertParallelDispatcher, inputs: dict[str, Tensor], experts: Callable[..., Tensor]) -> Tensor:
    state = dispatcher.dispatch(inputs["hidden"], inputs["weights"], inputs["experts"])
    state["rows"] = experts(state["rows"], state.pop("row_weights"), state["counts"])
    return dispatcher.combine(state)


def on_a_rank(case: Case, dispatcher: ExpertParallelDispatcher, rank: int, run: Run, kernel: Any) -> dict[str, Any]:
    parts, gate_up, down = case.draw()
    here = slice(rank * case.experts, (rank + 1) * case.experts)
    inputs = parts[rank]
    inputs["hidden"], inputs["weights"], gate_up, down = leaves(
        inputs["hidden"], inputs["weights"], gate_up[here], down[here]
    )
    output = run(dispatcher, inputs, lambda *rows: kernel(*rows, gate_up, down))
    return results(inputs, output, gate_up, down)


WAYS = [
    ("direct", "direct", composed, expert_ffn),
    ("segmented", "direct", composed, segmented_expert_ffn),
    ("node_limited", "node_limited", composed, expert_ffn),
]


def run_all(drawn: list[Case], node_size: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Run every case on this rank, in every way."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layout = RankLayout(1, 1, 1, ranks, node_size)
    found = {}
    for case in drawn:
        for name, kind, run, kernel in WAYS:
            config = ParallelConfig(ep_size=ranks, dispatch=kind)
            dispatcher = expert_parallel_dispatcher(config, layout, dist.group.WORLD, case.num_experts)
            found[case.name, name] = on_a_rank(case, dispatcher, rank, run, kernel)
    return found


def assert_close(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert found.shape == expected.shape, what
    error = np.linalg.norm(found - expected)
    assert error <= 1e-12 * np.linalg.norm(expected), f"{what}: off by {error}"


@pytest.mark.parametrize(("ranks", "node_size"), [(2, 1), (4, 2), (4, 4), (4, 1)], ids=str)
def test_outputs_and_gradients_equal_those_of_one_process(ranks: int, node_size: int) -> None:
    drawn = cases(ranks)
    found = run_ranks(ranks, run_all, drawn, node_size)
    for case in drawn:
        expected = in_one_process(case)
        for way, *_ in WAYS:
            for name, value in expected.items():
                whole = np.concatenate([part[case.name, way][name] for part in found])
                assert_close(whole, value, f"{case}, {way}: {name}")
