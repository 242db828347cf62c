"""The engine behind asyncio: many callers, some of whom leave."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.engine import (
    AsyncEngine,
    DrainingError,
    Engine,
    EngineFailedError,
    EngineOptions,
    OutputStream,
    QueueFullError,
    Request,
    RequestFailedError,
    SamplingParameters,
)
from abyssal.errors import ModelDirectoryError, UsageError
from abyssal.model import Transformer
from engine.oracle import generate

Build = Callable[..., Transformer]
GREEDY = SamplingParameters(12, temperature=0)
OPTIONS = EngineOptions(page_tokens=4, max_running=3, num_drafts=1)


@pytest.fixture
def model(tiny_config: ModelConfig, build: Build) -> Transformer:
    """In float64, where a text does not depend on who else runs, which is a matter of time here."""
    return build(tiny_config)


def within_seconds(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run it; what hangs is a failure."""
    asyncio.run(asyncio.wait_for(coroutine, 60))


async def ids_of(stream: OutputStream) -> list[int]:
    return [output.token.id async for output in stream if output.token is not None]


def prompts(count: int) -> list[list[int]]:
    source = random.Random(4)
    return [[source.randrange(97) for _ in range(source.randint(1, 20))] for _ in range(count)]


def test_many_streams_give_what_each_request_gives_alone(model: Transformer) -> None:
    async def scenario() -> None:
        engine = Engine(model, OPTIONS)
        async with AsyncEngine(engine) as driver:
            streams = [driver.submit(Request(prompt, GREEDY)) for prompt in prompts(12)]
            texts = await asyncio.gather(*(ids_of(stream) for stream in streams))
            assert driver.num_sequences == 0
            assert driver.statistics.new_tokens_total == 12 * 12
        engine.check_integrity()
        assert engine.statistics().num_pages_used == 0
        assert texts == [[token.id for token in generate(model, prompt, GREEDY)] for prompt in prompts(12)]

    within_seconds(scenario())


def test_half_of_the_callers_leave_at_random_moments_and_no_page_leaks(model: Transformer) -> None:
    async def scenario() -> None:
        source = random.Random(9)
        engine = Engine(model, OPTIONS)

        async def caller(prompt: list[int], leaves_after: int | None) -> None:
            async with driver.submit(Request(prompt, GREEDY, num_sequences=source.randint(1, 3))) as stream:
                count = 0
                async for output in stream:
                    assert output.token is not None
                    count += 1
                    if count == leaves_after:
                        return
                    await asyncio.sleep(0)
                assert leaves_after is None

        async with AsyncEngine(engine) as driver:
            ends = [source.choice([None, 1, 2, 5, 11]) for _ in range(24)]
            callers = [asyncio.create_task(caller(p, n)) for p, n in zip(prompts(24), ends, strict=True)]
            for task in source.sample(callers, 4):
                await asyncio.sleep(0.01)
                task.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            assert [task for task in callers if not task.cancelled() and task.exception()] == []
            assert await driver.drain(30)
        engine.check_integrity()
        assert not engine.has_work
        assert engine.statistics().num_pages_used == 0

    within_seconds(scenario())


def test_more_requests_than_may_wait_are_refused(model: Transformer) -> None:
    async def scenario() -> None:
        async with AsyncEngine(Engine(model, OPTIONS), max_waiting=2) as driver:
            streams = [driver.submit(Request([n], GREEDY)) for n in range(5)]
            with pytest.raises(QueueFullError, match="5 texts run and wait, of at most 5; try again later"):
                driver.submit(Request([7], GREEDY))
            with pytest.raises(UsageError, match="num_sequences=6: at most 5"):
                driver.submit(Request([7], GREEDY, num_sequences=6))
            await streams[0].aclose()
            streams.append(driver.submit(Request([7], GREEDY)))
            assert [len(text) for text in await asyncio.gather(*map(ids_of, streams))] == [0, 12, 12, 12, 12, 12]

    within_seconds(scenario())


