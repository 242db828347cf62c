"""Every text reads from its pages what was written for it, whichever way the pass goes."""

from __future__ import annotations

import random

import pytest
import torch

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
