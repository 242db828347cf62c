"""What every request passes before its handler: size, key, a number of its own, and a line in the access log."""

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

#: Where the handlers add what the access log should know of a request.
RECORD = "record"
#: So many times the allowed size is read and dropped, so that the client gets to read why it was refused.
DRAINED = 8
GONE = 499  # what logs say of a client that left before an answer
server_log = logging.getLogger("abyssal.server")
access_log = logging.getLogger("abyssal.access")


class GoneError(Exception):
    """The client left before its request was complete."""


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, options: ServerOptions, count: Callable[[str, int], None]) -> None:
        """Guard `app`; `count` hears of each answer's path and status."""
        self._app, self._options, self._count = app, options, count
        self._keys = [_digest(key) for key in options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application do it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        record: dict[str, Any] = {"request_id": uuid.uuid4().hex, "status": GONE}
        scope.setdefault("state", {})[RECORD] = record

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record["request_id"]
            await send(message)

        try:
            await self._app(scope, await self._admitted(scope, receive), answer)
        except ApiError as fault:
            await fault.response()(scope, receive, answer)
        except GoneError:
            pass
        except Exception as error:  # a defect of ours
            server_log.exception("request %s failed", record["request_id"])
            if record["status"] == GONE:
                await fault_of(error).response()(scope, receive, answer)
        finally:
            self._log(scope, record, time.perf_counter() - began)

    async def _admitted(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` that gives the whole body at once.

        Raises:
            ApiError: a wrong key, or a body that is too large or too slow.
        """
        has_key = not self._keys or not scope["path"].startswith("/v1/") or self._has_key(Headers(scope=scope))
        most = self._options.max_body_bytes
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self._options.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise GoneError
                    part = message.get("body", b"")
                    size += len(part)
                    if has_key and size <= most:
                        body += part
                    if not message.get("more_body", False) or size > DRAINED * most:
                        break
        except TimeoutError:
            raise ApiError(
                408, f"the request's body did not arrive within {self._options.body_timeout_s:g} s", code="timeout"
            ) from None
        if not has_key:
            raise ApiError(
                401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`", code="invalid_api_key"
            )
        if size > most:
            raise ApiError(413, f"the request's body is larger than {most} bytes", code="request_too_large")
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
        found = [hmac.compare_digest(digest, own) for own in self._keys]
        return scheme.lower() == "bearer" and any(found)

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
