"""Which rank works on which matrix: every matrix once, by a rank that shares it, and all ranks equally busy."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from abyssal.parallel.matrix_owners import Matrix, ShardedMatrices, assign_matrices
from abyssal.ranks.placements import TensorShard, chunk
from ranks import run_ranks


def cubic(rows: int, columns: int) -> int:
    a, b = sorted((rows, columns))
    return 2 * a * a * b + a**3


def by_rows(rows: int, columns: int, ranks: int) -> ShardedMatrices:
    """Return a dense matrix whose rows all ranks share."""
    held = [chunk(range(rows), ranks, rank) for rank in range(ranks)]
    shards = tuple(TensorShard((range(1), own, range(columns))) for own in held)
    return ShardedMatrices((1, rows, columns), 1, shards)


def experts(shape: tuple[int, int, int], edp: int, ep: int, matrices: int) -> ShardedMatrices:
    """Return a stack over ep, the rows of whose matrices ranks along edp share."""
    shards = []
    for rank in range(edp * ep):
        stack, rows = chunk(range(shape[0]), ep, rank % ep), chunk(range(shape[1]), edp, rank // ep)
        shards.append(TensorShard((stack, rows, range(shape[2]))))
    return ShardedMatrices(shape, matrices, tuple(shards))


def loads(matrices: list[Matrix], ranks: int) -> list[int]:
    found = Counter[int]()
    for matrix in matrices:
        found[matrix.owner] += matrix.cost
    return [found[rank] for rank in range(ranks)]


def test_chunks_are_those_of_torch() -> None:
    for size, number in ((12, 4), (10, 4), (9, 4), (6, 4), (3, 4), (1, 5)):
        expected = [tuple(part.tolist()) for part in torch.arange(size).chunk(number)]
        found = [tuple(chunk(range(size), number, index)) for index in range(number)]
        assert found == expected + [()] * (number - len(expected))


def test_every_matrix_goes_once_to_a_rank_that_shares_it() -> None:
    parameters = [by_rows(33, 20, 6), experts((8, 18, 20), 3, 2, 2), experts((8, 21, 9), 3, 2, 1)]
    matrices = assign_matrices(parameters, cubic)
    places = [(matrix.parameter, matrix.index, matrix.rows) for matrix in matrices]
    assert places == [
        (0, 0, range(33)),
        *[(1, index, rows) for index in range(8) for rows in (range(9), range(9, 18))],
        *[(2, index, range(21)) for index in range(8)],
    ]
    for matrix in matrices:
        assert matrix.index in parameters[matrix.parameter].shards[matrix.owner].ranges[0]


@pytest.mark.parametrize(("edp", "ep"), [(1, 8), (2, 4), (8, 1)])
def test_no_rank_has_a_matrix_more_to_do_than_another(edp: int, ep: int) -> None:
    """Dense matrices even out what experts leave: at most one of the cheapest separates the ranks at the end."""
    ranks = edp * ep
    draw = random.Random(ranks)
    dense = [by_rows(*draw.choice([(80, 48), (28, 48), (40, 28), (48, 32)]), ranks) for _ in range(60)]
    routed = [experts((24, rows, columns), edp, ep, parts) for rows, columns, parts in ((64, 48, 2), (48, 32, 1)) * 3]
    routed.append(experts((ep, 64, 48), edp, ep, 1))  # one a slice, which cannot be shared evenly along edp
    matrices = assign_matrices(routed + dense, cubic)
    busy = loads(matrices, ranks)
    assert max(busy) - min(busy) <= min(matrix.cost for matrix in matrices if len(matrix.ranks) == ranks)
    assert max(busy) <= 1.02 * sum(busy) / ranks


def test_gate_and_up_that_a_shard_separates_stay_where_they_lie() -> None:
    """Shard 0 of 2 holds the gate of each expert whole, shard 1 its up projection."""
    matrices = assign_matrices([experts((6, 14, 20), 2, 1, 2)], cubic)
    assert all(matrix.owner == (matrix.rows.start == 7) for matrix in matrices)


def test_copies_share_the_work() -> None:
    shards = tuple(TensorShard((range(1), chunk(range(12), 2, rank % 2), range(7)), rank // 2) for rank in range(4))
    busy = loads(assign_matrices([ShardedMatrices((1, 12, 7), 1, shards)] * 8, cubic), 4)
    assert len(set(busy)) == 1


def _read_placements() -> None:
    """Read 12 ranks' parts where only the first exists, so nothing can be sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=12)
    mesh = init_device_mesh("cpu", (2, 3, 2), mesh_dim_names=("dp_replicate", "edp", "ep"))
    local = torch.zeros(3, 4, 7)
    stack = DTensor.from_local(
        local, mesh, [Replicate(), Shard(1), Shard(0)], run_check=False, shape=torch.Size((5, 10, 7)), stride=(70, 7, 1)
    )
    found = ShardedMatrices.of(stack, 2, range(12))
    assert found.shape == (5, 10, 7)
    assert found.matrices == 2
    expected = [
        TensorShard((stacks, rows, range(7)), copy)
        for copy in (0, 1)
        for rows in (range(4), range(4, 8), range(8, 10))
        for stacks in (range(3), range(3, 5))
    ]
    assert list(found.shards) == expected
    for placements in ([Replicate(), Shard(2), Shard(0)], [Replicate(), Replicate(), Shard(-1)]):
        with pytest.raises(ValueError, match="columns are sharded; rows and stacked matrices may be"):
            ShardedMatrices.of(DTensor.from_local(local, mesh, placements, run_check=False), 1, range(12))
    for other in (torch.zeros(5, 10, 7), stack):
        with pytest.raises(ValueError, match="a DTensor over all ranks"):
            ShardedMatrices.of(other, 1, range(11))


def test_parts_are_read_from_placements_without_communication() -> None:
    run_ranks(1, _read_placements)
