from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from abyssal.cli.main import main
from abyssal.engine import Conversation, Engine, Output, Request, SamplingParameters, load_model
from abyssal.text.chat_template import ChatTemplate

Capture = pytest.CaptureFixture[str]
Pipe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pipe(model_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Pipe:
    """Run a chat over lines that are piped in: exit code, standard output and standard error."""

    def run(lines: str | bytes, *options: str) -> tuple[int, str, str]:
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        code = main(["chat", str(model_folder), *options])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def answers(model_folder: Path) -> Callable[..., list[str]]:
    """Return what the engine answers."""

    def ask(questions: list[str], system: str | None = None, **sampling: object) -> list[str]:
        loaded = load_model(model_folder)
        parameters = SamplingParameters(**sampling)  # type: ignore[arg-type]
        conversation = Conversation(loaded, ChatTemplate.load(model_folder), parameters, system=system)
        return ["".join(chunk.text for chunk in conversation.ask(question)[1]) for question in questions]

    return ask


GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


def test_piped_lines_are_messages_and_only_answers_are_on_standard_output(
    pipe: Pipe, answers: Callable[..., list[str]]
) -> None:
    code, out, err = pipe("def f\n\nreturn é\n", *GREEDY, "--system", "x")
    wanted = answers(["def f", "return é"], "x", temperature=0, max_new_tokens=6)
    assert (code, out) == (0, "".join(f"{text}\n" for text in wanted))
    assert err.count("6 new tokens at") == 2
    assert err.count("(the answer was cut after 6 tokens; --max-new-tokens allows more)") == 2
    assert err.count("of them known)") == 1


def test_sampling_options_reach_the_engine(pipe: Pipe, answers: Callable[..., list[str]]) -> None:
    options = {"max_new_tokens": 9, "temperature": 1.5, "top_p": 0.7, "top_k": 30, "seed": 11}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    _, out, _ = pipe("a\nb\n", *words, "--dtype", "float32", "--threads", "1")
    assert out == "".join(f"{text}\n" for text in answers(["a", "b"], **options))


def test_reset_and_system_begin_anew(pipe: Pipe, answers: Callable[..., list[str]]) -> None:
    code, out, err = pipe("a\n/reset\na\n/system s\na\n/system\na\n", *GREEDY)
    plain = answers(["a"], temperature=0, max_new_tokens=6)[0]
    told = answers(["a"], "s", temperature=0, max_new_tokens=6)[0]
    assert (code, out) == (0, "".join(f"{text}\n" for text in (plain, plain, told, plain)))
    assert "(a new conversation; system prompt: s)" in err
    assert "(a new conversation; system prompt: none)" in err


def test_exit_ends_it_and_help_lists_every_command(pipe: Pipe) -> None:
    code, out, err = pipe("/help\n/exit\na\n", *GREEDY)
    assert (code, out) == (0, "")
    for name in ("/help", "/reset", "/system", "/exit"):
        assert f"{name} " in err


def test_an_unknown_command_is_a_sentence_and_two_slashes_are_a_message(
    pipe: Pipe, answers: Callable[..., list[str]]
) -> None:
    code, out, err = pipe("/rest\n//etc\n", *GREEDY)
    assert "/rest: no such command; nearest: /reset; there are /help, /reset, /system, /exit" in err
    assert (code, out) == (0, answers(["/etc"], temperature=0, max_new_tokens=6)[0] + "\n")


def test_speculation_leaves_the_answers_alone_and_is_counted(pipe: Pipe) -> None:
    plain = pipe("def f\nx\n", *GREEDY)
    drafted = pipe("def f\nx\n", *GREEDY, "--drafts", "2")
    assert plain[1] == drafted[1]
    assert "speculation" not in plain[2]
    assert drafted[2].count("drafts accepted") == 2


def test_a_full_context_is_a_sentence(pipe: Pipe) -> None:
    code, _, err = pipe("x\n" + "大" * 30 + "\ny\n", "--temperature", "0", "--max-new-tokens", "3")
    assert code == 2
    assert "tokens with this message, but the model can attend to 64" in err
    code, _, err = pipe("x\n", "--temperature", "0")  # answers with 1024 tokens by default
    assert code == 0
    assert "the context of 64 tokens is full; /reset starts a new conversation" in err


def test_the_length_of_an_answer_is_the_models_own_where_it_has_one(pipe: Pipe, model_folder: Path) -> None:
    path = model_folder / "generation_config.json"
    path.write_text(json.dumps({"max_new_tokens": 5, "temperature": 0, "eos_token_id": []}))
    assert "(the answer was cut after 5 tokens" in pipe("x\n")[2]


@pytest.mark.parametrize(
    ("lines", "options", "code", "sentence"),
    [
        (b"a\xff\n", [], 1, "standard input: byte 1 is not UTF-8"),
        (b"", ["--top-p", "3"], 2, "top_p=3.0: must be above 0"),
        (b"", ["--drafts", "0"], 2, "drafts=0: must be at least 1"),
        (b"", ["--threads", "0"], 2, "threads=0: must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_sentence(pipe: Pipe, lines: bytes, options: list[str], code: int, sentence: str) -> None:
    found, out, err = pipe(lines, *options)
    assert (found, out) == (code, "")
    assert sentence in err


def test_a_model_without_a_chat_template_is_refused(pipe: Pipe, model_folder: Path) -> None:
    path = model_folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    del fields["chat_template"]
    path.write_text(json.dumps(fields))
    code, _, err = pipe("x\n")
    assert code == 1
    assert "has no chat template" in err


def test_ctrl_c_stops_the_answer_and_not_the_chat(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, stop_after = Engine.stream, [4, 0, 99]

    def interrupted(engine: Engine, request: Request) -> Iterator[Output]:
        limit = stop_after.pop(0)
        for taken, output in enumerate(stream(engine, request)):
            if taken == limit:
                raise KeyboardInterrupt
            yield output

    whole = pipe("x\n", *GREEDY)[1]
    monkeypatch.setattr(Engine, "stream", interrupted)
    code, out, err = pipe("x\ny\n/reset\nx\n", *GREEDY)
    assert code == 0
    assert "(stopped; the answer so far stays in the conversation)" in err
    assert "(stopped before the answer; the message was taken back)" in err
    assert len(whole) < len(out) < 2 * len(whole)  # four of six tokens, then all of them
    assert out.endswith(whole)


class Terminal:
    """A chat in a pseudo-terminal, as a person has it."""

    def __init__(self, *arguments: str) -> None:
        self._end, other = pty.openpty()
        command = [sys.executable, "-m", "abyssal", "chat", *arguments]
        ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in the background; a child inherits it
        self.process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True)
        signal.signal(signal.SIGINT, ignored)
        os.close(other)
        self._seen = ""

    def sees(self, text: str, seconds: float = 60) -> bool:
        """Read until `text`, or anything if it is empty, has been printed behind what was waited for before."""
        end = time.monotonic() + seconds
        while not self._seen or text not in self._seen:
            if not select.select([self._end], [], [], max(0, end - time.monotonic()))[0]:
                return False
            self._seen += os.read(self._end, 4096).decode(errors="replace")
        self._seen = self._seen.partition(text)[2] if text else ""
        return True

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def ctrl_c_until_it_says(self, text: str) -> None:
        """A signal just before readline waits is noticed at the next one only."""
        for _ in range(40):
            os.kill(self.process.pid, signal.SIGINT)
            if self.sees(text, 0.5):
                return
        raise AssertionError(self._seen)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal(model_directory_without_end: Path) -> Iterator[Terminal]:
    options = ("--max-new-tokens", "100000", "--threads", "1", "--seed", "3")
    chat = Terminal(str(model_directory_without_end), *options)
    yield chat
    chat.close()


@pytest.mark.slow
def test_a_person_types_stops_and_leaves(terminal: Terminal) -> None:
    assert terminal.sees("Ctrl-D leaves.")
    assert terminal.sees("> ")
    terminal.type("def f\n")
    assert terminal.sees("def f\r\n")
    assert terminal.sees("")  # the answer begins
    terminal.ctrl_c_until_it_says("(stopped")
    assert terminal.sees("> ")
    terminal.ctrl_c_until_it_says("(Ctrl-D or /exit leaves)")
    assert terminal.sees("> ")
    terminal.type("/rset\n")
    assert terminal.sees("nearest: /reset")
    assert terminal.sees("> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


@pytest.fixture
def model_directory_without_end(model_folder: Path) -> Path:
    """A model that answers at great length."""
    path = model_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 200_000}))
    path = model_folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": []}))
    return model_folder
