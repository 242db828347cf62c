from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from abyssal.engine import (
    Detokenizer,
    Engine,
    EngineOptions,
    LoadedModel,
    Output,
    Request,
    SamplingParameters,
    ScoredToken,
    load_model,
)
from abyssal.engine.sampler import Sampler
from abyssal.errors import UsageError
from abyssal.text.tokenizer import Tokenizer

TEXT = "naïve 寸法 — ok"


@pytest.fixture
def loaded(model_directory: Callable[..., Path]) -> LoadedModel:
    return load_model(model_directory())


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int]], None]:
    """Let the model generate these ids, as far as the request goes."""

    def script(ids: Sequence[int]) -> None:
        coming = iter(ids)
        monkeypatch.setattr(Sampler, "choose", lambda *_: ScoredToken(next(coming), -1.0))

    return script


def stream_text(loaded: LoadedModel, prompt_ids: list[int], parameters: SamplingParameters) -> Iterator[Output]:
    return Engine.of(loaded, EngineOptions.single_stream()).stream(Request(prompt_ids, parameters))


def test_characters_of_several_tokens_come_out_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT), "some characters must take several tokens"
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "" in pieces
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == TEXT


def test_an_unfinished_character_reads_as_such_at_the_end(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer)
    first_byte = tokenizer.encode("寸")[0]
    assert stream.push(first_byte) == ""
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("stop", ["法", "法 —", "ïve 寸", "— o"])
def test_a_stop_string_across_tokens_and_characters_ends_the_text(tokenizer: Tokenizer, stop: str) -> None:
    stream = Detokenizer(tokenizer, [stop])
    text = "".join([stream.push(token) for token in tokenizer.encode(TEXT)]) + stream.flush()
    assert text == TEXT[: TEXT.index(stop)]
    assert stream.matched == stop


def test_the_beginning_of_a_stop_string_is_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer, ["ok then"])
    pieces = [stream.push(token) for token in tokenizer.encode(TEXT)]
    assert "".join(pieces) == TEXT.removesuffix("ok")
    assert stream.flush() == "ok"
    assert stream.matched is None


@pytest.mark.parametrize(
    ("text", "ends", "parameters", "expected", "reason"),
    [
        ("x * x", True, {}, "x * x", "eos"),
        ("x * x", False, {"max_new_tokens": 3}, "x *", "length"),
        ("x * x\n\nnext", True, {"stop": ("\n\n", "never")}, "x * x", "stop"),
        ("x * x\n", True, {"stop": ("\n\n",)}, "x * x\n", "eos"),  # what was held back comes out
    ],
)
def test_a_text_ends_by_end_token_length_or_stop_string(
    loaded: LoadedModel,
    say: Callable[[Sequence[int]], None],
    text: str,
    ends: bool,
    parameters: dict[str, object],
    expected: str,
    reason: str,
) -> None:
    ids = [token for character in text for token in loaded.tokenizer.encode(character)]
    if parameters.get("max_new_tokens"):
        assert len(ids) > 3
    say([*ids, *([loaded.tokenizer.eos_id] if ends else []), *ids])
    chunks = list(stream_text(loaded, [0], SamplingParameters(**parameters)))  # type: ignore[arg-type]
    assert "".join(chunk.text for chunk in chunks) == expected
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [reason]


def test_a_stop_string_that_the_last_flush_completes_counts(
    loaded: LoadedModel, say: Callable[[Sequence[int]], None]
) -> None:
    say([loaded.tokenizer.encode("a")[0], loaded.tokenizer.encode("寸")[0]])
    chunks = list(stream_text(loaded, [0], SamplingParameters(2, stop=("\ufffd",))))
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("a", None), ("", "stop")]


def test_an_end_token_that_spells_a_text_is_not_part_of_the_text(
    model_directory: Callable[..., Path], say: Callable[[Sequence[int]], None], tokenizer: Tokenizer
) -> None:
    letters = [tokenizer.encode(letter)[0] for letter in "def"]
    loaded = load_model(model_directory(generation={"eos_token_id": [1, letters[2]]}))
    say(letters)
    assert "".join(chunk.text for chunk in stream_text(loaded, [0], SamplingParameters())) == "de"


def test_a_stream_of_the_model_itself_is_the_text_of_its_tokens(loaded: LoadedModel) -> None:
    parameters = SamplingParameters(30, temperature=1.0, seed=4)
    chunks = list(stream_text(loaded, loaded.encode_prompt("def f"), parameters))
    ids = [chunk.token.id for chunk in chunks if chunk.token and chunk.token.id not in loaded.eos_ids]
    assert "".join(chunk.text for chunk in chunks) == loaded.tokenizer.decode(ids)
    assert chunks[-1].finish_reason == ("eos" if len(ids) < len(chunks) else "length")


def test_faults_come_when_the_stream_is_asked_for_not_when_it_is_read(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match="prompt: has no tokens"):
        stream_text(loaded, [], SamplingParameters())
