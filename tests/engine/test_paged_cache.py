"""Every text reads from its pages what was written for it, whichever way the pass goes."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from abyssal.config import ModelConfig
from abyssal.engine.paged_cache import PagedLatentCache, TokenRange
from abyssal.ops.latent_attention import PaddedLatents


def numbers(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("cuts", [[(5, 3, 9)], [(5, 3, 9), (1, 1, 1), (1, 1, 1)], [(2, 1, 1), (4, 2, 0), (1, 1, 6)]])
def test_texts_read_what_was_written_for_them(
    tiny_config: ModelConfig, cuts: list[tuple[int, int, int]], scattered: bool
) -> None:
    """Passes over chunks of three texts, some of which take no part; two layers from the second on."""
    latent, rotary, size = tiny_config.kv_lora_rank, tiny_config.qk_rope_head_dim, 4
    order = list(range(24))
    if scattered:
        random.Random(3).shuffle(order)
    tables = [order[8 * n : 8 * (n + 1)] for n in range(3)]
    cache = PagedLatentCache(tiny_config, 24, size, torch.float32, "cpu")
    written = {(text, layer): torch.empty(0, latent + rotary) for text in range(3) for layer in range(2)}
    for number, cut in enumerate(cuts):
        parts = [(text, count) for text, count in enumerate(cut) if count]
        starts = {text: len(written[text, 0]) for text, _ in parts}
        ctx = cache.begin([TokenRange(tables[text], starts[text], count) for text, count in parts], first_layer=1)
        assert ctx.lengths == tuple(count for _, count in parts)
        assert ctx.positions.tolist() == [p for text, n in parts for p in range(starts[text], starts[text] + n)]
        assert ctx.cache is not None
        for layer in range(2):
            new = numbers(sum(count for _, count in parts), latent + rotary, 10 * number + layer)
            reads = ctx.cache.append(layer, new[:, :latent], new[:, latent:])
            assert isinstance(reads, PaddedLatents) == (len(parts) > 1 and {count for _, count in parts} == {1})
            for (text, _), rows, read in zip(parts, new.split(list(ctx.lengths)), reads, strict=True):
                written[text, layer] = torch.cat((written[text, layer], rows))
                assert torch.equal(read, written[text, layer])


def test_pages_side_by_side_are_read_where_they_lie(tiny_config: ModelConfig) -> None:
    cache = PagedLatentCache(tiny_config, 9, 4, torch.float32, "cpu")
    width = tiny_config.kv_lora_rank + tiny_config.qk_rope_head_dim
    for pages, is_view in (([3, 4, 5], True), ([3, 5, 4], False)):
        ctx = cache.begin([TokenRange(pages, 0, 9)])
        assert ctx.cache is not None
        new = numbers(9, width, 1)
        (read,) = ctx.cache.append(0, new[:, : tiny_config.kv_lora_rank], new[:, tiny_config.kv_lora_rank :])
        assert (read.untyped_storage().data_ptr() == cache._storage.untyped_storage().data_ptr()) == is_view


def test_the_cache_has_a_place_for_every_layer_and_mtp_module(tiny_config: ModelConfig) -> None:
    cache = PagedLatentCache(tiny_config, 9, 4, torch.bfloat16, "cpu")
    assert cache.bytes == 2 * 9 * 4 * (tiny_config.kv_lora_rank + tiny_config.qk_rope_head_dim) * 4


class CacheAgainstLists(RuleBasedStateMachine):
    """Random passes, some broken off, and truncations of three sequences in scattered pages, against lists of rows."""

    config = ModelConfig(
        vocab_size=5,
        hidden_size=4,
        intermediate_size=3,
        moe_intermediate_size=2,
        num_hidden_layers=2,
        num_attention_heads=1,
        kv_lora_rank=3,
        qk_nope_head_dim=1,
        qk_rope_head_dim=2,
        v_head_dim=1,
        n_routed_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=9,
    )

    @initialize(order=st.permutations(range(9)), page_tokens=st.integers(1, 4))
    def start(self, order: list[int], page_tokens: int) -> None:
        self.cache = PagedLatentCache(self.config, 9, page_tokens, torch.float32, "cpu")
        self.tables, self.capacity = [order[3 * n : 3 * n + 3] for n in range(3)], 3 * page_tokens
        self.expected: list[list[int]] = [[], [], []]  # the number of each token's row in layer 0
        self.used = 0

    @rule(counts=st.tuples(*[st.integers(0, 4)] * 3).filter(any), layers=st.integers(0, 2))
    def run_pass(self, counts: tuple[int, ...], layers: int) -> None:
        """Append the first `layers` layers of a pass: all of them, or break off."""
        counts = tuple(min(n, self.capacity - len(rows)) for n, rows in zip(counts, self.expected, strict=True))
        present = [n for n, count in enumerate(counts) if count]
        if not present:
            return
        ranges = [TokenRange(self.tables[n], len(self.expected[n]), counts[n]) for n in present]
        ctx = self.cache.begin(ranges)
        assert ctx.cache is not None
        assert ctx.lengths == tuple(counts[n] for n in present)
        assert ctx.positions.tolist() == [p for new in ranges for p in range(new.start, new.start + new.count)]
        after, first = [list(rows) for rows in self.expected], self.used
        for n in present:
            after[n] += range(self.used, self.used + counts[n])
            self.used += counts[n]
        for layer in range(layers):
            values = 1000.0 * layer + torch.arange(first, self.used)[:, None]
            reads = ctx.cache.append(layer, values + torch.arange(3) / 100, -values - torch.arange(2) / 100)
            for n, read in zip(present, reads, strict=True):
                assert read[:, 0].tolist() == [1000 * layer + row for row in after[n]]
                assert read[:, 3].tolist() == [-1000 * layer - row for row in after[n]]
        if layers == self.config.num_hidden_layers:
            self.expected = after

    @precondition(lambda self: any(self.expected))
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        rows = self.expected[data.draw(st.integers(0, 2))]
        del rows[data.draw(st.integers(0, len(rows))) :]

    @invariant()
    def what_is_held_is_read(self) -> None:
        for n, rows in enumerate(getattr(self, "expected", [])):
            for layer in range(2 if rows else 0):
                pages = self.cache._storage[layer, self.tables[n]].flatten(0, 1)[: len(rows)]
                assert pages[:, 0].tolist() == [1000 * layer + row for row in rows]


CacheAgainstLists.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestCacheAgainstLists = CacheAgainstLists.TestCase
