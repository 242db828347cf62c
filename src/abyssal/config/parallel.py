"""How a run is spread over ranks."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from abyssal.config.frozen import Frozen


class ParallelConfig(Frozen):
    """Degrees of parallelism; with every size 1 a run is one process. Paper: §3.2.

    A pipeline stage has dp_replicate_size * dp_shard_size ranks, each with sequences of its own. Its experts are spread
    over ep_size neighbours among the sharded ones, as published.
    """

    pp_size: PositiveInt = Field(default=1, description="pipeline stages")
    ep_size: PositiveInt = Field(default=1, description="ranks that the experts of a layer are spread over")
    dp_replicate_size: PositiveInt = Field(default=1, description="copies of the sharded state")
    dp_shard_size: NonNegativeInt = Field(
        default=0, description="ranks that the state is sharded over, a multiple of ep_size; 0: all that are left"
    )
    zero_stage: Literal[1, 2, 3] = Field(
        default=1, description="what is sharded: 1 moments and master weights, 2 gradients too, 3 weights in use too"
    )
    node_size: NonNegativeInt = Field(default=0, description="ranks of a node; 0: as the launcher says")
    dispatch: Literal["direct", "node_limited"] = Field(
        default="direct", description="how rows reach their experts; node_limited: once to each node, then on within it"
    )
    dispatch_dtype: Literal["compute", "fp8"] = Field(
        default="compute", description="what rows are sent to experts in; they always come back in the compute dtype"
    )
    silence_s: PositiveFloat = Field(
        default=30.0, description="a rank that gives no sign of life for so many seconds is named, and ends the run"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dp_shard_size % self.ep_size:
            below, size = self.dp_shard_size // self.ep_size * self.ep_size, self.ep_size
            nearest = ", ".join(str(n) for n in (below, below + size) if n)
            raise ValueError(
                f"dp_shard_size={self.dp_shard_size}: must be a multiple of ep_size={size}; nearest: {nearest}"
            )
        return self
