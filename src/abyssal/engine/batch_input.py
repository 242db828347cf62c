"""The lines of a batch: prompts or conversations, each with what it asks for itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from abyssal.engine.load import LoadedModel
from abyssal.engine.request import Request
from abyssal.engine.sampling import SamplingParameters
from abyssal.errors import AbyssalError, DataError, UsageError, nearest
from abyssal.text.chat_template import ChatTemplate

#: Sampling parameters that a line may set for itself.
SAMPLING = (
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
FIELDS = ("prompt", "messages", "id", "metadata", *SAMPLING)
MOST_FAULTS = 20  # that a message names


@dataclass(frozen=True)
class BatchLine:
    """What one line asks for.

    `number` counts lines from 1. `label` has the line's `id` and `metadata`, which its answer repeats. `key` is a
    digest of the line and of everything else that decides on its answer.
    """

    number: int
    prompt: str | None
    messages: list[dict[str, Any]] | None
    sampling: Mapping[str, Any]
    label: Mapping[str, Any]
    key: str

    def request(
        self, loaded: LoadedModel, template: ChatTemplate | None, defaults: SamplingParameters, *, bos: bool = True
    ) -> Request:
        """Return what the engine is asked: `defaults` with what the line sets itself.

        A seed among the defaults becomes another one in each line, that of line n being the seed + n - 1; a line's own
        is taken as it is.

        Raises:
            UsageError, DataError: the chat template does not take the messages.
        """
        if self.messages is None:
            assert self.prompt is not None
            ids = loaded.encode_prompt(self.prompt, bos=bos)
        else:
            assert template is not None
            text = template.render(self.messages, add_generation_prompt=True)
            ids = loaded.encode_prompt(text, bos=False)  # the template writes it
        seed = None if defaults.seed is None else (defaults.seed + self.number - 1) % 2**63
        return Request(ids, replace(defaults, **{"seed": seed, **self.sampling}))


@dataclass(frozen=True)
class BatchInput:
    """A JSONL file of requests; `salt` is what decides on the answers beside the lines themselves."""

    path: Path
    salt: str = ""

    def __iter__(self) -> Iterator[BatchLine]:
        """Yield the requests in order; empty lines are none, but count.

        Raises:
            DataError: the file cannot be read, or a line is no request.
        """
        for number, data in self._lines():
            try:
                yield _parse(number, data, self.salt)
            except AbyssalError as error:
                raise DataError(f"{self.path}: line {number}: {error}") from None

    def check(self) -> list[BatchLine]:
        """Return all requests without their texts, each with number and key, after reading every line once.

        Raises:
            DataError: there is none, or lines are no requests; names the first of them, each with its number.
        """
        lines: list[BatchLine] = []
        faults: list[str] = []
        for number, data in self._lines():
            try:
                line = _parse(number, data, self.salt)
                messages: list[dict[str, Any]] | None = None if line.messages is None else []
                lines.append(replace(line, prompt=None, messages=messages, sampling={}, label={}))
            except AbyssalError as error:
                faults.append(f"  line {number}: {error}")
        if faults:
            shown = "\n".join(faults[:MOST_FAULTS])
            more = f"\n  and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
            raise DataError(
                f"{self.path}: {len(faults)} of {len(faults) + len(lines)} lines cannot be taken; nothing was "
                f"generated\n{shown}{more}"
            )
        if not lines:
            raise DataError(f'{self.path}: holds no line such as {{"prompt": "import os"}}')
        return lines

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield every line that is not empty, with its number."""
        try:
            with self.path.open("rb") as file:
                for number, data in enumerate(file, start=1):
                    if data.strip():
                        yield number, data.strip()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None


def _parse(number: int, data: bytes, salt: str) -> BatchLine:
    """Return the request in one line of the file; the messages of its faults do not name the line."""
    fields = _object(data)
    for name in fields:
        if name not in FIELDS:
            raise UsageError(f"{name}: not a field of a line; allowed are {', '.join(FIELDS)}{nearest(name, FIELDS)}")
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None):
        raise UsageError("must have either a prompt or messages")
    if prompt is not None and not isinstance(prompt, str):
        raise UsageError(f"prompt={prompt!r:.60}: must be a string")
    if messages is not None:
        _check_messages(messages)
    if not isinstance(fields.get("id", ""), str | int):
        raise UsageError(f"id={fields['id']!r:.60}: must be a string or a whole number")
    return BatchLine(
        number,
        prompt,
        messages,
        _sampling(fields),
        {name: fields[name] for name in ("id", "metadata") if name in fields},
        hashlib.sha256(salt.encode() + b"\n" + data).hexdigest()[:16],
    )


def _object(data: bytes) -> dict[str, Any]:
    """Return the JSON object that `data` spells."""
    try:
        fields = json.loads(data.decode("utf-8"), parse_constant=_refuse)
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise DataError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    except RecursionError:
        raise DataError("is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise DataError('must be an object such as {"prompt": "import os"}')
    return fields


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise UsageError("messages: must be a list of objects, each with a role and a content")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"messages[{place}]: must be an object with a role, a string, and a content")


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling parameters among the fields; one stop string may stand by itself."""
    given = {name: fields[name] for name in SAMPLING if fields.get(name) is not None}
    if "stop" in given:
        stop = given["stop"]
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
    SamplingParameters(**given)
    return given
