"""The tokenizer of a GGUF file gives the ids of the one that it was made from."""

import copy
import json
from pathlib import Path

import pytest
import tokenizers
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import Regex, models, pre_tokenizers

from abyssal.checkpoint.gguf.tokenizer import add_tokenizer
from abyssal.errors import DataError
from abyssal.text.tokenizer import SPLITS, Tokenizer
from abyssal.text.tokenizer_config import CHAT_TEMPLATE, write_tokenizer_config

RELEASED = Path(__file__).parents[3] / "../shared/data/deepseek_v3_tokenizer"
#: What llama.cpp (0c1e57098, src/llama-vocab.cpp) splits by where `tokenizer.ggml.pre` is `deepseek-v3`.
LLAMA_CPP_SPLITS = (
    "\\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
TEXTS = [
    "def main() -> None:\n\tfor i in range(12345):\r\n\r\n        print(i, 3.14159)\n  ",
    "Größe, 寸法ひらがな, размер — 大小 and size; it's 1234567!! e\u0301 🚀 ...",
    "<｜User｜>What is 2+2?<｜Assistant｜>4<｜end▁of▁sentence｜> <|EOT|>",
]


@pytest.fixture(scope="module")
def learnt() -> Tokenizer:
    return Tokenizer.train([*TEXTS, *(f"value_{n} = Größe({n})" for n in range(50))], 420)


@pytest.fixture
def folder(tmp_path, learnt) -> Path:
    learnt.save(tmp_path / "tokenizer.json")
    write_tokenizer_config(tmp_path, learnt, 64)
    return tmp_path


def add(folder: Path, vocab_size: int, path: Path | None = None) -> GGUFWriter:
    writer = GGUFWriter(path, "deepseek2")
    add_tokenizer(writer, folder, vocab_size)
    return writer


@pytest.fixture
def written(tmp_path):
    """Write a file of nothing but a tokenizer and return what is in it."""

    def write(folder: Path, vocab_size: int = 450) -> dict[str, object]:
        writer = add(folder, vocab_size, tmp_path / "vocabulary.gguf")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        fields = GGUFReader(tmp_path / "vocabulary.gguf").fields
        return {
            name.removeprefix("tokenizer."): field.contents()
            for name, field in fields.items()
            if name.startswith("tokenizer.")
        }

    return write


def rebuilt(fields: dict[str, object]) -> tokenizers.Tokenizer:
    """Build a tokenizer from the fields of a file, splitting as llama.cpp does."""
    tokens, types = fields["ggml.tokens"], fields["ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["ggml.merges"]]
    core = tokenizers.Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in LLAMA_CPP_SPLITS]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    added = [t for t, kind in zip(tokens, types, strict=True) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    core.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])
    return core


def test_llama_cpp_splits_as_we_do():
    assert LLAMA_CPP_SPLITS == SPLITS


def test_a_tokenizer_trained_here_comes_back(folder, learnt, written):
    fields = written(folder)
    core = rebuilt(fields)
    for text in TEXTS:
        assert core.encode(text, add_special_tokens=False).ids == learnt.encode(text)
    state = json.loads(learnt.to_json())
    assert fields["ggml.merges"] == [" ".join(pair) for pair in state["model"]["merges"]]
    assert fields["ggml.tokens"][: learnt.vocab_size] == [
        token for token, _ in sorted(state["model"]["vocab"].items(), key=lambda item: item[1])
    ]


def test_special_tokens_types_and_template(folder, learnt, written):
    fields = written(folder)
    tokens, types = fields.pop("ggml.tokens"), fields.pop("ggml.token_type")
    fields.pop("ggml.merges")
    assert fields == {
        "ggml.model": "gpt2",
        "ggml.pre": "deepseek-v3",
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "ggml.padding_token_id": 2,
        "ggml.fim_suf_token_id": 3,
        "ggml.fim_pre_token_id": 4,
        "ggml.fim_mid_token_id": 5,
        "ggml.add_bos_token": True,
        "ggml.add_eos_token": False,
        "ggml.add_space_prefix": False,
        "chat_template": CHAT_TEMPLATE,
    }
    assert len(tokens) == len(set(tokens)) == len(types) == 450
    assert types[:8] == [TokenType.CONTROL] * 8
    assert set(types[8 : learnt.vocab_size]) == {TokenType.NORMAL}
    assert set(types[learnt.vocab_size :]) == {TokenType.UNUSED}


