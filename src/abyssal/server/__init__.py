"""The engine behind HTTP: OpenAI's API over one model directory."""

from abyssal.server.app import create_app
from abyssal.server.options import ServerOptions

__all__ = ["ServerOptions", "create_app"]
