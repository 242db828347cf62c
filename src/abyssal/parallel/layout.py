"""Which rank does what: a function of the recipe and the number of ranks, without a process group."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from abyssal.config import ModelConfig
from abyssal.config.parallel import ParallelConfig
from abyssal.errors import UsageError, nearest_numbers

#: The axes of the mesh, the slowest first: neighbours in rank are neighbours in ep, so an expert group fills nodes.
AXES = ("pp", "dp_replicate", "edp", "ep")


@dataclass(frozen=True)
class RankLayout:
    """The sizes of all axes; rank = ((pp * dp_replicate_size + dp_replicate) * edp_size + edp) * ep_size + ep.

    Dense weights are sharded over edp and ep together; a slice of the experts is the same along edp, over which it is
    sharded.
    """

    pp_size: int
    dp_replicate_size: int
    edp_size: int  # ranks that hold the same experts and shard them
    ep_size: int
    node_size: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes, in the order of `AXES`."""
        return self.pp_size, self.dp_replicate_size, self.edp_size, self.ep_size

    @property
    def world_size(self) -> int:
        """All ranks."""
        return prod(self.sizes)

    @property
    def dp_size(self) -> int:
        """Ranks of a stage, each with sequences of its own."""
        return self.dp_replicate_size * self.edp_size * self.ep_size

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """Return where a rank stands on each of `AXES`."""
        coordinates = []
        for size in reversed(self.sizes):
            rank, coordinate = divmod(rank, size)
            coordinates.append(coordinate)
        pp, dp_replicate, edp, ep = reversed(coordinates)
        return pp, dp_replicate, edp, ep

    def dp_rank(self, rank: int) -> int:
        """Return which share of the batch a rank trains on."""
        return rank % self.dp_size

    def experts(self, rank: int, num_experts: int) -> range:
        """Return the routed experts that a rank holds of each layer."""
        size = num_experts // self.ep_size
        first = self.coordinates(rank)[3] * size
        return range(first, first + size)


def lay_out(config: ParallelConfig, model: ModelConfig, world_size: int, node_size: int) -> RankLayout:
    """Lay a run over `world_size` ranks, `node_size` of them on each node if the recipe says nothing else.

    Raises:
        UsageError: it does not fit; names the nearest that does.
    """
    pp, ep, replicate = config.pp_size, config.ep_size, config.dp_replicate_size
    if model.n_routed_experts % ep:
        fitting = [n for n in range(1, model.n_routed_experts + 1) if model.n_routed_experts % n == 0]
        raise UsageError(
            f"parallel.ep_size={ep}: must divide model.n_routed_experts={model.n_routed_experts}; "
            f"nearest: {nearest_numbers(ep, fitting)}"
        )
    unit = pp * replicate * (config.dp_shard_size or ep)
    named = f"pp_size={pp} * dp_replicate_size={replicate} * " + (
        f"dp_shard_size={config.dp_shard_size}" if config.dp_shard_size else f"a multiple of ep_size={ep}"
    )
    if config.dp_shard_size and world_size != unit:
        raise UsageError(
            f"{world_size} ranks: parallel.{named} needs {unit}; start {unit} ranks, or let parallel.dp_shard_size=0 "
            "take all that are left"
        )
    if world_size % unit:
        below = world_size // unit * unit
        nearest = ", ".join(str(n) for n in (below, below + unit) if n)
        raise UsageError(f"{world_size} ranks: must be {named}, a multiple of {unit}; nearest: {nearest}")
    edp = world_size // (pp * replicate * ep)
    for name, size in (
        ("2 * moe_intermediate_size", 2 * model.moe_intermediate_size),
        ("hidden_size", model.hidden_size),
    ):
        if size % edp:  # FSDP shards the experts' second dim, evenly
            fitting = [n for n in range(1, size + 1) if size % n == 0]
            raise UsageError(
                f"{world_size} ranks: an expert would be sharded over {edp}, which must divide model's {name}={size}; "
                f"nearest: {nearest_numbers(edp, fitting)}; change parallel.ep_size or parallel.dp_replicate_size"
            )
    node = config.node_size or node_size
    _check_nodes(config, node, world_size)
    return RankLayout(pp, replicate, edp, ep, node)


def _check_nodes(config: ParallelConfig, node: int, world_size: int) -> None:
    if config.dispatch != "node_limited":
        return
    small, large = sorted((node, config.ep_size))
    if large % small:
        raise UsageError(
            f"parallel.dispatch='node_limited': parallel.ep_size={config.ep_size} and the node_size={node} must divide "
            "each other, so that an expert group fills whole nodes"
        )


def describe(layout: RankLayout, model: ModelConfig, *, most_rows: int = 16) -> str:
    """Return the layout as a table: a line a rank, the middle ones left out beyond `most_rows`."""
    lines = [f"{layout.world_size} ranks: " + " * ".join(f"{n} {s}" for n, s in zip(AXES, layout.sizes, strict=True))]
    head = ("rank", "node", *AXES, "experts", "share of the batch")
    rows = []
    for rank in range(layout.world_size):
        held = layout.experts(rank, model.n_routed_experts)
        place = (rank, rank // layout.node_size, *layout.coordinates(rank))
        share = f"{layout.dp_rank(rank) + 1} of {layout.dp_size}"
        rows.append((*map(str, place), f"{held.start}-{held.stop - 1}", share))
    if len(rows) > most_rows:
        half = most_rows // 2
        rows = [*rows[:half], ("...",) * len(head), *rows[-half:]]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    return "\n".join(lines)
