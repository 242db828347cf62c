"""A model directory's weights into a model, also one whose parameters are spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import nn
from torch.distributed import ProcessGroup

from abyssal.checkpoint.hf.expert_stacks import split_shard
from abyssal.checkpoint.hf.names import BIAS, HEAD
from abyssal.checkpoint.hf.read import ModelReader
from abyssal.ranks.placements import local_shard
from abyssal.ranks.ranks import Ranks


def load_into(
    model: nn.Module,
    reader: ModelReader,
    dtype: torch.dtype | None = None,
    *,
    allow_missing_mtp: bool = False,
    group: ProcessGroup | None = None,
) -> list[str]:
    """Copy a model directory's tensors into `model`, after all names, shapes, types and values have been looked at.

    With a `dtype` the parameters become that (`e_score_correction_bias` fp32), without one they keep theirs. A tensor
    of the model that is on the meta device or changes its dtype is replaced by a new one, others are filled in place,
    experts one by one; FP8 weights are dequantised to what they become, on its device. DTensors are filled in place,
    each rank with what it holds; that is all that a rank reads. With a `group`, all its ranks call this together, and
    either all return or all raise.

    Returns:
        The in-memory names that were loaded; without the MTP layers that `allow_missing_mtp` let pass.

    Raises:
        ModelDirectoryError: names every tensor that is missing, surplus, of another shape or type, or not finite;
            `model` is as it was.
    """
    targets = dict(model.state_dict(keep_vars=True))
    if reader.config.tie_word_embeddings:
        targets.pop(HEAD, None)
    shapes = {name: tuple(target.shape) for name, target in targets.items()}
    mismatch = reader.compare(shapes, allow_missing_mtp=allow_missing_mtp)
    ranks = Ranks(group)

    def look() -> list[str]:
        mismatch.read_values(reader.stored, _own_rows(targets))
        return mismatch.not_finite

    @torch.no_grad()
    def fill() -> None:
        for name in mismatch.held:
            old = targets[name]
            wanted = old.dtype if dtype is None else torch.float32 if name.endswith(BIAS) else dtype
            new = old
            if old.is_meta or old.dtype != wanted:
                new = torch.empty_like(old, dtype=wanted, device="cpu" if old.is_meta else old.device)
            for part, first, view in split_shard(name, new.shape, *local_shard(new)):
                view.copy_(reader.part(part, wanted, new.device, (first, first + len(view))))
            if new is not old:
                _replace(model, name, old, new)

    not_finite: set[str] = ranks.agree(look, lambda names: set(chain.from_iterable(names)))
    mismatch.not_finite = [name for name in mismatch.stored if name in not_finite]
    mismatch.refuse(reader.path)
    ranks.together(fill)
    return mismatch.held


def _own_rows(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Return which rows of each released tensor this rank holds, from..to."""
    return {
        part: (first, first + len(rows))
        for name, tensor in tensors.items()
        for part, first, rows in split_shard(name, tensor.shape, *local_shard(tensor))
    }


def _replace(model: nn.Module, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    """Put `new` in the place of the parameter or buffer `old` of `model`."""
    owner, _, leaf = name.rpartition(".")
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(model.get_submodule(owner), leaf, new)
