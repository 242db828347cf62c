"""A block whose experts live on several ranks, cut at its borders, equals the block in one process; in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.config.parallel import ParallelConfig
from abyssal.model import (
    Block,
    Context,
    RouterStatistics,
    Transformer,
    drop_prepared_weights,
    prepare_weights,
)
from abyssal.ops.linear import WeightGradients
from abyssal.parallel.apply import begin_step, end_step, parallelise, spread_experts
from abyssal.parallel.layout import RankLayout
from abyssal.parallel.mesh import Mesh
from abyssal.ranks.placements import local
from ranks import run_ranks
from ranks.cut import BORDERS, CUTS, CutChain, cut_block, interleave
from ranks.spread import SHAPE

pytestmark = pytest.mark.slow

DISPATCH = ("direct", "node_limited")
CONFIG = ModelConfig.parse({**SHAPE, "n_routed_experts": 12, "n_group": 4, "topk_group": 3}, source="test")
LAYER = 1
#: Tokens of the sequences of each micro-batch; a rank has one token more of each than the rank before.
LENGTHS = ((4, 2), (1, 3, 2))
Gradients = dict[str, Tensor]


class MicroBatch(NamedTuple):
    """What a block starts from, forward and backward."""

    x: Tensor
    d_y: Tensor
    ctx: Context


def filled() -> Transformer:
    """The model with random weights of order 1 in effect, on all ranks the same."""
    model = Transformer(CONFIG, compute_dtype=torch.float64).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0.2, tensor.shape[-1] ** -0.5, generator=generator)
    return model


def micro_batches(model: Transformer, rank: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(100 + rank)
    drawn = []
    for lengths in LENGTHS:
        ctx = Context.packed([length + rank for length in lengths])
        ctx = model.with_rotary(replace(ctx, statistics=RouterStatistics(), balance_weight=0.4))
        shape = len(ctx.positions), CONFIG.hidden_size
        x, d_y = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in "xy")
        drawn.append(MicroBatch(x, d_y, ctx))
    return drawn


def differentiate(block: Block, batches: Sequence[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
    """Output and input gradient of each by the block as it is; the other gradients add up in the parameters."""
    results = []
    for x, d_y, ctx in batches:
        x.requires_grad_()
        y = block(x, ctx)
        results.append((y.detach(), *torch.autograd.grad(y, x, d_y, retain_graph=True)))
        torch.autograd.backward(y, d_y, inputs=list(block.parameters()))
        x.requires_grad_(False)
    return results


def gradients(block: Block) -> Gradients:
    """What each rank holds of a gradient, or all of it in one process."""
    taken = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    return taken


class OneProcess(NamedTuple):
    """What a block makes where all its experts live in one process."""

    results: list[tuple[Tensor, Tensor]]  # outputs and input gradients of one rank's micro-batches
    of_rank: Gradients  # over that rank's tokens
    of_all: Gradients  # over those of all ranks


def in_one_process(rank: int, world_size: int) -> OneProcess:
    model = filled()
    block = model.model.layers[LAYER]
    results = differentiate(block, micro_batches(model, rank))
    of_rank = gradients(block)
    for each in range(world_size):
        differentiate(block, micro_batches(model, each))
    return OneProcess(results, of_rank, gradients(block))


def assert_results_equal(chains: Sequence[CutChain], d_inputs: Sequence[Tensor | None], expected: OneProcess) -> None:
    for chain, d_input, (y, d_x) in zip(chains, d_inputs, expected.results, strict=True):
        torch.testing.assert_close(chain.state, y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(d_input, d_x, rtol=1e-9, atol=1e-9)


def assert_gradients_equal(actual: Gradients, expected: Gradients, where: object) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-9, msg=f"{where}, {name}")


def spread_blocks(node_size: int) -> Iterator[tuple[str, Transformer, Block]]:
    """The block with its experts over all ranks, for each way to dispatch; it makes the process group."""
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    mesh = Mesh.over(RankLayout(1, 1, 1, ranks, node_size), torch.device("cpu"))
    for dispatch in DISPATCH:
        model = filled()
        spread_experts(model, ParallelConfig.model_validate({"ep_size": ranks, "dispatch": dispatch}), mesh)
        yield dispatch, model, model.model.layers[LAYER]


def run_cuts(node_size: int) -> None:
    """Hold every cut against one process."""
    for dispatch, model, block in spread_blocks(node_size):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        batches, expected = micro_batches(model, rank), in_one_process(rank, ranks)
        experts = {n: g.chunk(ranks)[rank] for n, g in expected.of_all.items() if n.startswith("mlp.experts.")}
        deferred = WeightGradients()
        for cut, prepared in product(CUTS, (False, True)):
            if prepared:
                prepare_weights(model, deferred)
            else:
                drop_prepared_weights(model)
            chains = [cut_block(block, cut, x, ctx) for x, _, ctx in batches]
            d_inputs = interleave(*chains, *(d_y for _, d_y, _ in batches), deferred)
            assert_results_equal(chains, d_inputs, expected)
            actual = {name: local(gradient) for name, gradient in gradients(block).items()}
            assert_gradients_equal(actual, expected.of_rank | experts, (dispatch, cut, prepared))


@pytest.mark.parametrize(("ranks", "node_size"), [(2, 1), (3, 3), (4, 2)], ids=str)
def test_two_micro_batches_interleaved_piece_by_piece_equal_one_process(ranks: int, node_size: int) -> None:
    """Forward of one beside backward of the other, both with transfers in flight, at every combination of borders."""
    run_ranks(ranks, run_cuts, node_size)


def run_sharded() -> None:
    """Hold steps of sharded weights against one process: experts over 2 ranks, each slice of them over 2 more."""
    dist.init_process_group("gloo")
    model, config = filled(), ParallelConfig(ep_size=2)
    parallelise(model, config, Mesh.over(RankLayout(1, 1, 2, 2, 4), torch.device("cpu")))
    block = model.model.layers[LAYER]
    batches, expected = micro_batches(model, dist.get_rank()), in_one_process(dist.get_rank(), dist.get_world_size())
    for cut, deferred in product(((), BORDERS), (None, WeightGradients())):
        begin_step(model, config, deferred)
        chains = [cut_block(block, cut, x, ctx) for x, _, ctx in batches]
        d_inputs = interleave(*chains, *(d_y for _, d_y, _ in batches), deferred)
        end_step(model)
        assert_results_equal(chains, d_inputs, expected)
        actual = {name: gradient.full_tensor() for name, gradient in gradients(block).items()}  # type: ignore[attr-defined]
        assert_gradients_equal(actual, expected.of_all, (cut, deferred))


def test_steps_of_sharded_weights_called_apart_gather_and_reduce_as_the_block_does() -> None:
    run_ranks(4, run_sharded)


def run_recorded() -> dict[str, list[str]]:
    """Run a block step by step, forward and backward, and note when rows are sent and waited for."""
    events: list[str] = []
    recorded_events = {}
    send = dist.all_to_all_single

    class Recorded:
        def __init__(self, work: dist.Work, what: str) -> None:
            self.work, self.what = work, what

        def wait(self) -> None:
            events.append(f"wait for {self.what}")
            self.work.wait()

    def recorded(received: Tensor, sent: Tensor, *arguments: Any, **named: Any) -> Recorded:
        what = "rows" if sent.shape[1:] == (CONFIG.hidden_size,) else "values" if sent.is_floating_point() else "plan"
        events.append(f"send {what}")
        return Recorded(send(received, sent, *arguments, **named), what)

    dist.all_to_all_single = recorded  # this process ends with this function
    for dispatch, model, block in spread_blocks(node_size=1):
        x, d_y, ctx = micro_batches(model, dist.get_rank())[0]
        events.clear()
        chain = cut_block(block, BORDERS, x, ctx)
        for name in ("attend", *BORDERS):
            events.append(name)
            chain.forward()
        back: Any = [d_y]
        for name in reversed(("attend", *BORDERS)):
            events.append(f"{name} backward")
            back = chain.backward(back)
        recorded_events[dispatch] = [event for event in events if not event.endswith("plan")]
    return recorded_events


def test_between_two_steps_rows_are_in_flight_in_both_directions() -> None:
    """What dispatch and combine send is waited for by the step after them, and so are the gradients."""
    for events in (events for recorded_events in run_ranks(2, run_recorded) for events in recorded_events.values()):
        assert events == [
            "attend",
            *("dispatch", "send rows", "send values"),
            *("compute", "wait for rows", "wait for values"),
            *("combine", "send rows"),
            *("finish", "wait for rows"),
            *("finish backward", "send rows"),
            *("combine backward", "wait for rows"),
            *("compute backward", "send rows", "send values"),
            *("dispatch backward", "wait for rows", "wait for values"),
            "attend backward",
        ]
