"""The server process: listening, logging, and graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from abyssal.engine import AsyncEngine
from abyssal.errors import UsageError

#: Once the engine is drained, slow readers have this long to read the rest.
FLUSH_TIMEOUT_S = 5


class DrainingServer(uvicorn.Server):
    """Lets running requests end before it stops; new ones get status 503 meanwhile."""

    def __init__(self, config: uvicorn.Config, driver: AsyncEngine, timeout_s: float) -> None:
        """Serve until a signal; then give requests `timeout_s` to end."""
        super().__init__(config)
        self._driver, self._timeout_s = driver, timeout_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the engine while connections are still answered, then close them."""
        draining = asyncio.ensure_future(self._driver.drain(self._timeout_s))
        while not (draining.done() or self.force_exit):
            await asyncio.wait([draining], timeout=0.1)
        draining.cancel()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Stop when the engine has ended by a fault: whoever keeps the server running then starts it again."""
        return self._driver.has_ended or await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; the second signal, whichever, stops at once."""
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)


def run_server(app: FastAPI, listener: socket.socket, *, drain_timeout_s: float) -> None:
    """Serve `app` at a socket that listens, until SIGTERM or Ctrl-C.

    Raises:
        EngineFailedError: the engine has ended by a fault.
    """
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
    )
    server = DrainingServer(config, app.state.driver, drain_timeout_s)
    with _ending_by_sigterm():
        server.run(sockets=[listener])
    if app.state.driver.has_ended:
        raise app.state.driver.failure


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address but does not listen yet; port 0 takes a free one.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{host}:{port}: cannot listen there ({reason}); choose another --host or --port") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def set_up_logging(*, access: bool) -> None:
    """Send the access log to standard output, one JSON object a line, and what goes wrong to standard error."""
    lines = logging.StreamHandler(sys.stdout)
    lines.setFormatter(logging.Formatter("%(message)s"))
    access_log = logging.getLogger("abyssal.access")
    access_log.handlers, access_log.propagate = [lines], False
    access_log.setLevel(logging.INFO if access else logging.CRITICAL)
    faults = logging.StreamHandler(sys.stderr)
    faults.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("abyssal.server", "uvicorn.error"):
        logging.getLogger(name).handlers = [faults]
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def _ending_by_sigterm() -> Iterator[None]:
    """Let a SIGTERM that uvicorn raises again once it has stopped end this block, not the process by a signal."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
