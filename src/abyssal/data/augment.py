"""What training documents go through on their way to tokens: fill-in-the-middle, merged tokens taken apart.

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


class TrainingText:
    """Turns training documents into token ids, under the rates of the recipe."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, seed: int) -> None:
        """Fix tokenizer, rates and seed.

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
        borders of which all are alike. Of the tokens that are punctuation and line ends in one, each is taken apart
        with probability `data.split_merged_rate`. Paper: §4.1.
        """
        ids = self._rearranged(text, key)
        return self._taken_apart(ids, key) if self._split_rate else ids

    def _rearranged(self, text: str, key: str) -> list[int]:
        if self._fim is not None:
            chance, *borders = self._random("fim", key, 3)
            if chance < self._fim_rate:
                first, second = sorted(int(border * (len(text) + 1)) for border in borders)
                return self._fim.encode(text, first, second)
        return self._tokenizer.encode_document(text)

    def _taken_apart(self, ids: list[int], key: str) -> list[int]:
        places = [place for place, token in enumerate(ids) if token in self.merged]
        chances = self._random("split", key, len(places))
        found, done = list[int](), 0
        for place, chance in zip(places, chances, strict=True):
            if chance < self._split_rate:
                found += [*ids[done:place], *self.merged[ids[place]]]
                done = place + 1
        return found + ids[done:]

    @cached_property
    def merged(self) -> dict[int, list[int]]:
        """Every token that is punctuation and line ends in one, and the ids of the two parts."""
        found = {}
        for token in range(self._tokenizer.vocab_size):
            text = self._tokenizer.decode([token])
            marks = text.rstrip(LINE_ENDS)
            if marks != text and _is_punctuation(marks):
                encode = self._tokenizer.encode_document
                found[token] = encode(marks) + encode(text[len(marks) :])
        return found

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
