"""Many requests on one model: each step lets every sequence catch up a little. The heart is `Engine.step`.

Legend: T packed tokens of a pass, M places to sample at, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.engine.adaptive_drafts import AdaptiveDrafts
from abyssal.engine.detokenizer import Detokenizer
from abyssal.engine.drafter import MTPDrafter
from abyssal.engine.expert_record import ExpertRecord
from abyssal.engine.load import LoadedModel
from abyssal.engine.options import EngineOptions
from abyssal.engine.paged_cache import PagedCacheView, PagedLatentCache, TokenRange
from abyssal.engine.pages import PagePool
from abyssal.engine.request import FinishReason, Output, Request, new_token_limit
from abyssal.engine.request_fault import request_fault
from abyssal.engine.sampler import Sampler
from abyssal.engine.scheduler import Scheduler
from abyssal.engine.scoring import PromptScores, score_tokens
from abyssal.engine.sequence import SequenceState
from abyssal.engine.statistics import DraftStatistics, EngineStatistics
from abyssal.engine.weights import model_with_weights
from abyssal.errors import UsageError
from abyssal.model import Transformer
from abyssal.text.tokenizer import Tokenizer

Scheduled = dict[SequenceState, int]  #: how many tokens each sequence computes in a step


@dataclass(frozen=True)
class _ForwardOutput:
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

    A sequence is the same whatever runs beside it, up to rounding: of a request with a seed, or at temperature 0, also
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
            end_ids: the tokens that end a sequence, where a request names none.

        Raises:
            UsageError: the options do not fit the model or one another.
        """
        self.options = options = options or EngineOptions()
        config = model.config
        self._tokenizer, self._end_ids = tokenizer, frozenset(end_ids)
        modules = config.num_nextn_predict_layers
        self._num_drafts = modules if options.num_drafts is None else options.num_drafts
        if self._num_drafts and not modules:
            raise UsageError(f"num_drafts={self._num_drafts}: drafts come from MTP modules, and this model has none")
        width = (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_layers * model.compute_dtype.itemsize
        longest = min(options.max_sequence_tokens or config.max_position_embeddings, config.max_position_embeddings)
        num_pages = options.max_running * -(-longest // options.page_tokens)
        if options.cache_bytes is not None:
            num_pages = max(min(options.cache_bytes // (width * options.page_tokens), num_pages), 1)
        self._pool = PagePool(num_pages, options.page_tokens)
        self._adaptive = AdaptiveDrafts(adapts=options.adapt_drafts)
        self._scheduler = Scheduler(
            self._pool,
            max_step_tokens=options.max_step_tokens,
            max_running=options.max_running,
            share_prefixes=options.share_prefixes,
            lookahead=lambda running: modules if self._num_drafts and self._adaptive.follows(running) else 0,
        )
        self._cache = PagedLatentCache(
            config, num_pages, options.page_tokens, model.compute_dtype, model.head_weight.device
        )
        self.draft_statistics = DraftStatistics(max(self._num_drafts, 1))
        self._requests: dict[int, list[SequenceState]] = {}
        self._next_id = self._num_new_tokens = self._num_steps = 0
        self._serve(model)

    @classmethod
    def of(cls, loaded: LoadedModel, options: EngineOptions | None = None) -> Engine:
        """Serve a model directory that `load_model` has read."""
        return cls(loaded.model, options, tokenizer=loaded.tokenizer, end_ids=loaded.eos_ids)

    def _serve(self, model: Transformer) -> None:
        """Let every further step run `model`."""
        self._model = model
        self._expert_record = ExpertRecord(model)
        self._drafter = MTPDrafter(model, self._cache)

    # Requests

    def check(self, request: Request) -> int:
        """Return how many tokens each sequence of a request can have; reads nothing that a step changes.

        Raises:
            UsageError: the prompt or a parameter cannot be.
        """
        parameters, ids, config = request.parameters, request.prompt_ids, self._model.config
        if not ids:
            raise UsageError("prompt: has no tokens; give some text, or let it start with the BOS token")
        last = config.vocab_size - 1
        for token in (min(ids), max(ids)):
            if not 0 <= token <= last:
                raise UsageError(f"prompt: token id {token} is not one of the model's, 0 to {last}")
        only_scored = request.num_sequences == 0 and request.prompt_logprobs is not None
        if request.num_sequences < 1 and not only_scored:
            raise UsageError(f"num_sequences={request.num_sequences}: must be at least 1 (0 with prompt_logprobs)")
        if only_scored and len(ids) <= config.max_position_embeddings:
            limit = 0
        else:
            limit = new_token_limit(config, len(ids), parameters.max_new_tokens)
        if request.prompt_logprobs is not None and request.prompt_logprobs < 0:
            raise UsageError(f"prompt_logprobs={request.prompt_logprobs}: must be at least 0; 0 adds no other tokens")
        if request.prompt_logprobs is not None and not 1 <= request.prompt_logprobs_start <= len(ids):
            raise UsageError(
                f"prompt_logprobs_start={request.prompt_logprobs_start}: must be from 1 to {len(ids)}, the prompt's end"
            )
        if parameters.stop and self._tokenizer is None:
            raise UsageError("stop: needs a tokenizer, and the engine was built without one")
        for token, _ in parameters.logit_bias:
            if token > last:
                raise UsageError(f"logit_bias: token id {token} is not one of the model's, 0 to {last}")
        room = self._pool.num_pages * self._pool.page_tokens
        if len(ids) + max(limit - 1, 0) > room:  # the last token is never fed back
            raise UsageError(
                f"prompt: {len(ids)} tokens and {limit} new ones do not fit the latent cache of {room} "
                "tokens; ask for fewer, or give the engine more cache_bytes"
            )
        return limit

    def add(self, request: Request) -> int:
        """Take on a request and return its number, which its outputs bear.

        Raises:
            UsageError: the prompt or a parameter cannot be; nothing has changed then.
            RequestFailedError: its constraint cannot be made; likewise.
        """
        max_tokens = len(request.prompt_ids) + self.check(request)
        sequences: list[SequenceState] = []
        for index in range(max(request.num_sequences, 1)):
            try:
                constraint = None if request.constraint is None else request.constraint()
            except BaseException as error:
                raise request_fault(error) from error
            scores = None
            if index == 0 and request.prompt_logprobs is not None:
                scores = PromptScores(request.prompt_logprobs_start, request.prompt_logprobs)
            sequence = SequenceState(
                request_id=self._next_id,
                index=index,
                tokens=list(request.prompt_ids),
                max_tokens=max_tokens,
                sampler=Sampler(request.parameters, request.prompt_ids, index, constraint),
                end_ids=self._end_ids if request.end_ids is None else request.end_ids,
                detokenizer=None if self._tokenizer is None else Detokenizer(self._tokenizer, request.parameters.stop),
                wants_experts=request.wants_experts,
                scores=scores,
                leader=sequences[0] if sequences and self.options.share_prefixes else None,
            )
            sequences.append(sequence)
        for sequence in sequences:
            self._scheduler.add(sequence)
        self._requests[self._next_id] = sequences
        self._next_id += 1
        return self._next_id - 1

    def cancel(self, request_id: int) -> None:
        """Forget a request and free its pages; one that has ended, or never was, is no fault."""
        for sequence in self._requests.pop(request_id, ()):
            if not sequence.is_finished:
                self._scheduler.remove(sequence)

    def stream(self, request: Request) -> Generator[Output]:
        """Return the outputs of a request as they come, on an engine without other work; leaving them cancels it.

        Raises:
            UsageError: when called: the prompt or a parameter cannot be.
            AbyssalError: while iterating: what ended a sequence before its time.
        """
        self.check(request)
        return self._stream(request)

    def _stream(self, request: Request) -> Generator[Output]:
        request_id = self.add(request)
        try:
            while self.is_open(request_id):
                for output in self.step():
                    if output.error is not None:
                        raise output.error
                    yield output
        finally:
            self.cancel(request_id)

    def is_open(self, request_id: int) -> bool:
        """Whether a sequence of this request has not ended."""
        return request_id in self._requests

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests)

    def restart(self) -> None:
        """Forget all requests and all cached pages, as after a step that failed.

        Raises:
            RuntimeError: the engine's state is broken all the same.
        """
        for request_id in list(self._requests):
            self.cancel(request_id)
        self._pool.drop_cached()
        self.check_integrity()

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Go on with new weights: names and shapes of a model directory, any order, values cast and packed as loaded.

        A sequence under way keeps the tokens that it has; all else of it is computed anew by the new weights, and it
        goes on with them. Cached pages are dropped, since their latents belong to the old weights. The whole stream is
        looked at before anything changes; until then memory holds both models.

        Raises:
            UsageError: a tensor is missing, of another name or shape, comes twice or is not finite; nothing has
                changed then.
        """
        self._serve(model_with_weights(self._model, weights))
        self._scheduler.preempt_all()
        self._pool.drop_cached()
        for sequence in self._scheduler.waiting:
            if sequence.scores is not None and sequence.scores.next_place < sequence.num_prompt_tokens:
                sequence.scores.tokens.clear()

    # A step

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Let every sequence that can catch up a little, and return the new tokens, in order of arrival and place."""
        scheduled = self._scheduler.schedule()
        if not scheduled:
            return []
        forward = self._forward(scheduled)
        self._score(scheduled, forward.hidden)
        outputs = self._sample(scheduled, forward)
        self._finish(outputs)
        sampled = time.perf_counter()
        self._draft(scheduled, forward.hidden)
        for sequence in scheduled:
            self._scheduler.cache_full_pages(sequence)
        self._record_step(scheduled, forward, outputs, sampled)
        return outputs

    def _forward(self, scheduled: Scheduled) -> _ForwardOutput:
        """Run what is scheduled through the main model, with logits where a token can be sampled."""
        began = time.perf_counter()
        tokens: list[int] = []
        ranges: list[TokenRange] = []
        rows: list[int] = []
        for sequence, count in scheduled.items():
            start, num_tokens = sequence.num_computed, len(sequence.tokens)
            rows += range(len(tokens) + max(num_tokens - 1 - start, 0), len(tokens) + count)
            tokens += [*sequence.tokens[start : start + count], *sequence.drafts][:count]
            ranges.append(TokenRange(sequence.pages, start, count))
        device = self._model.head_weight.device
        ctx = self._cache.begin(ranges)
        hidden: Tensor = self._model(torch.tensor(tokens, device=device), ctx)  # [T, D]
        assert isinstance(ctx.cache, PagedCacheView)
        if ctx.cache.num_appended != self._model.config.num_hidden_layers:
            raise RuntimeError(
                "the model's layers do not write to the latent cache; call use_latent_cache(model) first"
            )
        chosen = hidden if len(rows) == len(tokens) else hidden[torch.tensor(rows, dtype=torch.int64, device=device)]
        logits = self._model.logits(chosen)  # [M, V]
        only_decodes = all(sequence.is_decoding for sequence in scheduled)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        experts = self._expert_record.at(rows) if any(sequence.wants_experts for sequence in scheduled) else []
        normalisers, likeliest = wide.logsumexp(-1).tolist(), logits.argmax(-1).tolist()
        return _ForwardOutput(began, only_decodes, hidden, logits, normalisers, likeliest, experts)

    def _score(self, scheduled: Scheduled, hidden: Tensor) -> None:
        """Score the prompt tokens whose places before them were computed, where that is asked for."""
        row = 0
        for sequence, count in scheduled.items():
            start, scores = sequence.num_computed, sequence.scores
            if scores is not None:
                first, end = scores.next_place, min(start + count + 1, sequence.num_prompt_tokens)
                if first < end:
                    outputs = hidden[row + first - 1 - start : row + end - 1 - start]
                    scores.tokens += score_tokens(self._model, outputs, sequence.tokens[first:end], scores.top)
            row += count

    def _sample(self, scheduled: Scheduled, forward: _ForwardOutput) -> list[Output]:
        """Sample at every place up to the first draft that is not the sampled token; count what is computed by now."""
        outputs: list[Output] = []
        row = 0
        for sequence, count in scheduled.items():
            places = sequence.num_computed + count - (len(sequence.tokens) - 1)
            if places <= 0:  # the prompt goes on
                sequence.num_computed += count
                continue
            drafts = sequence.drafts[: places - 1]
            verifies = sequence.follows_mtp and sequence.is_decoding and sequence.num_new > 0
            if verifies:
                self.draft_statistics.count_pass(len(drafts))
            sequence.num_computed = len(sequence.tokens) - 1
            for place, draft in enumerate([*drafts, None]):
                output = self._append_token(sequence, forward, row + place, draft)
                outputs.append(output)
                if output.token is None:
                    break
                sequence.num_computed += 1
                if verifies:
                    self.draft_statistics.count_token(place, accepted=output.was_draft)
                if output.finish_reason is not None or not output.was_draft:
                    break
            row += places
            sequence.drafts = []
        return outputs

    def _append_token(self, sequence: SequenceState, forward: _ForwardOutput, row: int, draft: int | None) -> Output:
        """Sample one token for a sequence and say what it adds; a fault of what the request brought ends it."""
        who = (sequence.request_id, sequence.index)
        scores = None
        if sequence.scores is not None and sequence.num_new == 0:
            scores = tuple(sequence.scores.tokens)
        if not sequence.generates:
            return Output(*who, None, finish_reason="length", prompt_logprobs=scores)
        try:
            token = sequence.sampler.choose(forward.logits[row], forward.normalisers[row], forward.likeliest[row])
            sequence.tokens.append(token.id)
            ended, full = token.id in sequence.end_ids, sequence.num_left == 0
            text, stopped = "", False
            if sequence.detokenizer is not None:
                text = "" if ended else sequence.detokenizer.push(token.id)  # an end token is no text
                if ended or full:
                    text += sequence.detokenizer.flush()
                stopped = sequence.detokenizer.matched is not None
        except BaseException as error:
            return Output(*who, None, finish_reason="error", error=request_fault(error))
        reason: FinishReason | None = "stop" if stopped else "eos" if ended else "length" if full else None
        experts = forward.experts[row] if sequence.wants_experts else ()
        return Output(*who, token, text, token.id == draft, experts, reason, draft=draft, prompt_logprobs=scores)

    def _finish(self, outputs: list[Output]) -> None:
        """Let go of the sequences that have ended; what they filled of the cache may serve later requests."""
        for output in outputs:
            if output.finish_reason is None:
                continue
            sequences = self._requests[output.request_id]
            self._scheduler.cache_full_pages(sequences[output.index])
            self._scheduler.remove(sequences[output.index])
            if all(sequence.is_finished for sequence in sequences):
                del self._requests[output.request_id]

    def _draft(self, scheduled: Scheduled, hidden: Tensor) -> None:
        """Let the MTP modules follow the sequences that go on, and draft behind those that only decode by now."""
        num_running = len(self._scheduler.running)
        follows, drafts = self._adaptive.follows(num_running), self._adaptive.drafts(num_running)
        wanted: dict[SequenceState, int] = {}
        row = 0
        for sequence, count in scheduled.items():
            first = row
            row += count
            if sequence.is_finished or not sequence.follows_mtp:
                continue
            if not follows:
                sequence.follows_mtp, sequence.mtp_hidden = False, None
                continue
            before = sequence.mtp_hidden  # of entries that waited for their tokens
            num_new = sequence.num_computed - sequence.num_mtp_computed - (0 if before is None else len(before))
            new = hidden[first : first + num_new]
            sequence.mtp_hidden = new if before is None else torch.cat((before, new))
            wanted[sequence] = self._num_wanted(sequence) if drafts and sequence.is_decoding else 0
        self._drafter.draft(wanted)

    def _num_wanted(self, sequence: SequenceState) -> int:
        """Return how many drafts have a place: in a step, before the last token, and in pages for their entries."""
        fair = self.options.max_step_tokens // len(self._scheduler.running) - 1
        count = min(self._num_drafts, sequence.num_left - 1, fair)
        alone = count - self._model.config.num_nextn_predict_layers  # made by the last module on its own output
        if alone > 0 and not self._scheduler.extend(sequence, sequence.num_computed + alone):
            count -= alone
        return count

    def _record_step(
        self, scheduled: Scheduled, forward: _ForwardOutput, outputs: list[Output], sampled: float
    ) -> None:
        """Count the step; `sampled` is when its tokens were."""
        self._num_steps += 1
        self._num_new_tokens += sum(output.token is not None for output in outputs)
        if forward.only_decodes:
            times = {"pass_s": sampled - forward.began, "draft_s": time.perf_counter() - sampled}
            self._adaptive.observe(len(scheduled), sum(scheduled.values()) - len(scheduled), len(outputs), **times)

    # What it holds

    def statistics(self) -> EngineStatistics:
        """Return the counts up to now."""
        scheduler, pool = self._scheduler, self._pool
        return EngineStatistics(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_pages=pool.num_pages,
            num_pages_used=pool.num_used,
            num_pages_cached=pool.num_cached,
            prompt_tokens_total=scheduler.num_admitted_tokens,
            shared_tokens_total=scheduler.num_shared_tokens,
            new_tokens_total=self._num_new_tokens,
            preemptions_total=scheduler.num_preempted,
            steps_total=self._num_steps,
            drafted=tuple(self.draft_statistics.drafted),
            accepted=tuple(self.draft_statistics.accepted),
            makes_drafts=self._num_drafts > 0 and self._adaptive.follows(max(len(scheduler.running), 1)),
        )

    def check_integrity(self) -> None:
        """Verify the rules that hold between steps.

        Raises:
            RuntimeError: one of them is broken, which is a defect of ours.
        """
        self._scheduler.check_integrity()
        alive = {s for sequences in self._requests.values() for s in sequences if not s.is_finished}
        if alive != {*self._scheduler.running, *self._scheduler.waiting}:
            raise RuntimeError("engine: broken: a sequence that has not ended runs or waits, and no other does")
