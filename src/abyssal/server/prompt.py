"""Renders the messages of a chat request to the prompt's text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from abyssal.server.faults import ApiError
from abyssal.server.output_parser import CALL, CALLS, END_CALL, END_CALLS, END_FENCE, FENCE, FUNCTION, SEPARATOR
from abyssal.server.protocol import ChatMessage, TextPart, Tool
from abyssal.text.chat_template import ChatTemplate

#: Variables that a request may not set in the template: they have fields of their own.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "name"})


def chat_prompt(
    template: ChatTemplate, messages: Sequence[ChatMessage], tools: Sequence[Tool], variables: dict[str, Any]
) -> str:
    """Return the text that the model continues with its answer.

    Where the template says nothing of `tools` (that of the released V3 does not), a system message describes them.

    Raises:
        ApiError: a variable that is not the request's to set.
        UsageError, DataError: the template refuses the messages, or fails.
    """
    if refused := sorted(RESERVED & variables.keys()):
        raise ApiError(400, f"chat_template_kwargs.{refused[0]}: has a field of its own", param="chat_template_kwargs")
    conversation = [_plain(message) for message in messages]
    if not tools:
        return template.render(conversation, add_generation_prompt=True, **variables)
    definitions = [tool.model_dump(exclude_none=True) for tool in tools]
    text = template.render(conversation, tools=definitions, add_generation_prompt=True, **variables)
    if text != template.render(conversation, tools=[], add_generation_prompt=True, **variables):
        return text
    tool_message = {"role": "system", "content": _description(definitions)}
    first = next((n for n, message in enumerate(conversation) if message["role"] != "system"), len(conversation))
    conversation.insert(first, tool_message)
    return template.render(conversation, add_generation_prompt=True, **variables)


def _plain(message: ChatMessage) -> dict[str, Any]:
    """Return a message as templates expect it: text joined, no field without a value but the content."""
    fields = message.model_dump(exclude_none=True, include={"role", "name", "tool_call_id", "reasoning_content"})
    if message.role == "developer":
        fields["role"] = "system"
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content if isinstance(part, TextPart))
    calls = message.tool_calls or []
    if calls:
        fields["tool_calls"] = [call.model_dump(exclude={"index"}) for call in calls]
    # a template tells an answer that only calls by its content: none at all
    fields["content"] = None if calls and not content else content or ""
    return fields


def _description(definitions: Sequence[dict[str, Any]]) -> str:
    """Return what a model needs to know of its tools, with the form of a call as V3 was taught it."""
    functions = "\n\n".join(
        f"### {function['name']}\n{function.get('description', '')}\nParameters (JSON schema): "
        f"{json.dumps(function.get('parameters', {}), ensure_ascii=False)}"
        for function in (definition["function"] for definition in definitions)
    )
    return (
        f"## Tools\n\nYou may call these functions:\n\n{functions}\n\nTo call some of them, end your answer with\n"
        f"{CALLS}{CALL}{FUNCTION}{SEPARATOR}NAME{FENCE}ARGUMENTS_AS_JSON{END_FENCE}{END_CALL}{END_CALLS}\n"
        f"Each further call goes behind the one before, from {CALL} to {END_CALL}."
    )
