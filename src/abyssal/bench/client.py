"""One request to an OpenAI-compatible server, with the time of everything that comes back."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from abyssal.errors import AbyssalError, UsageError


class ServerError(AbyssalError):
    """The server cannot be reached, or does not answer as such a server does."""


@dataclass
class RequestResult:
    """What became of one request; times in seconds from the beginning of the measurement.

    `due_s` is when it should have been sent, which is what a user waits from. `chunks_s` are the arrivals of text.
    Token counts are the server's own, None where it reports none.
    """

    due_s: float
    sent_s: float = 0.0
    ended_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    accepted_drafts: int | None = None
    rejected_drafts: int | None = None
    error: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the answer, by the server's count, else chunks."""
        return len(self.chunks_s) if self.output_tokens is None else self.output_tokens

    def note_usage(self, usage: dict[str, Any]) -> None:
        """Keep what the server counted."""
        details = usage.get("completion_tokens_details") or {}
        self.prompt_tokens = usage.get("prompt_tokens")
        self.output_tokens = usage.get("completion_tokens")
        self.accepted_drafts = details.get("accepted_prediction_tokens")
        self.rejected_drafts = details.get("rejected_prediction_tokens")


@dataclass(frozen=True)
class Client:
    """Speaks to one server about one model."""

    http: httpx2.AsyncClient
    model: str
    chats: bool
    extra: dict[str, Any]

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, *, model: str | None, api_key: str | None, chats: bool, timeout_s: float, extra: dict[str, Any]
    ) -> AsyncIterator[Client]:
        """Yield a client for the server at `url`, with or without /v1; the model is the first one unless named.

        Raises:
            UsageError: no URL.
            ServerError: nobody answers there, or not like such a server.
        """
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url}: must be a URL such as http://127.0.0.1:8000")
        base = url.rstrip("/").removesuffix("/v1") + "/v1"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx2.AsyncClient(base_url=base, headers=headers, timeout=timeout_s, limits=limits) as http:
            yield cls(http, model or await _first_model(http), chats, extra)

    async def ask(self, prompt: str, max_tokens: int, measured: RequestResult, begin: float) -> None:
        """Send a request and fill in what became of it; a failure is written down, not raised.

        `begin`: what times count from, by the clock of `time.perf_counter`.
        """
        body = self._body(prompt, max_tokens) | {"stream": True, "stream_options": {"include_usage": True}}
        measured.sent_s = time.perf_counter() - begin
        try:
            async with self.http.stream("POST", self._path, json=body) as response:
                if response.status_code != 200:
                    measured.error = f"HTTP {response.status_code}: {_sentence(await response.aread())}"
                else:
                    measured.error = await self._read(response, measured, begin)
        except (httpx2.HTTPError, httpx2.StreamError, json.JSONDecodeError) as error:
            measured.error = f"{type(error).__name__}: {error}".rstrip(": ")
        measured.ended_s = time.perf_counter() - begin

    async def count_prompt(self, prompt: str) -> int | None:
        """Return how many tokens the server makes of a prompt, if it tells.

        Raises:
            ServerError: the request fails.
        """
        try:
            response = await self.http.post(self._path, json=self._body(prompt, 1))
        except httpx2.HTTPError as error:
            raise ServerError(f"{self.http.base_url}: {type(error).__name__}: {error}") from None
        if response.status_code != 200:
            raise ServerError(
                f"{self.http.base_url}{self._path}: HTTP {response.status_code}: {_sentence(response.content)}"
            )
        try:
            count = (response.json().get("usage") or {}).get("prompt_tokens")
        except (ValueError, AttributeError):
            raise ServerError(f"{self.http.base_url}{self._path}: the answer is not a JSON object") from None
        return count if isinstance(count, int) else None

    @property
    def _path(self) -> str:
        return "chat/completions" if self.chats else "completions"

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        what = {"messages": [{"role": "user", "content": prompt}]} if self.chats else {"prompt": prompt}
        return {"model": self.model, "max_tokens": max_tokens, **what, **self.extra}

    async def _read(self, response: httpx2.Response, measured: RequestResult, begin: float) -> str | None:
        """Take the events of a stream, and return what is wrong with it."""
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                return None
            event = json.loads(data)
            if "error" in event:
                return f"in the stream: {_sentence(data.encode())}"
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                if choice.get("text") or any(delta.get(name) for name in ("content", "reasoning_content", "reasoning")):
                    measured.chunks_s.append(time.perf_counter() - begin)
            if event.get("usage"):
                measured.note_usage(event["usage"])
        return "the stream broke off"


async def _first_model(http: httpx2.AsyncClient) -> str:
    """Return the first model that the server names."""
    try:
        response = await http.get("models")
    except httpx2.HTTPError as error:
        raise ServerError(
            f"{http.base_url}: nobody answers ({type(error).__name__}: {error}); start the server first"
        ) from None
    except httpx2.InvalidURL as error:
        raise UsageError(f"{http.base_url}: {error}") from None
    if response.status_code != 200:
        raise ServerError(f"{http.base_url}models: HTTP {response.status_code}: {_sentence(response.content)}")
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise ServerError(f"{http.base_url}models: lists no model, so this is no OpenAI-compatible server") from None


def _sentence(data: bytes) -> str:
    """Return the message in the body of an error, of OpenAI's shape or any other."""
    text = data.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:200] or "no message"
