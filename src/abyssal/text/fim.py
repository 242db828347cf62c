"""Fill-in-the-middle: a document is learnt as prefix, suffix, and then the middle. Paper: §4.1, PSM."""

from __future__ import annotations

from collections.abc import Sequence

from abyssal.errors import DataError
from abyssal.text.special_tokens import FIM_BEGIN, FIM_END, FIM_HOLE
from abyssal.text.tokenizer import Tokenizer

TOKENS = (FIM_BEGIN, FIM_HOLE, FIM_END)


def missing_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return which of the three tokens `tokenizer` lacks."""
    return [name for name in TOKENS if not tokenizer.has(name)]


class FillInTheMiddle:
    """Token ids of documents in the order prefix, suffix, middle, and back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look the three tokens up.

        Raises:
            DataError: the tokenizer lacks one of them.
        """
        if missing := missing_tokens(tokenizer):
            raise DataError(
                f"data.fim_rate: must be 0 with this tokenizer, which lacks {', '.join(missing)}; add them to it"
            )
        self._tokenizer = tokenizer
        self.begin_id, self.hole_id, self.end_id = (tokenizer.encode(name)[0] for name in TOKENS)

    def encode(self, text: str, first: int, second: int) -> list[int]:
        """Return begin, prefix, hole, suffix, end, middle; the middle is text[first:second].

        Args:
            text: the document.
            first: where the middle begins, in characters.
            second: where the suffix begins, first <= second <= len(text).
        """
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        return [*self.prompt(prefix, suffix), *self._tokenizer.encode_document(middle)]

    def prompt(self, prefix: str, suffix: str) -> list[int]:
        """Return begin, prefix, hole, suffix, end: what a model is given to write the middle, which EOS then ends."""
        encode = self._tokenizer.encode_document
        return [self.begin_id, *encode(prefix), self.hole_id, *encode(suffix), self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the document, whether it was rearranged or not; BOS and EOS are left out."""
        ids = list(ids)
        if self.begin_id not in ids:
            return self._tokenizer.decode(ids)
        begin, hole, end = (ids.index(one) for one in (self.begin_id, self.hole_id, self.end_id))
        prefix, suffix, middle = ids[begin + 1 : hole], ids[hole + 1 : end], ids[end + 1 :]
        return "".join(self._tokenizer.decode(part) for part in (prefix, middle, suffix))
