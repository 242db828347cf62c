"""OpenAI's own client against the application: what it asks for is what it gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from abyssal.engine import EngineOptions, LoadedModel, SamplingParameters
from abyssal.text.chat_template import ChatTemplate

HI = [{"role": "user", "content": "hi"}]
PROMPT = "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>"
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 1, "maximum": 500}, "kind": {"enum": ["a", "b"]}},
    "required": ["size", "kind"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "make_thing", "parameters": SCHEMA}}
#: With the roles of tools, which the template of our own models has not.
TOOL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<｜{{ message.role }}｜>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments }}{% endfor %}"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}<｜Assistant｜>"
)
Alone = Callable[..., list[str]]


def fields(**changes: Any) -> dict[str, Any]:
    return {"model": "model", "messages": HI, "max_tokens": 24, "temperature": 0, **changes}


def test_an_answer_is_the_engines_text(serve: Any, alone: Alone, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve() as served:
            answer = await served.openai.chat.completions.create(**fields())
            assert answer.choices[0].message.content == alone(PROMPT, SamplingParameters(24, temperature=0))[0]
            assert answer.choices[0].message.role == "assistant"
            assert answer.choices[0].finish_reason == "length"
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
                5,
                24,
                29,
            )
            details = answer.usage.completion_tokens_details
            drafted = sum(served.app.state.engine.statistics().drafted)
            assert details.accepted_prediction_tokens + details.rejected_prediction_tokens == drafted > 0

    within_seconds(scenario())


@pytest.mark.parametrize("count", [1, 3])
def test_a_stream_has_the_same_texts_as_a_whole_answer(
    serve: Any, alone: Alone, within_seconds: Any, count: int
) -> None:
    asked = fields(n=count, temperature=1.5, top_p=1, seed=11)

    async def scenario() -> None:
        async with serve() as served:
            whole = await served.openai.chat.completions.create(**asked)
            texts, reasons, roles = [""] * count, [None] * count, [0] * count
            usage = None
            stream = await served.openai.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    roles[choice.index] += choice.delta.role == "assistant"
                    reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            expected = alone(PROMPT, SamplingParameters(24, temperature=1.5, top_p=1.0, seed=11), count)
            assert texts == expected == [choice.message.content for choice in whole.choices]
            assert reasons == [choice.finish_reason for choice in whole.choices]
            assert roles == [1] * count
            assert usage.completion_tokens == whole.usage.completion_tokens
            assert usage.prompt_tokens == 5

    within_seconds(scenario())


def test_a_stop_string_ends_the_text_before_it(serve: Any, alone: Alone, within_seconds: Any) -> None:
    text = alone(PROMPT, SamplingParameters(24, temperature=0))[0]
    stop = text[5:7]

    async def scenario() -> None:
        async with serve() as served:
            for stops in (stop, ["never there", stop]):
                answer = await served.openai.chat.completions.create(**fields(stop=stops))
                assert answer.choices[0].message.content == text[: text.index(stop)]
                assert answer.choices[0].finish_reason == "stop"

    within_seconds(scenario())


def test_logprobs_are_the_models_own_and_spell_the_text(serve: Any, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve() as served:
            ban = {"logit_bias": {"40": 100}}
            answer = await served.openai.chat.completions.create(**fields(logprobs=True, top_logprobs=3, **ban))
            tokens = answer.choices[0].logprobs.content
            assert len(tokens) == 24
            assert b"".join(bytes(token.bytes) for token in tokens).decode() == answer.choices[0].message.content
            assert len({token.token for token in tokens}) == 1  # the bias chose
            for token in tokens:
                tops = [top.logprob for top in token.top_logprobs]
                assert tops == sorted(tops, reverse=True)
                assert len(tops) == 3
                assert token.logprob <= tops[0] <= 0  # and the log-probability knows nothing of it

    within_seconds(scenario())


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_json_of_a_schema_with_drafts(serve: Any, within_seconds: Any, temperature: float) -> None:
    async def scenario() -> None:
        texts = []
        for num_drafts in (1, 0):
            engine = EngineOptions(max_running=4, page_tokens=8, num_drafts=num_drafts, adapt_drafts=False)
            async with serve(engine=engine) as served:
                answer = await served.openai.chat.completions.create(
                    **fields(response_format=FORMAT, max_tokens=300, temperature=temperature, seed=4, n=2)
                )
                texts.append([choice.message.content for choice in answer.choices])
                assert {choice.finish_reason for choice in answer.choices} == {"stop"}
                assert bool(sum(served.app.state.engine.statistics().drafted)) == bool(num_drafts)
        assert texts[0] == texts[1]
        for text in texts[0]:
            value = json.loads(text)
            assert set(value) == {"size", "kind"}
            assert 1 <= value["size"] <= 500
            assert value["kind"] in ("a", "b")

    within_seconds(scenario())


def test_a_json_object_without_a_schema(serve: Any, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve() as served:
            answer = await served.openai.chat.completions.create(
                **fields(response_format={"type": "json_object"}, max_tokens=200, temperature=1, seed=2)
            )
            text = answer.choices[0].message.content
            assert text.startswith("{")
            if answer.choices[0].finish_reason == "stop":
                assert isinstance(json.loads(text), dict)

    within_seconds(scenario())


def test_a_tool_is_called_and_its_result_goes_back(serve: Any, within_seconds: Any) -> None:
    asked = fields(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=400)
    by_name = {**asked, "tool_choice": {"type": "function", "function": {"name": "make_thing"}}}
    template = ChatTemplate({"default": TOOL_TEMPLATE}, {"bos_token": "<｜begin▁of▁sentence｜>"})

    async def scenario() -> None:
        async with serve(template) as served:
            answer = await served.openai.chat.completions.create(**asked)
            (call,) = answer.choices[0].message.tool_calls
            assert answer.choices[0].finish_reason == "tool_calls"
            assert answer.choices[0].message.content is None
            assert call.function.name == "make_thing"
            assert set(json.loads(call.function.arguments)) == {"size", "kind"}
            name, arguments = "", ""
            async for chunk in await served.openai.chat.completions.create(**by_name, stream=True):
                for part in chunk.choices[0].delta.tool_calls or ():
                    assert part.index == 0
                    name += part.function.name or ""
                    arguments += part.function.arguments or ""
            assert (name, arguments) == (call.function.name, call.function.arguments)
            message = answer.choices[0].message.model_dump()
            result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
            second = await served.openai.chat.completions.create(
                **fields(messages=[*HI, message, result], tools=[TOOL])
            )
            assert second.choices[0].finish_reason == "length"

    within_seconds(scenario())


def test_a_template_that_ignores_tools_gets_them_told(serve: Any, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve() as served:
            plain = await served.openai.chat.completions.create(**fields(max_tokens=1))
            told = await served.openai.chat.completions.create(**fields(max_tokens=1, tools=[TOOL_SMALL]))
            kept = await served.openai.chat.completions.create(
                **fields(max_tokens=1, tools=[TOOL_SMALL], tool_choice="none")
            )
            assert told.usage.prompt_tokens > plain.usage.prompt_tokens + 100
            assert kept.usage.prompt_tokens == plain.usage.prompt_tokens

    within_seconds(scenario())


TOOL_SMALL = {"type": "function", "function": {"name": "f"}}


def test_what_the_prompt_opens_is_reasoning(serve: Any, within_seconds: Any, loaded: LoadedModel) -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}<think>\n"}, {})

    async def scenario() -> None:
        async with serve(template) as served:
            answer = await served.openai.chat.completions.create(**fields())
            message = answer.choices[0].message
            assert message.content == ""
            assert len(message.reasoning_content) > 0
            assert answer.usage.completion_tokens_details.reasoning_tokens > 0
            streamed = ""
            async for chunk in await served.openai.chat.completions.create(**fields(stream=True)):
                streamed += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            assert streamed == message.reasoning_content

    within_seconds(scenario())


def test_the_inspector_hears_of_every_token(serve: Any, alone: Alone, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve() as served:
            tokens = []
            extension = {"abyssal": {"inspect": True}}
            async for chunk in await served.openai.chat.completions.create(**fields(stream=True), extra_body=extension):
                tokens += (getattr(chunk.choices[0], "abyssal", None) or {"tokens": []})["tokens"]
            assert len(tokens) == 24
            assert all(0 < token["probability"] <= 1 for token in tokens)
            assert all(len(layer) == 2 for token in tokens for layer in token["experts"])
            assert {len(token["experts"]) for token in tokens} == {2}
            drafts = [token["draft"] for token in tokens if token["draft"]]
            statistics = served.app.state.engine.statistics()
            assert len(drafts) == sum(statistics.drafted) > 0
            assert sum(draft["accepted"] for draft in drafts) == sum(statistics.accepted)

    within_seconds(scenario())


def test_texts_are_continued_for_each_prompt(serve: Any, alone: Alone, within_seconds: Any) -> None:
    prompts = ["def ", "x * x\n"]

    async def scenario() -> None:
        async with serve() as served:
            whole = await served.openai.completions.create(
                model="model", prompt=prompts, n=2, max_tokens=9, seed=5, temperature=1.2, top_p=1, logprobs=2
            )
            parameters = SamplingParameters(9, temperature=1.2, top_p=1.0, seed=5)
            expected = [text for p in prompts for text in alone(f"<｜begin▁of▁sentence｜>{p}", parameters, 2)]
            assert [choice.text for choice in whole.choices] == expected
            assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
            for choice in whole.choices:
                assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) <= 9
                assert all(1 <= len(top) <= 2 for top in choice.logprobs.top_logprobs)
            streamed = [""] * 4
            async for chunk in await served.openai.completions.create(
                model="model", prompt=prompts, n=2, max_tokens=9, seed=5, temperature=1.2, top_p=1, stream=True
            ):
                streamed[chunk.choices[0].index] += chunk.choices[0].text
            assert streamed == expected
            ids = await served.openai.completions.create(model="model", prompt=[[0, 9, 8], [0, 7]], temperature=0)
            assert [choice.text for choice in ids.choices] == [
                alone(prompt, SamplingParameters(16, temperature=0))[0] for prompt in ([0, 9, 8], [0, 7])
            ]

    within_seconds(scenario())


def test_penalties_and_ignored_end_tokens_reach_the_engine(serve: Any, alone: Alone, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve() as served:
            answer = await served.openai.chat.completions.create(
                **fields(presence_penalty=1.5, frequency_penalty=-0.5),
                extra_body={"repetition_penalty": 1.2, "top_k": 7},
            )
            parameters = SamplingParameters(
                24, temperature=0, presence_penalty=1.5, frequency_penalty=-0.5, repetition_penalty=1.2, top_k=7
            )
            assert answer.choices[0].message.content == alone(PROMPT, parameters)[0]
            only_end = {"logit_bias": {"1": 100}}
            ended = await served.openai.chat.completions.create(**fields(**only_end))
            assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")
            forced = await served.openai.chat.completions.create(**fields(**only_end), extra_body={"ignore_eos": True})
            assert forced.choices[0].finish_reason == "length"
            assert forced.usage.completion_tokens == 24

    within_seconds(scenario())


def test_the_one_model_is_listed(serve: Any, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve(model_name="a/b c") as served:
            models = await served.openai.models.list()
            assert [model.id for model in models.data] == ["a/b c"]
            assert (await served.http.get("/v1/models/a/b c")).json()["max_model_len"] == 800
            assert (await served.http.get("/health")).json() == {"status": "ok"}

    within_seconds(scenario())
