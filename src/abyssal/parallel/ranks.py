"""What the ranks of a run say to one another beside its gradients: sums, decisions, and work of the first alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from abyssal.errors import AbyssalError

T = TypeVar("T")
#: How long ranks wait for work that the first does for all, such as preparing data.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """All ranks of a run; one process without a group is the only rank, and everything here costs it nothing."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    control: Any = None  # the process group (gloo) of decisions; none: one process

    @classmethod
    def joined(cls, local_world_size: int = 1) -> Self:
        """Return those of the default process group, if there is one; called by all ranks."""
        if not dist.is_initialized():
            return cls()
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), local_world_size, control)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks, and writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks, in place where there are several."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def most(self, value: int) -> int:
        """Return the largest of all ranks' values; they come to this at about the same time."""
        if self.world_size == 1:
            return value
        found = torch.tensor([value])
        dist.all_reduce(found, dist.ReduceOp.MAX)  # not over `control`, whose patience would hide a rank that hangs
        return int(found)

    def first(self, work: Callable[[], T]) -> T:
        """Let the first rank do `work`, and return its result on all; they wait as long as it takes.

        Raises:
            AbyssalError: what the work raised, on all ranks.
        """
        if self.world_size == 1:
            return work()
        result: list[Any] = [None, None]
        unexpected: Exception | None = None
        if self.is_first:
            try:
                result[0] = work()
            except AbyssalError as error:
                result[1] = error
            except Exception as error:  # the others must not wait for a rank that has ended
                result[1], unexpected = AbyssalError(f"rank 0: {error!r}"), error
        dist.broadcast_object_list(result, src=0, group=self.control)
        if unexpected is not None:
            raise unexpected
        if result[1] is not None:
            raise result[1]
        return result[0]  # type: ignore[no-any-return]


#: One process.
ALONE = Ranks()
