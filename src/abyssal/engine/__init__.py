"""From a model directory to a stream of tokens and text, over the latent cache."""

from abyssal.engine.async_engine import AsyncEngine, DrainingError, EngineFailedError, OutputStream, QueueFullError
from abyssal.engine.conversation import Conversation
from abyssal.engine.engine import Engine, EngineOptions
from abyssal.engine.generate import generate, new_token_limit
from abyssal.engine.kept_cache import KeptCache
from abyssal.engine.latent_cache import ContiguousLatentCache
from abyssal.engine.load import LoadedModel, load_model
from abyssal.engine.prepare import prepare_for_inference, use_latent_cache
from abyssal.engine.request import Output, Request
from abyssal.engine.sampler import GeneratedToken, TokenConstraint
from abyssal.engine.sampling import SamplingParameters, sample
from abyssal.engine.speculate import Speculation, generate_speculatively, speculation_for
from abyssal.engine.statistics import EngineStatistics
from abyssal.engine.text_stream import Chunk, FinishReason, TextStream, stream_text

__all__ = [
    "AsyncEngine",
    "Chunk",
    "ContiguousLatentCache",
    "Conversation",
    "DrainingError",
    "Engine",
    "EngineFailedError",
    "EngineOptions",
    "EngineStatistics",
    "FinishReason",
    "GeneratedToken",
    "KeptCache",
    "LoadedModel",
    "Output",
    "OutputStream",
    "QueueFullError",
    "Request",
    "SamplingParameters",
    "Speculation",
    "TextStream",
    "TokenConstraint",
    "generate",
    "generate_speculatively",
    "load_model",
    "new_token_limit",
    "prepare_for_inference",
    "sample",
    "speculation_for",
    "stream_text",
    "use_latent_cache",
]
