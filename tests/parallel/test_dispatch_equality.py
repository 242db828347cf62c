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
from ranks.choices import Choices, assert_equal_to_one_process, differentiated, draw_cases, in_one_process, numbers

PATHS = ("direct", "node_limited")
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
State = dict[str, Tensor]


def dispatcher_for(case: Choices, path: str, node_size: int) -> ExpertParallelDispatcher:
    ranks = dist.get_world_size()
    config = ParallelConfig.model_validate({"ep_size": ranks, "dispatch": path})
    return expert_parallel_dispatcher(config, RankLayout(1, 1, 1, ranks, node_size), dist.group.WORLD, case.num_experts)


def compute(state: State, experts: Experts) -> State:
    kept = {name: value for name, value in state.items() if name != "row_weights"}
    return {**kept, "rows": experts(state["rows"], state["row_weights"], state["counts"])}


def composed(dispatcher: ExpertParallelDispatcher, inputs: State, experts: Experts) -> Tensor:
    state = dispatcher.dispatch(inputs["hidden"], inputs["weights"], inputs["experts"])
    return dispatcher.combine(compute(state, experts))


def run_composed(drawn: list[Choices], node_size: int) -> dict[tuple[str, ...], dict[str, np.ndarray]]:
    dist.init_process_group("gloo")
    found = {}
    for case in drawn:
        for path in PATHS:
            for kernel in (expert_ffn, segmented_expert_ffn):
                dispatcher = dispatcher_for(case, path, node_size)
                inputs, *stacks = case.of_rank(dist.get_rank())
                output = composed(dispatcher, inputs, lambda *rows: kernel(*rows, *stacks))  # noqa: B023
                found[case.name, path, kernel.__name__] = differentiated(inputs, output, *stacks)
    return found


@pytest.mark.parametrize(("ranks", "node_size"), [(2, 1), (4, 2), (4, 4), (4, 1)], ids=str)
def test_outputs_and_gradients_equal_those_of_one_process(ranks: int, node_size: int) -> None:
    drawn = draw_cases(ranks)
    found = run_ranks(ranks, run_composed, drawn, node_size)
    for case in drawn:
        expected = in_one_process(case)
        for way in [way for way in found[0] if way[0] == case.name]:
            assert_equal_to_one_process([part[way] for part in found], expected, f"{case}, {way}")


Piece = Callable[[State], State]


class Cut:
    """A chain of pieces with autograd cut between them, each run when it is asked for, as a pipeline does."""

    def __init__(self, state: State, pieces: list[Piece]) -> None:
        self.outputs, self.pieces = state, pieces
        self.ran: list[tuple[State, State]] = []

    def forward(self) -> None:
        """Run the next piece on leaves of its own."""
        leaves = {
            name: value.detach().requires_grad_() if value.is_floating_point() else value
            for name, value in self.outputs.items()
        }
        before, self.outputs = self.outputs, self.pieces[len(self.ran)](leaves)
        self.ran.append((before, leaves))

    def backward(self, grads: State) -> State:
        """Run the last piece back and return the gradients of what it took."""
        before, leaves = self.ran.pop()
        named = [(value, grads[name]) for name, value in self.outputs.items() if name in grads]
        torch.autograd.backward([value for value, _ in named], [grad for _, grad in named])
        self.outputs = before
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.is_floating_point() and leaf.grad is not None}


def pieces_of(dispatcher: ExpertParallelDispatcher, experts: Experts) -> list[Piece]:
    """The five pieces of a feed-forward network, with a residual that goes past all of them."""

    def start(state: State) -> State:
        sent = dispatcher.start_dispatch(state["hidden"], state["weights"], state["experts"])
        return {"residual": state["residual"], **sent}

    def finish(state: State) -> State:
        return {"output": state["residual"] + dispatcher.finish_combine(state)}

    compute_piece: Piece = lambda state: compute(state, experts)  # noqa: E731
    return [start, dispatcher.finish_dispatch, compute_piece, dispatcher.start_combine, finish]


def run_cut(pair: tuple[Choices, Choices], node_size: int) -> dict[str, tuple[list[Any], list[Any]]]:
    """Interleave the pieces of two cases, both under way at once; return their results and residuals' gradients."""
    dist.init_process_group("gloo")
    found = {}
    for path in PATHS:
        dispatcher = dispatcher_for(pair[0], path, node_size)
        drawn = [case.of_rank(dist.get_rank()) for case in pair]
        chains, grads = [], []
        for inputs, *stacks in drawn:
            state = {**inputs, "residual": torch.zeros_like(inputs["hidden"])}
            chains.append(Cut(state, pieces_of(dispatcher, lambda *rows, own=stacks: expert_ffn(*rows, *own))))
            grads.append({"output": inputs["coefficients"]})
        for _ in range(5):
            for chain in chains:
                chain.forward()
        outputs = [chain.outputs["output"] for chain in chains]
        for _ in range(5):
            for number in (1, 0):  # in another order than forward
                grads[number] = chains[number].backward(grads[number])
        results = []
        for (inputs, *stacks), output, grad in zip(drawn, outputs, grads, strict=True):
            inputs["hidden"].grad, inputs["weights"].grad = grad["hidden"], grad["weights"]
            results.append(numbers(inputs, output, *stacks))
        found[path] = results, [grad["residual"].numpy() for grad in grads]
    return found


