"""Decoding and prefill of Abyssal against transformers: same weights, plain torch, no compiler, one run.

    python bench/decode.py --shape S
    python bench/decode.py --shape M --precision bfloat16

Every candidate runs in a process of its own, in turns, and fills its model from the same seed. Both sides run bare
forward passes and take the likeliest token: no sampling, no text. A pass counts with its median over the steps of a
round and the least over the rounds; where a side has several candidates (precisions; transformers' experts options),
its fastest is compared, for each quantity apart. (transformers' batched_mm gathers weights for each token: it is not
asked for a prefill.)

The floor is what the machine allows: the bytes of the weights that a pass must read over the memory bandwidth that
torch reaches here, or its operations over the matmul peak, whichever takes longer, both measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.engine import prepare_for_inference
from abyssal.engine.paged_cache import PagedLatentCache, TokenRange
from abyssal.machine.describe import available_cores
from abyssal.machine.matmul_speed import measure_matmul
from abyssal.model import Transformer, initialise
from abyssal.ops.kernels import choose_kernels
from abyssal.plan import count_parameters, decode_flops, forward_flops
from abyssal.train.resolve import set_threads
from record import record
from shapes import SHAPES

PROMPT_TOKENS = 32  # before each decoded sequence
WARM_UP_STEPS = 4


class Candidate(Protocol):
    """A model over a cache of its own."""

    def start(self, sequences: int, capacity: int) -> None:
        """Forget everything; prepare for so many sequences of so many tokens."""

    def feed(self, tokens: Tensor) -> Tensor:
        """Add tokens [N, t] and return the logits [N, V] behind the last of each sequence."""


class Abyssal:
    """The packed model over a latent cache."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.model = build(config, dtype)
        prepare_for_inference(self.model)

    def start(self, sequences: int, capacity: int) -> None:
        size = -(-capacity // 64) * 64
        self.cache = PagedLatentCache(self.model.config, sequences, size, self.model.compute_dtype, "cpu")
        self.length = 0

    def feed(self, tokens: Tensor) -> Tensor:
        n, t = tokens.shape
        ranges = [TokenRange([sequence], self.length, t) for sequence in range(n)]  # a page each
        hidden = self.model(tokens.flatten(), self.cache.begin(ranges))  # [N*t, D]
        self.length += t
        return self.model.logits(hidden[t - 1 :: t])


class Transformers:
    """transformers' model with one of its implementations of the experts, over its own cache."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, experts: str) -> None:
        import transformers

        fields = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "torch_dtype")}
        hf_config = transformers.DeepseekV3Config(**fields)
        hf_config._experts_implementation = experts
        with torch.device("meta"):  # the weights are ours, and memory holds them once
            self.model = transformers.DeepseekV3ForCausalLM._from_config(hf_config, dtype=dtype)
        self.model.load_state_dict(build(config, dtype).state_dict(), assign=True)
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(hf_config)
        self.cache_type = transformers.DynamicCache

    def start(self, sequences: int, capacity: int) -> None:
        self.cache = self.cache_type(config=self.model.config)

    def feed(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]


def build(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """Return the model of seed 0 in `dtype`; the balancing bias stays fp32."""
    with torch.device("meta"):
        model = Transformer(config, choose_kernels(torch.device("cpu"), dtype, "decode"), dtype)
    return initialise(model.to(dtype).to_empty(device="cpu"), 0)


def build_candidate(name: str, config: ModelConfig) -> Candidate:
    *side, precision = name.split(" ")
    dtype: torch.dtype = getattr(torch, precision)
    return Abyssal(config, dtype) if side == ["abyssal"] else Transformers(config, dtype, side[1])


def prompt(config: ModelConfig, sequences: int, tokens: int) -> Tensor:
    """Return the same random ids to everybody: [N, t]."""
    return torch.randint(config.vocab_size, (sequences, tokens), generator=torch.Generator().manual_seed(1))


def timed(work: Callable[[], Any], times: int) -> list[float]:
    """Return the seconds that each of so many calls takes."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return seconds


@torch.inference_mode()
def run_candidate(name: str, config: ModelConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one candidate in this process: seconds of a step by batch, and of a prefill; the first ids it chose."""
    set_threads(available_cores())
    candidate = build_candidate(name, config)
    result: dict[str, Any] = {"seconds": {}, "ids": {}}

    def prefill() -> None:
        candidate.start(1, arguments.prefill)
        candidate.feed(prompt(config, 1, arguments.prefill))

    if "batched_mm" not in name:
        result["seconds"]["prefill"] = min(timed(prefill, 4)[1:])
    for batch in arguments.batch:
        candidate.start(batch, PROMPT_TOKENS + WARM_UP_STEPS + arguments.steps)
        chosen = [candidate.feed(prompt(config, batch, PROMPT_TOKENS)).max(-1).indices]

        def step(chosen: list[Tensor] = chosen) -> None:
            chosen.append(candidate.feed(chosen[-1][:, None]).max(-1).indices)

        seconds = timed(step, WARM_UP_STEPS + arguments.steps - 1)[WARM_UP_STEPS:]
        result["seconds"][f"batch {batch}"] = statistics.median(seconds)
        result["ids"][f"batch {batch}"] = torch.stack(chosen, 1)[:, :8].tolist()
    return result


def read_bandwidth() -> float:
    """Return the bytes a second at which torch reads a matrix that is far larger than the caches."""
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = torch.ones(1 << 16, 1024, dtype=dtype), torch.ones(1, 1024, dtype=dtype)
        best = max(best, weight.nbytes / min(timed(lambda w=weight, x=x: torch.nn.functional.linear(x, w), 6)))
    return best


def floors(config: ModelConfig, arguments: argparse.Namespace, bandwidth: float, peak: float) -> dict[str, float]:
    """Return the least seconds of each quantity with weights in bf16; routing is taken as uniform."""
    count = count_parameters(config)
    routed = count.main.routed_experts
    share = config.num_experts_per_tok / config.n_routed_experts
    head = config.vocab_size * config.hidden_size

    def floor(tokens: int, flops: int) -> float:
        read = count.main.total - count.main.embedding - routed * (1 - share) ** tokens
        return max(2 * read / bandwidth, flops / peak)

    context = PROMPT_TOKENS + arguments.steps // 2
    decoding = decode_flops(config, context).total
    whole = forward_flops(config, arguments.prefill).total - 2 * head  # the head sees the last token only
    bounds = {f"batch {batch}": floor(batch, batch * decoding) for batch in arguments.batch}
    return {"prefill": floor(arguments.prefill, arguments.prefill * whole + 2 * head), **bounds}


def run_all(names: list[str], rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the candidates in turns, each in a process of its own."""
    for _ in range(rounds):
        for name in names:
            worker = subprocess.run(
                [sys.executable, *sys.argv, "--candidate", name], capture_output=True, text=True, check=False
            )
            if worker.returncode:
                reason = worker.stderr.strip().splitlines()[-1:] or [f"exit code {worker.returncode}"]
                print(f"{name}: failed: {reason[0]}", flush=True)
                continue
            yield name, json.loads(worker.stdout)


def main() -> None:
    """Run all candidates in turn and print and record the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--precision", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm", "batched_mm"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=24, help="decoded tokens that are timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    config = SHAPES[arguments.shape]()
    if arguments.candidate:
        print(json.dumps(run_candidate(arguments.candidate, config, arguments)))
        return

    set_threads(available_cores())
    bandwidth, peak = read_bandwidth(), measure_matmul([torch.bfloat16]).gflops[torch.bfloat16] * 1e9
    tokens = {"prefill": arguments.prefill, **{f"batch {batch}": batch for batch in arguments.batch}}
    least = floors(config, arguments, bandwidth, peak)
    sides = {
        "abyssal": [f"abyssal {p}" for p in arguments.precision],
        "transformers": [f"transformers {e} {p}" for p in arguments.precision for e in arguments.experts],
    }
    best: dict[str, dict[str, float]] = {quantity: {} for quantity in tokens}
    ids: dict[str, Any] = {}
    for name, result in run_all([*sides["abyssal"], *sides["transformers"]], arguments.rounds):
        rates = ", ".join(f"{q} {tokens[q] / s:,.1f}" for q, s in result["seconds"].items())
        print(f"{name}: tokens/s: {rates}", flush=True)
        ids[name] = result["ids"]
        for quantity, seconds in result["seconds"].items():
            best[quantity][name] = min(best[quantity].get(name, seconds), seconds)
    figures: dict[str, Any] = {
        "shape": arguments.shape,
        "parameters": count_parameters(config).main.total,
        "bf16_peak_gflops": round(peak / 1e9),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "same_ids_in_float32": same_ids(ids),
        "tokens_per_s": {q: {n: round(tokens[q] / s, 1) for n, s in found.items()} for q, found in best.items()},
    }
    for quantity, found in best.items():
        ours, theirs = (min((found[n], n) for n in names if n in found) for names in sides.values())
        figures[quantity] = {
            "ratio": round(theirs[0] / ours[0], 2),
            "ours": ours[1],
            "baseline": theirs[1],
            "floor_tokens_per_s": round(tokens[quantity] / least[quantity], 1),
            "of_floor": round(least[quantity] / ours[0], 3),
        }
        print(
            f"{quantity}: {tokens[quantity] / ours[0]:,.1f} tokens/s ({ours[1]}), "
            f"{theirs[0] / ours[0]:.2f}x {theirs[1]}; {least[quantity] / ours[0]:.0%} of what the machine allows"
        )
    path = record(f"decode-{arguments.shape}", " ".join(["python", "bench/decode.py", *sys.argv[1:]]), figures)
    print(f"the same ids in float32: {figures['same_ids_in_float32']}; written to {path}")


def same_ids(ids: dict[str, Any]) -> bool | None:
    """Say whether all fp32 candidates chose the same first ids; None where fewer than two ran."""
    chosen = [found for name, found in ids.items() if name.endswith("float32")]
    return all(found == chosen[0] for found in chosen) if len(chosen) > 1 else None


if __name__ == "__main__":
    main()
