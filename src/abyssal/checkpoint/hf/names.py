"""The names and shapes of a model's tensors: in memory (experts stacked) and as released (one by one).

Shapes: D hidden, E routed experts, F expert width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch

from abyssal.config import ModelConfig
from abyssal.ops.block_fp8 import scale_shape

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
#: The selection bias of the gate, fp32 in every file and every model. Paper: §2.1.2 eq. 16.
BIAS = "e_score_correction_bias"

#: What a released FP8 weight's name is followed by in the name of its scales, which stand for W = fp8 * scale.
SCALE_SUFFIX = "_scale_inv"

GATE_UP = ".mlp.experts.gate_up_proj"
DOWN = ".mlp.experts.down_proj"


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


def released_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield every tensor of a model directory: experts one by one, each MTP layer with copies of embedding and head.

    The copy of the head is there also when `tie_word_embeddings` leaves out `lm_head.weight` itself.
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    for spec in memory_tensors(config):
        if spec.name.endswith(".enorm.weight"):
            yield TensorSpec(spec.name.replace(".enorm.", ".embed_tokens."), vocabulary)
        if spec.name.endswith(GATE_UP):
            gate_up = list(split_shapes(spec.name, spec.shape))
            down_name = spec.name.removesuffix(GATE_UP) + DOWN
            down = list(split_shapes(down_name, (spec.shape[0], spec.shape[2], spec.shape[1] // 2)))
            for expert in range(spec.shape[0]):  # expert by expert, as released
                yield from (*gate_up[2 * expert : 2 * expert + 2], down[expert])
        elif not spec.name.endswith(DOWN):
            yield spec
        if spec.name.endswith(".shared_head.norm.weight"):
            yield TensorSpec(spec.name.replace(".norm.", ".head."), vocabulary)


def is_quantised(name: str) -> bool:
    """Whether the FP8 release holds the weight `name` in FP8: every projection of attention and feed-forward networks.

    Embeddings, norms, the gate and its bias, `eh_proj` and the heads are never FP8. Paper: §3.3.1.
    """
    return re.search(r"\.(self_attn|mlp)\.(.*\.)?\w*_proj(_with_mqa)?\.weight$", name) is not None


def scales_of(weight: TensorSpec) -> TensorSpec:
    """Return name and shape of the scales of a released weight [N, K]."""
    return TensorSpec(weight.name + SCALE_SUFFIX, scale_shape(weight.shape))


def stored_tensors(config: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[TensorSpec, torch.dtype]]:
    """Yield (name and shape, dtype) of every tensor in the files of a model directory that is written in `dtype`.

    With float8_e4m3fn, the weights of `is_quantised` are FP8, each with fp32 scales after it, and the others bf16.
    """
    fp8 = dtype == torch.float8_e4m3fn
    for spec in released_tensors(config):
        if fp8 and is_quantised(spec.name):
            yield spec, dtype
            yield scales_of(spec), torch.float32
        else:
            wide = torch.float32 if spec.name.endswith(BIAS) else torch.bfloat16 if fp8 else dtype
            yield spec, wide


def is_experts(name: str) -> bool:
    """Whether `name` is a stack of experts, which a model directory holds one by one."""
    return name.endswith((GATE_UP, DOWN))


def split_names(name: str, num_experts: int) -> list[str]:
    """Return the released names that the in-memory tensor `name` stands for: of gate_up_proj, gate and up by turns."""
    if name.endswith(GATE_UP):
        prefix = name.removesuffix("gate_up_proj")
        return [f"{prefix}{e}.{kind}_proj.weight" for e in range(num_experts) for kind in ("gate", "up")]
    if name.endswith(DOWN):
        prefix = name.removesuffix("down_proj")
        return [f"{prefix}{e}.down_proj.weight" for e in range(num_experts)]
    return [name]


def split_shapes(name: str, shape: tuple[int, ...]) -> Iterator[TensorSpec]:
    """Yield the released names and shapes that the in-memory tensor `name` of `shape` stands for."""
    part = shape
    if name.endswith(GATE_UP):
        part = (shape[1] // 2, shape[2])
    elif name.endswith(DOWN):
        part = shape[1:]
    yield from (TensorSpec(released, part) for released in split_names(name, shape[0] if is_experts(name) else 1))


def split_experts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (released name, view) of each expert in an in-memory stack; any other tensor as it is.

    Of `gate_up_proj` [E, 2F, D] the first F rows are the gate and the last F the up projection, [F, D] each; of
    `down_proj` [E, D, F] each expert is [D, F].
    """
    yield from ((released, rows) for released, _, rows in split_shard(name, tensor.shape, tensor, (0,) * tensor.dim()))


def split_shard(
    name: str, shape: Sequence[int], shard: torch.Tensor, begin: Sequence[int]
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield (released name, first row, view of rows) for what a shard of an in-memory tensor holds.

    Args:
        name: of the tensor in memory.
        shape: of the whole.
        shard: some experts and some of their rows, or some rows; rows are whole. It may be empty.
        begin: where in the whole it begins, along each dim.
    """
    assert shard.dim() < 2 or shard.shape[-1] == shape[-1], f"{name}: a row of {list(shape)} is split"
    if not is_experts(name):
        yield name, begin[0], shard
        return
    parts = 2 if name.endswith(GATE_UP) else 1  # released tensors above one another in each matrix of the stack
    names, rows = split_names(name, shape[0]), shape[1] // parts
    for expert, matrix in enumerate(shard, begin[0]):
        for part in range(parts):  # the rows part * rows .. (part + 1) * rows of the whole matrix
            first = max(begin[1] - part * rows, 0)
            own = matrix[max(part * rows - begin[1], 0) : max((part + 1) * rows - begin[1], 0)]
            if len(own):
                yield names[parts * expert + part], first, own


def join_experts(name: str, num_experts: int, part: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Return the in-memory tensor `name`, built from its released tensors, which `part` gives by name.

    The inverse of `split_experts`; a tensor that is no stack of experts comes back as `part` gave it.
    """
    if not is_experts(name):
        return part(name)
    names = split_names(name, num_experts)
    first = part(names[0])
    halves = len(names) // num_experts
    stack = first.new_empty(num_experts, halves * first.shape[0], first.shape[1])  # [E, 2F, D] or [E, D, F]
    for view, released in zip(stack.view(len(names), *first.shape), names, strict=True):
        view.copy_(first if released == names[0] else part(released))
    return stack


def mtp_copies(name: str, config: ModelConfig) -> list[str]:
    """Return the released names inside the MTP layers that hold a copy of the in-memory tensor `name`."""
    layers = [_prefix(layer) for layer in range(config.num_hidden_layers, config.num_layers)]
    copies = []
    if name == EMBEDDING:
        copies += [f"{layer}embed_tokens.weight" for layer in layers]
    if name == (EMBEDDING if config.tie_word_embeddings else HEAD):
        copies += [f"{layer}shared_head.head.weight" for layer in layers]
    return copies


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to; none for embedding, last norm and head."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def fold(names: Iterable[str]) -> list[str]:
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


def _prefix(layer: int) -> str:
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
    yield from (TensorSpec(_prefix(layer) + name, shape) for name, shape in shapes.items())


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
