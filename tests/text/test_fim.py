import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.errors import DataError
from abyssal.text.fim import FillInTheMiddle
from abyssal.text.special_tokens import FIM_BEGIN, FIM_END, FIM_HOLE
from abyssal.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["def f(x):\n    return x\n"] * 3, 290)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30), data=st.data())
def test_rearranged_document_comes_back(text: str, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(text)))
    second = data.draw(st.integers(first, len(text)))
    fim = FillInTheMiddle(TOKENIZER)
    assert fim.decode([TOKENIZER.bos_id, *fim.encode(text, first, second), TOKENIZER.eos_id]) == text


def test_order_is_prefix_suffix_middle() -> None:
    ids = FillInTheMiddle(TOKENIZER).encode("aébc", 1, 3)
    assert TOKENIZER.decode(ids, skip_special=False) == f"{FIM_BEGIN}a{FIM_HOLE}c{FIM_END}éb"


def test_document_that_was_not_rearranged_comes_back() -> None:
    text = f"spelt out {FIM_BEGIN}{FIM_HOLE}{FIM_END}"
    assert FillInTheMiddle(TOKENIZER).decode([0, *TOKENIZER.encode_document(text), 1]) == text


def test_tokenizer_without_the_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "has", lambda self, token: token != FIM_HOLE)
    with pytest.raises(DataError, match=rf"data\.fim_rate: must be 0 with this tokenizer, which lacks {FIM_HOLE};"):
        FillInTheMiddle(TOKENIZER)
