from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from abyssal.config import ModelConfig
from abyssal.engine import ContiguousLatentCache
from abyssal.errors import UsageError

CAPACITY, SEQUENCES = 7, 3


def rows(config: ModelConfig, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` rows that no other call returns for another `first`."""
    values = torch.arange(first, first + count, dtype=torch.float32)[:, None]
    return values + torch.arange(config.kv_lora_rank) / 100, -values - torch.arange(config.qk_rope_head_dim) / 100


def filled(config: ModelConfig, *lengths: int, capacity: int = CAPACITY) -> ContiguousLatentCache:
    cache = ContiguousLatentCache(config, capacity, len(lengths))
    cache.begin(lengths)
    for layer in range(config.num_hidden_layers):
        cache.append(layer, *rows(config, 100 * layer, sum(lengths)))
    return cache


def test_a_token_takes_latent_plus_rotary_dims_in_each_main_layer_and_no_more(tiny_config: ModelConfig) -> None:
    cache = ContiguousLatentCache(tiny_config, capacity_tokens=10, sequences=2, dtype=torch.bfloat16)
    assert cache.bytes == 2 * 10 * tiny_config.num_hidden_layers * (13 + 4) * torch.bfloat16.itemsize
    assert (cache.capacity_tokens, cache.lengths) == (10, (0, 0))


def test_a_cache_may_serve_fewer_layers_than_the_main_model_has(tiny_config: ModelConfig) -> None:
    cache = ContiguousLatentCache(tiny_config, CAPACITY, layers=1)
    cache.begin((2,))
    cache.append(0, *rows(tiny_config, 0, 2))
    assert cache.lengths == (2,)
    assert cache.bytes == CAPACITY * (13 + 4) * 4


def test_begin_counts_positions_on_and_leaves_out_sequences_without_new_tokens(tiny_config: ModelConfig) -> None:
    cache = filled(tiny_config, 2, 4, 1)
    ctx = cache.begin((3, 0, 2))
    assert ctx.lengths == (3, 2)
    assert ctx.positions.tolist() == [2, 3, 4, 1, 2]
    assert ctx.cache is cache
    views = cache.append(0, *rows(tiny_config, 50, 5))
    assert [tuple(view.shape) for view in views] == [(5, 13 + 4), (3, 13 + 4)]


def test_appended_rows_are_views_into_the_cache(tiny_config: ModelConfig) -> None:
    cache = ContiguousLatentCache(tiny_config, CAPACITY)
    cache.begin((2,))
    latents, keys = rows(tiny_config, 0, 2)
    (view,) = cache.append(0, latents, keys)
    assert torch.equal(view, torch.cat((latents, keys), -1))
    assert view.untyped_storage().nbytes() == cache.bytes


def test_a_pass_counts_once_its_last_layer_is_appended(tiny_config: ModelConfig) -> None:
    cache = filled(tiny_config, 2)
    cache.begin((3,))
    for layer in range(tiny_config.num_hidden_layers):
        assert cache.lengths == (2,)
        cache.append(layer, *rows(tiny_config, 0, 3))
    assert cache.lengths == (5,)


def test_more_tokens_than_slots_are_refused_with_both_numbers(tiny_config: ModelConfig) -> None:
    cache = filled(tiny_config, 2, 5)
    with pytest.raises(UsageError, match=r"sequence 1 holds 5 tokens and is given 3 more, but capacity_tokens=7;.* 8"):
        cache.begin((1, 3))
    assert cache.lengths == (2, 5)
    cache.begin((1, 2))


@pytest.mark.parametrize("new_tokens", [(), (1,), (1, 1, 1), (0, 0), (2, -1)], ids=str)
def test_begin_refuses_counts_that_are_not_one_a_sequence(tiny_config: ModelConfig, new_tokens: tuple[int]) -> None:
    with pytest.raises(ValueError, match="new_tokens="):
        ContiguousLatentCache(tiny_config, CAPACITY, 2).begin(new_tokens)


def test_append_refuses_layers_out_of_turn(tiny_config: ModelConfig) -> None:
    cache = ContiguousLatentCache(tiny_config, CAPACITY)
    with pytest.raises(RuntimeError, match="layer 0 appended out of turn"):
        cache.append(0, *rows(tiny_config, 0, 2))
    cache.begin((2,))
    with pytest.raises(RuntimeError, match="layer 1 appended out of turn"):
        cache.append(1, *rows(tiny_config, 0, 2))
    cache.append(0, *rows(tiny_config, 0, 2))
    with pytest.raises(RuntimeError, match="layer 0 appended out of turn"):
        cache.append(0, *rows(tiny_config, 0, 2))


def test_append_refuses_another_number_of_rows_or_another_dtype(tiny_config: ModelConfig) -> None:
    cache = ContiguousLatentCache(tiny_config, CAPACITY)
    cache.begin((2,))
    latents, keys = rows(tiny_config, 0, 3)
    with pytest.raises(RuntimeError, match="3 and 3 rows appended, but the pass has 2"):
        cache.append(0, latents, keys)
    with pytest.raises(RuntimeError, match=r"torch.float64 appended to a cache of torch.float32"):
        cache.append(0, latents[:2].double(), keys[:2].double())


def test_truncate_breaks_off_the_pass_under_way(tiny_config: ModelConfig) -> None:
    cache = filled(tiny_config, 3)
    cache.begin((2,))
    cache.truncate(0, 1)
    assert cache.lengths == (1,)
    with pytest.raises(RuntimeError, match="layer 0 appended out of turn"):
        cache.append(0, *rows(tiny_config, 0, 2))


@pytest.mark.parametrize("length", [-1, 4])
def test_truncate_refuses_a_length_that_the_sequence_does_not_have(tiny_config: ModelConfig, length: int) -> None:
    with pytest.raises(ValueError, match=f"length={length}: sequence 0 holds 3 tokens"):
        filled(tiny_config, 3).truncate(0, length)


@pytest.mark.parametrize(("capacity", "sequences"), [(0, 1), (1, 0)])
def test_a_cache_without_slots_is_refused(tiny_config: ModelConfig, capacity: int, sequences: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ContiguousLatentCache(tiny_config, capacity, sequences)


def test_check_integrity_finds_lengths_beyond_the_slots(tiny_config: ModelConfig) -> None:
    cache = filled(tiny_config, 3)
    cache.check_integrity()
    cache._lengths[0] = CAPACITY + 1
    with pytest.raises(RuntimeError, match="lengths within the slots"):
        cache.check_integrity()


class CacheAgainstLists(RuleBasedStateMachine):
    """Random passes, broken-off passes and truncations, against plain lists of row numbers."""

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
        max_position_embeddings=CAPACITY,
    )

    @initialize()
    def start(self) -> None:
        self.cache = ContiguousLatentCache(self.config, CAPACITY, SEQUENCES)
        self.expected: list[list[int]] = [[] for _ in range(SEQUENCES)]  # the number of each token's row in layer 0
        self.used = 0

    @rule(counts=st.tuples(*[st.integers(0, 4)] * SEQUENCES).filter(any), layers=st.integers(0, 2))
    def run_pass(self, counts: tuple[int, ...], layers: int) -> None:
        """Append the first `layers` layers of a pass: all of them, or break off."""
        wanted = [len(tokens) + n for tokens, n in zip(self.expected, counts, strict=True)]
        if max(wanted) > CAPACITY:
            with pytest.raises(UsageError, match="capacity_tokens=7"):
                self.cache.begin(counts)
            return
        ctx = self.cache.begin(counts)
        starts = accumulate(counts, initial=self.used)
        after = [[*tokens, *range(a, a + n)] for tokens, a, n in zip(self.expected, starts, counts, strict=False)]
        positions = [
            p for tokens, n in zip(self.expected, counts, strict=True) for p in range(len(tokens), len(tokens) + n)
        ]
        assert ctx.positions.tolist() == positions
        assert ctx.lengths == tuple(n for n in counts if n)
        for layer in range(layers):
            first = 1000 * layer + self.used
            views = self.cache.append(layer, *rows(self.config, first, sum(counts)))
            present = [tokens for tokens, n in zip(after, counts, strict=True) if n]
            for view, tokens in zip(views, present, strict=True):
                assert view[:, 0].tolist() == [1000 * layer + t for t in tokens]
                assert view[:, self.config.kv_lora_rank].tolist() == [-1000 * layer - t for t in tokens]
        self.used += sum(counts)
        if layers == self.config.num_hidden_layers:
            self.expected = after

    @precondition(lambda self: any(self.expected))
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence = data.draw(st.integers(0, SEQUENCES - 1))
        length = data.draw(st.integers(0, len(self.expected[sequence])))
        self.cache.truncate(sequence, length)
        del self.expected[sequence][length:]

    @invariant()
    def holds(self) -> None:
        self.cache.check_integrity()
        assert self.cache.lengths == tuple(len(tokens) for tokens in self.expected)


CacheAgainstLists.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestCacheAgainstLists = CacheAgainstLists.TestCase
