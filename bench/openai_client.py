"""Everything that OpenAI's own client asks of a model directory behind `abyssal serve`, and whether the answers hold.

    python bench/openai_client.py runs/demo/model [--record]
    python bench/openai_client.py DIR --untrained       drafts of random weights are hardly accepted

The directory is served twice, with drafts of its MTP modules and without. Each check asks through the package `openai`,
compares what comes back with what must hold, and prints it: chat, streams, JSON of a schema, calls of tools,
log-probabilities, stop strings, several texts, clients that leave. Exits with 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError

from served import NAME, Served, serving

QUESTION = [{"role": "user", "content": "def add_numbers(a, b):"}]
PROMPT = "class Stack:\n    def __init__(self):\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["class", "function"]},
        "name": {"type": "string", "maxLength": 12},
        "lines": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["kind", "name", "lines"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "code", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "find_code", "description": "Finds code.", "parameters": SCHEMA}}
MARK = re.compile(r"<｜[^｜]+｜>")  # a special token, which may stand for no text
FORCED = {"ignore_eos": True}  # a field of ours: the text does not end by itself


@dataclass
class Asked:
    """The same model twice: `client` speaks to the server with drafts, `plain` to the one without."""

    client: OpenAI
    plain: OpenAI
    server: Served
    is_trained: bool

    def chat(self, client: OpenAI | None = None, **fields: Any) -> Any:
        """Return the answer to the question, or a stream of it."""
        fields = {"model": NAME, "messages": QUESTION, "max_tokens": 60, "temperature": 0, **fields}
        return (client or self.client).chat.completions.create(**fields)

    def text(self, client: OpenAI | None = None, **fields: Any) -> Any:
        """Return the continuation of the prompt, of a length that is known."""
        fields = {"model": NAME, "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "extra_body": FORCED, **fields}
        return (client or self.client).completions.create(**fields)


def follows_schema(text: str) -> dict[str, Any]:
    """Return JSON that must be of `SCHEMA`."""
    value = json.loads(text)
    assert set(value) == {"kind", "name", "lines"}, value
    assert value["kind"] in ("class", "function"), value
    assert isinstance(value["name"], str), value
    assert len(value["name"]) <= 12, value
    assert type(value["lines"]) is int, value
    assert 1 <= value["lines"] <= 99, value
    return value  # type: ignore[no-any-return]


def drafts_of(answer: Any) -> tuple[int, int]:
    """Return how many drafts an answer's usage says were accepted, and how many there were."""
    details = answer.usage.completion_tokens_details
    accepted = details.accepted_prediction_tokens
    return accepted, accepted + details.rejected_prediction_tokens


def json_schema(asked: Asked) -> str:
    """JSON of the schema, drafts verified meanwhile, and the same text without them."""
    fields = {"response_format": FORMAT, "max_tokens": 300, "temperature": 0.8, "seed": 3}
    answer = asked.chat(**fields)
    content = answer.choices[0].message.content
    follows_schema(content)
    assert answer.choices[0].finish_reason == "stop"
    accepted, drafted = drafts_of(answer)
    assert drafted > 0, "no draft was verified"
    plain = asked.chat(asked.plain, **fields)
    assert drafts_of(plain) == (0, 0)
    assert plain.choices[0].message.content == content, "drafts changed the text"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in asked.chat(**fields, stream=True))
    assert streamed == content
    return f"{' '.join(content.split())} ({accepted} of {drafted} drafts accepted)"


