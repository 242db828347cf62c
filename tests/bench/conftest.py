"""A server that speaks as OpenAI's does, and says what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

OVERHEAD, TOKENS_PER_WORD = 3, 2  # of a prompt


class FakeServer(ThreadingHTTPServer):
    """Keeps the bodies it was sent; `faults` are what it does to a request of that number instead of answering."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: dict[int, str] = {}
        self.counts = True
        self.open = self.most_open = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def streamed(self) -> list[dict[str, Any]]:
        return [body for body in self.bodies if body.get("stream")]


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "fake-1"}, {"id": "other"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        chat = self.path == "/v1/chat/completions"
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        usage = {"prompt_tokens": TOKENS_PER_WORD * len(prompt.split()) + OVERHEAD} if self.server.counts else None
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["authorization"])
            number = len(self.server.streamed()) - 1
        if body.get("stream"):
            self.stream(body, chat, usage, self.server.faults.get(number))
        else:
            self.answer(200, {"choices": [], "usage": usage})

    def stream(self, body: dict[str, Any], chat: bool, usage: dict[str, Any] | None, fault: str | None) -> None:
        with self.server.lock:
            self.server.open += 1
            self.server.most_open = max(self.server.most_open, self.server.open)
        try:
            end = self.events(body, chat, usage, fault)
        finally:
            with self.server.lock:
                self.server.open -= 1
        self.wfile.write(end)  # not before: who has read it asks for the next one

    def events(self, body: dict[str, Any], chat: bool, usage: dict[str, Any] | None, fault: str | None) -> bytes:
        """Send all but the end of the stream, and return that."""
        if fault == "full":
            self.answer(503, {"error": {"message": "the queue is full"}})
            return b""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        if chat:
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for _ in range(body["max_tokens"]):
            self.event({"choices": [{"delta": {"content": "x"}} if chat else {"text": "x"}]})
            if fault == "breaks":
                return b""
            if fault == "error":
                self.event({"error": {"message": "out of pages"}})
                return b""
        if usage is not None:
            drafts = {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}
            counted = {"completion_tokens": body["max_tokens"], "completion_tokens_details": drafts}
            self.event({"choices": [], "usage": usage | counted})
        return b"data: [DONE]\n\n"

    def event(self, fields: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(fields).encode() + b"\n\n")
        self.wfile.flush()

    def answer(self, status: int, fields: dict[str, Any]) -> None:
        data = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """One such server, on a port of its own."""
    with FakeServer() as fake:
        thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield fake
        fake.shutdown()
        thread.join()
