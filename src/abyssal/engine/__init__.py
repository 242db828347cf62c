"""From a model directory to streams of tokens and text: one engine, and what its clients need."""

from abyssal.engine.async_engine import AsyncEngine, DrainingError, EngineFailedError, OutputStream, QueueFullError
from abyssal.engine.conversation import Conversation
from abyssal.engine.detokenizer import Detokenizer
from abyssal.engine.engine import Engine
from abyssal.engine.load import LoadedModel, load_model
from abyssal.engine.options import EngineOptions
from abyssal.engine.prepare import prepare_for_inference, use_latent_cache
from abyssal.engine.request import FinishReason, Output, Request, new_token_limit
from abyssal.engine.request_fault import RequestFailedError
from abyssal.engine.sampler import ScoredToken, TokenConstraint
from abyssal.engine.sampling import SamplingParameters, sample
from abyssal.engine.statistics import DraftStatistics, EngineStatistics

__all__ = [
    "AsyncEngine",
    "Conversation",
    "Detokenizer",
    "DraftStatistics",
    "DrainingError",
    "Engine",
    "EngineFailedError",
    "EngineOptions",
    "EngineStatistics",
    "FinishReason",
    "LoadedModel",
    "Output",
    "OutputStream",
    "QueueFullError",
    "Request",
    "RequestFailedError",
    "SamplingParameters",
    "ScoredToken",
    "TokenConstraint",
    "load_model",
    "new_token_limit",
    "prepare_for_inference",
    "sample",
    "use_latent_cache",
]
