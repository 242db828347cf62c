"""What a model directory says about how to generate from it: `generation_config.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abyssal.config import ModelConfig
from abyssal.engine.sampling import SamplingParameters
from abyssal.errors import ModelDirectoryError, UsageError

FILE = "generation_config.json"
#: Fields that become sampling parameters under the same name.
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# fmt: off
#: Fields that do not change which tokens are chosen.
NEUTRAL = frozenset(
    {
        "_from_model_config", "bos_token_id", "cache_implementation", "do_sample", "eos_token_id", "output_attentions",
        "output_hidden_states", "pad_token_id", "return_dict_in_generate", "transformers_version", "use_cache",
    }
)
# fmt: on


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling parameters for requests that name none, the tokens that end a text, and what was not understood.

    `named` are the parameters that the file itself names; the others are our own.
    """

    parameters: SamplingParameters = field(default_factory=SamplingParameters)
    eos_ids: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    named: frozenset[str] = frozenset()


def read_generation_defaults(folder: Path, config: ModelConfig) -> GenerationDefaults:
    """Read `generation_config.json` in `folder`; a missing file or field leaves our own default.

    `do_sample: false` means temperature 0. The end tokens are the file's, else those of `config`. A field that would
    change the choice of tokens in a way we do not implement becomes a note.

    Raises:
        ModelDirectoryError: not a JSON object, or a field has a value that is not possible.
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        values = {}
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelDirectoryError(f"{path}: must hold a JSON object")
    fields: dict[str, Any] = {name: values[name] for name in SAMPLING if values.get(name) is not None}
    if values.get("do_sample") is False:
        fields["temperature"] = 0
    try:
        parameters = SamplingParameters(**fields)
    except UsageError as error:
        raise ModelDirectoryError(f"{path}: {error}") from None
    strange = [name for name in values if name not in NEUTRAL and name not in SAMPLING and values[name] is not None]
    notes = tuple(f"{path}: {name}={values[name]!r} is not implemented and has no effect" for name in strange)
    end_tokens = _end_tokens(path, values.get("eos_token_id"), config)
    return GenerationDefaults(parameters, end_tokens, notes, frozenset(fields))


def _end_tokens(path: Path, value: object, config: ModelConfig) -> frozenset[int]:
    """Return the ids that `eos_token_id` names, one or a list."""
    ids = value if isinstance(value, list) else [config.eos_token_id if value is None else value]
    ids = [token for token in ids if token is not None]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ModelDirectoryError(f"{path}: eos_token_id={value!r}: must be a token id or a list of them")
    return frozenset(ids)
