"""The bytes of single tokens, which need not be whole characters."""

from __future__ import annotations

import random

import pytest

from abyssal.text.special_tokens import USER
from abyssal.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def f(x):\n    return x * x\n", "ééé ünïcode 漢字 😀"] * 3, 300)


def test_bytes_of_the_tokens_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    source = random.Random(3)
    for _ in range(50):
        text = "".join(source.choice("aé漢😀 \n\t\0¡ÿĀ\u00ad") for _ in range(source.randint(0, 20)))
        assert b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text)) == text.encode()


def test_an_added_token_is_its_spelling(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.encode(USER)[0]) == USER.encode()


def test_an_id_that_no_token_has_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
