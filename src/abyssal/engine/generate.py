"""One prompt to tokens: the prompt through the model in a few passes, then token by token over the latent cache.

Legend: V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.engine.kept_cache import KeptCache
from abyssal.engine.latent_cache import ContiguousLatentCache
from abyssal.engine.sampler import GeneratedToken, Sampler
from abyssal.engine.sampling import SamplingParameters
from abyssal.errors import UsageError
from abyssal.model import Transformer

#: Prompt tokens a pass takes: enough for full matrix products, also of the experts.
PREFILL_TOKENS = 512


def new_token_limit(config: ModelConfig, prompt_tokens: int, max_new_tokens: int) -> int:
    """Return how many tokens can follow a prompt: `max_new_tokens`, or fewer where the context ends before.

    Raises:
        UsageError: the prompt leaves no room for a single one.
    """
    room = config.max_position_embeddings - prompt_tokens
    if room < 1:
        raise UsageError(
            f"prompt: has {prompt_tokens} tokens, but the model can attend to {config.max_position_embeddings}, "
            f"one of them new, so at most {config.max_position_embeddings - 1} are possible; shorten it"
        )
    return min(max_new_tokens, room)


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    parameters: SamplingParameters,
    eos_ids: Collection[int] = (),
    kept: KeptCache | None = None,
) -> Iterator[GeneratedToken]:
    """Yield the tokens that follow a prompt, each as soon as it is chosen.

    The last one is the first of `eos_ids` that comes up, or the one with which `new_token_limit` is reached. Stop
    strings are not looked at here, since they are a matter of text. Each call has a cache of its own unless it is given
    one, so several may run by turns on one model. The same seed gives the same tokens.

    Args:
        model: prepared by `use_latent_cache` or `prepare_for_inference`; not changed.
        prompt_ids: at least one token.
        parameters: see there.
        eos_ids: tokens that end the text.
        kept: what earlier calls left; the part of it that this prompt begins with is not run again.

    Raises:
        UsageError: when called: an empty or too long prompt, or an id that the model does not have.
        ModelDirectoryError: while iterating: the logits are not finite.
    """
    limit = check_prompt(model, prompt_ids, parameters)
    return _continue(model, prompt_ids, parameters, frozenset(eos_ids), limit, kept or KeptCache(model))


def check_prompt(model: Transformer, prompt_ids: Sequence[int], parameters: SamplingParameters) -> int:
    """Return how many tokens can follow; see `new_token_limit`.

    Raises:
        UsageError: an empty or too long prompt, or an id that the model does not have.
    """
    if not prompt_ids:
        raise UsageError("prompt: has no tokens; give some text, or let it start with the BOS token")
    vocab_size = model.config.vocab_size
    for token in (min(prompt_ids), max(prompt_ids)):
        if not 0 <= token < vocab_size:
            raise UsageError(f"prompt: token id {token} is not one of the model's, 0 to {vocab_size - 1}")
    return new_token_limit(model.config, len(prompt_ids), parameters.max_new_tokens)


def _continue(
    model: Transformer,
    prompt_ids: Sequence[int],
    parameters: SamplingParameters,
    eos_ids: frozenset[int],
    limit: int,
    kept: KeptCache,
) -> Iterator[GeneratedToken]:
    """Yield up to `limit` tokens; see `generate`."""
    device = model.head_weight.device
    sampler = Sampler(parameters, prompt_ids)
    pending = prompt_ids[kept.resume(prompt_ids, len(prompt_ids) + limit - 1) :]  # the last token is never fed back
    for _ in range(limit):
        kept.note(pending)
        token = sampler.choose(next_logits(model, torch.tensor(pending, device=device), kept.cache))
        yield token
        if token.id in eos_ids:
            return
        pending = [token.id]


@torch.inference_mode()
def next_logits(model: Transformer, tokens: Tensor, cache: ContiguousLatentCache) -> Tensor:
    """Run new tokens through the model and return the logits of what follows the last one.

    Args:
        model: prepared by `use_latent_cache` or `prepare_for_inference`.
        tokens: ids [t], taken in passes of `PREFILL_TOKENS`.
        cache: of one sequence; grows by t.

    Returns:
        [V], the output head being applied to the last token only.
    """
    for part in tokens.split(PREFILL_TOKENS):
        hidden = run_pass(model, part, cache)  # [t, D]
    return model.logits(hidden[-1:])[0]  # [V]; a product of matrices, which reads bf16 twice as fast as one by a vector


@torch.inference_mode()
def run_pass(model: Transformer, tokens: Tensor, cache: ContiguousLatentCache) -> Tensor:
    """Run new tokens [t] through the main model in one pass and return its hidden states after the final norm, [t, D].

    Args:
        model: prepared by `use_latent_cache` or `prepare_for_inference`.
        tokens: ids [t].
        cache: of one sequence; grows by t.
    """
    expected = cache.lengths[0] + len(tokens)
    hidden: Tensor = model(tokens, cache.begin((len(tokens),)))
    if cache.lengths[0] != expected:  # another core attends to the new tokens alone, and nobody would notice
        raise RuntimeError("the model's layers do not write to the latent cache; call use_latent_cache(model) first")
    return hidden
