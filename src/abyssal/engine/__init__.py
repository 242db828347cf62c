"""From a model directory to a stream of tokens and text, over the latent cache."""

from abyssal.engine.generate import GeneratedToken, generate, new_token_limit
from abyssal.engine.latent_cache import ContiguousLatentCache
from abyssal.engine.load import LoadedModel, load_model
from abyssal.engine.prepare import prepare_for_inference, use_latent_cache
from abyssal.engine.sampling import SamplingParameters, sample
from abyssal.engine.speculate import Speculation, generate_speculatively, speculation_for
from abyssal.engine.text_stream import Chunk, FinishReason, TextStream, stream_text

__all__ = [
    "Chunk",
    "ContiguousLatentCache",
    "FinishReason",
    "GeneratedToken",
    "LoadedModel",
    "SamplingParameters",
    "Speculation",
    "TextStream",
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
