"""`abyssal bench serve` against a server whose answers are known."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from abyssal.cli.main import main

Capture = pytest.CaptureFixture[str]
OVERHEAD, TOKENS_PER_WORD = 3, 2  # as the server of these tests counts


def prompt_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"] if "messages" in body else body["prompt"])


def test_a_closed_loop_sends_what_was_asked_for_and_counts_what_came_back(
    server: Any, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out.json"
    options = "--requests 17 --concurrency 3 --prompt-tokens 41 --output-tokens 5 --shared-tokens 20 --ignore-eos"
    arguments = ["bench", "serve", server.url, *options.split(), "--json", str(out), "--api-key", "secret"]
    assert main(arguments) == 0
    bodies = server.streamed()
    assert len(bodies) == 17
    assert set(server.keys) == {"Bearer secret"}
    assert server.most_open <= 3
    assert all(
        (body["model"], body["max_tokens"], body["temperature"], body["ignore_eos"]) == ("fake-1", 5, 0, True)
        for body in bodies
    )
    prompts = [prompt_of(body).split() for body in bodies]
    assert {TOKENS_PER_WORD * len(words) + OVERHEAD for words in prompts} == {41}
    assert len({tuple(words[:10]) for words in prompts}) == 1
    assert len({tuple(words[:12]) for words in prompts}) > 10
    found = json.loads(out.read_text())
    assert (found["requests"], found["failed"], found["errors"]) == (17, 0, {})
    assert (found["output_tokens"], found["prompt_tokens"], found["acceptance"]) == (17 * 5, 17 * 41, 0.75)
    assert {name: one["count"] for name, one in found["times_s"].items()} == {
        "ttft": 17,
        "tpot": 17,
        "itl": 17 * 4,
        "latency": 17,
    }
    for one in found["measured"]:
        times = [one["due_s"], one["sent_s"], *one["chunks_s"], one["ended_s"]]
        assert times == sorted(times)
    printed = capsys.readouterr().out
    assert "17 of 17" in printed
    assert "75.0%" in printed


def test_requests_at_a_rate_are_due_at_random_times_that_the_seed_fixes(server: Any, tmp_path: Path) -> None:
    def due(*options: str) -> list[float]:
        out = tmp_path / "out.json"
        arguments = ["--requests", "60", "--rate", "400", "--output-tokens", "1", "--json", str(out), *options]
        assert main(["bench", "serve", server.url, "--completions", *arguments]) == 0
        return [one["due_s"] for one in json.loads(out.read_text())["measured"]]

    first, again, other = due(), due(), due("--seed", "8")
    assert first == again != other
    gaps = [after - before for before, after in pairwise(first)]
    assert 0.4 / 400 < sum(gaps) / len(gaps) < 2 / 400
    assert max(gaps) > 3 * sum(gaps) / len(gaps) > 20 * min(gaps)  # as exponential gaps are, and even ones are not
    assert "prompt" in server.streamed()[0]


def test_lengths_vary_by_the_spread(server: Any) -> None:
    options = "--requests 40 --concurrency 8 --prompt-tokens 100 --output-tokens 20 --spread 0.5"
    assert main(["bench", "serve", server.url, *options.split()]) == 0
    asked = [body["max_tokens"] for body in server.streamed()]
    lengths = [TOKENS_PER_WORD * len(prompt_of(body).split()) + OVERHEAD for body in server.streamed()]
    for values, middle in ((asked, 20), (lengths, 100)):
        assert 0.48 * middle <= min(values) < 0.75 * middle
        assert 1.52 * middle >= max(values) > 1.25 * middle


def test_failures_are_counted_by_what_they_say_and_do_not_stop_the_rest(
    server: Any, tmp_path: Path, capsys: Capture
) -> None:
    server.faults = {1: "full", 4: "full", 2: "breaks", 6: "error"}
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    options = ["--requests", "9", "--concurrency", "1", "--output-tokens", "3", "--json", str(out), "--plot", str(page)]
    assert main(["bench", "serve", server.url, *options]) == 1
    found = json.loads(out.read_text())
    errors = {"HTTP 503: the queue is full": 2, "the stream broke off": 1, "in the stream: out of pages": 1}
    assert found["errors"] == errors
    assert (found["failed"], found["output_tokens"], found["times_s"]["ttft"]["count"]) == (4, 15, 5)
    assert "4 of 9 requests failed; most often: HTTP 503: the queue is full" in capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    assert "2 × HTTP 503: the queue is full" in text
    assert text.count("<svg") == 5
    for svg in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.partition("</svg>")[0] + "</svg>")
    assert "<script" not in text
    assert "http://www" not in text


def test_a_server_without_usage_is_measured_by_chunks(server: Any, tmp_path: Path, capsys: Capture) -> None:
    server.counts = False
    out = tmp_path / "out.json"
    options = ["--requests", "4", "--concurrency", "2", "--output-tokens", "6", "--json", str(out), "--model", "other"]
    assert main(["bench", "serve", f"{server.url}/v1/", *options]) == 0
    found = json.loads(out.read_text())
    assert (found["output_tokens"], found["prompt_tokens"], found["acceptance"]) == (24, None, None)
    assert {body["model"] for body in server.bodies} == {"other"}
    assert "the server reports no usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--rate", "1", "--concurrency", "1"], 2, "either a rate or a concurrency"),
        (["--rate", "0"], 2, "rate=0.0: must be a number above 0"),
        (["--requests", "0"], 2, "num_requests=0: must be at least 1"),
        (["--shared-tokens", "200"], 2, "shared_tokens=200: must be from 0 to 128"),
        (["--spread", "1"], 2, "spread=1.0: must be at least 0 and below 1"),
        (["--plot", "x.png"], 2, "--plot x.png: must end in .html"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    server: Any, options: list[str], code: int, sentence: str, capsys: Capture
) -> None:
    assert main(["bench", "serve", server.url, *options]) == code
    assert sentence in capsys.readouterr().err
    assert server.bodies == []


@pytest.mark.parametrize(
    ("url", "code", "sentence"),
    [
        ("127.0.0.1:1", 2, "must be a URL such as"),
        ("http://127.0.0.1:1", 1, "nobody answers"),
        ("{}/elsewhere", 1, "is no OpenAI-compatible server"),
    ],
)
def test_a_wrong_address_is_refused_in_a_sentence(
    server: Any, url: str, code: int, sentence: str, capsys: Capture
) -> None:
    assert main(["bench", "serve", url.format(server.url)]) == code
    assert sentence in capsys.readouterr().err
