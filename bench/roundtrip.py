"""Model directories to and from transformers: drawn shapes, logits in fp32, both directions.

    python bench/roundtrip.py [--shapes 500] [--first 0]

For each shape, transformers opens a directory that we wrote, and we open one that transformers wrote; both times its
logits and ours are compared. Exits with 1 at the first shape whose logits differ by more than 1e-5 of the largest.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abyssal.checkpoint.hf import load_into, read_model_directory, write_model_directory
from abyssal.checkpoint.hf.names import memory_tensors
from abyssal.config import ModelConfig
from abyssal.model import Context, Transformer

TOLERANCE = 1e-5
#: Experts or groups closer to one another than this may be chosen differently by two fp32 implementations.
MARGIN = 1e-4
LENGTHS = (9, 3, 14)


@dataclass(frozen=True)
class RoundTrip:
    """What one drawn shape came to; differences as shares of the largest logit."""

    config: ModelConfig
    written_by_us: float
    written_by_them: float


def draw(seed: int) -> ModelConfig:
    """Return a shape in which no two widths are equal, with or without each optional part."""
    rng = random.Random(f"shape {seed}")
    hidden, dense, expert, q_lora, kv_lora, nope, value = rng.sample(range(7, 24), 7)
    groups, in_group = rng.choice([(1, 5), (1, 8), (2, 3), (2, 4), (3, 2), (4, 2), (4, 3)])
    kept = rng.randint(1, groups)
    mscale, mscale_all_dim = rng.choice([(1.0, 1.0), (0.7, 1.3), (1.0, 0.0)])
    yarn = {
        "factor": rng.uniform(1.5, 40.0),
        "original_max_position_embeddings": rng.choice([16, 100, 4096]),
        "beta_fast": rng.choice([32.0, 1.0, rng.uniform(2.0, 32.0)]),  # Kimi K2 has 1 for both
        "beta_slow": rng.choice([1.0, rng.uniform(0.2, 1.0)]),
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }
    layers = rng.randint(2, 4)
    fields = {
        "vocab_size": rng.randint(29, 60),
        "hidden_size": hidden,
        "intermediate_size": dense,
        "moe_intermediate_size": expert,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": rng.choice([0, 1, 1, 2]),
        "num_attention_heads": rng.choice([2, 3, 5]),
        "q_lora_rank": rng.choice([None, q_lora]),
        "kv_lora_rank": kv_lora,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rng.choice([2, 4, 6]),
        "v_head_dim": value,
        "n_routed_experts": groups * in_group,
        "n_shared_experts": rng.randint(1, 3),
        "num_experts_per_tok": rng.randint(1, min(4, kept * in_group)),
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": rng.random() < 0.7,
        "routed_scaling_factor": rng.uniform(0.5, 3.0),
        "first_k_dense_replace": rng.randint(0, layers),
        "max_position_embeddings": 4096,
        "rope_theta": rng.choice([50.0, 10000.0, 50000.0]),
        "rope_scaling": rng.choice([None, yarn]),
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.3,
    }
    return ModelConfig.parse(fields, source=f"seed {seed}")


def random_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return weights by in-memory name, all of order 1 in effect: norms near 1, biases that move the selection."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in memory_tensors(config):
        drawn = torch.randn(spec.shape, generator=generator)
        if spec.name.endswith("e_score_correction_bias"):
            drawn *= 0.2
        elif len(spec.shape) == 1:
            drawn = 1 + 0.2 * drawn
        elif not spec.name.endswith("embed_tokens.weight"):
            drawn *= spec.shape[-1] ** -0.5
        tensors[spec.name] = drawn
    return tensors


def write_ours(folder: Path, config: ModelConfig, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    """Write a directory in fp32; its tokenizer is empty."""

    def tokenizer(staging: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (staging / name).write_text("{}")

    write_model_directory(
        folder,
        config,
        tensors,
        dtype=torch.float32,
        tokenizer_files=tokenizer,
        card="",
        max_shard_bytes=max_shard_bytes,
    )


def write_theirs(folder: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """Let transformers write a model that it built from keyword arguments; it knows no MTP layers."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config.to_hf("float32")))
    names = {name: t for name, t in tensors.items() if name in model.state_dict()}
    if config.tie_word_embeddings:
        names["lm_head.weight"] = names["model.embed_tokens.weight"]
    model.load_state_dict(names, strict=True)
    model.save_pretrained(folder, max_shard_size="30KB")


