"""Byte-level BPE: text to token ids and back without loss, on top of the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from abyssal.errors import DataError
from abyssal.text.special_tokens import BOS, EOS, SKIPPED_TOKENS, SPECIAL_TOKENS

#: DeepSeek-V3's rules for where a token may end: numbers in groups of three digits, runs of Chinese and Japanese,
#: then words with the one sign or space before them, punctuation with the line ends after it, and white space.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+",
)


class Tokenizer:
    """Token ids of text, and text of token ids.

    `encode` takes prompts: the spelling of an added token, such as `<｜User｜>`, becomes that token. `encode_document`
    takes text to learn from, where the same spelling is nothing but characters. Neither adds BOS or EOS.
    """

    def __init__(self, core: tokenizers.Tokenizer, bos: str = BOS, eos: str = EOS) -> None:
        """Wrap a byte-level tokenizer of the library that has the tokens `bos` and `eos`; `core` is changed."""
        self._core = core
        self.bos, self.eos = bos, eos
        self.bos_id, self.eos_id = core.token_to_id(bos), core.token_to_id(eos)
        core.no_truncation()  # a tokenizer.json can ask for both, and text would be cut or filled up
        core.no_padding()
        # Other software that opens the saved file then puts BOS first by itself, as the released tokenizer does.
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, self.bos_id)]
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `tokenizer.json`, or the one in the folder `path`.

        BOS and EOS are the tokens that a `tokenizer_config.json` beside it names; without one, DeepSeek-V3's.

        Raises:
            DataError: no such file, not a byte-level tokenizer, or BOS or EOS is missing.
        """
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise DataError(f"{path}: no such file; a tokenizer.json is needed")
        try:
            core = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path}: not a tokenizer of the `tokenizers` library ({error})") from None
        if not isinstance(core.decoder, decoders.ByteLevel):
            kind = type(core.decoder).__name__
            raise DataError(f"{path}: decoder={kind}: must be ByteLevel; only byte-level BPE keeps every text as it is")
        bos, eos = _sentence_borders(path.with_name("tokenizer_config.json"))
        for name, token in (("BOS", bos), ("EOS", eos)):
            if core.token_to_id(token) is None:
                raise DataError(
                    f"{path}: has no {name} token {token!r}; name the one it has in a tokenizer_config.json beside it"
                )
        return cls(core, bos, eos)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn a byte-level BPE with DeepSeek-V3's splits and special tokens, the same for the same texts.

        A corpus with too few different words gives fewer than `vocab_size` tokens.

        Raises:
            DataError: `vocab_size` has no room for the 256 bytes and the special tokens.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        least = len(SPECIAL_TOKENS) + len(alphabet)
        if vocab_size < least:
            raise DataError(
                f"vocab_size={vocab_size}: must be at least {least}, "
                f"{len(alphabet)} bytes and {len(SPECIAL_TOKENS)} special tokens"
            )
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        core.train_from_iterator(iter(texts), trainer=trainer)
        state = json.loads(core.to_str())
        for token in state["added_tokens"]:  # the trainer makes all of them special
            token["special"] = token["content"] in SKIPPED_TOKENS
        return cls(tokenizers.Tokenizer.from_str(json.dumps(state)))

    def to_json(self) -> str:
        """Return what a `tokenizer.json` holds."""
        return self._core.to_str(pretty=True)

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`."""
        path.write_text(self.to_json(), encoding="utf-8")

    # Ids of text

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt; the spelling of an added token becomes that token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several prompts."""
        return _ids(self._core, texts)

    def encode_document(self, text: str) -> list[int]:
        """Return the ids of a text to learn from, none of which is an added token."""
        return _ids(self._document_core, [text])[0]

    @cached_property
    def _document_core(self) -> tokenizers.Tokenizer:
        """The same BPE without any added token.

        The library's `encode_special_tokens` switch spares only tokens marked as special, and `<｜User｜>` is not. What
        the BPE's own vocabulary still holds of them cannot be reached: no merge leads there.
        """
        state = json.loads(self._core.to_str())
        state["added_tokens"], state["post_processor"] = [], None
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    # Text of ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text; bytes that are not UTF-8 read U+FFFD, ids that no token has give nothing."""
        return self._core.decode(ids, skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """Return a decoder that takes the ids one by one."""
        return StreamDecoder(self._core, skip_special)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that one token stands for, often a part of a character; none for an id that no token has."""
        added = self._added_tokens.get(token)
        if added is not None:
            return added.encode()
        return bytes(self._byte_of[sign] for sign in self._core.id_to_token(token) or "")

    @cached_property
    def _added_tokens(self) -> dict[int, str]:
        return {token: added.content for token, added in self._core.get_added_tokens_decoder().items()}

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """The byte of each sign in which a byte-level vocabulary is spelt: visible ones stand for themselves."""
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in visible]
        return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}

    # What it is

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: the least `vocab_size` of a model for it."""
        return max(self._core.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of everything that fixes the ids, as hexadecimal digits."""
        canonical = json.dumps(json.loads(self._core.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def has(self, token: str) -> bool:
        """Whether the vocabulary has this very token."""
        return self._core.token_to_id(token) is not None

    def bytes_per_token(self, texts: Iterable[str]) -> float:
        """Return how many UTF-8 bytes of these documents one token stands for."""
        num_bytes = num_tokens = 0
        for text in texts:
            num_bytes += len(text.encode())
            num_tokens += len(self.encode_document(text))
        return num_bytes / max(num_tokens, 1)


class StreamDecoder:
    """The text of ids that come one by one; a character is given out once all its bytes are there."""

    def __init__(self, core: tokenizers.Tokenizer, skip_special: bool) -> None:
        """Start an empty text."""
        self._core = core
        self._skip_special = skip_special
        self._start()

    def _start(self) -> None:
        self._stream = decoders.DecodeStream(skip_special_tokens=self._skip_special)
        self._ids: list[int] = []
        self._length = 0  # characters given out

    def push(self, token: int) -> str:
        """Take the next id and return the text that it completes, perhaps none."""
        self._ids.append(token)
        text = self._stream.step(self._core, token) or ""
        self._length += len(text)
        return text

    def flush(self) -> str:
        """Return what is left, U+FFFD for an unfinished character, and start a new text."""
        text = self._core.decode(self._ids, skip_special_tokens=self._skip_special)
        rest = text[self._length :]
        self._start()
        return rest


def _ids(core: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, with nothing added."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{text[:40]!r}: not valid Unicode text (a lone surrogate at {error.start})") from None
    return [encoding.ids for encoding in core.encode_batch_fast(texts, add_special_tokens=False)]


def _sentence_borders(config: Path) -> tuple[str, str]:
    """Return the BOS and EOS that a `tokenizer_config.json` names, DeepSeek-V3's where it names none."""
    try:
        fields: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return BOS, EOS
    except OSError as error:
        raise DataError(f"{config}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{config}: not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise DataError(f"{config}: must hold a JSON object")

    def name(field: str, default: str) -> str:
        token = fields.get(field) or default
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str):
            raise DataError(f"{config}: {field}={token!r}: must be a token, or an object with its content")
        return content

    return name("bos_token", BOS), name("eos_token", EOS)
