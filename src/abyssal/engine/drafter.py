"""Drafts for many sequences at once, by the MTP modules over pages of the latent cache. Paper: §2.2.

Entry i of module k joins what is known up to token i + k - 1 (for k = 1 the main model's output after the final norm,
else that of the module before) with token i + k, stands at position i and predicts token i + k + 1, as in training.
Behind the newest entry module k reads the draft of module k - 1. Once all modules are used, the last one goes on alone,
on its own output after shared_head.norm, an entry a draft.

Legend: T packed entries of a pass, N sequences, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.engine.paged_cache import PagedLatentCache, TokenRange
from abyssal.engine.sequence import SequenceState
from abyssal.model import Transformer


@dataclass(slots=True)
class _DraftTask:
    """What one sequence wants of the modules: `count` entries from `num_mtp_computed` on, and so many drafts."""

    sequence: SequenceState
    known: list[int]  # its tokens from the first entry on, then drafts
    num_tokens: int  # of these, tokens
    count: int
    num_drafts: int


class MTPDrafter:
    """Lets the MTP modules follow the main model, and proposes what comes next."""

    def __init__(self, model: Transformer, cache: PagedLatentCache) -> None:
        """Serve the sequences whose tables name pages of `cache`; `model` is prepared by `use_latent_cache`."""
        self._model, self._cache, self._modules = model, cache, model.mtp_modules

    @torch.inference_mode()
    def draft(self, wanted: Mapping[SequenceState, int]) -> None:
        """Run the modules over what the main model has computed since, and leave drafts in the sequences.

        Args:
            wanted: for each sequence that is followed, how many drafts; 0 for one whose prompt goes on. Its table
                has room for `num_computed` tokens and for a further one a draft beyond the number of modules.
        """
        tasks = [task for sequence, count in wanted.items() if (task := self._task(sequence, count))]
        if not tasks:
            return
        h = torch.cat([_hidden(task)[: task.count] for task in tasks])  # [T, D]
        ends = torch.tensor([task.count for task in tasks]).cumsum(0) - 1
        for k in range(1, len(self._modules) + 1):
            ids = [token for task in tasks for token in task.known[k : k + task.count]]
            ranges = [TokenRange(task.sequence.pages, task.sequence.num_mtp_computed, task.count) for task in tasks]
            h = self._predict(k, h, ids, ranges)
            reached = [n for n, task in enumerate(tasks) if task.num_drafts and task.count + k == len(task.known)]
            self._extend([tasks[n] for n in reached], h[ends[reached].to(h.device)])
        self._go_on_alone(tasks, h[ends.to(h.device)])
        for task in tasks:
            self._settle(task)

    def _task(self, sequence: SequenceState, num_drafts: int) -> _DraftTask | None:
        """Return what is to be done for one sequence, if anything is."""
        known = sequence.tokens[sequence.num_mtp_computed :]
        count = len(sequence.mtp_hidden) if sequence.mtp_hidden is not None else 0
        if not num_drafts:  # then the entries whose tokens are all there, and no others
            count = min(count, len(known) - len(self._modules))
        return _DraftTask(sequence, known, len(known), count, num_drafts) if count > 0 else None

    def _predict(self, k: int, h: Tensor, ids: Sequence[int], ranges: Sequence[TokenRange]) -> Tensor:
        """Run module k over entries [T, D] and the embeddings of their tokens."""
        ctx = self._cache.begin(ranges, first_layer=self._model.config.num_hidden_layers + k - 1)
        embedded = self._model.embed(torch.tensor(ids, device=h.device))
        return self._modules[k - 1].predict(h, embedded, self._model.with_rotary(ctx))

    def _extend(self, tasks: Sequence[_DraftTask], h: Tensor) -> None:
        """Add the most probable token after each output [N, D] to what is known."""
        if tasks:
            for task, token in zip(tasks, self._model.logits(h).argmax(-1).tolist(), strict=True):
                task.known.append(token)

    def _go_on_alone(self, tasks: Sequence[_DraftTask], h: Tensor) -> None:
        """Let the last module make the drafts beyond the number of modules; `h` [N, D] are its newest outputs."""
        further = 0
        while short := [n for n, task in enumerate(tasks) if len(task.known) - task.num_tokens < task.num_drafts]:
            h = h[torch.tensor(short, device=h.device)]
            tasks = [tasks[n] for n in short]
            ranges = [
                TokenRange(task.sequence.pages, task.sequence.num_mtp_computed + task.count + further, 1)
                for task in tasks
            ]
            h = self._predict(len(self._modules), h, [task.known[-1] for task in tasks], ranges)
            self._extend(tasks, h)
            further += 1

    def _settle(self, task: _DraftTask) -> None:
        """Keep the entries that no draft went into, the main model's outputs for the others, and the drafts."""
        sequence = task.sequence
        settled = task.count if not task.num_drafts else max(min(task.count, task.num_tokens - len(self._modules)), 0)
        sequence.mtp_hidden = _hidden(task)[settled:].clone()
        sequence.num_mtp_computed += settled
        sequence.drafts = task.known[task.num_tokens :][: task.num_drafts]


def _hidden(task: _DraftTask) -> Tensor:
    hidden = task.sequence.mtp_hidden
    assert hidden is not None, "a sequence is followed from its first token on"
    return hidden
