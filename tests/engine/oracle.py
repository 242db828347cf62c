"""Generation as it is defined, token after token, over nothing but the latents of the tokens before: what the engine
must equal. And an engine that serves one sequence."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abyssal.engine import Detokenizer, Engine, EngineOptions, LoadedModel, Request, SamplingParameters, ScoredToken
from abyssal.engine.sampler import Sampler
from abyssal.model import Context, Transformer


class Latents:
    """The latents of one sequence, layer by layer."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}

    def append(self, layer: int, c_kv: Tensor, k_rope: Tensor) -> list[Tensor]:
        new = torch.cat((c_kv, k_rope), -1)
        self._rows[layer] = torch.cat((self._rows.get(layer, new[:0]), new))
        return [self._rows[layer]]


@torch.inference_mode()
def generate(
    model: Transformer, prompt_ids: Sequence[int], parameters: SamplingParameters, end_ids: Collection[int] = ()
) -> list[ScoredToken]:
    """The prompt in one pass, then each token in a pass of its own, until an end token or the last place."""
    sampler, latents, start, pending = Sampler(parameters, prompt_ids), Latents(), 0, list(prompt_ids)
    tokens: list[ScoredToken] = []
    while len(tokens) < min(parameters.max_new_tokens, model.config.max_position_embeddings - len(prompt_ids)):
        positions = torch.arange(start, start + len(pending))
        hidden = model(torch.tensor(pending), Context((len(pending),), positions, cache=latents))
        tokens.append(sampler.choose(model.logits(hidden[-1:])[0]))
        if tokens[-1].id in end_ids:
            break
        start, pending = start + len(pending), [tokens[-1].id]
    return tokens


class Chunk(NamedTuple):
    """What one token adds to a text."""

    text: str
    token: ScoredToken
    finish_reason: str | None


def generate_text(loaded: LoadedModel, prompt_ids: Sequence[int], parameters: SamplingParameters) -> list[Chunk]:
    """The text of the tokens, up to a stop string."""
    tokens = generate(loaded.model, prompt_ids, parameters, loaded.eos_ids)
    detokenizer = Detokenizer(loaded.tokenizer, parameters.stop)
    chunks: list[Chunk] = []
    for token in tokens:
        ended, last = token.id in loaded.eos_ids, token is tokens[-1]
        text = ("" if ended else detokenizer.push(token.id)) + (detokenizer.flush() if last else "")
        stopped = detokenizer.matched is not None
        chunks.append(Chunk(text, token, "stop" if stopped else "eos" if ended else "length" if last else None))
        if stopped:
            break
    return chunks


def single_stream(
    model: Transformer,
    prompt_ids: Sequence[int],
    parameters: SamplingParameters,
    drafts: int = 0,
    end_ids: Collection[int] = (),
    **options: Any,
) -> Iterator[ScoredToken]:
    """The tokens that an engine of its own streams for one request."""
    engine = Engine(model, EngineOptions(**{**vars(EngineOptions.single_stream(drafts)), **options}), end_ids=end_ids)
    outputs = engine.stream(Request(prompt_ids, parameters))
    return (output.token for output in outputs if output.token is not None)
