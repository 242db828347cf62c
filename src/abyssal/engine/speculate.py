"""Speculation: the MTP modules draft a few tokens, one pass of the main model verifies them all. Paper: §2.2.

The token at place i + 1 is sampled from the main model's output at place i, whatever was drafted; a draft only decides
whether the pass that computes this output has been made already. So the text has the distribution that it has without
drafts, and as one random number is drawn a token, the same seed even gives the same tokens (up to rounding, since a
pass over several tokens may round otherwise than passes over one).

Legend: t tokens of one pass, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.engine.generate import PREFILL_TOKENS, check_prompt, run_pass
from abyssal.engine.kept_cache import KeptCache, shared_length
from abyssal.engine.latent_cache import ContiguousLatentCache
from abyssal.engine.sampler import GeneratedToken, Sampler
from abyssal.engine.sampling import SamplingParameters
from abyssal.errors import UsageError
from abyssal.model import Transformer


@dataclass
class Speculation:
    """How many tokens are drafted for a pass, and what became of them so far; several texts may share one.

    `passes` are those that verify, not those over a prompt, and `tokens` what came of them. `drafted` and `accepted`
    count by the draft's place in its pass. A draft is accepted where the main model samples the same token and all
    drafts before it were accepted.

    Raises:
        UsageError: `num_drafts` is below 1.
    """

    num_drafts: int
    passes: int = 0
    tokens: int = 0
    drafted: list[int] = field(init=False)
    accepted: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Check the number of drafts and start the counts by place."""
        if self.num_drafts < 1:
            raise UsageError(f"drafts={self.num_drafts}: must be at least 1; each is one token, proposed in advance")
        self.drafted, self.accepted = [0] * self.num_drafts, [0] * self.num_drafts

    def count_pass(self, drafts: int) -> None:
        """Count a pass that verifies so many drafts."""
        self.passes += 1
        for place in range(drafts):
            self.drafted[place] += 1

    def count_token(self, place: int, *, accepted: bool) -> None:
        """Count a token that came of the pass, at the place of a draft or behind them all."""
        self.tokens += 1
        if accepted:
            self.accepted[place] += 1

    def __str__(self) -> str:
        """Say what became of the drafts, in one line."""
        if not any(self.drafted):
            return "nothing was drafted"
        pairs = list(zip(self.accepted, self.drafted, strict=True))
        places = ", ".join(f"{a}/{d}" for a, d in pairs if d)
        by_place = f" (by place: {places})" if len(pairs) > 1 else ""
        accepted, drafted = sum(self.accepted), sum(self.drafted)
        share = f"{accepted}/{drafted} drafts accepted, {accepted / drafted:.0%}{by_place}"
        return f"{share}; {self.tokens / self.passes:.2f} tokens a pass"


def speculation_for(config: ModelConfig, num_drafts: int | None = None) -> Speculation:
    """Return a fresh `Speculation`, by default with a draft for each MTP module of the model.

    Raises:
        UsageError: the model has no MTP module, or `num_drafts` is below 1.
    """
    modules = config.num_nextn_predict_layers
    if not modules:
        raise UsageError(
            "speculate: drafts come from MTP modules, and this model has none "
            "(num_nextn_predict_layers=0, or its files leave them out); generate without"
        )
    return Speculation(modules if num_drafts is None else num_drafts)


