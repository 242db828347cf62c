"""A storm of random requests on `abyssal serve`, and SIGTERM in the middle of it: nothing may break, leak or hang.

    python bench/storm.py [--requests 2000] [--connections 200] [--seed 0] [--record]

A tiny random model is served by a process of its own. Requests have random lengths, stops, seeds and forms; some are
no JSON, of wrong types, too large, too long, with unknown fields or wrong keys. Half of the connections vanish at a
random moment. Every answer must have the status that its request deserves, or be the 503 of a full queue; afterwards
no page may be in use, and the process may not have grown. The last tenth of the requests meets SIGTERM: each of them
is answered, or ends with a reason, or never got in. Exits with 1 where any of that does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "storm-key"
MODEL = "storm"
POSITIONS = 1024
NUM_TOKENS = 280  # of its vocabulary
MAX_BODY_BYTES = 20_000
TIMEOUT_S = 120
#: The requests come in so many parts, and memory is looked at behind each.
PARTS = 8
#: What it may gain in the second half of them.
MAX_GROWTH_BYTES = 32 * 2**20
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "é"]}}, "required": ["a", "b"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
WORDS = ("def ", "x", "\n", "é", "😀", "\u0000", "<think>", "<｜tool▁calls▁begin｜>", "return", " ", "漢字")


def write_model(folder: Path) -> None:
    """Write a model directory of random numbers, with an MTP module."""
    import torch

    from abyssal.checkpoint.hf import write_model_directory
    from abyssal.config import ModelConfig
    from abyssal.model import Transformer, initialise
    from abyssal.text.tokenizer import Tokenizer
    from abyssal.text.tokenizer_config import write_tokenizer_config

    tokenizer = Tokenizer.train(["def f(x):\n    return x * x\n"] * 3, 290)
    assert tokenizer.vocab_size == NUM_TOKENS
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_nextn_predict_layers=1,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
    )

    def tokenizer_files(staging: Path) -> None:
        tokenizer.save(staging / "tokenizer.json")
        write_tokenizer_config(staging, tokenizer, POSITIONS)

    weights = initialise(Transformer(config), 5).state_dict()
    write_model_directory(
        folder, config, weights, dtype=torch.float32, tokenizer_files=tokenizer_files, card="Random.\n", generation=None
    )


# Requests


@dataclass(frozen=True)
class Shot:
    """One request: its bytes, the statuses it may have, and where its connection ends before the answer does."""

    kind: str
    content: bytes
    statuses: tuple[int, ...]
    vanishes: str | None  # in the body, before the answer, in the answer
    is_stream: bool = False


def body_of(source: random.Random) -> dict[str, Any]:
    """Return the fields of a request that can be answered."""
    text = "".join(source.choices(WORDS, k=source.randint(0, 8)))
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": source.choice([1, 2, 7, 30, 90]),
        "temperature": source.choice([0, 0.7, 1.5]),
    }
    extras: dict[str, Any] = {
        "stream": True,
        "n": source.randint(1, 3),
        "stop": source.choice(["e", ["\n", "xx"], []]),
        "seed": source.randint(-5, 10**12),
        "logprobs": True,
        "logit_bias": {str(source.randrange(NUM_TOKENS)): source.choice([-100, 5, 100])},
        "presence_penalty": 1.5,
        "user": "someone",
        "abyssal": {"inspect": True},
        "ignore_eos": True,
    }
    for name in source.sample(sorted(extras), source.randint(0, 4)):
        body[name] = extras[name]
    if source.random() < 0.15:
        body.pop("ignore_eos", None)
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
        body |= source.choice(
            [{"response_format": form}, {"tools": [TOOL], "tool_choice": "required"}, {"tools": [TOOL]}]
        )
        body["messages"] = [{"role": "user", "content": "j"}]
    return body


def wrong_body(source: random.Random) -> tuple[str, dict[str, Any] | bytes, int]:
    """Return a request that must be refused, and the status it must be refused with."""
    body = body_of(source)
    changes: list[tuple[str, dict[str, Any] | bytes, int]] = [
        ("bad JSON", source.choice([b"", b"{", b"[1", b"\xff\xfe", b"nul", b"[" * 9000]), 400),
        ("wrong type", {**body, source.choice(["max_tokens", "n", "seed", "stop", "messages"]): {"a": 1}}, 400),
        ("wrong value", {**body, source.choice(["temperature", "top_p", "max_tokens", "n"]): -3}, 400),
        ("unknown field", {**body, "max_token": 3}, 400),
        ("surrogate", {**body, "messages": [{"role": "user", "content": "\ud800"}]}, 400),
        ("too long", {**body, "messages": [{"role": "user", "content": "é" * 700}]}, 400),
        ("too many tokens", {**body, "max_tokens": 10**9}, 400),
        ("too large", {**body, "user": "x" * MAX_BODY_BYTES}, 413),
        ("unknown model", {**body, "model": "gpt"}, 404),
    ]
    return source.choice(changes)


def shot(source: random.Random) -> Shot:
    """Return a random request."""
    vanishes = source.choice([None, None, None, "body", "before", "answer"])
    key, path, method, statuses, kind, is_stream = KEY, "/v1/chat/completions", "POST", (200, 503), "good", False
    if source.random() < 0.6:
        fields = body_of(source)
        is_stream = bool(fields.get("stream"))
        if source.random() < 0.2 and "tools" not in fields:
            path, kind = "/v1/completions", "text"
            fields = {
                name: fields[name]
                for name in ("model", "max_tokens", "temperature", "n", "stop", "stream")
                if name in fields
            }
            fields["prompt"] = source.choice(["é", ["a", "b"], [0, 5, 9], ""])
        content = json.dumps(fields).encode()
    elif source.random() < 0.15:
        kind, key, statuses, content = "wrong key", "wrong", (401,), json.dumps(body_of(source)).encode()
    elif source.random() < 0.1:
        kind, path, statuses, content = "no such page", "/v1/embeddings", (404,), b"{}"
    elif source.random() < 0.1:
        kind, method, statuses, content = "wrong method", "PUT", (405,), b"{}"
    else:
        kind, wrong, status = wrong_body(source)
        content, statuses = wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode(), (status,)
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: storm\r\ncontent-type: application/json\r\nconnection: close\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return Shot(kind, head.encode() + content, statuses, vanishes, is_stream)


# One connection


async def send(one: Shot, port: int, source: random.Random) -> tuple[str, str | None]:
    """Make a request and return how it ended, and what was wrong with that."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return "not let in", None
    try:
        if one.vanishes == "body":
            writer.write(one.content[: source.randrange(len(one.content))])
            await writer.drain()
            return "vanished", None
        writer.write(one.content)
        await writer.drain()
        if one.vanishes == "before":
            await asyncio.sleep(source.random() * 0.3)
            return "vanished", None
        if one.vanishes == "answer":
            await reader.read(source.randint(1, 2000))
            return "vanished", None
        answer = await reader.read(-1)
        return judge(one, answer)
    except OSError:
        return "cut", None
    finally:
        writer.close()


