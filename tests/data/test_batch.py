from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abyssal.data.batch import BatchLoader, count_windows, evaluation_sequences
from abyssal.data.order import WindowOrder
from abyssal.data.shards import Shards
from abyssal.errors import DataError

S = 5


@pytest.fixture
def shards(make_shards, tmp_path: Path) -> Shards:
    """33 tokens 100 to 132 in three shards: six windows of 5 and two tokens over."""
    tokens = list(range(100, 133))
    make_shards([tokens[:7], tokens[7:10]], [tokens[10:21]], [tokens[21:33]])
    return Shards.open(tmp_path, "train")


def loader(shards: Shards, **fields) -> BatchLoader:
    return BatchLoader(shards, WindowOrder(7, count_windows(shards, S), **fields), S)


def test_windows_share_one_token_with_the_next(shards: Shards) -> None:
    assert count_windows(shards, S) == 6
    rows = loader(shards).batch(0, 6).tokens
    assert rows.dtype == torch.int64
    assert sorted(rows.tolist()) == [list(range(100 + 5 * n, 106 + 5 * n)) for n in range(6)]


def test_batches_follow_the_order(shards: Shards) -> None:
    order = WindowOrder(7, 6)
    batch = loader(shards).batch(4, 3)
    assert batch.first_sequence == 4
    assert batch.tokens[:, 0].tolist() == [100 + 5 * order.window(n) for n in (4, 5, 6)]


def test_any_cut_into_batches_gives_the_same_sequences(shards: Shards) -> None:
    whole = loader(shards, skipped=[(3, 8)]).batch(0, 20).tokens
    for sizes in ((20,), (1,) * 20, (7, 2, 11)):
        first, parts = 0, []
        for size in sizes:
            parts.append(loader(shards, skipped=[(3, 8)]).batch(first, size).tokens)
            first += size
        assert torch.equal(torch.cat(parts), whole)


def test_skipped_sequences_are_not_trained_on(shards: Shards) -> None:
    plain, skipping = loader(shards).batch(0, 12).tokens, loader(shards, skipped=[(2, 5)]).batch(0, 9).tokens
    assert torch.equal(skipping, torch.cat([plain[:2], plain[5:]]))


def test_batch_names_the_sequence_indices_of_its_rows(shards: Shards) -> None:
    assert loader(shards).batch(3, 4).ranges == ((3, 7),)
    assert loader(shards, skipped=[(2, 5), (6, 9)]).batch(1, 4).ranges == ((1, 2), (5, 6), (9, 11))


def test_skipping_loader_skips_its_own_ranges_only(shards: Shards) -> None:
    first = loader(shards, skipped=[(0, 3)])
    again = first.skipping(((2, 5),))
    assert torch.equal(again.batch(0, 9).tokens, loader(shards, skipped=[(2, 5)]).batch(0, 9).tokens)
    assert first.batch(0, 1).ranges == ((3, 4),)


def test_a_corpus_shorter_than_one_window_is_refused_with_the_sizes(shards: Shards) -> None:
    assert count_windows(shards, 32) == 1
    with pytest.raises(DataError, match=r"has 33 training tokens, but train\.sequence_length=33 needs at least 34"):
        BatchLoader(shards, WindowOrder(0, 1), 33)


def test_an_order_of_other_data_is_refused(shards: Shards) -> None:
    with pytest.raises(DataError, match="has 6 windows, but the order was made for 7"):
        BatchLoader(shards, WindowOrder(0, 7), S)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(3, 23), max_size=6), sequence_length=st.integers(1, 12))
def test_every_token_after_bos_is_a_target_once(make_shards, tmp_path: Path, lengths, sequence_length: int) -> None:
    documents = [[0, *range(100 * n + 2, 100 * n + length), 1] for n, length in enumerate(lengths)]
    make_shards(documents[:2], documents[2:])
    slices = list(evaluation_sequences(Shards.open(tmp_path, "train"), sequence_length))
    for n, document in enumerate(documents):
        mine = [piece for piece in slices if piece.document == n]
        assert torch.cat([piece.tokens[1:] for piece in mine]).tolist() == document[1:]
        assert torch.cat([piece.tokens[:-1] for piece in mine]).tolist() == document[:-1]
        assert all(1 < len(piece.tokens) <= sequence_length + 1 for piece in mine)
        assert [piece.num_bytes for piece in mine] == [10 * len(document)] + [0] * (len(mine) - 1)
    assert [piece.document for piece in slices] == sorted(piece.document for piece in slices)


@pytest.mark.parametrize(
    ("max_bytes", "documents"), [(None, 4), (330, 4), (329, 3), (210, 3), (99, 1), (70, 1), (1, 1)]
)
def test_evaluation_takes_whole_documents_up_to_the_bytes(
    shards: Shards, max_bytes: int | None, documents: int
) -> None:
    found = list(evaluation_sequences(shards, S, max_bytes))  # documents of 70, 30, 110 and 120 bytes
    assert {piece.document for piece in found} == set(range(documents))
    assert sum(piece.num_bytes for piece in found) == [70, 100, 210, 330][documents - 1]


def test_evaluation_of_nothing_is_nothing(make_shards, tmp_path: Path) -> None:
    make_shards([])
    assert list(evaluation_sequences(Shards.open(tmp_path, "train"), S)) == []


def test_batches_tell_where_documents_begin_when_asked(make_shards, tmp_path: Path) -> None:
    make_shards([[5, 6, 7], [8]], [], [[9] * 9, [10, 11]], [[12] * 6])
    shards = Shards.open(tmp_path, "train")  # documents begin at 0, 3, 4, 13 and 15, of 21 tokens
    assert shards.document_starts(0, 21) == [0, 3, 4, 13, 15]
    assert shards.document_starts(3, 13) == [3, 4]
    assert shards.document_starts(5, 13) == []
    order = WindowOrder(7, 4)
    batch = BatchLoader(shards, order, S, mask_documents=True).batch(0, 4)
    expected = {0: (3, 1, 1), 1: (5,), 2: (3, 2), 3: (5,)}
    assert batch.lengths == tuple(expected[order.window(n)] for n in range(4))
    assert BatchLoader(shards, order, S).batch(0, 4).lengths == ()
