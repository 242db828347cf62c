"""Training states to resume from: directories of torch.distributed.checkpoint (DCP), whole or not at all."""

from abyssal.checkpoint.state.background_writer import StateWriter
from abyssal.checkpoint.state.load import (
    adamw_tensors,
    check_state,
    latest_state,
    load_state,
    read_progress,
    remove_state,
    save_state,
    states,
)
from abyssal.checkpoint.state.local_shards import leaves

__all__ = [
    "StateWriter",
    "adamw_tensors",
    "check_state",
    "latest_state",
    "leaves",
    "load_state",
    "read_progress",
    "remove_state",
    "save_state",
    "states",
]
