"""What is refused, with which status, in the shape that OpenAI's clients read."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from abyssal.engine import EngineOptions
from abyssal.errors import UsageError
from abyssal.server import ServerOptions

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COUNTED = {**BODY, "ignore_eos": True}  # otherwise any of the tokens, which are drawn, may be the last
SLOW = {**COUNTED, "max_tokens": 150}


def check(answer: Any, status: int, words: str, code: str | None = None, param: str | None = None) -> None:
    """Compare an answer with a fault in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert (error["code"], error["param"]) == (code, param)
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("changes", "words", "param"),
    [
        ({"temprature": 1}, "temprature: unknown field; nearest: temperature", "temprature"),
        ({"temperature": -1}, "temperature=-1", "temperature"),
        ({"temperature": "0"}, "temperature: input should be a valid number", "temperature"),
        ({"max_tokens": 0}, "max_tokens: input should be greater than or equal to 1", "max_tokens"),
        ({"max_tokens": True}, "max_tokens: input should be a valid integer", "max_tokens"),
        ({"top_p": 0}, "top_p=0", "top_p"),
        ({"n": 0}, "n: input should be", "n"),
        ({"n": 200}, "makes 200 texts, at most 128", "n"),
        ({"stop": ["a", ""]}, "stop: must not hold an empty string", "stop"),
        ({"stop": ["a"] * 17}, "stop: list should have at most 16 items", "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is not a token id", "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias: token id 99999 is not one of the model's", "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs: only allowed when logprobs is true", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: input should be less", "top_logprobs"),
        ({"stream_options": {}}, "stream_options: only allowed when stream is true", "stream_options"),
        ({"messages": []}, "messages: list should have at least 1 item", "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role: input should be", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode text", None),
        ({"messages": None}, "messages: input should be a valid list", "messages"),
        ({"functions": [{}]}, "functions: is not supported here; leave it out", "functions"),
        ({"response_format": {"type": "xml"}}, "response_format", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema: is needed", "response_format.json_schema"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name: string should match", None),
        ({"tool_choice": "required"}, "tool_choice: 'required' needs tools", "tool_choice"),
        ({"chat_template_kwargs": {"messages": []}}, "has a field of its own", "chat_template_kwargs"),
    ],
)
def test_a_body_that_cannot_be_is_400_and_says_why(
    serve: Any, within_seconds: Any, changes: dict[str, Any], words: str, param: str | None
) -> None:
    async def scenario() -> None:
        async with serve() as served:
            answer = await served.http.post(CHAT, content=json.dumps(BODY | changes), headers=JSON)
            check(answer, 400, words, None, answer.json()["error"]["param"] if param is None else param)

    within_seconds(scenario())


JSON = {"content-type": "application/json"}


def test_a_schema_that_cannot_be_followed_is_400(serve: Any, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve() as served:
            for schema in ({"type": "objct"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}):
                form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
                answer = await served.http.post(CHAT, json=BODY | {"response_format": form})
                check(answer, 400, "response_format: cannot be followed", None, "response_format")

    within_seconds(scenario())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nul", b'"text"', b"\xff{}", b"[" * 100_000, b'{"model": 1}'])
def test_what_is_no_request_is_400(serve: Any, within_seconds: Any, body: bytes) -> None:
    async def scenario() -> None:
        async with serve() as served:
            answer = await served.http.post(CHAT, content=body, headers=JSON)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["type"] == "invalid_request_error"
            if body == b"{":
                check(answer, 400, "the body is not valid JSON (expecting property name enclosed in double quotes, at")

    within_seconds(scenario())


def test_statuses_of_what_is_not_there(serve: Any, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve() as served:
            for path in (CHAT, "/v1/completions"):
                body = {**BODY, "model": "modle"} if path == CHAT else {"model": "modle", "prompt": "a"}
                answer = await served.http.post(path, json=body)
                check(answer, 404, "this server has 'model' only; nearest: model", "model_not_found", "model")
            check(await served.http.get("/v1/nothing"), 404, "GET /v1/nothing: there is no such page", "not_found")
            answer = await served.http.post("/chat/completions", json=BODY)
            check(answer, 404, "there is no such page; nearest: /v1/chat/completions", "not_found")
            check(await served.http.get("/v1/models/gpt"), 404, "this server has", "model_not_found")
            answer = await served.http.get(CHAT)
            check(answer, 405, f"GET {CHAT}: this address takes POST")
            assert answer.headers["allow"] == "POST"

    within_seconds(scenario())


def test_a_prompt_that_is_too_long_is_400(serve: Any, within_seconds: Any) -> None:
    async def scenario() -> None:
        long = {**BODY, "messages": [{"role": "user", "content": "x" * 900}]}
        async with serve() as served:
            answer = await served.http.post(CHAT, json=long)
            check(answer, 400, "at most 799 are allowed here", "context_length_exceeded", "messages")
            answer = await served.http.post(CHAT, json=BODY | {"max_tokens": 796})
            check(answer, 400, "only 795 tokens fit behind this prompt", "context_length_exceeded", "max_tokens")
        async with serve(max_prompt_tokens=4) as served:
            check(
                await served.http.post(CHAT, json=BODY),
                400,
                "has 5 tokens, at most 4",
                "context_length_exceeded",
                "messages",
            )
        small = EngineOptions(page_tokens=8, cache_bytes=1, num_drafts=0)  # a page
        async with serve(engine=small) as served:
            answer = await served.http.post(CHAT, json=BODY | {"max_tokens": 5})
            check(answer, 400, "only 4 tokens fit", "context_length_exceeded", "max_tokens")
            assert (await served.http.post(CHAT, json=BODY)).status_code == 200

    within_seconds(scenario())


def test_without_a_chat_template_there_is_no_chat(serve: Any, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve(None) as served:
            check(await served.http.post(CHAT, json=BODY), 400, "no chat template", "no_chat_template")
            answer = await served.http.post("/v1/completions", json={"model": "model", "prompt": "a", "max_tokens": 2})
            assert answer.status_code == 200

    within_seconds(scenario())


def test_a_wrong_key_is_401(serve: Any, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve(api_keys=("right", "other")) as served:
            wrong = (None, "Bearer wrong", "Bearer ", "Basic right", "right", "Bearer right2", "Bearer rígght")
            for header in wrong:
                headers = {} if header is None else {"authorization": header.encode()}
                answer = await served.http.post(CHAT, json=BODY, headers=headers)
                check(answer, 401, "the API key is missing or wrong", "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
            for key in ("right", "other"):
                answer = await served.http.post(CHAT, json=BODY, headers={"authorization": f"Bearer {key}"})
                assert answer.status_code == 200
            assert (await served.http.get("/v1/models")).status_code == 401
            assert (await served.http.get("/health")).status_code == 200

    within_seconds(scenario())


def test_a_body_that_is_too_large_is_413(serve: Any, within_seconds: Any) -> None:
    async def parts() -> Any:
        for _ in range(300):
            yield b"x" * 10

    async def scenario() -> None:
        async with serve(max_body_bytes=200) as served:
            answer = await served.http.post(CHAT, content=b"x" * 201)
            check(answer, 413, "larger than 200 bytes", "request_too_large")
            check(await served.http.post(CHAT, content=parts()), 413, "larger than 200 bytes", "request_too_large")
            assert (await served.http.post(CHAT, json=BODY)).status_code == 200

    within_seconds(scenario())


def test_a_full_queue_is_503_with_retry_after(serve: Any, within_seconds: Any, held: Any) -> None:
    async def scenario() -> None:
        engine = EngineOptions(max_running=1, num_drafts=0)
        async with serve(engine=engine, max_waiting=1) as served:
            with held(served.app.state.engine):
                slow = [asyncio.ensure_future(served.http.post(CHAT, json=SLOW)) for _ in range(2)]
                while served.app.state.driver.num_sequences < 2:
                    await asyncio.sleep(0.01)
                answer = await served.http.post(CHAT, json=BODY)
                check(answer, 503, "try again later", "queue_full")
                assert answer.headers["retry-after"] == "1"
                two = {"model": "model", "prompt": ["a", "b"], "max_tokens": 2}
                check(await served.http.post("/v1/completions", json=two), 503, "try again later", "queue_full")
            assert [(await one).status_code for one in slow] == [200, 200]

    within_seconds(scenario())


def test_a_server_that_drains_refuses_and_lets_end(serve: Any, within_seconds: Any, held: Any) -> None:
    async def scenario() -> None:
        async with serve() as served:
            with held(served.app.state.engine):
                slow = asyncio.ensure_future(served.http.post(CHAT, json=SLOW))
                while not served.app.state.driver.num_sequences:
                    await asyncio.sleep(0.01)
                draining = asyncio.ensure_future(served.app.state.driver.drain(30))
                await asyncio.sleep(0)
                check(await served.http.post(CHAT, json=BODY), 503, "about to stop", "shutting_down")
                check(await served.http.get("/health"), 503, "about to stop", "shutting_down")
            assert await draining
            assert (await slow).json()["usage"]["completion_tokens"] == 150

    within_seconds(scenario())


def test_what_drains_too_long_ends_with_a_reason(serve: Any, within_seconds: Any, held: Any) -> None:
    async def scenario() -> None:
        async with serve() as served:
            asked = [served.http.post(CHAT, json=SLOW), served.http.post(CHAT, json=SLOW | {"stream": True})]
            with held(served.app.state.engine):
                whole, stream = (asyncio.ensure_future(one) for one in asked)
                while served.app.state.driver.num_sequences < 2:
                    await asyncio.sleep(0.01)
                await served.app.state.driver.drain(0)
            check(await whole, 503, "had not ended in time", "shutting_down")
            *_, last, end = (await stream).text.split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
            assert end == ""

    within_seconds(scenario())


def test_the_access_log_tells_of_each_request_and_of_no_text(
    serve: Any, within_seconds: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serve(api_keys=("secret",)) as served:
            with caplog.at_level(logging.INFO, "abyssal.access"):
                answer = await served.http.post(CHAT, json=COUNTED, headers={"authorization": "Bearer secret"})
                await served.http.post(CHAT, json=BODY)
            first, second = (json.loads(record.message) for record in caplog.records if record.name == "abyssal.access")
            assert first["request_id"] == answer.headers["x-request-id"]
            assert (first["method"], first["path"], first["status"]) == ("POST", CHAT, 200)
            assert (first["prompt_tokens"], first["completion_tokens"]) == (5, 4)
            assert second["status"] == 401
            assert "secret" not in caplog.text
            assert "hi" not in [value for line in (first, second) for value in line.values()]

    within_seconds(scenario())


def test_metrics_count_under_vllms_names(serve: Any, within_seconds: Any) -> None:
    async def scenario() -> None:
        async with serve() as served:
            await served.http.post(CHAT, json=COUNTED)
            await served.http.post(CHAT, json=COUNTED | {"n": 2, "stream": True})
            await served.http.post(CHAT, json=COUNTED | {"n": 0})
            lines = dict(
                line.rsplit(" ", 1) for line in (await served.http.get("/metrics")).text.splitlines() if line[0] != "#"
            )
            label = '{model_name="model"}'
            assert float(lines[f"vllm:generation_tokens_total{label}"]) == 12
            assert float(lines[f"vllm:prompt_tokens_total{label}"]) == 5 * 3 - float(
                lines[f"vllm:prefix_cache_hits_total{label}"]
            )
            assert float(lines[f"vllm:num_requests_running{label}"]) == 0
            assert float(lines[f"vllm:e2e_request_latency_seconds_count{label}"]) == 2
            assert float(lines['vllm:request_success_total{finished_reason="length",model_name="model"}']) == 3
            assert float(lines['abyssal:http_responses_total{path="/v1/chat/completions",status="400"}']) == 1

    within_seconds(scenario())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_waiting": -1}, "max_waiting=-1"),
        ({"model_name": ""}, "must not be empty"),
        ({"api_keys": ("",)}, "empty"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ServerOptions(**options)
