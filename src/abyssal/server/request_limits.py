"""Middleware for every request: API key, size and time limits of the body, a request id, and the access log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from abyssal.server.faults import ApiError, fault_of
from abyssal.server.options import ServerOptions

#: The key of the request's state under which handlers add fields for the access log.
RECORD = "record"
#: A body of up to this many times the allowed size is read and discarded, so that the client can read the refusal.
DISCARDED_BODIES = 8
CLIENT_CLOSED_REQUEST = 499  # nginx's status of a client that left before the response
server_log = logging.getLogger("abyssal.server")
access_log = logging.getLogger("abyssal.access")


class DisconnectedError(Exception):
    """The client disconnected before its request was complete."""


class RequestLimits:
    """ASGI middleware that checks and logs every request of the application."""

    def __init__(self, app: ASGIApp, options: ServerOptions, count: Callable[[str, int], None]) -> None:
        """Wrap `app`; `count` is called with the path and status of each response."""
        self._app, self._options, self._count = app, options, count
        self._keys = [_digest(key) for key in options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it to the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        record: dict[str, Any] = {"request_id": uuid.uuid4().hex, "status": CLIENT_CLOSED_REQUEST}
        scope.setdefault("state", {})[RECORD] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record["request_id"]
            await send(message)

        try:
            await self._app(scope, await self._receive_checked(scope, receive), send_with_id)
        except ApiError as fault:
            await fault.response()(scope, receive, send_with_id)
        except DisconnectedError:
            pass
        except Exception as error:  # a defect of ours
            server_log.exception("request %s failed", record["request_id"])
            if record["status"] == CLIENT_CLOSED_REQUEST:
                await fault_of(error).response()(scope, receive, send_with_id)
        finally:
            self._log(scope, record, time.perf_counter() - began)

    async def _receive_checked(self, scope: Scope, receive: Receive) -> Receive:
        """Receive and check the body; return a `receive` that yields it in one message.

        Raises:
            ApiError: a wrong key, or a body that is too large or too slow.
        """
        has_key = not self._keys or not scope["path"].startswith("/v1/") or self._has_key(Headers(scope=scope))
        limit = self._options.max_body_bytes
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self._options.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise DisconnectedError
                    part = message.get("body", b"")
                    size += len(part)
                    if has_key and size <= limit:
                        body += part
                    if not message.get("more_body", False) or size > DISCARDED_BODIES * limit:
                        break
        except TimeoutError:
            raise ApiError(
                408, f"the request's body did not arrive within {self._options.body_timeout_s:g} s", code="timeout"
            ) from None
        if not has_key:
            raise ApiError(
                401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`", code="invalid_api_key"
            )
        if size > limit:
            raise ApiError(413, f"the request's body is larger than {limit} bytes", code="request_too_large")
        pending = [bytes(body)]

        async def replay() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        return replay

    def _has_key(self, headers: Headers) -> bool:
        """Whether the request bears one of the keys; takes the same time for every wrong one."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, own) for own in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def _log(self, scope: Scope, record: dict[str, Any], seconds: float) -> None:
        route = scope.get("route")
        self._count(getattr(route, "path", "other"), record["status"])
        client = scope.get("client")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            **record,
            "seconds": round(seconds, 4),
        }
        access_log.info(json.dumps(line))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