def our_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Read a directory into our model and return its logits [T, V], the sequences in one pack."""
    config, reader = read_model_directory(folder, needs_tokenizer=False)
    model = Transformer(config)
    load_into(model, reader, allow_missing_mtp=True)
    with torch.no_grad():
        return model.logits(model(tokens, Context.packed(LENGTHS)))


def their_logits(folder: Path, tokens: Tensor) -> tuple[Tensor, float]:
    """Read a directory into transformers' model; return its logits [T, V] and the smallest margin of its routers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad(), watched_routers(model) as routed:
        logits = torch.cat([model(input_ids=part[None]).logits[0] for part in tokens.split(LENGTHS)])
    return logits, min((_margin(biased, model.config) for biased in routed), default=float("inf"))


@contextmanager
def watched_routers(model: Any) -> Iterator[list[Tensor]]:
    """Collect each router's biased affinities [T, E] in float64."""
    found: list[Tensor] = []

    def note(router: Any, _: Any, output: Any) -> None:
        found.append(output[0].double().sigmoid() + router.e_score_correction_bias)

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    yield found
    for hook in hooks:
        hook.remove()


def _margin(biased: Tensor, config: Any) -> float:
    """Return the smallest distance between what is chosen and what is not, among groups and among experts."""
    grouped = biased.unflatten(-1, (config.n_group, -1))  # [T, groups, experts of a group]
    margins = [float("inf")]
    if config.topk_group < config.n_group:
        ranked, order = grouped.topk(2, -1).values.sum(-1).sort(-1, descending=True)
        margins.append((ranked[:, config.topk_group - 1] - ranked[:, config.topk_group]).min().item())
        kept = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order[:, : config.topk_group], True)
        grouped = grouped.masked_fill(~kept[..., None], float("-inf"))
    ranked = grouped.flatten(-2).sort(-1, descending=True).values
    k = config.num_experts_per_tok
    if k < ranked.shape[-1]:
        margins.append((ranked[:, k - 1] - ranked[:, k]).min().item())
    return min(margins)


def round_trip(seed: int, folder: Path) -> RoundTrip:
    """Compare logits in both directions for one drawn shape; weights are drawn again where a router's choice is close.

    Raises:
        AssertionError: no comparable weights in 20 draws.
    """
    config = draw(seed)
    for attempt in range(20):
        drawn = 1000 * seed + attempt
        tensors = random_tensors(config, drawn)
        generator = torch.Generator().manual_seed(drawn)
        tokens = torch.randint(config.vocab_size, (sum(LENGTHS),), generator=generator)
        ours, theirs = folder / f"{drawn}-ours", folder / f"{drawn}-theirs"
        write_ours(ours, config, tensors, max_shard_bytes=8_000 if seed % 2 else 10**9)
        expected, margin = their_logits(ours, tokens)
        if margin < MARGIN:
            continue
        first = (our_logits(ours, tokens) - expected).abs().max() / expected.abs().max()
        write_theirs(theirs, config, tensors)
        assert torch.equal(their_logits(theirs, tokens)[0], expected), "transformers differs from itself"
        second = (our_logits(theirs, tokens) - expected).abs().max() / expected.abs().max()
        return RoundTrip(config, first.item(), second.item())
    raise AssertionError(f"seed {seed}: no weights in 20 draws whose routing is clear enough to compare")


def kinds(config: ModelConfig) -> dict[str, str]:
    """Return which of the optional parts a shape has."""
    return {
        "query": "plain" if config.q_lora_rank is None else "low rank",
        "groups": "one" if config.n_group == 1 else "several",
        "yarn": "no" if config.rope_scaling is None else "yes",
        "shared experts": str(config.n_shared_experts),
        "mtp": str(config.num_nextn_predict_layers),
        "head": "tied" if config.tie_word_embeddings else "separate",
    }


def main() -> int:
    """Compare the shapes and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    import transformers

    from record import record

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found, worst = Counter[str](), [0.0, 0.0]
    for seed in range(arguments.first, arguments.first + arguments.shapes):
        with tempfile.TemporaryDirectory() as folder:
            result = round_trip(seed, Path(folder))
        found.update(f"{part}: {kind}" for part, kind in kinds(result.config).items())
        worst = [max(worst[0], result.written_by_us), max(worst[1], result.written_by_them)]
        if not max(worst) <= TOLERANCE:
            print(f"seed {seed}: {result}", file=sys.stderr)
            return 1
    figures = {
        "shapes": arguments.shapes,
        "first_seed": arguments.first,
        "largest_difference_written_by_us": worst[0],
        "largest_difference_written_by_them": worst[1],
        "tolerance": TOLERANCE,
        "kinds": dict(sorted(found.items())),
    }
    command = f"python bench/roundtrip.py --shapes {arguments.shapes} --first {arguments.first}"
    print(figures, record("roundtrip", command, figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
