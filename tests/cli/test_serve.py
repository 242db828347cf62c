"""`abyssal serve` up to the moment at which it listens."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from abyssal.cli.main import main

pytest.importorskip("fastapi", reason="the extra serve is not installed")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the applications that would be served."""
    applications: list[Any] = []

    def run_server(app: Any, listener: Any, *, drain_timeout_s: float) -> None:
        with socket.create_connection(("127.0.0.1", listener.getsockname()[1])):  # as soon as the address was told
            listener.close()
        applications.append((app, drain_timeout_s))

    monkeypatch.setattr("abyssal.server.process.run_server", run_server)
    monkeypatch.setattr("abyssal.server.process.set_up_logging", lambda *, access: None)
    monkeypatch.delenv("ABYSSAL_API_KEY", raising=False)
    return applications


def test_options_reach_the_server_and_the_engine(served: list[Any], model_folder: Path) -> None:
    options = [
        "--name",
        "tiny",
        "--max-running",
        "3",
        "--max-queue",
        "7",
        "--max-prompt-tokens",
        "20",
        "--api-key",
        "a",
    ]
    options += [
        "--api-key",
        "b",
        "--max-body-bytes",
        "999",
        "--drain-seconds",
        "2.5",
        "--drafts",
        "0",
        "--dtype",
        "bfloat16",
    ]
    assert main(["serve", str(model_folder), "--port", "0", *options]) == 0
    ((app, drain_timeout_s),) = served
    chosen = app.state.service.options
    assert (chosen.model_name, chosen.api_keys) == ("tiny", ("a", "b"))
    assert (chosen.max_waiting, chosen.max_texts, chosen.max_prompt_tokens, chosen.max_body_bytes) == (7, 10, 20, 999)
    assert (app.state.engine.options.max_running, app.state.engine.options.num_drafts) == (3, 0)
    assert str(app.state.service.loaded.model.compute_dtype) == "torch.bfloat16"
    assert drain_timeout_s == 2.5


def test_more_texts_may_run_than_a_step_has_tokens_by_default(served: list[Any], model_folder: Path) -> None:
    assert main(["serve", str(model_folder), "--port", "0", "--max-running", "300"]) == 0
    ((app, _),) = served
    assert (app.state.engine.options.max_running, app.state.engine.options.max_step_tokens) == (300, 300)


def test_an_empty_name_is_refused(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(model_folder), "--port", "0", "--name", ""]) == 2
    assert "model_name='': must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "warns"),
    [([], False), (["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--api-key", "a"], False)],
)
def test_an_open_server_without_a_key_is_warned_of(
    served: list[Any], model_folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], warns: bool
) -> None:
    assert main(["serve", str(model_folder), "--port", "0", *options]) == 0
    errors = capsys.readouterr().err
    assert ("warning: 0.0.0.0 can be reached from other machines, and nobody needs a key" in errors) == warns
    host = "0.0.0.0" if "--host" in options else "127.0.0.1"
    assert f"serving {model_folder} at http://{host}:" in errors


def test_the_key_can_come_from_the_environment(
    served: list[Any], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ABYSSAL_API_KEY", "secret")
    assert main(["serve", str(model_folder), "--port", "0"]) == 0
    assert served[0][0].state.service.options.api_keys == ("secret",)


def test_a_model_without_a_template_is_served_with_a_note(
    served: list[Any], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "tokenizer_config.json").unlink()
    assert main(["serve", str(model_folder), "--port", "0"]) == 0
    assert "has no chat template" in capsys.readouterr().err
    assert served[0][0].state.service.template is None


def test_without_the_extra_one_sentence_says_so(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("abyssal.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(model_folder)]) == 2
    assert "serve: needs the package fastapi; pip install 'abyssal[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(("cores", "options", "threads"), [(4, [], 3), (1, [], 1), (4, ["--threads", "2"], 2)])
def test_a_core_is_left_to_the_clients_unless_threads_are_given(
    served: list[Any],
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    options: list[str],
    threads: int,
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    monkeypatch.setattr("abyssal.machine.describe.available_cores", lambda: cores)
    assert main(["serve", str(model_folder), "--port", "0", *options]) == 0
    assert chosen == [threads]
