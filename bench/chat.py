"""Time to the first token of each turn of a conversation, with the latent cache kept between turns and without.

    python bench/chat.py --turns 8

A model of random numbers at shape S in bf16; questions of about 60 tokens, answers of 40. Both ways generate the same
conversation in one process, by turns; the median over the rounds counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from abyssal.engine import Engine, EngineOptions, Request, SamplingParameters, use_latent_cache
from abyssal.model import Transformer, initialise
from abyssal.ops.kernels import choose_kernels
from record import record
from shapes import SHAPES

QUESTION, ANSWER = 60, 40


def converse(model: Transformer, turns: int, keep: bool) -> list[float]:
    """Return the seconds to the first token of each turn."""
    draw = torch.Generator().manual_seed(0)
    engine, text, seconds = Engine(model, EngineOptions.single_stream(share_prefixes=keep)), [0], []
    for _ in range(turns):
        text += torch.randint(3, model.config.vocab_size, (QUESTION,), generator=draw).tolist()
        begin = time.perf_counter()
        outputs = engine.stream(Request(text, SamplingParameters(ANSWER, temperature=0)))
        answer = [next(outputs)]
        seconds.append(time.perf_counter() - begin)
        text += [output.token.id for output in (*answer, *outputs) if output.token]
    return seconds


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    kernels = choose_kernels(torch.device("cpu"), torch.bfloat16, "decode")
    model = initialise(Transformer(SHAPES[arguments.shape](), kernels, torch.bfloat16), 0).to(torch.bfloat16)
    use_latent_cache(model)
    converse(model, 1, keep=True)
    rounds = [[converse(model, arguments.turns, keep) for keep in (True, False)] for _ in range(arguments.rounds)]
    kept, fresh = (
        [statistics.median(times) for times in zip(*(pair[way] for pair in rounds), strict=True)] for way in (0, 1)
    )
    for turn, (with_cache, without) in enumerate(zip(kept, fresh, strict=True), start=1):
        print(f"turn {turn}: {with_cache * 1e3:.0f} ms kept, {without * 1e3:.0f} ms fresh, {without / with_cache:.1f}x")
    figures = {
        "shape": arguments.shape,
        "question_tokens": QUESTION,
        "answer_tokens": ANSWER,
        "first_token_s_kept": [round(t, 4) for t in kept],
        "first_token_s_fresh": [round(t, 4) for t in fresh],
        "ratio_of_last_turn": round(fresh[-1] / kept[-1], 2),
    }
    path = record("chat", " ".join(["python", "bench/chat.py", *sys.argv[1:]]), figures)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