def test_halves_run_apart_with_autograd_cut_equal_one_process() -> None:
    pair = draw_cases(4)[0], draw_cases(4)[4]
    found = run_ranks(4, run_cut, pair, 2)
    for path in PATHS:
        for number, case in enumerate(pair):
            parts = [part[path][0][number] for part in found]
            assert_equal_to_one_process(parts, in_one_process(case), f"{case}, {path}")
            for part, inputs in zip(found, case.draw()[0], strict=True):
                assert np.array_equal(part[path][1][number], inputs["coefficients"].numpy())


def run_recorded(case: Choices, path: str) -> list[str]:
    """Run the halves one by one and note when rows are sent and waited for."""
    dist.init_process_group("gloo")
    dispatcher = dispatcher_for(case, path, 1)
    events: list[str] = []
    send = dist.all_to_all_single

    class Noted:
        def __init__(self, work: dist.Work, what: str) -> None:
            self.work, self.what = work, what

        def wait(self) -> None:
            events.append(f"wait for {self.what}")
            self.work.wait()

    def noted(arriving: Tensor, leaving: Tensor, *arguments: Any, **named: Any) -> Noted:
        what = "rows" if leaving.shape[1:] == (case.width,) else "values" if leaving.is_floating_point() else "plan"
        events.append(f"send {what}")
        return Noted(send(arriving, leaving, *arguments, **named), what)

    dist.all_to_all_single = noted  # this process ends with this function
    inputs, *stacks = case.of_rank(dist.get_rank())
    pieces = pieces_of(dispatcher, lambda *rows: expert_ffn(*rows, *stacks))
    chain = Cut({**inputs, "residual": torch.zeros_like(inputs["hidden"])}, pieces)
    for name in ("start dispatch", "finish dispatch", "compute", "start combine", "finish combine"):
        events.append(name)
        chain.forward()
    grads = {"output": inputs["coefficients"]}
    for name in ("finish combine", "start combine", "compute", "finish dispatch", "start dispatch"):
        events.append(f"back through {name}")
        grads = chain.backward(grads)
    return [event for event in events if not event.endswith("plan")]


@pytest.mark.parametrize("path", PATHS)
def test_what_a_start_sends_is_waited_for_by_its_finish_alone_in_both_directions(path: str) -> None:
    for events in run_ranks(2, run_recorded, draw_cases(2)[0], path):
        assert events == [
            *("start dispatch", "send rows", "send values"),
            *("finish dispatch", "wait for rows", "wait for values"),
            "compute",
            *("start combine", "send rows"),
            *("finish combine", "wait for rows"),
            *("back through finish combine", "send rows"),
            *("back through start combine", "wait for rows"),
            "back through compute",
            *("back through finish dispatch", "send rows", "send values"),
            *("back through start dispatch", "wait for rows", "wait for values"),
        ]


def run_again(case: Choices) -> dict[str, tuple[dict[str, np.ndarray], dict[str, int]]]:
    """Recompute everything between the router and the residual in the backward pass."""
    dist.init_process_group("gloo")
    found = {}
    for path in PATHS:
        dispatcher = dispatcher_for(case, path, 1)
        inputs, *stacks = case.of_rank(dist.get_rank())

        def whole(hidden: Tensor, weights: Tensor) -> Tensor:
            moved = {"hidden": hidden, "weights": weights, "experts": inputs["experts"]}  # noqa: B023
            return composed(dispatcher, moved, lambda *rows: expert_ffn(*rows, *stacks))  # noqa: B023

        output = checkpoint(whole, inputs["hidden"], inputs["weights"], use_reentrant=False)
        results = differentiated(inputs, output, *stacks)
        found[path] = results, {leg: traffic.rows_to_ranks for leg, traffic in dispatcher.traffic.items()}
    return found


def test_recomputation_sends_rows_to_experts_again_and_does_not_bring_them_back_again() -> None:
    case = draw_cases(2)[0]
    found = run_ranks(2, run_again, case)
    for path in PATHS:
        assert_equal_to_one_process([part[path][0] for part in found], in_one_process(case), f"{case}, {path}")
        sent = {leg: sum(part[path][1][leg] for part in found) for leg in found[0][path][1]}
        assert sent["dispatch"] == 2 * sent["combine"] > 0
        assert sent["combine"] == sent["combine_backward"] == sent["dispatch_backward"]
