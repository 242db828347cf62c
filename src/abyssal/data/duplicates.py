"""Which documents are left out because another has the same text, or nearly so."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from abyssal.config.run import DataConfig
from abyssal.data.optional import optional

#: Documents are compared by their runs of so many words.
SHINGLE_WORDS = 5
#: Numbers of a signature.
PERMUTATIONS = 128
#: Of the pairs of documents exactly at the threshold, at least this share is found and compared.
RECALL = 0.99
SEED = 1


def bands_for(threshold: float) -> int:
    """Return into how many bands a signature is cut: as few as find enough, for fewer find less that is not alike."""
    for bands in (4, 8, 16, 32, 64):
        if 1 - (1 - threshold ** (PERMUTATIONS // bands)) ** bands >= RECALL:
            return bands
    return PERMUTATIONS


class NearDuplicates:
    """Remembers documents by MinHash, and finds one that is like them.

    Likeness is the Jaccard index of the sets of runs of five words, as 128 hashes estimate it.
    """

    def __init__(self, threshold: float) -> None:
        """Remember nothing yet; documents are near from this likeness on.

        Raises:
            DataError: the library is missing.
        """
        self._rensa = optional("rensa", "duplicates", 'data.duplicates="near"')
        self._threshold = threshold
        bands = bands_for(threshold)
        self._candidates = self._rensa.RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=bands)
        self._signatures: list[Any] = []

    def signature(self, text: str) -> Any:
        """Return what documents are compared by."""
        words = re.findall(r"\w+|[^\w\s]", text)
        found = self._rensa.RMinHash(num_perm=PERMUTATIONS, seed=SEED)
        starts = range(max(len(words) - SHINGLE_WORDS, 0) + 1)
        found.update([" ".join(words[start : start + SHINGLE_WORDS]) for start in starts])
        return found

    def known(self, signature: Any) -> bool:
        """Whether a document like this was remembered."""
        candidates = self._candidates.query(signature)
        return any(self._signatures[place].jaccard(signature) >= self._threshold for place in candidates)

    def remember(self, signature: Any) -> None:
        """Find documents like this one from now on."""
        self._candidates.insert(len(self._signatures), signature)
        self._signatures.append(signature)


Reason = Literal["duplicate", "near_duplicate"]


class Duplicates:
    """Decides document after document, those that are only tested on first; an earlier one is never left out."""

    def __init__(self, config: DataConfig, digest: Callable[[str], bytes]) -> None:
        """Know nothing yet.

        Args:
            config: with the rule, `exact` or `near`.
            digest: what two documents share only if they are equal.

        Raises:
            DataError: the rule needs a library that is missing.
        """
        self._digest = digest
        self._known = set[bytes]()
        self._near = NearDuplicates(config.near_threshold) if config.duplicates == "near" else None

    def protect(self, text: str) -> None:
        """Remember a document that is only tested on."""
        self._known.add(self._digest(text))
        if self._near is not None:
            self._near.remember(self._near.signature(text))

    def reason(self, text: str) -> Reason | None:
        """Return why a training document is left out, and remember it if it is not."""
        digest = self._digest(text)
        if digest in self._known:
            return "duplicate"
        if self._near is not None:
            signature = self._near.signature(text)
            if self._near.known(signature):
                return "near_duplicate"
            self._near.remember(signature)
        self._known.add(digest)
        return None
