"""Experts across ranks: rows go to the ranks that hold their experts, and come back."""

from abyssal.parallel.dispatch.build import expert_parallel_dispatcher
from abyssal.parallel.dispatch.dispatcher import ExpertParallelDispatcher
from abyssal.parallel.dispatch.volume import CommunicationVolume

__all__ = ["CommunicationVolume", "ExpertParallelDispatcher", "expert_parallel_dispatcher"]