def tools(asked: Asked) -> str:
    """A call that the model must make, whole and in a stream, with arguments of the function's schema."""
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300, "seed": 5}
    choice = asked.chat(**fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "find_code"
    assert call.id
    follows_schema(call.function.arguments)
    name = arguments = ""
    for chunk in asked.chat(**fields, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            name += part.function.name or ""
            arguments += part.function.arguments or ""
        reason = chunk.choices[0].finish_reason
    assert (name, arguments, reason) == ("find_code", call.function.arguments, "tool_calls")
    return f"{name}({' '.join(arguments.split())})"


def chat(asked: Asked) -> str:
    """An answer, its usage, and the same answer without drafts."""
    answer = asked.chat()
    choice, usage = answer.choices[0], answer.usage
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert 0 < usage.completion_tokens <= 60
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert asked.chat(asked.plain).choices[0].message.content == choice.message.content, "drafts changed the text"
    return repr(choice.message.content)


def stream(asked: Asked) -> str:
    """The chunks of a stream, which together are the whole answer of the same seed."""
    fields = {"temperature": 1.0, "seed": 7}
    whole = asked.chat(**fields)
    parts, usage, reason = [], None, None
    for chunk in asked.chat(**fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
    assert "".join(parts) == whole.choices[0].message.content
    assert reason == whole.choices[0].finish_reason
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    return f"{len(parts)} chunks, {usage.completion_tokens} tokens"


def logprobs(asked: Asked) -> str:
    """Log-probabilities whose tokens spell the text, the sampled one at temperature 0 the likeliest."""
    choice = asked.chat(logprobs=True, top_logprobs=4).choices[0]
    tokens = choice.logprobs.content
    spelt = b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace")
    assert MARK.sub("", spelt) == MARK.sub("", choice.message.content), spelt
    for token in tokens:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 4, token
        assert values == sorted(values, reverse=True), token
        assert token.logprob == values[0], token
        assert sum(math.exp(value) for value in values) <= 1 + 1e-5
    return f"{len(tokens)} tokens, the first with probability {math.exp(tokens[0].logprob):.2f}"


def stop(asked: Asked) -> str:
    """A string out of the middle of a text, which ends before it when asked to."""
    text = asked.text().choices[0].text
    mark = text[len(text) // 2 :][:3]
    choice = asked.text(stop=["never in it", mark]).choices[0]
    assert choice.text == text.partition(mark)[0]
    assert choice.finish_reason == "stop"
    return f"{len(choice.text)} of {len(text)} characters, before {mark!r}"


def several(asked: Asked) -> str:
    """Three texts that differ, text i that of seed + i alone."""
    choices = asked.text(n=3, temperature=1.0, seed=40).choices
    texts = [choice.text for choice in sorted(choices, key=lambda choice: choice.index)]
    assert len(set(texts)) == 3
    for number, text in enumerate(texts):
        assert asked.text(temperature=1.0, seed=40 + number).choices[0].text == text
    return f"{[text[:20] for text in texts]}"


def cancel(asked: Asked) -> str:
    """A client that leaves a stream: its pages are free again, as /metrics tells."""
    with asked.chat(max_tokens=500, stream=True, extra_body=FORCED) as answer:
        assert len(list(itertools.islice(answer, 4))) == 4
        held = asked.server.metric("vllm:kv_cache_usage_perc")
        assert held > 0
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        asked.server.until(name, 0)
    asked.server.until('vllm:request_success_total{finished_reason="abort",model_name="served"}', 1)
    return f"{held:.1%} of the pages held, then none"


def speculation(asked: Asked) -> str:
    """A long text, equal with drafts and without; a trained model's drafts are often right."""
    answer, plain = asked.text(max_tokens=300), asked.text(asked.plain, max_tokens=300)
    assert answer.choices[0].text == plain.choices[0].text, "drafts changed the text"
    assert answer.usage.completion_tokens == 300
    accepted, drafted = (
        asked.server.metric(f"vllm:spec_decode_num_{name}_tokens_total") for name in ("accepted", "draft")
    )
    assert drafted > 0
    assert accepted > 0.1 * drafted or not asked.is_trained, f"{accepted} of {drafted}"
    return f"{accepted:.0f} of {drafted:.0f} drafts accepted since the start"


#: In this order: drafts are certain in a server's first passes, and left out later where they do not pay.
CHECKS: tuple[Callable[[Asked], str], ...] = (
    json_schema,
    tools,
    chat,
    stream,
    logprobs,
    stop,
    several,
    cancel,
    speculation,
)


def main() -> int:
    """Ask, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model directory with an MTP module and a chat template")
    parser.add_argument("--untrained", action="store_true", help="do not expect that drafts are accepted")
    parser.add_argument("--record", action="store_true", help="write what was answered to bench/results")
    arguments = parser.parse_args()
    found: dict[str, str] = {}
    faults = 0
    with serving(arguments.model) as server, serving(arguments.model, "--drafts", "0") as other:
        clients = [OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0) for one in (server, other)]
        asked = Asked(clients[0], clients[1], server, not arguments.untrained)
        for check in CHECKS:
            try:
                found[check.__name__] = check(asked)
            except (AssertionError, ValueError, OpenAIError) as error:
                faults += 1
                found[check.__name__] = f"FAULT: {type(error).__name__}: {error}"
            print(f"{check.__name__}: {found[check.__name__]}", flush=True)
        for one in (server, other):
            if "Traceback" in (text := one.log.read_text()):
                faults += 1
                print(f"a traceback in a server's log:\n{text}", file=sys.stderr)
    if arguments.record:
        from record import record

        print(record("openai-client", "python bench/openai_client.py DIR", found))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
