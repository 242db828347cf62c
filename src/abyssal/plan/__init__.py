"""What a model and a run cost, worked out from the configuration alone: parameters, FLOPs, memory, steps. No torch."""

from abyssal.plan.flops import TokenFlops, TrainingFlops, decode_flops, forward_flops, training_flops
from abyssal.plan.memory import cache_bytes_per_token
from abyssal.plan.parameters import ParameterCount, ParametersByPart, count_parameters
from abyssal.plan.steps import count_steps

__all__ = [
    "ParameterCount",
    "ParametersByPart",
    "TokenFlops",
    "TrainingFlops",
    "cache_bytes_per_token",
    "count_parameters",
    "count_steps",
    "decode_flops",
    "forward_flops",
    "training_flops",
]
