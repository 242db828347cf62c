"""The application: OpenAI's endpoints, health and metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from abyssal import __version__
from abyssal.engine import AsyncEngine, Engine, EngineOptions, LoadedModel
from abyssal.errors import AbyssalError, nearest
from abyssal.server.chat_page import add_chat_page
from abyssal.server.connection import EventStream, NoResponse, while_connected
from abyssal.server.faults import ApiError, fault_of
from abyssal.server.generation import Generation
from abyssal.server.json_text import to_json
from abyssal.server.options import ServerOptions
from abyssal.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from abyssal.server.request_limits import RECORD, DisconnectedError, RequestLimits
from abyssal.server.responses import ResponseBuilder
from abyssal.server.service import Service
from abyssal.server.validation import fault_of_fields
from abyssal.text.chat_template import ChatTemplate


def create_app(
    loaded: LoadedModel,
    *,
    template: ChatTemplate | None = None,
    options: ServerOptions | None = None,
    engine_options: EngineOptions | None = None,
) -> FastAPI:
    """Return the application that serves `loaded`; its lifespan runs the engine.

    Args:
        loaded: the model.
        template: of its chats; none serves completions only.
        options: what clients may ask for.
        engine_options: how much the engine takes on at a time.

    Raises:
        UsageError: options that do not fit the model.
    """
    options, engine_options = options or ServerOptions(), engine_options or EngineOptions()
    engine = Engine.of(loaded, engine_options)
    driver = AsyncEngine(engine, max_waiting=options.max_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with driver:
            yield

    app = FastAPI(title="Abyssal", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    service = Service(loaded, driver, engine_options, options, template)
    app.state.engine, app.state.driver, app.state.service = engine, driver, service
    app.add_middleware(RequestLimits, options=options, count=service.metrics.count_response)
    app.add_exception_handler(AbyssalError, _refused)
    app.add_exception_handler(RequestValidationError, _fields_refused)
    app.add_exception_handler(HTTPException, _not_found)
    _add_completions(app, service)
    _add_models(app, options.model_name, service.context_length)
    _add_health(app, service)
    add_chat_page(app, service)
    return app


def _add_completions(app: FastAPI, service: Service) -> None:
    """Add the endpoints that generate."""

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatCompletionRequest, request: Request) -> Response:
        """Generate the next message of a conversation."""
        return await _respond(request, body, *await service.chat(body))

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue the prompts."""
        return await _respond(request, body, *await service.complete(body))


def _add_models(app: FastAPI, name: str, context_length: int) -> None:
    """Add the endpoints that describe the model served."""
    description = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "abyssal",
        "max_model_len": context_length,
    }

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        """List the one model."""
        return _json({"object": "list", "data": [description]})

    @app.get("/v1/models/{model:path}", response_model=None)
    async def model(model: str) -> Response:
        """Describe the model."""
        if model != name:
            raise ApiError(404, f"model={model!r}: this server has {name!r} only", code="model_not_found")
        return _json(description)


def _add_health(app: FastAPI, service: Service) -> None:
    """Add the endpoints for those who keep the server running."""

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Say whether requests are accepted."""
        if service.driver.is_draining:
            raise ApiError(503, "the server is about to stop", code="shutting_down")
        if service.driver.failure is not None:
            raise ApiError(503, str(service.driver.failure), code="engine_failed")
        return _json({"status": "ok"})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")


async def _respond(
    request: Request, body: GenerationRequest, generation: Generation, builder: ResponseBuilder
) -> Response:
    """Return the response of a generation that has begun, streamed or complete."""
    record: dict[str, Any] = request.scope["state"][RECORD]
    record["prompt_tokens"] = builder.usage.prompt_tokens

    async def close() -> None:
        record["completion_tokens"] = builder.usage.completion_tokens
        await generation.aclose()

    if body.stream:
        wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(_events(generation, builder, record, wants_usage=wants_usage), close)

    async def collect() -> None:
        async for number, output in generation.outputs():
            builder.chunks(number, output)

    try:
        await while_connected(request.receive, collect())
    except DisconnectedError:
        return NoResponse()
    finally:
        await close()
    return _json(builder.response())


async def _events(
    generation: Generation, builder: ResponseBuilder, record: dict[str, Any], *, wants_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the chunks of a response as server-sent events; a fault in between is the last one."""
    try:
        async for number, output in generation.outputs():
            if chunks := builder.chunks(number, output):
                yield b"".join(_event({**chunk, "usage": None} if wants_usage else chunk) for chunk in chunks)
        if wants_usage:
            yield _event(builder.usage_chunk())
        yield b"data: [DONE]\n\n"
    except ApiError as fault:
        record["error"] = fault.code or fault.message
        yield _event(fault.body)


def _event(value: object) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def _json(value: object) -> Response:
    return Response(to_json(value), media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    return fault_of(error).response()


async def _fields_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return fault_of_fields(error.errors()).response()


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        hint = nearest(request.url.path, (route.path for route in request.app.routes if isinstance(route, Route)))
        return ApiError(404, f"{asked}: there is no such page{hint}", code="not_found").response()
    allowed = (error.headers or {}).get("Allow")
    sentence = f"{asked}: this address takes {allowed}" if allowed else str(error.detail)
    response = ApiError(error.status_code, sentence).response()
    response.headers.update(error.headers or {})
    return response
