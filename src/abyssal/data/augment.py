"""Augmentation of training documents: fill-in-the-middle, and merged tokens split at random.

Random numbers are a pure function of seed and document, so neither workers nor the other documents change them.
"""

from __future__ import annotations

import unicodedata
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from abyssal.config.run import DataConfig
from abyssal.text.fim import FillInTheMiddle
from abyssal.text.tokenizer import Tokenizer

LINE_ENDS = "\r\n"


class TrainingEncoder:
    """Turns training documents into token ids, augmented at the rates of the recipe."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, seed: int) -> None:
        """Take the tokenizer, the rates and the seed.

        Raises:
            DataError: a rate asks for tokens that the tokenizer lacks.
        """
        self._tokenizer = tokenizer
        self._fim_rate, self._split_rate = config.fim_rate, config.split_merged_rate
        self._fim = FillInTheMiddle(tokenizer) if config.fim_rate else None
        self._seed = seed

    def encode(self, text: str, key: str) -> list[int]:
        """Return the ids of a training document, without BOS and EOS.

        With probability `data.fim_rate` it becomes begin, prefix, hole, suffix, end, middle, cut at two characters'
        borders of which all are alike. Each token of punctuation together with line ends is split in two
        with probability `data.split_merged_rate`. Paper: §4.1.
        """
        ids = self._encode_with_fim(text, key)
        return self._split_merged(ids, key) if self._split_rate else ids

    def _encode_with_fim(self, text: str, key: str) -> list[int]:
        if self._fim is not None:
            chance, *borders = self._random("fim", key, 3)
            if chance < self._fim_rate:
                first, second = sorted(int(border * (len(text) + 1)) for border in borders)
                return self._fim.encode(text, first, second)
        return self._tokenizer.encode_document(text)

    def _split_merged(self, ids: list[int], key: str) -> list[int]:
        num_merged = sum(token in self.merged_tokens for token in ids)
        chances = iter(self._random("split", key, num_merged))
        split_ids = list[int]()
        for token in ids:
            parts = self.merged_tokens.get(token)
            split_ids += parts if parts is not None and next(chances) < self._split_rate else [token]
        return split_ids

    @cached_property
    def merged_tokens(self) -> dict[int, list[int]]:
        """Every token of punctuation together with line ends, and the ids of its two parts."""
        parts = {}
        for token in range(self._tokenizer.vocab_size):
            text = self._tokenizer.decode([token])
            marks = text.rstrip(LINE_ENDS)
            if marks != text and _is_punctuation(marks):
                encode = self._tokenizer.encode_document
                parts[token] = encode(marks) + encode(text[len(marks) :])
        return parts

    def _random(self, purpose: str, key: str, count: int) -> NDArray[np.float64]:
        """Return numbers in [0, 1)."""
        message = f"{purpose}:{self._seed}:{key}".encode(errors="surrogateescape")
        digest = int.from_bytes(blake2b(message, digest_size=16).digest(), "big")
        # raw output, which numpy keeps as it is; how its distributions are drawn may change
        raw = np.random.Philox(key=digest).random_raw(count)
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _is_punctuation(text: str) -> bool:
    """Whether this is nothing but punctuation and symbols, after at most one space; U+FFFD stands for broken bytes."""
    marks = text.removeprefix(" ")
    return marks != "" and all(unicodedata.category(mark)[0] in "PS" and mark != "\ufffd" for mark in marks)
