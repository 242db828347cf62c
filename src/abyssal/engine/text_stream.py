"""From generated tokens to a stream of text that ends where it should."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from abyssal.engine.generate import generate, new_token_limit
from abyssal.engine.kept_cache import KeptCache
from abyssal.engine.load import LoadedModel
from abyssal.engine.sampler import GeneratedToken
from abyssal.engine.sampling import SamplingParameters
from abyssal.engine.speculate import Speculation, generate_speculatively
from abyssal.engine.stop_strings import StopStringFilter
from abyssal.text.tokenizer import Tokenizer

#: Why a text ended: a token of the model's, a stop string of the request's, or no room for more tokens.
FinishReason = Literal["eos", "stop", "length"]


class TextStream:
    """The text of ids that come one by one: whole characters only, and nothing from the first stop string on."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Start an empty text that ends before any string in `stop`."""
        self._decoder = tokenizer.stream()
        self._filter = StopStringFilter(stop)

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one has."""
        return self._filter.matched

    def push(self, token: int) -> str:
        """Take the next id and return the text that is certain by now, perhaps none."""
        return self._filter.push(self._decoder.push(token))

    def flush(self) -> str:
        """Return what was held back, U+FFFD for an unfinished character, once no more ids will come."""
        return self._filter.push(self._decoder.flush()) + self._filter.flush()


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one new token adds to the text, perhaps nothing; the last chunk of a text says why it ended."""

    text: str
    token: GeneratedToken
    finish_reason: FinishReason | None = None


def stream_text(
    loaded: LoadedModel,
    prompt_ids: Sequence[int],
    parameters: SamplingParameters,
    speculation: Speculation | None = None,
    kept: KeptCache | None = None,
) -> Iterator[Chunk]:
    """Yield the sequence of a prompt, one chunk a token; with drafts if there is a `speculation`, which counts.

    What `kept` holds of the prompt's beginning is not run again.

    Raises:
        UsageError, ModelDirectoryError: as `generate` does.
    """
    if speculation is None:
        tokens = generate(loaded.model, prompt_ids, parameters, loaded.eos_ids, kept)
    else:
        tokens = generate_speculatively(loaded.model, prompt_ids, parameters, loaded.eos_ids, speculation, kept)
    limit = new_token_limit(loaded.config, len(prompt_ids), parameters.max_new_tokens)
    return _chunks(loaded, tokens, parameters.stop, limit)


def _chunks(loaded: LoadedModel, tokens: Iterator[GeneratedToken], stop: Sequence[str], limit: int) -> Iterator[Chunk]:
    """Join `tokens`, at most `limit`, to text; see `stream_text`."""
    stream = TextStream(loaded.tokenizer, stop)
    for number, token in enumerate(tokens, start=1):
        ended = token.id in loaded.eos_ids
        text = "" if ended else stream.push(token.id)  # an end token is no text, also where decoding would spell it out
        if ended or number == limit:
            text += stream.flush()
        reason: FinishReason | None = None
        if stream.matched is not None:
            reason = "stop"
        elif ended:
            reason = "eos"
        elif number == limit:
            reason = "length"
        yield Chunk(text, token, reason)
        if reason is not None:
            return