def test_a_request_that_cannot_be_is_refused_before_it_waits(model: Transformer) -> None:
    async def scenario() -> None:
        async with AsyncEngine(Engine(model, OPTIONS)) as driver:
            with pytest.raises(UsageError, match="prompt: has no tokens"):
                driver.submit(Request([], GREEDY))
            assert driver.num_sequences == 0

    within_seconds(scenario())
    with pytest.raises(UsageError, match="max_waiting=-1: must be at least 0"):
        AsyncEngine(Engine(model, OPTIONS), max_waiting=-1)


def test_draining_ends_what_runs_and_refuses_the_rest(model: Transformer) -> None:
    async def scenario() -> None:
        async with AsyncEngine(Engine(model, OPTIONS)) as driver:
            reader = asyncio.create_task(ids_of(driver.submit(Request([5, 6], GREEDY))))
            assert await driver.drain(30)
            assert driver.is_draining
            with pytest.raises(DrainingError, match="takes no further request"):
                driver.submit(Request([1], GREEDY))
            assert len(await reader) == 12

    within_seconds(scenario())


def test_what_does_not_end_in_time_is_ended_with_a_reason(model: Transformer) -> None:
    async def scenario() -> None:
        engine = Engine(model, OPTIONS)
        go, step = threading.Event(), engine.step
        engine.step = lambda: go.wait() and step()  # however long the thread of the event loop waits for its turn
        async with AsyncEngine(engine) as driver:
            stream = driver.submit(Request([5, 6], SamplingParameters(60, temperature=0)))
            all_ended = await driver.drain(0)
            go.set()
            assert not all_ended
            with pytest.raises(DrainingError, match="had not ended in time"):
                await ids_of(stream)
        assert not engine.has_work
        assert engine.statistics().num_pages_used == 0

    within_seconds(scenario())


