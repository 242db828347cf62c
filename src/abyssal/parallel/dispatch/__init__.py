"""Experts across ranks: rows go to the ranks that hold their experts, and come back."""

from abyssal.parallel.dispatch.build import expert_parallel_dispatcher
from abyssal.parallel.dispatch.dispatcher import ExpertParallelDispatcher
from abyssal.parallel.dispatch.exchange import Traffic

__all__ = ["ExpertParallelDispatcher", "Traffic", "expert_parallel_dispatcher"]
