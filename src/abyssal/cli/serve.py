"""`abyssal serve`: a model behind OpenAI's API."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.cli.generation_options import Device, DType, Model
from abyssal.errors import UsageError

if TYPE_CHECKING:
    from socket import socket

    from abyssal.text.chat_template import ChatTemplate

Host = Annotated[str, typer.Option(help="Address to listen at; the default is reached from this machine only.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: a free one.")]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key", envvar="ABYSSAL_API_KEY", help="Key that clients must send; may be repeated.", show_default="none"
    ),
]
Name = Annotated[
    str | None, typer.Option(help="Name that clients ask for the model by.", show_default="MODEL_DIR as given")
]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads of torch on the CPU.", show_default="one fewer than cores, which answers clients"),
]
MaxRunning = Annotated[int, typer.Option(min=1, help="Texts that grow at a time.")]
MaxQueue = Annotated[int, typer.Option(min=0, help="Texts that may wait behind them; more are answered with 503.")]
MaxPromptTokens = Annotated[int | None, typer.Option(min=1, help="Longest prompt.", show_default="the model's context")]
MaxBodyBytes = Annotated[int, typer.Option(min=1, help="Largest body of a request.")]
CacheBytes = Annotated[int, typer.Option(min=1, help="Memory of the latent cache.")]
Drafts = Annotated[
    int | None, typer.Option(min=0, help="Tokens to draft a pass; 0: none.", show_default="the number of MTP modules")
]
DrainSeconds = Annotated[float, typer.Option(min=0, help="Time that requests under way get after SIGTERM.")]
AccessLog = Annotated[bool, typer.Option("--access-log/--no-access-log", help="A JSON line for each request.")]


def serve(
    model: Model,
    *,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    name: Name = None,
    dtype: DType = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    max_running: MaxRunning = 16,
    max_queue: MaxQueue = 256,
    max_prompt_tokens: MaxPromptTokens = None,
    max_body_bytes: MaxBodyBytes = 4 * 2**20,
    cache_bytes: CacheBytes = 2**30,
    drafts: Drafts = None,
    drain_seconds: DrainSeconds = 30.0,
    access_log: AccessLog = True,
) -> None:
    """Serve a model at /v1/chat/completions and /v1/completions, as OpenAI's API does, until SIGTERM or Ctrl-C.

    Standard output gets the access log, standard error the rest. Examples:

        abyssal serve runs/demo/model
        abyssal serve runs/demo/model --host 0.0.0.0 --port 8080 --api-key SECRET --max-queue 64
    """
    from abyssal.cli.model_argument import refuse_run_folder
    from abyssal.engine import EngineOptions, load_model
    from abyssal.machine.describe import available_cores

    _check_packages()
    from abyssal.server import ServerOptions, create_app
    from abyssal.server.process import is_loopback, listen, run_server, set_up_logging

    refuse_run_folder(model)
    options = ServerOptions(
        model_name=str(model) if name is None else name,
        api_keys=tuple(api_key or ()),
        max_waiting=max_queue,
        max_texts=max_running + max_queue,
        max_prompt_tokens=max_prompt_tokens,
        max_body_bytes=max_body_bytes,
        drain_timeout_s=drain_seconds,
    )
    engine_options = EngineOptions(
        max_running=max_running,
        max_step_tokens=max(EngineOptions.max_step_tokens, max_running),  # each text that runs has a token a step
        cache_bytes=cache_bytes,
        num_drafts=drafts,
    )
    if threads is None:
        # a product waits for the last of its threads, so one whose core answers clients would hold up the others
        threads = max(1, available_cores() - 1)
    with closing(listen(host, port)) as listener:  # before minutes of loading
        if not (is_loopback(listener) or api_key):
            _warn(f"{host} can be reached from other machines, and nobody needs a key; see --api-key")
        loaded = load_model(model, dtype=dtype, device=device, threads=threads)
        app = create_app(loaded, template=_template(model), options=options, engine_options=engine_options)
        set_up_logging(access=access_log)
        listener.listen()  # connections from now on wait, instead of being refused until the loop has begun
        typer.echo(f"serving {options.model_name} at {_url(listener)}; Ctrl-C or SIGTERM ends it", err=True)
        run_server(app, listener, drain_timeout_s=drain_seconds)


def _check_packages() -> None:
    """Raise UsageError where an optional package of the server is missing."""
    try:
        import abyssal.server
        import abyssal.server.process  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"serve: needs the package {error.name}; pip install 'abyssal[serve]'") from None


def _warn(sentence: str) -> None:
    typer.echo(f"warning: {sentence}", err=True)


def _url(listener: socket) -> str:
    """Return the URL of the API at a socket."""
    address, port = listener.getsockname()[:2]
    return f"http://[{address}]:{port}/v1" if ":" in address else f"http://{address}:{port}/v1"


def _template(model: Path) -> ChatTemplate | None:
    """Return the model's chat template, or say that there will be no chat."""
    from abyssal.errors import DataError
    from abyssal.text.chat_template import ChatTemplate

    try:
        return ChatTemplate.load(model)
    except DataError as error:
        typer.echo(f"note: {error}", err=True)
        return None
