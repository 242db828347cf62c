"""The limits: bodies that never end, clients that leave, and defects of ours."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from abyssal.server import ServerOptions
from abyssal.server.request_limits import RequestLimits

SCOPE = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [], "client": ("127.0.0.1", 5)}


def drive(messages: list[Message], application: Any, **options: Any) -> tuple[list[Message], list[tuple[str, int]]]:
    """Send messages through a limits and return what is answered and counted; more messages never come."""
    answered: list[Message] = []
    counted: list[tuple[str, int]] = []

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        answered.append(message)

    async def scenario() -> None:
        limits = RequestLimits(application, ServerOptions(**options), lambda *one: counted.append(one))
        await asyncio.wait_for(limits(dict(SCOPE), receive, send), 10)

    asyncio.run(scenario())
    return answered, counted


async def unreachable(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the application was called")


def part(body: bytes, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def test_the_application_gets_the_whole_body_at_once() -> None:
    seen = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(await receive())

    drive([part(b"ab", True), part(b"", True), part(b"c", False)], application)
    assert seen == [part(b"abc", False)]


def test_a_body_that_does_not_arrive_is_408() -> None:
    answered, counted = drive([part(b"ab", True)], unreachable, body_timeout_s=0.05)
    assert answered[0]["status"] == 408
    assert json.loads(answered[1]["body"])["error"]["code"] == "timeout"
    assert counted == [("other", 408)]


def test_a_client_that_leaves_in_its_body_gets_nothing() -> None:
    answered, counted = drive([part(b"ab", True), {"type": "http.disconnect"}], unreachable)
    assert answered == []
    assert counted == [("other", 499)]


def test_a_body_without_end_is_not_read_for_ever() -> None:
    messages = [part(b"x" * 10, True) for _ in range(10_000)]
    answered, _ = drive(messages, unreachable, max_body_bytes=50)
    assert answered[0]["status"] == 413
    assert len(messages) > 9_900


def test_a_defect_is_500_in_the_shape_of_every_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with caplog.at_level(logging.ERROR, "abyssal.server"):
        answered, counted = drive([part(b"", False)], application)
    assert answered[0]["status"] == 500
    assert json.loads(answered[1]["body"])["error"]["type"] == "server_error"
    assert counted == [("other", 500)]
    assert "ZeroDivisionError" in caplog.text
