"""A tokenizer in GGUF's keys, so that llama.cpp gives the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys, TokenType

from abyssal.errors import DataError
from abyssal.text.special_tokens import FIM_BEGIN, FIM_END, FIM_HOLE
from abyssal.text.tokenizer import SPLITS, Tokenizer

#: llama.cpp's name for the splits of DeepSeek-V3, which are those of every tokenizer trained here. It knows splits by
#: such names only.
PRE = "deepseek-v3"
#: Fields of a BPE and the values that llama.cpp has in mind with PRE.
BPE = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
    "ignore_merges": False,
}
#: llama.cpp reads PSM's tokens by these keys: prefix, suffix, middle.
FIM_KEYS = {
    Keys.Tokenizer.FIM_PRE_ID: FIM_BEGIN,
    Keys.Tokenizer.FIM_SUF_ID: FIM_HOLE,
    Keys.Tokenizer.FIM_MID_ID: FIM_END,
}


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add the tokenizer of a model directory: tokens, merges, special tokens, chat template.

    Ids up to `vocab_size` that no token has become tokens that no text gives.

    Differs: an added token spelt `<｜...｜>` is a control token here, special or not. llama.cpp then takes its spelling
    for the token only where the caller asks for special tokens, so that a user's text cannot end its own turn.

    Raises:
        DataError: no byte-level BPE with DeepSeek-V3's splits, or something else that a GGUF file cannot say.
    """
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.load(path)
    state = json.loads(tokenizer.to_json())
    config = _read_config(folder)
    if fault := _unsayable(state, tokenizer, vocab_size):
        raise DataError(f"{path}: {fault}")
    tokens, types = _tokens(state, vocab_size)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(PRE)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    ids = {token: number for number, token in enumerate(tokens)}
    writer.add_bos_token_id(ids[tokenizer.bos])
    writer.add_eos_token_id(ids[tokenizer.eos])
    pad = config.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad in ids:
        writer.add_pad_token_id(ids[pad])
    for key, token in FIM_KEYS.items():
        if token in ids:
            writer.add_uint32(key, ids[token])
    writer.add_add_bos_token(config.get("add_bos_token") is not False)
    writer.add_add_eos_token(config.get("add_eos_token") is True)
    writer.add_add_space_prefix(False)
    if template := _template(folder, config):
        writer.add_chat_template(template)


def _unsayable(state: dict[str, Any], tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """Return why a GGUF file cannot hold this tokenizer, none if it can."""
    normalizer = state["normalizer"] or {}
    if normalizer and normalizer.get("normalizers") != []:
        return f"normalizer={normalizer.get('type')}: must be none; llama.cpp changes no text before it splits it"
    model = state["model"]
    for field, wanted in BPE.items():
        if model.get(field, wanted) != wanted:
            return f"model.{field}={model[field]!r}: must be {wanted!r}; a GGUF file cannot say another"
    if not model["merges"]:
        return "model.merges is empty; llama.cpp needs at least one merge"
    if _splits(state["pre_tokenizer"]) != SPLITS:
        return "its pre_tokenizer is not DeepSeek-V3's; llama.cpp knows splits by name only, and ours is that one"
    for token in state["added_tokens"]:
        for field in ("lstrip", "rstrip", "single_word"):
            if token[field]:
                return f"added token {token['content']!r}: {field} must be false; a GGUF file cannot say it"
    if tokenizer.vocab_size > vocab_size:
        return f"has ids up to {tokenizer.vocab_size - 1}, but the model has vocab_size={vocab_size}"
    return None


def _splits(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...] | None:
    """Return the patterns at whose matches text is cut before a byte-level BPE, none for any other pre-tokenizer."""
    *splits, last = (pre_tokenizer or {}).get("pretokenizers") or [{}]
    if (last.get("type"), last.get("add_prefix_space"), last.get("use_regex")) != ("ByteLevel", False, False):
        return None
    if any((s.get("type"), s.get("behavior"), s.get("invert")) != ("Split", "Isolated", False) for s in splits):
        return None
    return tuple(split["pattern"].get("Regex") for split in splits)


def _tokens(state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Return spelling and type of every id; the spelling of an id without token holds a space, as no other's does."""
    tokens = [f"[unused {number}]" for number in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, number in state["model"]["vocab"].items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for added in state["added_tokens"]:
        number, token = added["id"], added["content"]
        control = added["special"] or (token.startswith("<｜") and token.endswith("｜>"))
        tokens[number], types[number] = token, TokenType.CONTROL if control else TokenType.USER_DEFINED
    return tokens, types


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))  # `Tokenizer.load` has read it already
    return config


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template: that of chat_template.jinja, or of tokenizer_config.json without such a file."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error})") from None
    template = config.get("chat_template")
    if not isinstance(template, str | None):
        place = folder / "tokenizer_config.json"
        raise DataError(f"{place}: chat_template must be one text; of several, put the one to use into {path.name}")
    return template