def judge(one: Shot, answer: bytes) -> tuple[str, str | None]:
    """Return how a request ended, and what is wrong with its answer."""
    if not answer:
        return "cut", None
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" in head.lower():
        body = joined(body)
    if status not in (*one.statuses, 503):
        return str(status), f"{one.kind}: status {status} instead of {one.statuses}: {body[:300]!r}"
    try:
        if status != 200:
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert status != 503 or b"retry-after" in head.lower()
            return str(status), None
        if not one.is_stream:
            value = json.loads(body)
            assert all(choice["finish_reason"] in ("stop", "length", "tool_calls") for choice in value["choices"])
            return "200", None
        *events, end = body.decode().split("\n\n")
        assert end == "", "the last event is not complete"
        if events[-1] != "data: [DONE]":
            assert "error" in json.loads(events[-1].removeprefix("data: ")), "neither ended nor told why"
            return "ended with a reason", None
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        return str(status), f"{one.kind}: {error}: {body[-300:]!r}"
    return "200", None


def joined(body: bytes) -> bytes:
    """Return the body that chunks of HTTP/1.1 make, as far as it came."""
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        parts.append(body[:length])
        body = body[length + 2 :]
    return b"".join(parts)


# The storm


@dataclass
class Server:
    """The process under the storm."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def rss(self) -> int:
        """Return its resident memory, in bytes."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def start(folder: Path) -> Server:
    """Serve a tiny model and return once it listens."""
    write_model(folder / "model")
    log = folder / "stderr"
    arguments = ["serve", str(folder / "model"), "--port", "0", "--name", MODEL, "--api-key", KEY, "--threads", "1"]
    arguments += ["--max-running", "8", "--max-queue", "120", "--max-body-bytes", str(MAX_BODY_BYTES)]
    arguments += ["--cache-bytes", "200000", "--drain-seconds", "20"]  # for 833 tokens: less than what may run
    with log.open("wb") as errors, (folder / "access").open("wb") as access:
        process = subprocess.Popen([sys.executable, "-m", "abyssal", *arguments], stdout=access, stderr=errors)
    for _ in range(1200):
        if found := re.search(r"http://[\d.]+:(\d+)", log.read_text()):
            return Server(process, int(found[1]), log)
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


