"""From the messages of a conversation to the text that a model was trained on, by the model's own chat template."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jinja2

from abyssal.errors import DataError, UsageError, nearest
from abyssal.text.template_sandbox import BUDGET, METER, UNITS_PER_INPUT, Meter, RefusedError, TemplateEnvironment
from abyssal.text.template_sandbox import text_units as units_of

CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
FILE, FURTHER_FILES = "chat_template.jinja", "additional_chat_templates"
DEFAULT, TOOL_USE = "default", "tool_use"
#: Characters of a template; the longest known has some 20,000.
LONGEST = 2**20

Message = Mapping[str, Any]


class ChatTemplate:
    """The chat templates of a model, most often one, ready to render conversations."""

    def __init__(
        self, templates: Mapping[str, str], special_tokens: Mapping[str, str], origin: str = "chat template"
    ) -> None:
        """Compile the templates.

        Args:
            templates: by name; the one without a name is `default`, and `tool_use` is preferred where there are tools.
            special_tokens: variables of the template such as `bos_token`.
            origin: where the templates come from, for messages.

        Raises:
            DataError: a template is not one.
        """
        self._origin = origin
        self._special_tokens = dict(special_tokens)
        environment = TemplateEnvironment()
        self._templates = {name: self._compiled(environment, name, source) for name, source in templates.items()}

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what a model directory says: `chat_template.jinja` and its companions, else `tokenizer_config.json`.

        Raises:
            DataError: no template, or files that cannot be read.
        """
        config = _read_object(folder / CONFIG)
        templates = _template_files(folder)
        origin = folder / (FILE if templates else CONFIG)
        if not templates:
            templates = _named_templates(origin, config.get("chat_template"))
        if not templates:
            raise DataError(
                f"{folder}: has no chat template (neither {FILE} nor chat_template in {CONFIG}), so it is no chat "
                "model; it can continue text"
            )
        if "added_tokens_decoder" not in config:
            config |= _read_object(folder / SPECIAL_TOKENS_MAP)
        return cls(templates, _special_tokens(config), str(origin))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation, the same as transformers' `apply_chat_template` gives.

        Args:
            messages: each with a `role`; the rest is up to the template.
            tools: functions the model may call, as JSON schemas.
            documents: what the model may cite.
            add_generation_prompt: end with what stands before an answer.
            name: which of several templates; none chooses by `tools`.
            variables: what else the template understands, such as `enable_thinking`.

        Raises:
            UsageError: no such template, messages of a wrong form, or ones that the template refuses.
            DataError: the template fails or takes too much.
        """
        _check_messages(messages)
        template = self._chosen(name, tools is not None)
        inputs = {"messages": messages, "tools": tools, "documents": documents, **variables}
        meter = Meter(BUDGET + UNITS_PER_INPUT * units_of(inputs, BUDGET))
        try:
            return template.render(
                {
                    **self._special_tokens,
                    **inputs,
                    "add_generation_prompt": add_generation_prompt,
                    METER: meter,
                }
            )
        except RefusedError as error:
            raise UsageError(f"{self._origin}: the chat template refuses these messages: {error}") from None
        except Exception as error:  # whatever a stranger's program may raise
            raise DataError(
                f"{self._origin}: the chat template fails{_line_of(error)} with these messages "
                f"({_in_words(error)}); another template, or other messages, may do"
            ) from None

    def _chosen(self, name: str | None, with_tools: bool) -> jinja2.Template:
        """Return the template of that name, or the one for conversations with or without tools."""
        if name is None:
            name = TOOL_USE if with_tools and TOOL_USE in self._templates else DEFAULT
        if name not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise UsageError(
                f"{self._origin}: has no chat template {name!r}; it has {known}{nearest(name, self._templates)}"
            )
        return self._templates[name]

    def _compiled(self, environment: TemplateEnvironment, name: str, source: str) -> jinja2.Template:
        if len(source) > LONGEST:
            raise DataError(f"{self._origin}: the chat template {name!r} has {len(source):,} characters; too many")
        try:
            return environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"{self._origin}: the chat template {name!r} is not valid in line {error.lineno}: {error.message}"
            ) from None
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            raise DataError(
                f"{self._origin}: the chat template {name!r} cannot be compiled ({_in_words(error)})"
            ) from None


def _in_words(error: BaseException) -> str:
    """Return what an exception says; some say nothing but their name."""
    text = " ".join(str(error).split())[:300]
    known = isinstance(error, jinja2.TemplateError)
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _line_of(error: BaseException) -> str:
    """Return ` in line N`, of the template, where jinja2 knows it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f" in line {lines[-1]}" if lines else ""


def _check_messages(messages: Sequence[Message]) -> None:
    """Refuse what is no conversation, before a template stumbles over it."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UsageError("messages: must be a list with at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UsageError(f"messages[{number}]: must be an object with a role and a content")
        if not isinstance(message.get("role"), str):
            raise UsageError(
                f"messages[{number}].role={message.get('role')!r}: must be a string such as system, user, assistant"
            )


# Files


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one where there is no file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(fields, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return fields


def _template_files(folder: Path) -> dict[str, str]:
    """Return the templates that have files of their own."""
    paths = {DEFAULT: folder / FILE} if (folder / FILE).is_file() else {}
    paths |= {path.stem: path for path in sorted((folder / FURTHER_FILES).glob("*.jinja"))}
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: a chat template cannot be read ({error})") from None


def _named_templates(path: Path, value: object) -> dict[str, str]:
    """Return the templates in the field `chat_template`: one, a list of named ones, or an object of them."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise DataError(f"{path}: chat_template: must be a string, or a list of objects with a name and a template")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields that name tokens, whether as strings or as objects with their `content`."""
    fields = {name: value for name, value in config.items() if name.endswith("_token")}
    further = config.get("extra_special_tokens")
    fields |= further if isinstance(further, dict) else {}
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in fields.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}
