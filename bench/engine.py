"""The serving engine: tokens a second alone and in company, at a long context, and behind a shared prefix.

    python bench/engine.py                    all
    python bench/engine.py --only batch       one part

Models have random weights, so that drafts are hardly accepted: `batch` is without them and tells what a pass costs.

- batch: a model of the demo's shape, prompts of 32 tokens, 1 and 8 requests at a time; tokens a second and request
  while all of them decode; baseline: bare passes of the model over the cache and their argmax, one sequence.
- context: shape S, one request; a decoding step at context 2,000 against one at context 64.
- prefix: a model of the demo's shape, prompts of 1,000 equal and 8 other tokens; time to the first token of the second
  request against that of the first.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from abyssal.config import ModelConfig, load_recipe
from abyssal.engine import Engine, EngineOptions, Request, SamplingParameters, prepare_for_inference
from abyssal.engine.paged_cache import PagedLatentCache, TokenRange
from abyssal.machine.describe import available_cores
from abyssal.model import Transformer, initialise
from abyssal.ops.kernels import choose_kernels
from record import record
from shapes import shape_s

CPU = torch.device("cpu")


def build(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    model = (
        initialise(Transformer(config, choose_kernels(CPU, dtype, "decode"), dtype), 0).to(dtype).requires_grad_(False)
    )
    prepare_for_inference(model)
    return model


def demo_shape(context: int = 2048) -> ModelConfig:
    return load_recipe("demo").model.model_copy(update={"max_position_embeddings": context})


def prompt(length: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(100, 4000) for _ in range(length)]


def greedy(tokens: int) -> SamplingParameters:
    return SamplingParameters(tokens, temperature=0)


def decoding_seconds(engine: Engine, prompts: list[list[int]], steps: int) -> float:
    """Return the median seconds of a step in which all requests, and nobody else, decode."""
    ids = [engine.add(Request(ids, greedy(steps + 4))) for ids in prompts]
    times: list[float] = []
    while engine.has_work:
        begin = time.perf_counter()
        outputs = engine.step()
        times.append(time.perf_counter() - begin)
        if len(outputs) < len(ids) or outputs[-1].finish_reason:
            times.pop()
    return statistics.median(times[2:])


@torch.inference_mode()
def bare_seconds(model: Transformer, ids: list[int], steps: int) -> float:
    """Return the median seconds of a pass over one token, with its argmax."""
    cache = PagedLatentCache(model.config, 1, len(ids) + steps, model.compute_dtype, CPU)
    start, pending, times = 0, ids, []
    for _ in range(steps):
        begin = time.perf_counter()
        hidden = model(torch.tensor(pending), cache.begin([TokenRange([0], start, len(pending))]))
        start, pending = start + len(pending), [int(model.logits(hidden[-1:]).argmax())]
        times.append(time.perf_counter() - begin)
    return statistics.median(times[3:])


def batch(rounds: int) -> dict[str, Any]:
    """Decode at 1 and 8 requests, and in bare passes of the model."""
    model = build(demo_shape(), torch.float32)
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        rates.setdefault("bare passes", []).append(1 / bare_seconds(model, prompt(32, 0), 100))
        for requests in (1, 8):
            engine = Engine(model, EngineOptions(num_drafts=0))
            seconds = decoding_seconds(engine, [prompt(32, n) for n in range(requests)], 100)
            rates.setdefault(f"engine, {requests}", []).append(1 / seconds)
    return {f"{name}: tokens/s a request": round(statistics.median(values), 1) for name, values in rates.items()}


def context(rounds: int) -> dict[str, Any]:
    """Decode behind 64 and behind 2,000 tokens."""
    model = build(shape_s(), torch.bfloat16)
    times: dict[int, list[float]] = {64: [], 2000: []}
    for _ in range(rounds):
        for length, values in times.items():
            engine = Engine(model, EngineOptions(num_drafts=0, max_running=1, max_step_tokens=512))
            values.append(decoding_seconds(engine, [prompt(length, 0)], 24))
    short, long = (statistics.median(values) for values in times.values())
    return {"step at 64, ms": round(short * 1e3, 2), "step at 2000, ms": round(long * 1e3, 2), "ratio": long / short}


def prefix(rounds: int) -> dict[str, Any]:
    """First token of a request, and of another that shares all but its last tokens."""
    model = build(demo_shape(), torch.float32)
    shared = prompt(1000, 0)
    ratios = []
    for n in range(rounds):
        engine = Engine(model, EngineOptions(num_drafts=1, adapt_drafts=False))
        seconds = []
        for seed in (2 * n + 1, 2 * n + 2):
            engine.add(Request([*shared, *prompt(8, seed)], greedy(2)))
            begin = time.perf_counter()
            while not engine.step():
                pass
            seconds.append(time.perf_counter() - begin)
            while engine.has_work:
                engine.step()
        ratios.append(seconds)
    first, second = (statistics.median(values) for values in zip(*ratios, strict=True))
    return {"first, ms": round(first * 1e3, 1), "second, ms": round(second * 1e3, 1), "ratio": first / second}


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {"batch": batch, "context": context, "prefix": prefix}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part, printed but not recorded")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures: dict[str, Any] = {"threads": arguments.threads}
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            figures[name] = part(arguments.rounds)
            print(name, figures[name], flush=True)
    if not arguments.only:
        print(record("engine", " ".join(["python", "bench/engine.py", *sys.argv[1:]]), figures))


if __name__ == "__main__":
    main()
