"""Whole matrices on one rank each: the work sees each once, exactly, and its results come back to the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from abyssal.config import ModelConfig
from abyssal.model import Transformer
from abyssal.parallel.matrix_exchange import MatrixExchange
from ranks import run_ranks
from ranks.spread import LAYOUTS, SHAPE, spread

pytestmark = pytest.mark.slow

Seen = Counter[tuple[Any, ...]]


def matrices_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def matrices_in(name: str) -> int:
    return 2 if name.endswith("gate_up_proj") else 1


def whole_ones(dtype: torch.dtype) -> dict[str, Tensor]:
    """Return numbers of which no two matrices are alike, in the shapes of a model's matrices, [L, A, B] each."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, parameter in matrices_of(Transformer(ModelConfig(**SHAPE))).items():
        rows, columns = parameter.shape[-2] // matrices_in(name), parameter.shape[-1]
        found[name] = torch.randn(parameter.numel() // (rows * columns), rows, columns, generator=generator).to(dtype)
    return found


def upside_down(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Turn whole matrices round, row by row: exact, and wrong wherever a row comes from or goes to another place."""
    return [stack.flip(-2) for stack in stacks]


def part(like: Tensor, whole: Tensor) -> Tensor:
    """Return this rank's part of stacks, put together as `like` and cut by DTensor itself."""
    assert isinstance(like, DTensor)
    joint = whole.reshape(like.shape)
    return distribute_tensor(joint, like.device_mesh, like.placements, src_data_rank=None).to_local().contiguous()


def key(matrix: Tensor) -> tuple[Any, ...]:
    return tuple(matrix.shape), matrix.double().numpy().tobytes()


def _exchange(dtype: torch.dtype) -> dict[str, tuple[Seen, list[int]]]:
    """Return, for each layout, the matrices that this rank worked on, and the elements it sent in each all-to-all."""
    found, expected, send = {}, whole_ones(dtype), dist.all_to_all_single
    for layout, sizes in LAYOUTS.items():
        parameters = matrices_of(spread(Transformer(ModelConfig(**SHAPE)), sizes))
        spreads = [(parameter, matrices_in(name)) for name, parameter in parameters.items()]
        assert dist.group.WORLD is not None
        exchange = MatrixExchange(spreads, dist.group.WORLD, lambda rows, columns: rows * columns)
        seen, sent = Seen(), list[int]()

        def work(stacks: Sequence[Tensor], seen: Seen = seen) -> list[Tensor]:
            seen.update(key(matrix) for stack in stacks for matrix in stack)
            return upside_down(stacks)

        def counted(output: Tensor, given: Tensor, *rest: Any, sent: list[int] = sent, **options: Any) -> Any:
            assert output.dtype == given.dtype == dtype
            sent.append(given.numel())
            return send(output, given, *rest, **options)

        dist.all_to_all_single = counted
        parts = [part(parameter, expected[name]) for name, parameter in parameters.items()]
        results = exchange(parts, work)
        dist.all_to_all_single = send
        for (name, parameter), given, result in zip(parameters.items(), parts, results, strict=True):
            assert torch.equal(given, part(parameter, expected[name])), f"{layout}: {name}: what was given is changed"
            assert torch.equal(result, part(parameter, expected[name].flip(-2))), f"{layout}: {name}"
        found[layout] = seen, sent
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_each_whole_matrix_is_worked_on_once_and_its_rows_return(dtype: torch.dtype) -> None:
    """In every layout, with short and empty shards; nothing is sent of experts that are whole on a rank."""
    expected = whole_ones(dtype)
    ranks = run_ranks(4, _exchange, dtype)
    every = Seen(key(matrix) for stack in expected.values() for matrix in stack)
    dense = sum(whole.numel() for name, whole in expected.items() if "mlp.experts" not in name)
    for layout, (replicate, edp, _) in LAYOUTS.items():
        assert sum((rank[layout][0] for rank in ranks), Seen()) == every, layout
        assert all(rank[layout][0] for rank in ranks), f"{layout}: a rank is idle"
        assert all(len(rank[layout][1]) == 2 for rank in ranks), f"{layout}: one all-to-all there, one back"
        there, back = (sum(rank[layout][1][way] for rank in ranks) for way in (0, 1))
        assert back >= there > 0
        assert (back == there) == (replicate == 1), "all copies get results, one gives rows"
        if replicate * edp == 1:
            assert there < dense, layout
