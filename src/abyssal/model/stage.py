"""Which part of the network a model is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from abyssal.config import ModelConfig


@dataclass(frozen=True)
class Stage:
    """A consecutive part of the network, as one rank of a pipeline holds it; the whole network is the stage with all.

    `layers` are the main layers by their global numbers. A stage with the embedding takes token ids, any other the
    hidden states of the stage before. A stage with the head ends with the final norm. MTP modules go on from there.
    """

    layers: range
    has_embedding: bool = False
    has_head: bool = False
    has_mtp: bool = False

    @classmethod
    def whole(cls, config: ModelConfig) -> Self:
        """Return the stage that has everything."""
        return cls(range(config.num_hidden_layers), has_embedding=True, has_head=True, has_mtp=True)

    def check(self, config: ModelConfig) -> None:
        """Raise a ValueError where `config` has no such stage."""
        if not set(self.layers) <= set(range(config.num_hidden_layers)):
            raise ValueError(f"{self}: main layers are 0 .. {config.num_hidden_layers - 1}")
        if self.has_mtp and not self.has_head:
            raise ValueError(
                f"{self}: MTP modules start from the output of the final norm, so they stand with the head"
            )

    def block_numbers(self, config: ModelConfig) -> list[int]:
        """Return the global numbers of all blocks here, main layers first; MTP modules count on from the last one."""
        return [*self.layers, *(range(config.num_hidden_layers, config.num_layers) if self.has_mtp else ())]

    def needs_embedding(self, config: ModelConfig) -> bool:
        """Say whether the embedding's weight is here: to embed, for what MTP modules read, or as a tied head."""
        has_modules = self.has_mtp and config.num_nextn_predict_layers > 0
        return self.has_embedding or has_modules or (self.has_head and config.tie_word_embeddings)
