"""`abyssal serve` as a process: clients that leave, SIGTERM, and what it says on the way."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from abyssal.cli.main import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LONG: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 700,
    "extra_body": {"ignore_eos": True},
}
ENDLESS = {**LONG, "max_tokens": 190_000}  # whoever asks for it leaves before


@dataclass
class Process:
    """A server and where it writes."""

    popen: subprocess.Popen[bytes]
    url: str
    folder: Path

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf'^{name}{{model_name="tiny"}} (\S+)$', text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def until(self, name: str, value: float) -> None:
        """Wait for a metric; a value that never comes is a failure."""
        for _ in range(600):
            if self.metric(name) == value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} is {self.metric(name)}, not {value}")

    def access(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "stdout").read_text().splitlines()]


@contextlib.contextmanager
def running(directory: Path, folder: Path, *options: str) -> Iterator[Process]:
    """Serve a model in a process of its own."""
    arguments = [sys.executable, "-m", "abyssal", "serve", str(directory), "--port", "0", "--name", "tiny", *options]
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as errors:
        popen = subprocess.Popen(arguments, stdout=out, stderr=errors)
    try:
        url = None
        while url is None:
            url = re.search(r"http://127\.0\.0\.1:\d+", (folder / "stderr").read_text())
            assert popen.poll() is None, (folder / "stderr").read_text()
            time.sleep(0.05)
        yield Process(popen, url[0], folder)
    finally:
        popen.kill()
        popen.wait()


@pytest.fixture
def patient_directory(directory: Path, tmp_path: Path) -> Path:
    """The same model, with room for a text that is not at its end before a test is."""
    copy = shutil.copytree(directory, tmp_path / "patient")
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 200_000}))
    return copy


def test_clients_that_leave_free_their_pages_and_sigterm_lets_the_rest_end(
    patient_directory: Path, tmp_path: Path
) -> None:
    with running(patient_directory, tmp_path, "--threads", "1", "--drain-seconds", "200") as process:
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="any", max_retries=0)
        with client.chat.completions.create(**ENDLESS, stream=True) as stream:
            next(iter(stream))
            assert process.metric("vllm:num_requests_running") == 1
        process.until("vllm:num_requests_running", 0)  # it left in the middle of the answer
        with pytest.raises(openai.APITimeoutError):  # and this one before it
            client.with_options(timeout=0.05).chat.completions.create(**ENDLESS)
        process.until("vllm:num_requests_waiting", 0)
        process.until("vllm:num_requests_running", 0)
        process.until("vllm:kv_cache_usage_perc", 0)

        with client.chat.completions.create(**LONG, stream=True) as stream:
            chunks = iter(stream)
            next(chunks)
            with client.chat.completions.create(**ENDLESS, stream=True) as other:  # keeps the server from its end
                next(iter(other))
                process.popen.send_signal(signal.SIGTERM)
                while httpx.get(f"{process.url}/health").status_code != 503:  # no further requests, but an answer
                    time.sleep(0.01)
            assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        client.close()
        assert process.popen.wait(30) == 0
        lines = process.access()
        generated = [line["completion_tokens"] for line in lines if "completion_tokens" in line]
        assert 700 in generated
        assert max(generated) < ENDLESS["max_tokens"]
        assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_openais_client_gets_all_that_it_asks_for(patient_directory: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "openai_client.py"), str(patient_directory), "--untrained"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\n") == 9, "so many checks"


def test_a_small_storm_is_weathered() -> None:
    command = [sys.executable, str(ROOT / "bench" / "storm.py"), "--requests", "150", "--connections", "40"]
    command.append("--ignore-memory")
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    ends = json.loads(result.stdout)["ends"]
    assert ends["200"] > 10
    assert ends["400"] > 10
    assert ends["vanished"] > 30


def test_an_address_that_is_taken_is_one_sentence(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(directory), "--port", str(port)]) == 2
    assert f"error: 127.0.0.1:{port}: cannot listen there (Address already in use)" in capsys.readouterr().err
