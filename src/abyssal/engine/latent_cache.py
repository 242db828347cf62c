"""The latent cache in its simplest form: one preallocated row of slots for each sequence.

Legend: T packed new tokens, S cached tokens of one sequence, L layers, N sequences, C latent dim, R rotary dims.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.errors import UsageError
from abyssal.model import Context
from abyssal.ops.latent_attention import PaddedLatents

ROUND = 64  # each new length of what several sequences read costs the matrix library a kernel


class ContiguousLatentCache:
    """Keeps, for each token and layer, its latent and its rotary key: C + R values, whatever the number of heads.

    A forward pass is announced by `begin`, which returns its context; each layer then calls `append` once, in order.
    A pass counts once its last layer has been appended: one that was broken off leaves every length as it was, and
    its slots are written over. Both halves of a token lie side by side, so a kernel can read them as one key of C + R.

    Paper: §2.1.1 eq. 1 and 3, the two boxed vectors.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity_tokens: int,
        sequences: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        layers: int | None = None,
    ) -> None:
        """Allocate room for `capacity_tokens` tokens in each of `sequences` sequences.

        The cache serves `layers` layers; none given, those of the main model.
        """
        if capacity_tokens < 1 or sequences < 1:
            raise ValueError(f"capacity_tokens={capacity_tokens}, sequences={sequences}: both must be at least 1")
        self._latent_dim = config.kv_lora_rank
        width = config.kv_lora_rank + config.qk_rope_head_dim
        layers = config.num_hidden_layers if layers is None else layers
        shape = (layers, sequences, capacity_tokens, width)
        # Zeros: what stands behind a short sequence is multiplied with weights of 0 beside longer ones.
        self._storage = torch.zeros(shape, dtype=dtype, device=device)  # [L, N, capacity, C+R]
        self._lengths = [0] * sequences
        self._new: list[tuple[int, int]] = []  # (sequence, new tokens) of the pass under way
        self._slots = torch.empty(0, dtype=torch.int64, device=device)  # [T], where they go, counted over all sequences
        self._next_layer = 0

    @property
    def capacity_tokens(self) -> int:
        """Slots for tokens in each sequence."""
        return self._storage.shape[2]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each sequence holds in all layers."""
        return tuple(self._lengths)

    @property
    def bytes(self) -> int:
        """Bytes of the allocated slots, full or not."""
        return self._storage.nbytes

    def reserve(self, capacity_tokens: int) -> None:
        """Have room for at least `capacity_tokens` tokens in each sequence; what is held stays."""
        if capacity_tokens <= self.capacity_tokens:
            return
        layers, sequences, _, width = self._storage.shape
        storage = self._storage.new_empty(layers, sequences, capacity_tokens, width)
        held = max(self._lengths)
        storage[:, :, :held] = self._storage[:, :, :held]
        self._storage = storage

    def begin(self, new_tokens: Sequence[int]) -> Context:
        """Announce a forward pass and return its context.

        Args:
            new_tokens: for every sequence of the cache how many tokens the pass adds; those with 0 take no part in it.

        Returns:
            The context of the packed new tokens, sequences in order, positions counted on from what is cached.

        Raises:
            UsageError: a sequence would outgrow its slots; nothing has changed then.
        """
        if len(new_tokens) != len(self._lengths) or min(new_tokens) < 0 or sum(new_tokens) == 0:
            raise ValueError(
                f"new_tokens={tuple(new_tokens)}: needs one count for each of {len(self._lengths)} sequences"
            )
        for sequence, (length, n) in enumerate(zip(self._lengths, new_tokens, strict=True)):
            if length + n > self.capacity_tokens:
                raise UsageError(
                    f"latent cache: sequence {sequence} holds {length} tokens and is given {n} more, "
                    f"but capacity_tokens={self.capacity_tokens}; allocate at least {length + n}"
                )
        self._new = [(sequence, n) for sequence, n in enumerate(new_tokens) if n]
        self._next_layer = 0
        spans = [(sequence, self._lengths[sequence], n) for sequence, n in self._new]
        positions = [p for _, start, n in spans for p in range(start, start + n)]
        slots = [sequence * self.capacity_tokens + p for sequence, start, n in spans for p in range(start, start + n)]
        both = torch.tensor([positions, slots], device=self._storage.device)  # [2, T]
        self._slots = both[1]
        return Context(lengths=tuple(n for _, n in self._new), positions=both[0], cache=self)

    def append(self, layer: int, c_kv: Tensor, k_rope: Tensor) -> PaddedLatents:
        """Write the new tokens of `layer` into their slots and return views of what its sequences hold by now.

        Args:
            layer: the layer after the one appended before, from 0.
            c_kv: [T, C], normed latents; k_rope: [T, R], rotated keys; both in the cache's dtype, which is not cast.

        Returns:
            For each sequence of the pass [S, C+R], a view into the cache that later passes do not change (a copy of all
            where a sequence between others takes no part).
        """
        if not self._new or layer != self._next_layer:
            raise RuntimeError(
                f"layer {layer} appended out of turn: begin a pass, then append each layer once, in order"
            )
        total = sum(n for _, n in self._new)
        if len(c_kv) != total or len(k_rope) != total:
            raise RuntimeError(f"layer {layer}: {len(c_kv)} and {len(k_rope)} rows appended, but the pass has {total}")
        if c_kv.dtype != self._storage.dtype or k_rope.dtype != self._storage.dtype:
            raise RuntimeError(f"layer {layer}: {c_kv.dtype} appended to a cache of {self._storage.dtype}")
        slots = self._storage[layer]  # [N, capacity, C+R]
        slots.view(-1, slots.shape[-1]).index_copy_(0, self._slots, torch.cat((c_kv, k_rope), -1))
        lengths = tuple(self._lengths[sequence] + n for sequence, n in self._new)
        first, last = self._new[0][0], self._new[-1][0]
        if last - first + 1 == len(self._new):
            rows = slots[first : last + 1]
        else:
            rows = slots[[sequence for sequence, _ in self._new]]
        self._next_layer += 1
        if self._next_layer == len(self._storage):
            for sequence, n in self._new:
                self._lengths[sequence] += n
            self._new = []
        width = -(-max(lengths) // ROUND) * ROUND
        return PaddedLatents(rows[:, :width], lengths)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of `sequence`; a pass under way is broken off."""
        if not 0 <= length <= self._lengths[sequence]:
            raise ValueError(f"length={length}: sequence {sequence} holds {self._lengths[sequence]} tokens")
        self._lengths[sequence] = length
        self._new = []

    def check_integrity(self) -> None:
        """Verify the rules that every operation keeps.

        Raises:
            RuntimeError: one of them is broken, which is a defect of ours.
        """
        layers, sequences, capacity, width = self._storage.shape
        pending = dict(self._new)
        rules = {
            "one length for each sequence": len(self._lengths) == sequences,
            "lengths within the slots": all(0 <= length <= capacity for length in self._lengths),
            "C + R values a token a layer": self.bytes
            == layers * sequences * capacity * width * self._storage.element_size(),
            "a pass names each sequence once, in order": list(pending) == sorted(pending)
            and len(pending) == len(self._new),
            "a pass adds at least one token to a sequence": all(n > 0 for n in pending.values()),
            "a pass fits": all(self._lengths[sequence] + n <= capacity for sequence, n in self._new),
            "a pass has layers to come": not self._new or 0 <= self._next_layer < layers,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise RuntimeError(f"latent cache: broken: {'; '.join(broken)}")
