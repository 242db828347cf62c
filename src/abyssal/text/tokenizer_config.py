"""DeepSeek-V3's chat format, and the `tokenizer_config.json` that tells it to other software."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abyssal.errors import DataError
from abyssal.text.special_tokens import ASSISTANT, PAD, USER
from abyssal.text.tokenizer import Tokenizer

#: BOS, the system prompts, then the turns: `<｜User｜>` and the question, `<｜Assistant｜>`, the answer and EOS.
#: Differs: the released template also writes tool calls; this one refuses a role that it does not know.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{{- messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '" + USER + "' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '" + ASSISTANT + "' + message['content'] + eos_token -}}"
    "{%- elif message['role'] != 'system' -%}"
    "{{- raise_exception('role ' ~ message['role'] ~ ': must be system, user or assistant') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + ASSISTANT + "' -}}{%- endif -%}"
)


def write_tokenizer_config(folder: Path, tokenizer: Tokenizer, max_length: int | None = None) -> None:
    """Write `tokenizer_config.json` beside the `tokenizer.json` in `folder`, for transformers' `AutoTokenizer`.

    Args:
        folder: a model directory or a data folder.
        tokenizer: its BOS and EOS are named; the chat template is added if it has the two tokens of the turns.
        max_length: tokens that the model can attend to, if there is a model.

    Differs: padding is `<｜▁pad▁｜>` where the tokenizer has it; the released config pads with EOS, and then training
    code that masks padding also masks the end of every answer.

    Raises:
        DataError: the file cannot be written.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos,
        "eos_token": tokenizer.eos,
        "pad_token": PAD if tokenizer.has(PAD) else tokenizer.eos,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    if tokenizer.has(USER) and tokenizer.has(ASSISTANT):
        config["chat_template"] = CHAT_TEMPLATE
    path = folder / "tokenizer_config.json"
    try:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
