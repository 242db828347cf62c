"""Steps run apart with autograd cut between them, as a pipeline runs them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from abyssal.model import Block, Context
from abyssal.model.block import map_tensors, tensors
from abyssal.ops.linear import WeightGradients

#: The borders of a block: a border stands before the step of that name.
BORDERS = ("dispatch", "compute", "combine", "finish")
CUTS = [cut for n in range(len(BORDERS) + 1) for cut in combinations(BORDERS, n)]
Gradients = list[Tensor | None]


class CutChain:
    """A chain of named steps, each a function from one state to the next, run in pieces that begin at the borders cut.

    Each floating tensor of a state at such a border becomes a leaf of its own.
    """

    def __init__(self, steps: dict[str, Callable[[Any], Any]], cut: Collection[str], state: Any) -> None:
        self.state = state
        self.pieces: list[list[Callable[[Any], Any]]] = [[]]
        for name, step in steps.items():
            if name in cut:
                self.pieces.append([])
            self.pieces[-1].append(step)
        self._ran: list[tuple[Any, Any]] = []  # leaves and results

    def forward(self) -> None:
        """Run the next piece."""
        state = leaves = map_tensors(_leaf, self.state)
        for step in self.pieces[len(self._ran)]:
            state = step(state)
        self._ran.append((leaves, state))
        self.state = state

    def backward(self, gradients: Gradients) -> Gradients:
        """Run the last piece that is left back: gradients of its results' tensors to those of its leaves."""
        leaves, results = self._ran.pop()
        pairs = zip(tensors(results), gradients, strict=True)
        torch.autograd.backward(*zip(*((r, g) for r, g in pairs if r.requires_grad and g is not None), strict=True))
        return [leaf.grad for leaf in tensors(leaves)]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def cut_block(block: Block, cut: Collection[str], x: Tensor, ctx: Context) -> CutChain:
    """Return the steps of a block, to be run on `x`."""
    attend = partial(block.attend, ctx=ctx)
    return CutChain({"attend": attend, **{name: getattr(block, name) for name in BORDERS}}, cut, x)


def interleave(
    a: CutChain, b: CutChain, d_a: Tensor, d_b: Tensor, deferred: WeightGradients | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Run `a` forward, then the pieces of `b` forward beside those of `a` backward, then `b` backward.

    Takes the gradients of both results and returns those of both inputs. What a piece leaves in `deferred` is taken out
    after it and run at the end.
    """
    store = WeightGradients() if deferred is None else deferred
    later = []
    back_a: Gradients = [d_a]
    back_b: Gradients = [d_b]
    for _ in a.pieces:
        a.forward()
    for _ in b.pieces:
        b.forward()
        back_a = a.backward(back_a)
        later.append(store.take())
    for _ in b.pieces:
        back_b = b.backward(back_b)
        later.append(store.take())
    for of_piece in later:
        of_piece.run()
    return back_a[0], back_b[0]