async def volley(
    server: Server, shots: list[Shot], connections: int, seed: int
) -> tuple[collections.Counter[str], list[str]]:
    """Send all requests, so many at a time, and return how they ended and what was wrong."""
    ends: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    waiting = iter(list(enumerate(shots)))

    async def connection() -> None:
        for number, one in waiting:
            try:
                end, fault = await asyncio.wait_for(send(one, server.port, random.Random(seed + number)), TIMEOUT_S)
            except TimeoutError:
                end, fault = "hung", f"{one.kind}: no end after {TIMEOUT_S} s"
            ends[end] += 1
            if fault:
                faults.append(fault)

    await asyncio.gather(*(connection() for _ in range(connections)))
    return ends, faults


async def numbers(server: Server) -> dict[str, float]:
    """Return the server's metrics that have no label but the model's name."""
    request = Shot("metrics", b"GET /metrics HTTP/1.1\r\nhost: storm\r\nconnection: close\r\n\r\n", (200,), None)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request.content)
    text = (await reader.read(-1)).decode()
    writer.close()
    return {name: float(value) for name, value in re.findall(r'^([\w:]+)\{model_name="storm"\} (\S+)$', text, re.M)}


async def rest(server: Server) -> dict[str, float]:
    """Return the metrics once nothing runs any more, or after 30 s."""
    for _ in range(300):
        found = await numbers(server)
        if found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    return found


async def storm(
    server: Server, shots: list[Shot], connections: int, seed: int, *, watches_memory: bool
) -> tuple[dict[str, Any], list[str]]:
    """Send the requests, the last tenth into a server that stops; return figures and faults."""
    last = len(shots) - len(shots) // 10
    borders = [last * part // PARTS for part in range(PARTS + 1)]
    ends: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    memory = []
    began = time.perf_counter()
    for first, end in itertools.pairwise(borders):
        more, further = await volley(server, shots[first:end], connections, seed + first)
        ends, faults = ends + more, faults + further
        counts = await rest(server)
        memory.append(server.rss())
    seconds = time.perf_counter() - began
    grown = memory[-1] - memory[PARTS // 2]
    for name in ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting"):
        if counts[name] != 0:
            faults.append(f"{name} is {counts[name]} when all is over")
    if watches_memory and grown > MAX_GROWTH_BYTES:
        faults.append(f"memory grew by {grown} bytes")
    if cut := ends["cut"] + ends["not let in"]:
        faults.append(f"{cut} requests had no answer while the server ran")
    ending = asyncio.ensure_future(volley(server, shots[last:], connections, seed + last))
    await asyncio.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    final, further = await ending
    code = await asyncio.to_thread(server.process.wait, TIMEOUT_S)
    if code != 0:
        faults.append(f"exit code {code} after SIGTERM")
    if "Traceback" in (text := server.log.read_text()):
        faults.append(f"a traceback in its log: {text[-2000:]}")
    figures = {
        "requests": len(shots),
        "connections": connections,
        "ends": dict(ends),
        "ends_after_sigterm": dict(final),
        "seconds": round(seconds, 1),
        "memory_bytes": memory,
        "preemptions": counts["vllm:num_preemptions_total"],
        "drafts_accepted": counts["vllm:spec_decode_num_accepted_tokens_total"],
        "tokens": counts["vllm:generation_tokens_total"],
    }
    return figures, faults + further


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-memory", action="store_true", help="a small storm ends before memory has settled")
    parser.add_argument("--record", action="store_true", help="write the figures to bench/results")
    arguments = parser.parse_args()
    source = random.Random(arguments.seed)
    shots = [shot(source) for _ in range(arguments.requests)]
    with tempfile.TemporaryDirectory() as folder:
        server = start(Path(folder))
        try:
            watches = not arguments.ignore_memory
            storming = storm(server, shots, arguments.connections, arguments.seed, watches_memory=watches)
            figures, faults = asyncio.run(storming)
        finally:
            server.process.kill()
            server.process.wait()
    print(json.dumps(figures, indent=1))
    if arguments.record:
        from record import record

        print(record("storm", f"python bench/storm.py --requests {arguments.requests}", figures))
    for fault in faults[:20]:
        print(fault, file=sys.stderr)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
