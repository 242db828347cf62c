"""Experts across ranks against all experts in one process, over the tokens of all ranks together, in float64.

A process group of each size runs all of its cases in turn; tokens, choices and experts are drawn anew at each run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from abyssal.config.parallel import ParallelConfig
from abyssal.ops.experts import expert_ffn, segmented_expert_ffn
from abyssal.parallel.dispatch import ExpertParallelDispatcher, expert_parallel_dispatcher
from abyssal.parallel.layout import RankLayout
from ranks import run_ranks
from ranks.choices import (
    Choices,
    assert_equal_to_one_process,
    composed,
    differentiated,
    draw_cases,
    in_one_process,
    numbers,
)
from ranks.cut import CutChain, Gradients

DISPATCH = ("direct", "node_limited")


def dispatcher_for(case: Choices, dispatch: str, node_size: int) -> ExpertParallelDispatcher:
    ranks = dist.get_world_size()
    config = ParallelConfig.model_validate({"ep_size": ranks, "dispatch": dispatch})
    return expert_parallel_dispatcher(config, RankLayout(1, 1, 1, ranks, node_size), dist.group.WORLD, case.num_experts)


def run_composed(drawn: list[Choices], node_size: int) -> dict[tuple[str, ...], dict[str, np.ndarray]]:
    dist.init_process_group("gloo")
    found = {}
    for case in drawn:
        for dispatch in DISPATCH:
            for kernel in (expert_ffn, segmented_expert_ffn):
                dispatcher = dispatcher_for(case, dispatch, node_size)
                inputs, *stacks = case.of_rank(dist.get_rank())
                output = composed(dispatcher, inputs, lambda rows: kernel(*rows[:3], *stacks))  # noqa: B023
                found[case.name, dispatch, kernel.__name__] = differentiated(inputs, output, *stacks)
    return found


@pytest.mark.parametrize(("ranks", "node_size"), [(2, 1), (4, 2), (4, 4), (4, 1)], ids=str)
def test_outputs_and_gradients_equal_those_of_one_process(ranks: int, node_size: int) -> None:
    drawn = draw_cases(ranks)
    found = run_ranks(ranks, run_composed, drawn, node_size)
    for case in drawn:
        expected = in_one_process(case)
        for key in [key for key in found[0] if key[0] == case.name]:
            assert_equal_to_one_process([part[key] for part in found], expected, f"{case}, {key}")


def steps_of(
    dispatcher: ExpertParallelDispatcher, experts: Tensor, stacks: list[Tensor]
) -> dict[str, Callable[[Any], Any]]:
    """The five steps of a feed-forward network, with a residual that goes past all of them."""
    return {
        "start_dispatch": lambda s: (s[0], dispatcher.start_dispatch(*s[1:], experts)),
        "finish_dispatch": lambda s: (s[0], dispatcher.finish_dispatch(s[1])),
        "compute": lambda s: (s[0], expert_ffn(*s[1][:3], *stacks), s[1].origin),
        "start_combine": lambda s: (s[0], dispatcher.start_combine(*s[1:])),
        "finish_combine": lambda s: s[0] + dispatcher.finish_combine(s[1]),
    }


def run_cut(pair: tuple[Choices, Choices], node_size: int) -> dict[str, tuple[list[Any], list[Any]]]:
    """Interleave the steps of two cases, both in flight at once; return their results and residuals' gradients."""
    dist.init_process_group("gloo")
    found = {}
    for dispatch in DISPATCH:
        dispatcher = dispatcher_for(pair[0], dispatch, node_size)
        drawn = [case.of_rank(dist.get_rank()) for case in pair]
        chains, grads = [], list[Gradients]()
        for inputs, *stacks in drawn:
            steps = steps_of(dispatcher, inputs["experts"], stacks)
            state = torch.zeros_like(inputs["hidden"]), inputs["hidden"], inputs["weights"]
            chains.append(CutChain(steps, list(steps)[1:], state))
            grads.append([inputs["coefficients"]])
        for _ in chains[0].pieces:
            for chain in chains:
                chain.forward()
        for _ in chains[0].pieces:
            for number in (1, 0):  # in another order than forward
                grads[number] = chains[number].backward(grads[number])
        results = []
        for (inputs, *stacks), chain, (_, d_hidden, d_weights) in zip(drawn, chains, grads, strict=True):
            inputs["hidden"].grad, inputs["weights"].grad = d_hidden, d_weights
            results.append(numbers(inputs, chain.state, *stacks))
        found[dispatch] = results, [d_residual.numpy() for d_residual, *_ in grads]  # type: ignore[union-attr]
    return found


def test_starts_and_finishes_run_apart_with_autograd_cut_equal_one_process() -> None:
    pair = draw_cases(4)[0], draw_cases(4)[4]
    found = run_ranks(4, run_cut, pair, 2)
    for dispatch in DISPATCH:
        for number, case in enumerate(pair):
            parts = [part[dispatch][0][number] for part in found]
            assert_equal_to_one_process(parts, in_one_process(case), f"{case}, {dispatch}")
            for part, inputs in zip(found, case.draw()[0], strict=True):
                assert np.array_equal(part[dispatch][1][number], inputs["coefficients"].numpy())


def run_again(case: Choices) -> dict[str, tuple[dict[str, np.ndarray], dict[str, int]]]:
    """Recompute everything between the router and the residual in the backward pass."""
    dist.init_process_group("gloo")
    found = {}
    for dispatch in DISPATCH:
        dispatcher = dispatcher_for(case, dispatch, 1)
        inputs, *stacks = case.of_rank(dist.get_rank())

        def whole(hidden: Tensor, weights: Tensor) -> Tensor:
            moved = {"hidden": hidden, "weights": weights, "experts": inputs["experts"]}  # noqa: B023
            return composed(dispatcher, moved, lambda rows: expert_ffn(*rows[:3], *stacks))  # noqa: B023

        output = checkpoint(whole, inputs["hidden"], inputs["weights"], use_reentrant=False)
        results = differentiated(inputs, output, *stacks)
        found[dispatch] = results, {name: volume.rows for name, volume in dispatcher.volumes.items()}
    return found


def test_recomputation_sends_rows_to_experts_again_and_does_not_bring_them_back_again() -> None:
    case = draw_cases(2)[0]
    found = run_ranks(2, run_again, case)
    for dispatch in DISPATCH:
        assert_equal_to_one_process([part[dispatch][0] for part in found], in_one_process(case), f"{case}, {dispatch}")
        sent = {name: sum(part[dispatch][1][name] for part in found) for name in found[0][dispatch][1]}
        assert sent["dispatch"] == 2 * sent["combine"] > 0
        assert sent["combine"] == sent["combine_backward"] == sent["dispatch_backward"]
