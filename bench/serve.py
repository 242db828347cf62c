"""Through HTTP: tokens a second of `abyssal serve`, streaming, against those of the engine alone.

    python bench/serve.py [MODEL] [--users 1 8] [--record]

MODEL is a model directory, such as runs/demo/model; without one a model of the demo's shape with random weights is
written and served. The server is a process of its own, this one is its clients; the engine alone runs here while the
server has nothing to do. Both continue the same prompts of 32 tokens by the same number of tokens at temperature 0, one
user and eight at a time, by turns, after a round that does not count. A rate is that of all tokens from the first
request to the last token; medians over the rounds. The server has as many threads as it takes by itself, one fewer than
there are cores, and so has the engine; the engine with all cores, which nobody could ask then, is shown too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from abyssal.checkpoint.hf import write_model_directory
from abyssal.config import load_recipe
from abyssal.engine import Engine, EngineOptions, Request, SamplingParameters, load_model
from abyssal.machine.describe import available_cores
from abyssal.model import Transformer, initialise
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config
from served import NAME, serving

PROMPT_TOKENS = 32
Prompts = list[list[int]]


def write_model(folder: Path) -> None:
    """Write a model of the demo's shape with random weights, and a tokenizer whose every token is some text."""
    config = load_recipe("demo").model
    sources = sorted(Path(asyncio.__file__).parents[1].glob("[a-m]*.py"))
    tokenizer = Tokenizer.train([path.read_text(encoding="utf-8") for path in sources], config.vocab_size)

    def tokenizer_files(staging: Path) -> None:
        tokenizer.save(staging / "tokenizer.json")
        write_tokenizer_config(staging, tokenizer, config.max_position_embeddings)

    weights = initialise(Transformer(config), 0).state_dict()
    write_model_directory(
        folder,
        config,
        weights,
        dtype=torch.float32,
        tokenizer_files=tokenizer_files,
        card="Random.\n",
        generation=None,
    )


def prompts_of(users: int, seed: int, vocab_size: int) -> Prompts:
    source = random.Random(seed)
    return [[source.randrange(100, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(users)]


def engine_rate(engine: Engine, prompts: Prompts, tokens: int) -> float:
    """Return the tokens a second of all requests together, by the engine alone."""
    begin = time.perf_counter()
    for ids in prompts:
        engine.add(Request(ids, SamplingParameters(tokens, temperature=0), end_ids=frozenset()))
    count = 0
    while engine.has_work:
        count += len(engine.step())
    assert count == tokens * len(prompts)
    return count / (time.perf_counter() - begin)


def with_all_cores(engine: Engine, prompts: Prompts, tokens: int) -> float:
    """Return the same with a thread a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(available_cores())
    try:
        return engine_rate(engine, prompts, tokens)
    finally:
        torch.set_num_threads(before)


async def stream(url: str, ids: list[int], tokens: int) -> bytes:
    """Ask for a stream and return what came, to be looked at when no time is taken any more."""
    fields = {"model": NAME, "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body = json.dumps({**fields, "stream_options": {"include_usage": True}}).encode()
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read(-1)
    writer.close()
    return answer


async def http_rate(url: str, prompts: Prompts, tokens: int) -> float:
    """Return the tokens a second of all requests together, through HTTP."""
    begin = time.perf_counter()
    answers = await asyncio.gather(*(stream(url, ids, tokens) for ids in prompts))
    seconds = time.perf_counter() - begin
    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert b'"completion_tokens":%d,' % tokens in answer, answer[-500:]
    return tokens * len(prompts) / seconds


def measure(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of both ways, by turns."""
    loaded = load_model(model, dtype="float32", threads=arguments.threads)
    options = ["--dtype", "float32", "--threads", str(arguments.threads)]
    options += [] if arguments.drafts is None else ["--drafts", str(arguments.drafts)]
    rates: dict[tuple[int, str], list[float]] = {}
    with serving(model, *options, *arguments.server_option) as server:
        engine = Engine.of(loaded, EngineOptions(num_drafts=arguments.drafts))
        for number in range(arguments.rounds + 1):
            for users in arguments.users:
                prompts = prompts_of(users, 100 * number + users, loaded.config.vocab_size)
                ways = {
                    "engine with all cores": lambda prompts=prompts: with_all_cores(engine, prompts, arguments.tokens),
                    "engine": lambda prompts=prompts: engine_rate(engine, prompts, arguments.tokens),
                    "http": lambda prompts=prompts: asyncio.run(http_rate(server.url, prompts, arguments.tokens)),
                }
                for way in sorted(ways, reverse=number % 2 == 1):
                    rate = ways[way]()
                    if number:
                        rates.setdefault((users, way), []).append(rate)
    figures: dict[str, Any] = {}
    for users in arguments.users:
        alone, through = rates[users, "engine"], rates[users, "http"]
        all_cores = statistics.median(rates[users, "engine with all cores"])
        figures[f"{users} users"] = {
            "engine with all cores, tokens/s a user": round(all_cores / users, 1),
            "engine, tokens/s a user": round(statistics.median(alone) / users, 1),
            "http, tokens/s a user": round(statistics.median(through) / users, 1),
            "http / engine": round(statistics.median(b / a for a, b in zip(alone, through, strict=True)), 3),
        }
    return figures


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=max(1, available_cores() - 1))
    parser.add_argument("--drafts", type=int, default=0, help="drafts a pass, in both ways")
    parser.add_argument("--server-option", action="append", default=[], help="a further argument of `abyssal serve`")
    parser.add_argument("--record", action="store_true", help="write the figures to bench/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = Path(folder) / "model"
            write_model(model)
        figures = {"threads": arguments.threads, "drafts": arguments.drafts, **measure(model, arguments)}
    print(json.dumps(figures, indent=1))
    if arguments.record:
        from record import record

        print(record("serve", f"python bench/serve.py {(arguments.model and 'MODEL') or ''}".strip(), figures))


if __name__ == "__main__":
    main()
