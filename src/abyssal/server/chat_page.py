"""The page at `/`: a conversation with the model, from files of this package alone."""

from __future__ import annotations

import asyncio
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Field
from starlette.responses import Response

from abyssal.server.faults import ApiError
from abyssal.server.json_text import to_json
from abyssal.server.markdown import render_markdown
from abyssal.server.protocol import StrictFields
from abyssal.server.service import Service

INDEX = "index.html"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = ("chat.css", "chat.js", "conversation.js", "inspector.js", "icon.svg")
MAX_MARKDOWN_LENGTH = 200_000  # characters
#: Nothing from elsewhere, nothing inline, nobody's frame; HTML enters the page through one named policy.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types abyssal-markdown"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


class MarkdownRequest(StrictFields):
    """The body of /v1/abyssal/markdown."""

    text: Annotated[str, Field(max_length=MAX_MARKDOWN_LENGTH)]


def add_chat_page(app: FastAPI, service: Service) -> None:
    """Add the page, and the two endpoints that it needs beside OpenAI's; they want the key, the page does not."""
    about = _about(service)

    @app.get("/", response_model=None)
    async def index() -> Response:
        """Return the page."""
        return _file(INDEX)

    @app.get("/page/{name}", response_model=None)
    async def file(name: str) -> Response:
        """Return a part of the page."""
        if name not in FILES:
            raise ApiError(404, f"/page/{name}: there is no such file", code="not_found")
        return _file(name)

    @app.get("/v1/abyssal/about", response_model=None)
    async def describe() -> Response:
        """Describe the model to the page."""
        return Response(to_json(about), media_type="application/json")

    @app.post("/v1/abyssal/markdown", response_model=None)
    async def markdown(body: MarkdownRequest) -> Response:
        """Render Markdown to HTML without anything that runs or loads."""
        html = await asyncio.to_thread(render_markdown, body.text)
        return Response(to_json({"html": html}), media_type="application/json")


def _about(service: Service) -> dict[str, Any]:
    config, defaults = service.loaded.config, service.loaded.defaults.parameters
    return {
        "model": service.options.model_name,
        "chats": service.template is not None,
        "context_length": service.context_length,
        "defaults": {
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
        },
        "num_experts": config.n_routed_experts,
        "first_expert_layer": config.first_k_dense_replace,
        "num_mtp_modules": config.num_nextn_predict_layers,
    }


def _file(name: str) -> Response:
    data = (resources.files("abyssal.server") / "page" / name).read_bytes()
    return Response(data, media_type=TYPES[name[name.rindex(".") :]], headers=HEADERS)
