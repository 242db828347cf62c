"""Training states to resume from: directories of torch.distributed.checkpoint (DCP), whole or not at all."""

from abyssal.checkpoint.state.background_writer import StateWriter
from abyssal.checkpoint.state.folders import latest_state, remove_state, states, step_of
from abyssal.checkpoint.state.integrity import check_state, set_damaged_states_aside
from abyssal.checkpoint.state.load import load_state, read_progress
from abyssal.checkpoint.state.local_shards import named_tensors
from abyssal.checkpoint.state.save import save_state

__all__ = [
    "StateWriter",
    "check_state",
    "latest_state",
    "load_state",
    "named_tensors",
    "read_progress",
    "remove_state",
    "save_state",
    "set_damaged_states_aside",
    "states",
    "step_of",
]