def test_the_released_tokenizer_comes_back():
    if not RELEASED.is_dir():
        pytest.skip(f"{RELEASED} is not there")
    values = add(RELEASED, 129280).kv_data[0]  # not read from a file: the package's reader takes seconds for it
    fields = {name.removeprefix("tokenizer."): value.value for name, value in values.items()}
    state = json.loads((RELEASED / "tokenizer.json").read_text(encoding="utf-8"))
    assert fields["ggml.merges"] == state["model"]["merges"]
    tokens, types = fields["ggml.tokens"], fields["ggml.token_type"]
    assert {token: tokens[number] for token, number in state["model"]["vocab"].items()} == {
        token: token for token in state["model"]["vocab"]
    }
    wanted = {
        added["id"]: (
            added["content"],
            TokenType.USER_DEFINED if added["content"] == "<|EOT|>" and not added["special"] else TokenType.CONTROL,
        )
        for added in state["added_tokens"]
    }
    assert {number: (tokens[number], types[number]) for number in wanted} == wanted
    assert types.count(TokenType.UNUSED) == 129280 - 128815
    config = json.loads((RELEASED / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert fields["chat_template"] == config["chat_template"]
    assert (fields["ggml.bos_token_id"], fields["ggml.eos_token_id"], fields["ggml.padding_token_id"]) == (0, 1, 1)
    assert tuple(split["pattern"]["Regex"] for split in state["pre_tokenizer"]["pretokenizers"][:-1]) == SPLITS


def test_a_template_of_its_own_file_and_other_settings(folder, written):
    (folder / "chat_template.jinja").write_text("{{ messages }} ü", encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": False, "add_eos_token": True, "pad_token": {"content": "<｜User｜>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    fields = written(folder)
    assert fields["chat_template"] == "{{ messages }} ü"
    assert (fields["ggml.add_bos_token"], fields["ggml.add_eos_token"]) == (False, True)
    assert fields["ggml.padding_token_id"] == 6


def test_without_a_tokenizer_config_there_is_no_template_and_bos_comes_first(folder, written):
    (folder / "tokenizer_config.json").unlink()
    fields = written(folder)
    assert "chat_template" not in fields
    assert "ggml.padding_token_id" not in fields
    assert fields["ggml.add_bos_token"] is True


def put(path: str, value: object):
    """Return a change of a tokenizer.json: the place named by `a.b.0` becomes a value."""

    def change(state: dict) -> None:
        *owners, last = path.split(".")
        for owner in owners:
            state = state[int(owner) if isinstance(state, list) else owner]
        state[int(last) if isinstance(state, list) else last] = value

    return change


def add_token(**changes: object):
    token = {"id": 420, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False}
    return lambda state: state["added_tokens"].append({**token, "normalized": False, "special": False, **changes})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("normalizer", {"type": "NFC"}), "normalizer=NFC: must be none"),
        (put("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}]}), "normalizer=Sequence: must be"),
        (put("model.ignore_merges", True), "model.ignore_merges=True: must be False"),
        (put("model.dropout", 0.1), "model.dropout=0.1: must be None"),
        (put("pre_tokenizer.pretokenizers.0.pattern.Regex", r"\p{N}"), "is not DeepSeek-V3's; llama.cpp knows splits"),
        (put("pre_tokenizer.pretokenizers.2.behavior", "Removed"), "its pre_tokenizer is not DeepSeek-V3's"),
        (put("pre_tokenizer.pretokenizers.3.add_prefix_space", True), "its pre_tokenizer is not DeepSeek-V3's"),
        (put("pre_tokenizer", None), "its pre_tokenizer is not DeepSeek-V3's"),
        (put("pre_tokenizer", {"type": "Whitespace"}), "its pre_tokenizer is not DeepSeek-V3's"),
        (put("model.merges", []), "model.merges is empty"),
        (add_token(lstrip=True), "added token '<x>': lstrip must be false"),
        (add_token(single_word=True), "added token '<x>': single_word must be false"),
        (add_token(id=420, content="y" * 2), None),
    ],
)
def test_what_gguf_cannot_say_of_a_tokenizer_is_refused(folder, written, change, sentence):
    path = folder / "tokenizer.json"
    state = copy.deepcopy(json.loads(path.read_text(encoding="utf-8")))
    change(state)
    path.write_text(json.dumps(state), encoding="utf-8")
    if sentence is None:
        fields = written(folder)
        assert (fields["ggml.tokens"][420], fields["ggml.token_type"][420]) == ("yy", TokenType.USER_DEFINED)
        return
    with pytest.raises(DataError) as caught:
        written(folder)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_vocabulary_larger_than_the_model_is_refused(folder, learnt, written):
    with pytest.raises(DataError, match=rf"has ids up to {learnt.vocab_size - 1}, but the model has vocab_size=100"):
        written(folder, 100)


def test_templates_that_cannot_be_written_are_refused(folder, written):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"chat_template must be one text; of several, put the one to use into chat_t"):
        written(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja: not UTF-8"):
        written(folder)