class MTPDrafter:
    """Proposes the tokens that follow a sequence, by the MTP modules over a latent cache of each one's own.

    Entry i of module k joins what is known up to token i + k - 1 (for k = 1 the main model's output after the final
    norm, else that of the module before) with token i + k, stands at position i and predicts token i + k + 1, as in
    training. Behind the newest entry module k reads the draft of module k - 1. Once all modules are used, the last one
    goes on alone, on its own output after shared_head.norm, an entry a draft.
    """

    def __init__(self, model: Transformer, capacity_tokens: int) -> None:
        """Serve one sequence of up to `capacity_tokens` entries; `model` is prepared by `use_latent_cache`."""
        self._model, self._modules = model, model.mtp_modules
        dtype, device = model.compute_dtype, model.head_weight.device
        self._caches = [
            ContiguousLatentCache(model.config, capacity_tokens, dtype=dtype, device=device, layers=1)
            for _ in self._modules
        ]
        self._tokens: list[int] = []  # of the whole sequence
        self._settled = 0  # entries that every module holds, from tokens of the sequence alone
        self._hidden = torch.empty(0, model.config.hidden_size, dtype=dtype, device=device)  # of the entries after them

    def reusable(self, prompt_ids: Sequence[int]) -> int:
        """Return how many entries came of tokens that `prompt_ids` begins with, so that `rewind` can go back there."""
        shared = shared_length(self._tokens, prompt_ids)
        return min(self._settled, max(shared - len(self._modules), 0))

    def rewind(self, length: int, capacity_tokens: int) -> None:
        """Go back to the first `length` tokens, at most what is `reusable`, with room for `capacity_tokens` entries.

        What comes next is the main model's output at the place behind them.
        """
        for cache in self._caches:
            cache.truncate(0, length)
            cache.reserve(capacity_tokens)
        del self._tokens[length:]
        self._settled = length
        self._hidden = self._hidden[:0]

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """Take further tokens of the sequence, and further outputs of the main model.

        Args:
            tokens: ids; before a draft, there is one more of them altogether than there are hidden states.
            hidden: [t, D], after the final norm, of the places that follow those given before.
        """
        self._tokens += tokens
        self._hidden = torch.cat((self._hidden, hidden))
        if len(self._hidden) < PREFILL_TOKENS:
            return
        # Do not keep the outputs of a whole prompt; a draft needs the newest entry, so that one waits.
        ready = min(len(self._tokens) - len(self._modules) - self._settled, len(self._hidden) - 1)
        if ready > 0:
            self._run(ready)
            self._settle(self._settled + ready)

    @torch.inference_mode()
    def draft(self, count: int) -> list[int]:
        """Return `count` tokens to follow the newest one, each the most probable to its module; once an `extend`."""
        if count < 1:
            return []
        drafts, h = self._run(len(self._hidden))
        while len(drafts) < count:
            ctx = self._model.with_rotary(self._caches[-1].begin((1,)))
            h = self._modules[-1].predict(h, self._embed(drafts[-1:]), ctx)  # [1, D]
            drafts.append(self._likeliest(h))
        self._settle(max(len(self._tokens) - len(self._modules), 0))
        return drafts[:count]

    def _run(self, count: int) -> tuple[list[int], Tensor]:
        """Run all modules over the next `count` entries.

        Returns:
            The tokens predicted beyond the newest one, and the last module's output at the last entry, [1, D].
        """
        known = self._tokens[self._settled :]
        num_known, h = len(known), self._hidden[:count]
        for k, (module, cache) in enumerate(zip(self._modules, self._caches, strict=True), start=1):
            ctx = self._model.with_rotary(cache.begin((count,)))
            h = module.predict(h, self._embed(known[k : k + count]), ctx)  # [t, D]
            if k + count == len(known):
                known.append(self._likeliest(h[-1:]))
        return known[num_known:], h[-1:]

    def _settle(self, settled: int) -> None:
        """Keep the first `settled` entries, which no draft went into, and the main model's outputs for the others."""
        for cache in self._caches:
            cache.truncate(0, settled)
        self._hidden = self._hidden[settled - self._settled :]
        self._settled = settled

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        """Return the embeddings [t, D] of ids."""
        return self._model.embed(torch.tensor(tokens, device=self._model.head_weight.device))

    def _likeliest(self, h: Tensor) -> int:
        """Return the most probable token after an output [1, D]."""
        return int(self._model.logits(h[0]).argmax())


def generate_speculatively(
    model: Transformer,
    prompt_ids: Sequence[int],
    parameters: SamplingParameters,
    eos_ids: Collection[int],
    speculation: Speculation,
    kept: KeptCache | None = None,
) -> Iterator[GeneratedToken]:
    """Yield the tokens that `generate` yields, several of them for a pass of the main model.

    Args:
        model: with MTP modules, prepared by `use_latent_cache`; not changed.
        prompt_ids: at least one token.
        parameters: see there; drafts do not depend on them.
        eos_ids: tokens that end the text.
        speculation: how much to draft; its counts grow.
        kept: what earlier calls left, the caches of the MTP modules among it.

    Raises:
        UsageError: when called: an empty or too long prompt, or an id that the model does not have.
        ModelDirectoryError: while iterating: the logits are not finite.
    """
    limit = check_prompt(model, prompt_ids, parameters)
    kept = kept or KeptCache(model)
    return _continue(model, prompt_ids, parameters, frozenset(eos_ids), limit, speculation, kept)


def _continue(
    model: Transformer,
    prompt_ids: Sequence[int],
    parameters: SamplingParameters,
    eos_ids: frozenset[int],
    limit: int,
    speculation: Speculation,
    kept: KeptCache,
) -> Iterator[GeneratedToken]:
    """Yield up to `limit` tokens; see `generate_speculatively`."""
    capacity = len(prompt_ids) + limit - 1  # the last token is never fed back, and no draft stands behind it
    device = model.head_weight.device
    cache = kept.cache
    drafter = kept.drafter = kept.drafter or MTPDrafter(model, capacity)
    start = kept.resume(prompt_ids, capacity, drafter.reusable(prompt_ids))
    drafter.rewind(start, capacity)
    sampler = Sampler(parameters, prompt_ids)
    for part in torch.tensor(prompt_ids[start:], device=device).split(PREFILL_TOKENS):
        kept.note(part.tolist())
        hidden = run_pass(model, part, cache)  # [t, D]
        drafter.extend(part.tolist(), hidden)
    token = sampler.choose(_logits(model, hidden[-1:])[0])
    drafter.extend([token.id], hidden[:0])
    yield token
    left = 0 if token.id in eos_ids else limit - 1
    while left:
        drafts = drafter.draft(min(speculation.num_drafts, left - 1))
        kept.note([token.id, *drafts])
        hidden = run_pass(model, torch.tensor([token.id, *drafts], device=device), cache)  # [1 + drafts, D]
        speculation.count_pass(len(drafts))
        sampled: list[int] = []
        for place_logits, draft in zip(_logits(model, hidden), [*drafts, None], strict=True):
            token = sampler.choose(place_logits)
            speculation.count_token(len(sampled), accepted=token.id == draft)
            sampled.append(token.id)
            left -= 1
            yield token
            if token.id in eos_ids:
                return
            if token.id != draft:
                break
        cache.truncate(0, cache.lengths[0] - (1 + len(drafts)) + len(sampled))
        drafter.extend(sampled, hidden[: len(sampled)])


@torch.inference_mode()
def _logits(model: Transformer, hidden: Tensor) -> Tensor:
    """Apply the output head: [t, D] -> [t, V]."""
    return model.logits(hidden)
