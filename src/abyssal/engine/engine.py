"""Many requests on one model: each step lets every text catch up a little. The heart is `Engine.step`.

Legend: T packed tokens of a pass, M places to sample at, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.engine.draft_payoff import DraftPayoff
from abyssal.engine.drafter import BatchDrafter
from abyssal.engine.expert_record import ExpertRecord
from abyssal.engine.generate import check_prompt
from abyssal.engine.load import LoadedModel
from abyssal.engine.paged_cache import PagedLatentCache, PagedPass, Span
from abyssal.engine.pages import PagePool
from abyssal.engine.request import Continuation, Output, Request
from abyssal.engine.sampler import Sampler
from abyssal.engine.scheduler import Scheduler
from abyssal.engine.speculate import Speculation
from abyssal.engine.statistics import EngineStatistics
from abyssal.engine.text_stream import FinishReason, TextStream
from abyssal.errors import AbyssalError, UsageError
from abyssal.model import Transformer
from abyssal.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine takes on at a time.

    `max_step_tokens` tokens and drafts a pass, `max_running` texts with pages at a time. The latent cache has at most
    `cache_bytes`, and no more than all of `max_running` texts could fill, in pages of `page_tokens` tokens.
    `share_prefixes` lets requests that begin alike share pages. `num_drafts` are made for a pass (None: one for each
    MTP module; 0: none); `adapt_drafts` leaves them out at loads where they do not pay.

    Raises:
        UsageError: a number out of its range.
    """

    max_step_tokens: int = 256
    max_running: int = 16
    page_tokens: int = 16
    cache_bytes: int = 2**30
    share_prefixes: bool = True
    num_drafts: int | None = None
    adapt_drafts: bool = True

    def __post_init__(self) -> None:
        """Check every number."""
        for field in ("max_step_tokens", "max_running", "page_tokens", "cache_bytes"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.max_running > self.max_step_tokens:
            raise UsageError(
                f"max_running={self.max_running}: must be at most max_step_tokens={self.max_step_tokens}, "
                "so that each text that runs can have a token a step"
            )
        if self.num_drafts is not None and self.num_drafts < 0:
            raise UsageError(f"num_drafts={self.num_drafts}: must be at least 0; 0 makes none")


@dataclass(frozen=True)
class _Pass:
    """What came of one pass of the main model."""

    began: float  # by the clock of `time.perf_counter`
    only_decodes: bool
    hidden: Tensor  # [T, D]
    logits: Tensor  # [M, V]
    normalisers: list[float]
    likeliest: list[int]
    experts: list[tuple[tuple[int, ...], ...]]  # of each place, if somebody wants them


class Engine:
    """Continues many prompts at once; not for several threads.

    A text is the same whatever runs beside it, up to rounding: of a request with a seed, or at temperature 0, also
    however it is cut into steps, shared, preempted and drafted.
    """

    def __init__(
        self,
        model: Transformer,
        options: EngineOptions | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        end_ids: Collection[int] = (),
    ) -> None:
        """Serve `model`, which `use_latent_cache` has prepared.

        Args:
            model: its dispatchers of experts are listened to; otherwise not changed.
            options: see there.
            tokenizer: none leaves out all text; stop strings are refused then.
            end_ids: the tokens that end a text, where a request names none.

        Raises:
            UsageError: the options do not fit the model or one another.
        """
        self.options = options = options or EngineOptions()
        config = model.config
        self._model, self._tokenizer, self._end_ids = model, tokenizer, frozenset(end_ids)
        modules = config.num_nextn_predict_layers
        self._num_drafts = modules if options.num_drafts is None else options.num_drafts
        if self._num_drafts and not modules:
            raise UsageError(f"num_drafts={self._num_drafts}: drafts come from MTP modules, and this model has none")
        width = (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_layers * model.compute_dtype.itemsize
        most = options.max_running * -(-config.max_position_embeddings // options.page_tokens)
        num_pages = max(min(options.cache_bytes // (width * options.page_tokens), most), 1)
        self._pool = PagePool(num_pages, options.page_tokens)
        self._payoff = DraftPayoff(adapts=options.adapt_drafts)
        self._scheduler = Scheduler(
            self._pool,
            max_step_tokens=options.max_step_tokens,
            max_running=options.max_running,
            share_prefixes=options.share_prefixes,
            lookahead=lambda running: modules if self._num_drafts and self._payoff.follows(running) else 0,
        )
        self._cache = PagedLatentCache(
            config, num_pages, options.page_tokens, model.compute_dtype, model.head_weight.device
        )
        self._record = ExpertRecord(model)
        self._drafter = BatchDrafter(model, self._cache)
        self._speculation = Speculation(max(self._num_drafts, 1))
        self._requests: dict[int, list[Continuation]] = {}
        self._next_id = self._num_new_tokens = self._num_steps = 0

    @classmethod
    def of(cls, loaded: LoadedModel, options: EngineOptions | None = None) -> Engine:
        """Serve a model directory that `load_model` has read."""
        return cls(loaded.model, options, tokenizer=loaded.tokenizer, end_ids=loaded.eos_ids)

    # Requests

    def check(self, request: Request) -> int:
        """Return how many tokens each text of a request can have; reads nothing that a step changes.

        Raises:
            UsageError: the prompt or a parameter cannot be.
        """
        parameters = request.parameters
        limit = check_prompt(self._model, request.prompt_ids, parameters)
        vocab_size, num_prompt_tokens = self._model.config.vocab_size, len(request.prompt_ids)
        if request.num_continuations < 1:
            raise UsageError(f"num_continuations={request.num_continuations}: must be at least 1")
        if parameters.stop and self._tokenizer is None:
            raise UsageError("stop: needs a tokenizer, and the engine was built without one")
        for token, _ in parameters.logit_bias:
            if token >= vocab_size:
                raise UsageError(f"logit_bias: token id {token} is not one of the model's, 0 to {vocab_size - 1}")
        room = self._pool.num_pages * self._pool.page_tokens
        if num_prompt_tokens + limit - 1 > room:  # the last token is never fed back
            raise UsageError(
                f"prompt: {num_prompt_tokens} tokens and {limit} new ones do not fit the latent cache of {room} "
                "tokens; ask for fewer, or give the engine more cache_bytes"
            )
        return limit

    def add(self, request: Request) -> int:
        """Take on a request and return its number, which its outputs bear.

        Raises:
            UsageError: the prompt or a parameter cannot be; nothing has changed then.
        """
        most = len(request.prompt_ids) + self.check(request)
        request_id, self._next_id = self._next_id, self._next_id + 1
        continuations: list[Continuation] = []
        for index in range(request.num_continuations):
            constraint = None if request.constraint is None else request.constraint()
            continuation = Continuation(
                request_id=request_id,
                index=index,
                tokens=list(request.prompt_ids),
                max_tokens=most,
                sampler=Sampler(request.parameters, request.prompt_ids, index, constraint),
                end_ids=self._end_ids if request.end_ids is None else request.end_ids,
                text=None if self._tokenizer is None else TextStream(self._tokenizer, request.parameters.stop),
                wants_experts=request.wants_experts,
                leader=continuations[0] if continuations and self.options.share_prefixes else None,
            )
            continuations.append(continuation)
            self._scheduler.add(continuation)
        self._requests[request_id] = continuations
        return request_id

    def cancel(self, request_id: int) -> None:
        """Forget a request and free its pages; one that has ended, or never was, is no fault."""
        for continuation in self._requests.pop(request_id, ()):
            if not continuation.is_finished:
                self._scheduler.remove(continuation)

    def is_open(self, request_id: int) -> bool:
        """Whether a text of this request has not ended."""
        return request_id in self._requests

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests)

    # A step

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Let every text that can catch up a little, and return the new tokens, in order of arrival and place."""
        shares = self._scheduler.schedule()
        if not shares:
            return []
        done = self._run(shares)
        outputs = self._verify(shares, done)
        self._retire(outputs)
        chosen = time.perf_counter()
        self._draft(shares, done.hidden)
        for continuation in shares:
            self._scheduler.keep_full_pages(continuation)
        self._measure(shares, done, outputs, chosen)
        return outputs

    def _run(self, shares: dict[Continuation, int]) -> _Pass:
        """Run everybody's share through the main model, with logits where a token can be sampled."""
        began = time.perf_counter()
        tokens: list[int] = []
        spans: list[Span] = []
        rows: list[int] = []
        for continuation, count in shares.items():
            start, num_tokens = continuation.num_computed, len(continuation.tokens)
            rows += range(len(tokens) + max(num_tokens - 1 - start, 0), len(tokens) + count)
            tokens += [*continuation.tokens[start : start + count], *continuation.drafts][:count]
            spans.append(Span(continuation.pages, start, count))
        device = self._model.head_weight.device
        ctx = self._cache.begin(spans)
        hidden: Tensor = self._model(torch.tensor(tokens, device=device), ctx)  # [T, D]
        assert isinstance(ctx.cache, PagedPass)
        if ctx.cache.num_appended != self._model.config.num_hidden_layers:
            raise RuntimeError(
                "the model's layers do not write to the latent cache; call use_latent_cache(model) first"
            )
        chosen = hidden if len(rows) == len(tokens) else hidden[torch.tensor(rows, dtype=torch.int64, device=device)]
        logits = self._model.logits(chosen)  # [M, V]
        only_decodes = all(continuation.is_decoding for continuation in shares)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        experts = self._record.at(rows) if any(continuation.wants_experts for continuation in shares) else []
        normalisers, likeliest = wide.logsumexp(-1).tolist(), logits.argmax(-1).tolist()
        return _Pass(began, only_decodes, hidden, logits, normalisers, likeliest, experts)

    def _verify(self, shares: dict[Continuation, int], done: _Pass) -> list[Output]:
        """Sample at every place up to the first draft that is not the sampled token; count what is computed by now."""
        outputs: list[Output] = []
        row = 0
        for continuation, count in shares.items():
            places = continuation.num_computed + count - (len(continuation.tokens) - 1)
            if places <= 0:  # the prompt goes on
                continuation.num_computed += count
                continue
            drafts = continuation.drafts[: places - 1]
            verifies = continuation.is_followed and continuation.is_decoding
            if verifies:
                self._speculation.count_pass(len(drafts))
            continuation.num_computed = len(continuation.tokens) - 1
            for place, draft in enumerate([*drafts, None]):
                output = self._take(continuation, done, row + place, draft)
                outputs.append(output)
                if output.token is None:
                    break
                continuation.num_computed += 1
                if verifies:
                    self._speculation.count_token(place, accepted=output.was_draft)
                if output.finish_reason is not None or not output.was_draft:
                    break
            row += places
            continuation.drafts = []
        return outputs

    def _take(self, continuation: Continuation, done: _Pass, row: int, draft: int | None) -> Output:
        """Sample one token for a text and say what it adds."""
        who = (continuation.request_id, continuation.index)
        try:
            token = continuation.sampler.choose(done.logits[row], done.normalisers[row], done.likeliest[row])
        except AbyssalError as error:
            return Output(*who, None, finish_reason="error", error=error)
        continuation.tokens.append(token.id)
        ended, full = token.id in continuation.end_ids, continuation.num_left == 0
        text, stopped = "", False
        if continuation.text is not None:
            text = "" if ended else continuation.text.push(token.id)  # an end token is no text
            if ended or full:
                text += continuation.text.flush()
            stopped = continuation.text.matched is not None
        reason: FinishReason | None = "stop" if stopped else "eos" if ended else "length" if full else None
        experts = done.experts[row] if continuation.wants_experts else ()
        return Output(*who, token, text, token.id == draft, experts, reason)

    def _retire(self, outputs: list[Output]) -> None:
        """Let go of the texts that have ended; what they filled of the cache may serve later requests."""
        for output in outputs:
            if output.finish_reason is None:
                continue
            continuations = self._requests[output.request_id]
            self._scheduler.keep_full_pages(continuations[output.index])
            self._scheduler.remove(continuations[output.index])
            if all(continuation.is_finished for continuation in continuations):
                del self._requests[output.request_id]

    def _draft(self, shares: dict[Continuation, int], hidden: Tensor) -> None:
        """Let the MTP modules follow the texts that go on, and draft behind those that only decode by now."""
        num_running = len(self._scheduler.running)
        follows, drafts = self._payoff.follows(num_running), self._payoff.drafts(num_running)
        wanted: dict[Continuation, int] = {}
        row = 0
        for continuation, count in shares.items():
            first = row
            row += count
            if continuation.is_finished or not continuation.is_followed:
                continue
            if not follows:
                continuation.is_followed, continuation.hidden = False, None
                continue
            before = continuation.hidden  # of entries that waited for their tokens
            num_new = continuation.num_computed - continuation.num_settled - (0 if before is None else len(before))
            new = hidden[first : first + num_new]
            continuation.hidden = new if before is None else torch.cat((before, new))
            wanted[continuation] = self._num_wanted(continuation) if drafts and continuation.is_decoding else 0
        self._drafter.draft(wanted)

    def _num_wanted(self, continuation: Continuation) -> int:
        """Return how many drafts have a place: in a step, before the last token, and in pages for their entries."""
        fair = self.options.max_step_tokens // len(self._scheduler.running) - 1
        count = min(self._num_drafts, continuation.num_left - 1, fair)
        alone = count - self._model.config.num_nextn_predict_layers  # made by the last module on its own output
        if alone > 0 and not self._scheduler.extend(continuation, continuation.num_computed + alone):
            count -= alone
        return count

    def _measure(self, shares: dict[Continuation, int], done: _Pass, outputs: list[Output], chosen: float) -> None:
        """Count the step; `chosen` is when its tokens were."""
        self._num_steps += 1
        self._num_new_tokens += sum(output.token is not None for output in outputs)
        if done.only_decodes:
            times = {"pass_s": chosen - done.began, "draft_s": time.perf_counter() - chosen}
            self._payoff.observe(len(shares), sum(shares.values()) - len(shares), len(outputs), **times)

    # What it holds

    def statistics(self) -> EngineStatistics:
        """Return the counts up to now."""
        scheduler, pool = self._scheduler, self._pool
        return EngineStatistics(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_pages=pool.num_pages,
            num_pages_used=pool.num_used,
            num_pages_kept=pool.num_kept,
            prompt_tokens_total=scheduler.num_admitted_tokens,
            shared_tokens_total=scheduler.num_shared_tokens,
            new_tokens_total=self._num_new_tokens,
            preemptions_total=scheduler.num_preempted,
            steps_total=self._num_steps,
            drafted=tuple(self._speculation.drafted),
            accepted=tuple(self._speculation.accepted),
            makes_drafts=self._num_drafts > 0 and self._payoff.follows(max(len(scheduler.running), 1)),
        )

    def check_integrity(self) -> None:
        """Verify the rules that hold between steps.

        Raises:
            RuntimeError: one of them is broken, which is a defect of ours.
        """
        self._scheduler.check_integrity()
        alive = {c for continuations in self._requests.values() for c in continuations if not c.is_finished}
        if alive != {*self._scheduler.running, *self._scheduler.waiting}:
            raise RuntimeError("engine: broken: a text that has not ended runs or waits, and no other does")
