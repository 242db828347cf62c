"""The network, to be read beside the paper: attention, feed-forward, block, MTP, transformer."""

from abyssal.model.attention import AbsorbedCore, NaiveCore
from abyssal.model.block import Block
from abyssal.model.context import Context, LatentCache, RouterStatistics
from abyssal.model.initialise import initialise
from abyssal.model.mtp import next_tokens
from abyssal.model.prepared import drop_prepared_weights, prepare_weights
from abyssal.model.stage import Stage
from abyssal.model.transformer import Transformer

__all__ = [
    "AbsorbedCore",
    "Block",
    "Context",
    "LatentCache",
    "NaiveCore",
    "RouterStatistics",
    "Stage",
    "Transformer",
    "drop_prepared_weights",
    "initialise",
    "next_tokens",
    "prepare_weights",
]
