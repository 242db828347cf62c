import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from abyssal.errors import DataError
from abyssal.text.special_tokens import ASSISTANT, BOS, EOS, SPECIAL_TOKENS, USER
from abyssal.text.tokenizer import Tokenizer

LEAST = 256 + len(SPECIAL_TOKENS)
RELEASED = Path(__file__).parents[2] / "../shared/data/deepseek_v3_tokenizer/tokenizer.json"
CORPUS = [
    "def area(width, height):\n    return width * height\n",
    "def main() -> None:\n    for i in range(12345):\n        print(area(i, i + 1))\n",
    "Größe, 寸法, размер — 大小 and size; it's 3.14159!\r\n\r\n\tEnd.\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, LEAST + 60)


@pytest.fixture(scope="module")
def released() -> Tokenizer:
    if not RELEASED.exists():
        pytest.skip("DeepSeek-V3's tokenizer.json is not beside the project")
    return Tokenizer.load(RELEASED)


def test_special_tokens_have_the_first_ids_in_order(tokenizer: Tokenizer) -> None:
    assert [tokenizer.encode(token) for token in SPECIAL_TOKENS] == [[i] for i in range(8)]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_encode_adds_neither_bos_nor_eos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    ids = tokenizer.encode_batch(["def main", "size"])
    assert ids == [tokenizer.encode("def main"), tokenizer.encode("size")]
    assert min(ids[0] + ids[1]) >= len(SPECIAL_TOKENS)


def test_prompt_spelling_of_a_special_token_is_the_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(f"{USER}def{ASSISTANT}")[::2] == [6, 7]


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_document_spelling_of_a_special_token_stays_text(tokenizer: Tokenizer, token: str) -> None:
    text = f"a {token}\n{token}{token}b"
    ids = tokenizer.encode_document(text)
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == text


def test_document_and_prompt_ids_agree_on_plain_text(tokenizer: Tokenizer) -> None:
    for text in CORPUS:
        assert tokenizer.encode_document(text) == tokenizer.encode(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_round_trip_keeps_every_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode_document(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_decode_leaves_out_what_the_released_tokenizer_marks_as_special(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"{BOS}{USER}def{ASSISTANT}size{EOS}")
    assert tokenizer.decode(ids) == f"{USER}def{ASSISTANT}size"
    assert tokenizer.decode(ids, skip_special=False) == f"{BOS}{USER}def{ASSISTANT}size{EOS}"


@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip_special=st.booleans())
def test_stream_gives_the_decoded_text_piece_by_piece(
    tokenizer: Tokenizer, data: st.DataObject, skip_special: bool
) -> None:
    ids = data.draw(
        st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40)
    )  # invalid UTF-8 and unknown ids too
    stream = tokenizer.stream(skip_special)
    for _ in range(2):  # flush starts anew
        pieces = [stream.push(token) for token in ids]
        assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids, skip_special)


def test_stream_never_gives_half_a_character(tokenizer: Tokenizer) -> None:
    text = "λ→𝛌🦉é"  # none of them in the corpus, so every byte is a token
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.flush() == ""


def test_stream_flush_shows_an_unfinished_character(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert [stream.push(token) for token in tokenizer.encode("ab🦉")[:-1]][-3:] == ["", "", ""]
    assert stream.flush() == "\ufffd"


def test_training_twice_gives_the_same_tokenizer() -> None:
    first, second = (Tokenizer.train(CORPUS, LEAST + 60) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != Tokenizer.train(CORPUS, LEAST + 59).fingerprint


def test_training_learns_longer_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == LEAST + 60
    assert tokenizer.bytes_per_token(CORPUS) > 1.2
    assert Tokenizer.train([], LEAST).bytes_per_token(CORPUS) == 1.0


def test_training_on_too_little_text_gives_a_smaller_vocabulary() -> None:
    assert Tokenizer.train(["aa"], LEAST + 500).vocab_size == LEAST + 1


def test_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=rf"^vocab_size={LEAST - 1}: must be at least {LEAST}, "):
        Tokenizer.train(CORPUS, LEAST - 1)


def test_a_fault_while_reading_the_corpus_comes_out_of_training() -> None:
    def texts():
        yield "some text"
        raise DataError("a.txt: not UTF-8")

    with pytest.raises(DataError, match=r"^a.txt: not UTF-8$"):
        Tokenizer.train(texts(), LEAST)


def test_a_saved_tokenizer_loads_as_itself(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(CORPUS[1] + EOS) == tokenizer.encode(CORPUS[1] + EOS)


def test_truncation_and_padding_in_the_file_are_not_followed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    core = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    core.enable_truncation(max_length=3)
    core.enable_padding(length=400)
    core.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(CORPUS[1]) == tokenizer.encode(CORPUS[1])


def test_loading_without_a_file_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json: no such file"):
        Tokenizer.load(tmp_path / "absent.json")
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"version": "1.0"}'])
def test_loading_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    core = tokenizers.Tokenizer(models.BPE())
    core.decoder = decoders.Metaspace()
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="decoder=Metaspace: must be ByteLevel"):
        Tokenizer.load(tmp_path)


def test_bos_and_eos_are_those_the_config_beside_it_names(tmp_path: Path) -> None:
    core = tokenizers.Tokenizer(models.BPE())
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="has no BOS token"):
        Tokenizer.load(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos, loaded.eos, loaded.bos_id, loaded.eos_id) == ("<s>", "</s>", 0, 1)
    for text, sentence in (
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"bos_token": {"lstrip": false}}', r"bos_token=\{'lstrip': False\}: must be a token, or an object with its"),
    ):
        config.write_text(text)
        with pytest.raises(DataError, match=rf"tokenizer_config\.json: {sentence}"):
            Tokenizer.load(tmp_path)
    config.unlink()
    config.mkdir()
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read \(Is a directory\)"):
        Tokenizer.load(tmp_path)


def test_text_with_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate at 2"):
        tokenizer.encode("ab\udc80")


def test_splits_are_those_of_the_released_tokenizer(tokenizer: Tokenizer, released: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    ours, theirs = (json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "tokenizer.json", RELEASED))
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]
    flags = {token["content"]: token["special"] for token in theirs["added_tokens"]}
    assert {token["content"]: token["special"] for token in ours["added_tokens"]} == {
        token: flags[token] for token in SPECIAL_TOKENS
    }


def test_released_tokenizer_makes_no_added_token_of_a_document(released: Tokenizer) -> None:
    added = [token["content"] for token in json.loads(RELEASED.read_text(encoding="utf-8"))["added_tokens"]]
    text = "x".join(added)
    assert released.vocab_size == 128815
    assert sum(token >= 128000 or token <= 2 for token in released.encode(text)) == len(added)
    ids = released.encode_document(text)
    assert all(2 < token < 128000 for token in ids)
    assert released.decode(ids) == text
