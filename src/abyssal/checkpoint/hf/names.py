"""The names and shapes of a model's tensors in memory, and how names are told in few words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod

from abyssal.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
#: The selection bias of the gate, fp32 in every file and every model. Paper: §2.1.2 eq. 16.
BIAS = "e_score_correction_bias"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of values."""
        return prod(self.shape)


def memory_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield every parameter and buffer of a model in memory: experts stacked, embedding and head once."""
    vocabulary = (config.vocab_size, config.hidden_size)
    yield TensorSpec(EMBEDDING, vocabulary)
    for layer in range(config.num_layers):
        if layer == config.num_hidden_layers:
            yield from _outputs(config)
        yield from _layer(config, layer)
    if config.num_nextn_predict_layers == 0:
        yield from _outputs(config)


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to; none for embedding, last norm and head."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def fold_names(names: Iterable[str]) -> list[str]:
    """Return `names` in fewer words: names that differ in expert or layer only become one, with ranges in braces."""
    unique = dict.fromkeys(names)
    for pattern in (r"^(.*\.experts\.)(\d+)(\..*)$", r"^(model\.layers\.)(\d+)(\..*)$"):
        groups: dict[str, tuple[str, str, list[int]]] = {}
        for name in unique:
            found = re.match(pattern, name)
            if found is None:
                groups[name] = (name, "", [])
            else:
                groups.setdefault(f"{found[1]}#{found[3]}", (found[1], found[3], []))[2].append(int(found[2]))
        unique = dict.fromkeys(before + _ranges(numbers) + after for before, after, numbers in groups.values())
    return list(unique)


def _ranges(numbers: list[int]) -> str:
    """Return `3`, `{0-2}` or `{0,4-5}` for some numbers, nothing for none."""
    runs = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        runs.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return runs[0] if len(numbers) == 1 else "{" + ",".join(runs) + "}" if runs else ""


def layer_prefix(layer: int) -> str:
    """Return how the names of a layer's tensors begin."""
    return f"model.layers.{layer}."


def _outputs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield the last norm and, unless it is the embedding, the head."""
    yield TensorSpec("model.norm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield TensorSpec(HEAD, (config.vocab_size, config.hidden_size))


def _layer(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """Yield one decoder layer; an MTP layer has the block's tensors and four of its own. Paper: §2.2 eq. 21."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,), **_attention(config)}
    shapes["post_attention_layernorm.weight"] = (hidden,)
    shapes |= _moe(config) if config.is_moe(layer) else _swiglu("mlp.", hidden, config.intermediate_size)
    if layer >= config.num_hidden_layers:
        projections = {
            "enorm.weight": (hidden,),
            "hnorm.weight": (hidden,),
            "eh_proj.weight": (hidden, 2 * hidden),
        }
        shapes = {**projections, **shapes, "shared_head.norm.weight": (hidden,)}
    yield from (TensorSpec(layer_prefix(layer) + name, shape) for name, shape in shapes.items())


def _attention(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of MLA. Paper: §2.1.1 eq. 1-11."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        shapes: dict[str, tuple[int, ...]] = {"q_proj": (queries, hidden)}
    else:
        shapes = {
            "q_a_proj": (config.q_lora_rank, hidden),
            "q_a_layernorm": (config.q_lora_rank,),
            "q_b_proj": (queries, config.q_lora_rank),
        }
    shapes |= {
        "kv_a_proj_with_mqa": (latent + config.qk_rope_head_dim, hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "o_proj": (hidden, heads * config.v_head_dim),
    }
    return {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}


def _moe(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of gate, routed experts and shared experts. Paper: §2.1.2 eq. 12-16."""
    hidden, experts, width = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    return {
        "mlp.gate.weight": (experts, hidden),
        f"mlp.gate.{BIAS}": (experts,),
        "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
        "mlp.experts.down_proj": (experts, hidden, width),
        **_swiglu("mlp.shared_experts.", hidden, config.shared_intermediate_size),
    }


def _swiglu(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of one gated feed-forward network."""
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }
