"""Deduplication: which documents are left out because another has the same text, or nearly the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from abyssal.config.run import DataConfig
from abyssal.data.optional import import_optional

#: Documents are compared by their runs of this many words.
SHINGLE_WORDS = 5
#: Hashes of a MinHash signature.
PERMUTATIONS = 128
#: Of the pairs of documents exactly at the threshold, at least this fraction is compared.
RECALL = 0.99
SEED = 1


def bands_for(threshold: float) -> int:
    """Return the fewest LSH bands of a signature with enough recall; more bands would compare more unlike pairs."""
    for bands in (4, 8, 16, 32, 64):
        if 1 - (1 - threshold ** (PERMUTATIONS // bands)) ** bands >= RECALL:
            return bands
    return PERMUTATIONS


class NearDuplicateIndex:
    """An index of documents by MinHash, which tells whether it holds one similar to a given one.

    Similarity is the Jaccard index of the sets of runs of five words, estimated by 128 hashes.
    """

    def __init__(self, threshold: float) -> None:
        """Start empty; documents at least this similar are near duplicates.

        Raises:
            DataError: the library is missing.
        """
        self._rensa = import_optional("rensa", "duplicates", 'data.duplicates="near"')
        self._threshold = threshold
        bands = bands_for(threshold)
        self._candidates = self._rensa.RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=bands)
        self._signatures: list[Any] = []

    def signature(self, text: str) -> Any:
        """Return the MinHash signature of a document."""
        words = re.findall(r"\w+|[^\w\s]", text)
        signature = self._rensa.RMinHash(num_perm=PERMUTATIONS, seed=SEED)
        starts = range(max(len(words) - SHINGLE_WORDS, 0) + 1)
        signature.update([" ".join(words[start : start + SHINGLE_WORDS]) for start in starts])
        return signature

    def contains(self, signature: Any) -> bool:
        """Whether a similar document was added."""
        candidates = self._candidates.query(signature)
        return any(self._signatures[place].jaccard(signature) >= self._threshold for place in candidates)

    def add(self, signature: Any) -> None:
        """Add a document."""
        self._candidates.insert(len(self._signatures), signature)
        self._signatures.append(signature)


DropReason = Literal["duplicate", "near_duplicate"]


class DuplicateFilter:
    """Decides which training documents to drop, in order; documents to test on are added first and never dropped."""

    def __init__(self, config: DataConfig, digest: Callable[[str], bytes]) -> None:
        """Start empty.

        Args:
            config: with the rule, `exact` or `near`.
            digest: of a document's text.

        Raises:
            DataError: the rule needs a library that is missing.
        """
        self._digest = digest
        self._digests = set[bytes]()
        self._near = NearDuplicateIndex(config.near_threshold) if config.duplicates == "near" else None

    def add_test_document(self, text: str) -> None:
        """Add a document of validation or held-out, which training documents must not repeat."""
        self._digests.add(self._digest(text))
        if self._near is not None:
            self._near.add(self._near.signature(text))

    def drop_reason(self, text: str) -> DropReason | None:
        """Return why a training document is dropped; add it if it is kept."""
        digest = self._digest(text)
        if digest in self._digests:
            return "duplicate"
        if self._near is not None:
            signature = self._near.signature(text)
            if self._near.contains(signature):
                return "near_duplicate"
            self._near.add(signature)
        self._digests.add(digest)
        return None
