"""`abyssal chat`: a conversation with a model directory, in its own chat template."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.cli.generation import Printing, given_sampling, num_drafts, sampling_of, utf8
from abyssal.cli.generation_options import (
    Device,
    Drafts,
    DType,
    Model,
    Speculate,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
)
from abyssal.errors import AbyssalError, nearest

if TYPE_CHECKING:
    from abyssal.engine import Conversation, LoadedModel

MAX_NEW_TOKENS = 1024
COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the conversation; the system prompt stays",
    "/system [TEXT]": "start anew with this system prompt; without a text, with none",
    "/exit": "leave; Ctrl-D does the same",
}
NAMES = [usage.partition(" ")[0] for usage in COMMANDS]

System = Annotated[str | None, typer.Option(help="What the model is told before the conversation.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of an answer, at most.", show_default=f"the model's, else {MAX_NEW_TOKENS}"),
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answers.", show_default="a new one")]


def chat(
    model: Model,
    *,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    dtype: DType = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    speculate: Speculate = False,
    drafts: Drafts = None,
) -> None:
    """Talk with a model: each line is a message; answers go to standard output, the rest to standard error.

    Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands. What is piped in is taken line by line. Examples:

        abyssal chat runs/demo/model
        abyssal chat runs/demo/model --system 'Answer in Python.' --speculate
        abyssal chat runs/demo/model --temperature 0 < questions.txt
    """
    from abyssal.cli.model_argument import refuse_run_folder
    from abyssal.engine import Conversation, load_model
    from abyssal.text.chat_template import ChatTemplate

    given = given_sampling(
        stop, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    refuse_run_folder(model)
    template = ChatTemplate.load(model)
    loaded = load_model(model, dtype=dtype, device=device, threads=threads)
    if "max_new_tokens" not in loaded.defaults.named:
        given.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    drafts = num_drafts(loaded, speculate, drafts)
    parameters = sampling_of(loaded, given)
    conversation = Conversation(loaded, template, parameters, system=system, num_drafts=drafts)
    _Chat(conversation, loaded, drafts=drafts > 0).run()


class _Chat:
    """The lines of a person, or of a pipe, and what becomes of each."""

    def __init__(self, conversation: Conversation, loaded: LoadedModel, *, drafts: bool) -> None:
        self._conversation, self._loaded, self._drafts = conversation, loaded, drafts
        self._person = sys.stdin.isatty()

    def run(self) -> None:
        """Take lines until there are no more, or one says /exit."""
        if self._person:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - input() then edits lines and remembers them
            _say("Write a message, or /help. Ctrl-C stops an answer, Ctrl-D leaves.")
        while True:
            try:
                line = self._next_line()
                if line is None or not self._take(line):
                    return
            except KeyboardInterrupt:  # not in an answer
                if not self._person:
                    raise
                _say("\n(Ctrl-D or /exit leaves)")

    def _next_line(self) -> str | None:
        """Return the next line without its end, none where there is no more."""
        if self._person:
            try:
                return input("> ")
            except EOFError:
                _say("")
                return None
        data = sys.stdin.buffer.readline()
        return utf8(data).rstrip("\r\n") if data else None

    def _take(self, line: str) -> bool:
        """Do what a line asks for, and return whether to go on."""
        if line.startswith("/") and not line.startswith("//"):
            return self._command(line)
        if line.strip():
            self._message(line.removeprefix("/"))
        return True

    def _command(self, line: str) -> bool:
        """Do what a line with a slash says, and return whether to go on."""
        name, _, text = line.partition(" ")
        if name == "/exit":
            return False
        if name == "/help":
            _say("\n".join(f"{usage:<16}{meaning}" for usage, meaning in COMMANDS.items()))
            _say("A message that begins with a slash is written with two of them.")
        elif name == "/reset":
            self._conversation.reset()
            _say("(a new conversation)")
        elif name == "/system":
            self._conversation.system = text.strip() or None
            self._conversation.reset()
            _say(f"(a new conversation; system prompt: {self._conversation.system or 'none'})")
        else:
            _say(f"{name}: no such command{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
        return True

    def _message(self, text: str) -> None:
        """Send a message and print the answer; a fault ends a pipe, and is only said to a person.

        Raises:
            AbyssalError: see `Conversation.ask`.
        """
        turns = self._conversation.turns
        try:
            prompt_tokens, outputs = self._conversation.ask(text)
            printing = Printing(prompt_tokens)
            printing.show(outputs)
        except KeyboardInterrupt:
            if self._conversation.turns == turns:
                _say("\n(stopped before the answer; the message was taken back)")
                return
        except AbyssalError as error:
            if not self._person:
                raise
            _say(f"error: {error}")
            return
        typer.echo()
        self._close(printing)

    def _close(self, printing: Printing) -> None:
        """Say how the answer ended, and what it took."""
        room = self._loaded.config.max_position_embeddings
        if printing.reason == "length":
            if printing.prompt_tokens + printing.new_tokens >= room:
                _say(f"(the answer was cut: the context of {room} tokens is full; /reset starts a new conversation)")
            else:
                _say(f"(the answer was cut after {printing.new_tokens} tokens; --max-new-tokens allows more)")
        elif printing.reason is None:
            _say("(stopped; the answer so far stays in the conversation)")
        printing.reused_tokens = self._conversation.reused_tokens
        drafts = self._conversation.engine.draft_statistics if self._drafts else None
        _say(f"({printing.summary(drafts)})")


def _say(text: str) -> None:
    typer.echo(text, err=True)
