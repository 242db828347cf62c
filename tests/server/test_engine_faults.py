"""What clients and those who keep the server running see of faults in the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import uvicorn

from abyssal.model import Transformer
from abyssal.server.constraint import GrammarConstraint
from abyssal.server.process import DrainingServer

Serve = Callable[..., AbstractAsyncContextManager[Any]]
Within = Callable[[Coroutine[Any, Any, None]], None]
ASKED = {"model": "model", "prompt": "def", "max_tokens": 5, "temperature": 0}
JSON = {"response_format": {"type": "json_object"}}


class PanicError(BaseException):
    """As pyo3's PanicException: no Exception."""


@pytest.mark.parametrize("method", ["__init__", "allowed", "advance"])
def test_a_grammar_that_panics_ends_its_request_with_500_and_the_server_goes_on(
    serve: Serve, within_seconds: Within, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def panic(*_: object) -> None:
        raise PanicError("called `Option::unwrap()` on a `None` value")

    async def scenario() -> None:
        async with serve(model_name="model") as served:
            with monkeypatch.context() as patch:
                patch.setattr(GrammarConstraint, method, panic)
                with pytest.raises(openai.InternalServerError, match="PanicError"):
                    await served.openai.completions.create(**ASKED, extra_body=JSON)
            assert (await served.http.get("/health")).status_code == 200
            answer = await served.openai.completions.create(**ASKED)
            assert answer.usage.completion_tokens > 0

    within_seconds(scenario())


def test_health_tells_that_the_engine_failed_until_it_works_again(
    serve: Serve, within_seconds: Within, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abyssal.engine.async_engine.PROBE_S", 0.01)

    async def scenario() -> None:
        async with serve(model_name="model") as served:
            with monkeypatch.context() as patch:
                patch.setattr(Transformer, "logits", lambda model, h: 1 / 0)
                with pytest.raises(openai.InternalServerError, match="step failed"):
                    await served.openai.completions.create(**ASKED)
                health = await served.http.get("/health")
                assert health.status_code == 503
                assert health.json()["error"]["code"] == "engine_failed"
                assert "ZeroDivisionError" in health.json()["error"]["message"]
            while (await served.http.get("/health")).status_code != 200:
                await asyncio.sleep(0.01)
            assert (await served.openai.completions.create(**ASKED)).usage.completion_tokens > 0

    within_seconds(scenario())


def test_the_process_ends_with_the_engine() -> None:
    driver = SimpleNamespace(has_ended=False)
    server = DrainingServer(uvicorn.Config("unused"), driver, 1.0)  # type: ignore[arg-type]
    assert not asyncio.run(server.on_tick(1))
    driver.has_ended = True
    assert asyncio.run(server.on_tick(1))
