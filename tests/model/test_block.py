"""The four steps of a block, run apart with autograd cut between them, equal the block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.model import Block, Context, RouterStatistics, Transformer

LENGTHS = (5, 3)
BORDERS = ("dispatch", "compute", "combine")  # a border stands before the step of that name
CUTS = [cut for n in range(1, 4) for cut in combinations(BORDERS, n)]
State = dict[str, Tensor]


@dataclass
class Piece:
    """A stretch of steps between two borders: leaves in, results out, and the leaf at which a result was cut."""

    inputs: State
    outputs: State


class CutBlock:
    """Runs a block piece by piece; each floating tensor of a state at a border becomes a leaf of its own."""

    def __init__(self, block: Block, cut: tuple[str, ...], x: Tensor, ctx: Context) -> None:
        self.block, self.ctx = block, ctx
        self.steps: list[list[str]] = [["attend"]]
        for step in BORDERS:
            if step in cut:
                self.steps.append([step])
            else:
                self.steps[-1].append(step)
        self.pieces: list[Piece] = []
        self.state: State = {"x": x}

    def forward(self) -> None:
        """Run the next piece."""
        state = {n: t.detach().requires_grad_() if t.is_floating_point() else t for n, t in self.state.items()}
        inputs = dict(state)
        for step in self.steps[len(self.pieces)]:
            if step == "attend":
                state = self.block.attend(state["x"], self.ctx)
            elif step == "combine":
                state = {"y": self.block.combine(state)}
            else:
                state = getattr(self.block, step)(state)
        self.pieces.append(Piece(inputs, state))
        self.state = state

    def backward(self, gradients: State) -> State:
        """Differentiate the last piece that is left; return the gradients of its inputs."""
        piece = self.pieces.pop()
        wanted = {n: g for n, g in gradients.items() if piece.outputs[n].requires_grad}
        torch.autograd.backward([piece.outputs[n] for n in wanted], list(wanted.values()))
        return {n: t.grad for n, t in piece.inputs.items() if t.grad is not None}


def draw(kind: str, seed: int, draw_config: Any, build: Any) -> tuple[Transformer, Block]:
    """A float64 block of the kind: dense, mixture or mtp."""
    config = draw_config(seed, first_k_dense_replace=1, num_nextn_predict_layers=1)
    model = build(config, seed)
    return model, model.model.layers[{"dense": 0, "mixture": 1, "mtp": 3}[kind]]


def draw_input(model: Transformer, seed: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Context]:
    generator = torch.Generator().manual_seed(seed)
    x, outward = (
        torch.randn(sum(lengths), model.config.hidden_size, dtype=torch.float64, generator=generator) for _ in "xy"
    )
    ctx = replace(Context.packed(lengths), statistics=RouterStatistics(), balance_weight=0.4)
    return x, outward, model.with_rotary(ctx)


def uncut(block: Block, x: Tensor, outward: Tensor, ctx: Context) -> list[Tensor]:
    """Output, input gradient and parameter gradients of the block as it is; the gradients stay in the parameters."""
    x = x.clone().requires_grad_()
    y = block(x, ctx)
    y.backward(outward)
    return [y.detach(), x.grad]  # type: ignore[list-item]


def gradients(block: Block) -> State:
    found = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    return found


@pytest.mark.parametrize("cut", CUTS, ids="-".join)
@pytest.mark.parametrize("kind", ["dense", "mixture", "mtp"])
@pytest.mark.parametrize("seed", range(2), ids="seed{}".format)
def test_a_block_cut_at_its_borders_equals_the_whole(
    seed: int, kind: str, cut: tuple[str, ...], draw_config: Any, build: Any
) -> None:
    model, block = draw(kind, seed, draw_config, build)
    x, outward, ctx = draw_input(model, seed, LENGTHS)
    expected = [*uncut(block, x, outward, ctx)]
    oracle = gradients(block)

    parts = CutBlock(block, cut, x, ctx)
    for _ in range(len(cut) + 1):
        parts.forward()
    back: State = {"y": outward}
    for _ in range(len(cut) + 1):
        back = parts.backward(back)
    assert torch.equal(parts.state["y"], expected[0])
    torch.testing.assert_close(back["x"], expected[1], rtol=1e-12, atol=1e-12)
    found = gradients(block)
    assert found.keys() == oracle.keys()
    for name, gradient in oracle.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_two_micro_batches_interleave_step_by_step(kind: str, draw_config: Any, build: Any) -> None:
    """Forward of one while the other goes backward, as a pipeline overlaps them."""
    model, block = draw(kind, 5, draw_config, build)
    drawn = [draw_input(model, seed, lengths) for seed, lengths in ((5, LENGTHS), (6, (2, 4, 3)))]
    expected = [uncut(block, *one) for one in drawn]
    oracle = gradients(block)

    a, b = (CutBlock(block, BORDERS, x, ctx) for x, _, ctx in drawn)
    for _ in range(4):
        a.forward()
    back_a: State = {"y": drawn[0][1]}
    for _ in range(4):
        b.forward()
        back_a = a.backward(back_a)
    back_b: State = {"y": drawn[1][1]}
    for _ in range(4):
        back_b = b.backward(back_b)
    for parts, back, (y, d_x) in zip((a, b), (back_a, back_b), expected, strict=True):
        assert torch.equal(parts.state["y"], y)
        torch.testing.assert_close(back["x"], d_x, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(block).items():
        torch.testing.assert_close(gradient, oracle[name], rtol=1e-12, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}")
    if kind == "mixture":
        for (_, _, ctx), lengths in zip(drawn, (LENGTHS, (2, 4, 3)), strict=True):
            assert int(ctx.statistics.expert_load[1].sum()) == sum(lengths) * model.config.num_experts_per_tok


def test_the_cut_carries_the_injected_balance_loss(draw_config: Any, build: Any) -> None:
    """Without the injection the router's gradient is another one, so the tests above would notice its loss."""
    model, block = draw("mixture", 7, draw_config, build)
    x, outward, ctx = draw_input(model, 7, LENGTHS)
    found = []
    for weight in (0.4, 0.0):
        uncut(block, x, outward, replace(ctx, balance_weight=weight))
        found.append(gradients(block)["mlp.gate.weight"])
    assert (found[0] - found[1]).norm() > 1e-3


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_what_crosses_a_border_is_tensors_and_no_more_than_the_next_steps_need(
    kind: str, draw_config: Any, build: Any
) -> None:
    model, block = draw(kind, 8, draw_config, build)
    x, _, ctx = draw_input(model, 8, LENGTHS)
    attended = block.attend(x, ctx)
    dispatched = block.dispatch(attended)
    computed = block.compute(dispatched)
    routed = {"weights", "experts"} if kind == "mixture" else set()
    way_back = {"counts", "order", "inverse"} if kind == "mixture" else set()
    rows = {"rows"} if kind == "mixture" else set()
    assert attended.keys() == {"residual", "hidden"} | routed
    assert dispatched.keys() == {"residual", "hidden"} | rows | way_back | ({"row_weights"} if rows else set())
    assert computed.keys() == {"residual", "output"} | rows | way_back
    assert all(isinstance(t, Tensor) for state in (attended, dispatched, computed) for t in state.values())
