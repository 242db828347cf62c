"""Drafts for many texts at once, by the MTP modules over pages of the latent cache. Paper: §2.2.

Entry i of module k joins what is known up to token i + k - 1 (for k = 1 the main model's output after the final norm,
else that of the module before) with token i + k, stands at position i and predicts token i + k + 1, as in training.
Behind the newest entry module k reads the draft of module k - 1. Once all modules are used, the last one goes on alone,
on its own output after shared_head.norm, an entry a draft.

Legend: T packed entries of a pass, N continuations, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.engine.paged_cache import PagedLatentCache, Span
from abyssal.engine.request import Continuation
from abyssal.model import Transformer


@dataclass(slots=True)
class _Job:
    """What one continuation wants of the modules: `count` entries from `num_settled` on, and so many drafts."""

    continuation: Continuation
    known: list[int]  # its tokens from the first entry on, then drafts
    num_tokens: int  # of these, tokens
    count: int
    num_drafts: int


class BatchDrafter:
    """Lets the MTP modules follow the main model, and proposes what comes next."""

    def __init__(self, model: Transformer, cache: PagedLatentCache) -> None:
        """Serve the texts whose tables name pages of `cache`; `model` is prepared by `use_latent_cache`."""
        self._model, self._cache, self._modules = model, cache, model.mtp_modules

    @torch.inference_mode()
    def draft(self, wanted: Mapping[Continuation, int]) -> None:
        """Run the modules over what the main model has computed since, and leave drafts in the continuations.

        Args:
            wanted: for each continuation that is followed, how many drafts; 0 for one whose prompt goes on. Its table
                has room for `num_computed` tokens and for a further one a draft beyond the number of modules.
        """
        jobs = [job for continuation, count in wanted.items() if (job := self._job(continuation, count))]
        if not jobs:
            return
        h = torch.cat([_hidden(job)[: job.count] for job in jobs])  # [T, D]
        ends = torch.tensor([job.count for job in jobs]).cumsum(0) - 1
        for k in range(1, len(self._modules) + 1):
            ids = [token for job in jobs for token in job.known[k : k + job.count]]
            spans = [Span(job.continuation.pages, job.continuation.num_settled, job.count) for job in jobs]
            h = self._predict(k, h, ids, spans)
            reached = [n for n, job in enumerate(jobs) if job.num_drafts and job.count + k == len(job.known)]
            self._extend([jobs[n] for n in reached], h[ends[reached].to(h.device)])
        self._go_on_alone(jobs, h[ends.to(h.device)])
        for job in jobs:
            self._settle(job)

    def _job(self, continuation: Continuation, num_drafts: int) -> _Job | None:
        """Return what is to be done for one continuation, if anything is."""
        known = continuation.tokens[continuation.num_settled :]
        count = len(continuation.hidden) if continuation.hidden is not None else 0
        if not num_drafts:  # then the entries whose tokens are all there, and no others
            count = min(count, len(known) - len(self._modules))
        return _Job(continuation, known, len(known), count, num_drafts) if count > 0 else None

    def _predict(self, k: int, h: Tensor, ids: Sequence[int], spans: Sequence[Span]) -> Tensor:
        """Run module k over entries [T, D] and the embeddings of their tokens."""
        ctx = self._cache.begin(spans, first_layer=self._model.config.num_hidden_layers + k - 1)
        embedded = self._model.embed(torch.tensor(ids, device=h.device))
        return self._modules[k - 1].predict(h, embedded, self._model.with_rotary(ctx))

    def _extend(self, jobs: Sequence[_Job], h: Tensor) -> None:
        """Add the most probable token after each output [N, D] to what is known."""
        if jobs:
            for job, token in zip(jobs, self._model.logits(h).argmax(-1).tolist(), strict=True):
                job.known.append(token)

    def _go_on_alone(self, jobs: Sequence[_Job], h: Tensor) -> None:
        """Let the last module make the drafts beyond the number of modules; `h` [N, D] are its newest outputs."""
        further = 0
        while short := [n for n, job in enumerate(jobs) if len(job.known) - job.num_tokens < job.num_drafts]:
            h = h[torch.tensor(short, device=h.device)]
            jobs = [jobs[n] for n in short]
            spans = [
                Span(job.continuation.pages, job.continuation.num_settled + job.count + further, 1) for job in jobs
            ]
            h = self._predict(len(self._modules), h, [job.known[-1] for job in jobs], spans)
            self._extend(jobs, h)
            further += 1

    def _settle(self, job: _Job) -> None:
        """Keep the entries that no draft went into, the main model's outputs for the others, and the drafts."""
        continuation = job.continuation
        settled = job.count if not job.num_drafts else max(min(job.count, job.num_tokens - len(self._modules)), 0)
        continuation.hidden = _hidden(job)[settled:].clone()
        continuation.num_settled += settled
        continuation.drafts = job.known[job.num_tokens :][: job.num_drafts]


def _hidden(job: _Job) -> Tensor:
    hidden = job.continuation.hidden
    assert hidden is not None, "a continuation is followed from its first token on"
    return hidden
