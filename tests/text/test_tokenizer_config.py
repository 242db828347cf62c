import json
from pathlib import Path

import pytest

from abyssal.errors import DataError
from abyssal.text.special_tokens import ASSISTANT, BOS, EOS, PAD, USER
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config

RELEASED = Path(__file__).parents[2] / "../shared/data/deepseek_v3_tokenizer"
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "content": "5\n"}
CHATS = {
    "question": ([QUESTION], f"{BOS}{USER}What is 2 + 3?"),
    "turns": ([QUESTION, ANSWER, QUESTION], f"{BOS}{USER}What is 2 + 3?{ASSISTANT}5\n{EOS}{USER}What is 2 + 3?"),
    "system": ([SYSTEM, QUESTION, ANSWER], f"{BOS}Be brief.{USER}What is 2 + 3?{ASSISTANT}5\n{EOS}"),
    "two system prompts": ([SYSTEM, QUESTION, SYSTEM], f"{BOS}Be brief.\n\nBe brief.{USER}What is 2 + 3?"),
    "system alone": ([SYSTEM], f"{BOS}Be brief."),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["What is 2 + 3? It is 5, and that is what it is."], 270)


@pytest.fixture(scope="module")
def opened(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    """The folder we write, as transformers opens it."""
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(folder / "tokenizer.json")
    write_tokenizer_config(folder, tokenizer, max_length=77)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_opens_the_folder_with_our_tokens(opened, tokenizer: Tokenizer) -> None:
    assert (opened.bos_token_id, opened.eos_token_id, opened.pad_token_id) == (0, 1, 2)
    assert opened.model_max_length == 77
    assert len(opened) == tokenizer.vocab_size


@pytest.mark.parametrize("text", ["What is it?", f"{USER}that{ASSISTANT}", "Größe\n\n 12345", ""])
def test_transformers_gives_bos_and_our_ids(opened, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert opened(text).input_ids == [tokenizer.bos_id, *ids]
    assert opened.decode(ids) == text


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("generation", [False, True])
def test_chat_template_writes_the_released_format(opened, chat: str, generation: bool) -> None:
    messages, expected = CHATS[chat]
    text = opened.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    assert text == expected + (ASSISTANT if generation else "")


def test_chat_ids_are_those_of_the_text(opened, tokenizer: Tokenizer) -> None:
    messages, text = CHATS["turns"]
    assert opened.apply_chat_template(messages, return_dict=False) == tokenizer.encode(text)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("generation", [False, True])
def test_chat_template_equals_the_released_one(opened, chat: str, generation: bool) -> None:
    if not RELEASED.exists():
        pytest.skip("DeepSeek-V3's tokenizer_config.json is not beside the project")
    template = json.loads((RELEASED / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    messages, _ = CHATS[chat]
    ours, theirs = (
        opened.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, chat_template=written)
        for written in (None, template)
    )
    assert ours == theirs


def test_transformers_opens_the_released_tokenizer_as_we_save_it(opened, tmp_path: Path) -> None:
    if not RELEASED.exists():
        pytest.skip("DeepSeek-V3's tokenizer.json is not beside the project")
    import transformers

    released = Tokenizer.load(RELEASED)
    released.save(tmp_path / "tokenizer.json")
    write_tokenizer_config(tmp_path, released, max_length=9)
    text = f"{USER}Größe 12345 大小{ASSISTANT}"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == [0, *released.encode(text)]


def test_chat_template_refuses_an_unknown_role(opened) -> None:
    import jinja2

    with pytest.raises(jinja2.TemplateError, match="role tool: must be system, user or assistant"):
        opened.apply_chat_template([{"role": "tool", "content": "42"}], tokenize=False)


def test_tokenizer_without_turn_tokens_gets_no_template(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models

    core = tokenizers.Tokenizer(models.BPE())
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    write_tokenizer_config(tmp_path, Tokenizer(core, "<s>", "</s>"), max_length=9)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "chat_template" not in config
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<s>", "</s>", "</s>")


def test_padding_is_not_the_end_of_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer_config(tmp_path, tokenizer, max_length=9)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))["pad_token"] == PAD


def test_a_folder_that_cannot_be_written_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be written"):
        write_tokenizer_config(tmp_path / "absent", tokenizer, max_length=9)