def test_a_step_that_fails_ends_all_requests_and_the_next_ones_are_served(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        engine = Engine(model, OPTIONS)
        async with AsyncEngine(engine) as driver:
            with monkeypatch.context() as patch:
                patch.setattr(Transformer, "logits", lambda model, h: 1 / 0)
                streams = [driver.submit(Request([n, 8], GREEDY)) for n in range(4)]
                for stream in streams:
                    with pytest.raises(EngineFailedError, match=r"failed \(ZeroDivisionError\)") as caught:
                        await ids_of(stream)
                    assert isinstance(caught.value.__cause__, ZeroDivisionError)
            assert len(await ids_of(driver.submit(Request([3], GREEDY)))) == 12
        engine.check_integrity()
        assert engine.statistics().num_pages_used == 0

    within_seconds(scenario())


class PanicError(BaseException):
    """What a native library raises where it meets a defect of its own: no Exception (pyo3's PanicException)."""


class Failing:
    """Raises at one of its calls."""

    def __init__(self, error: BaseException, at: str) -> None:
        self.error, self.at, self.left = error, at, 3

    def allowed(self) -> torch.Tensor | None:
        if self.at == "allowed" and self.left == 1:
            raise self.error
        return torch.zeros(97, dtype=torch.bool) if self.at == "bars all" and self.left == 1 else None

    def advance(self, token: int) -> None:
        self.left -= 1
        if self.at == "advance" and not self.left:
            raise self.error


@pytest.mark.parametrize("at", ["made", "allowed", "advance", "bars all"])
@pytest.mark.parametrize(
    ("error", "caught", "message"),
    [
        (UsageError("grammar: had enough"), UsageError, "had enough"),
        (ValueError("no"), RequestFailedError, r"what this request asks of its tokens failed \(ValueError: no\)"),
        (PanicError("no"), RequestFailedError, r"what this request asks of its tokens failed \(PanicError: no\)"),
    ],
    ids=["ours", "an exception", "a panic"],
)
def test_a_fault_of_one_request_ends_that_one(
    model: Transformer, error: BaseException, caught: type[Exception], message: str, at: str
) -> None:
    def constraint() -> Failing:
        if at == "made":
            raise error
        return Failing(error, at)

    async def scenario() -> None:
        engine = Engine(model, OPTIONS)
        async with AsyncEngine(engine) as driver:
            kept = driver.submit(Request([5, 6], GREEDY))
            broken = driver.submit(Request([5, 7], GREEDY, 2, constraint=constraint))
            expected = (UsageError, "allows no token") if at == "bars all" else (caught, message)
            with pytest.raises(expected[0], match=expected[1]):
                await ids_of(broken)
            assert await ids_of(kept) == [token.id for token in generate(model, [5, 6], GREEDY)]
            assert len(await ids_of(driver.submit(Request([5, 7], GREEDY)))) == 12
            assert driver.failure is None
            assert await driver.drain(30)
        engine.check_integrity()
        assert engine.statistics().num_pages_used == 0

    within_seconds(scenario())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("error", [ZeroDivisionError("no"), PanicError("no")], ids=["an exception", "a panic"])
def test_after_a_failed_step_the_engine_says_so_until_one_succeeds(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr("abyssal.engine.async_engine.PROBE_S", 0.01)

    def failing(*_: object) -> None:
        raise error

    async def scenario() -> None:
        engine = Engine(model, OPTIONS)
        async with AsyncEngine(engine) as driver:
            with monkeypatch.context() as patch:
                patch.setattr(Transformer, "logits", failing)
                with pytest.raises(EngineFailedError, match=r"step failed .*; send the request again"):
                    await ids_of(driver.submit(Request([5, 8], GREEDY)))
                await asyncio.sleep(0.1)  # it tries itself, and fails
                assert "step failed" in str(driver.failure)
            await until(lambda: driver.failure is None)
            assert not driver.has_ended
            assert await ids_of(driver.submit(Request([5, 8], GREEDY))) == [
                token.id for token in generate(model, [5, 8], GREEDY)
            ]
        engine.check_integrity()
        assert engine.statistics().num_pages_used == 0

    within_seconds(scenario())


def test_an_engine_whose_state_is_broken_ends_and_takes_no_request(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        engine = Engine(model, OPTIONS)
        async with AsyncEngine(engine) as driver:
            stream = driver.submit(Request([5, 6], SamplingParameters(60, temperature=0)))
            await anext(stream)
            engine._pool._num_empty += 1  # what a restart finds
            monkeypatch.setattr(Transformer, "logits", lambda model, h: 1 / 0)
            with pytest.raises(EngineFailedError):
                await ids_of(stream)
            await until(lambda: driver.has_ended)
            assert "the engine has ended" in str(driver.failure)
            with pytest.raises(DrainingError, match="about to stop"):
                driver.submit(Request([1], GREEDY))

    within_seconds(scenario())


def test_what_asks_the_process_to_end_ends_the_engine(model: Transformer) -> None:
    def leave() -> Failing:
        raise SystemExit(3)

    async def scenario() -> None:
        async with AsyncEngine(Engine(model, OPTIONS)) as driver:
            kept = driver.submit(Request([5, 6], SamplingParameters(60, temperature=0)))
            await anext(kept)
            for stream in (driver.submit(Request([5, 7], GREEDY, constraint=leave)), kept):
                with pytest.raises(EngineFailedError, match=r"SystemExit.*the engine has ended"):
                    await ids_of(stream)
            assert driver.has_ended

    within_seconds(scenario())


def test_weights_that_are_not_finite_are_a_fault_of_the_model_directory(model: Transformer) -> None:
    async def scenario() -> None:
        with torch.no_grad():
            model.lm_head.weight[4] = float("nan")
        async with AsyncEngine(Engine(model, OPTIONS)) as driver:
            with pytest.raises(ModelDirectoryError, match="logits are not finite"):
                await ids_of(driver.submit(Request([5, 6], GREEDY)))

    within_seconds(scenario())
