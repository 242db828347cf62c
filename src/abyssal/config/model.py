"""The shape of a DeepSeek-V3 model, in Hugging Face's `deepseek_v3` field names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from abyssal.config.frozen import Frozen
from abyssal.config.quantization import BlockFP8
from abyssal.errors import ConfigError

#: Bounds far above every model, which keep a damaged config.json from naming what could only be counted for hours.
MOST_LAYERS = MOST_EXPERTS = 10_000
MOST_POSITIONS = 10**12


class RopeScaling(Frozen):
    """YaRN's parameters, applied to the decoupled rotary dims only. Paper: §4.3."""

    type: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1.0)
    original_max_position_embeddings: int = Field(ge=1, le=MOST_POSITIONS)
    beta_fast: float = Field(default=32.0, ge=1e-6, le=1e6)
    beta_slow: float = Field(default=1.0, ge=1e-6, le=1e6)
    mscale: float = Field(default=1.0, ge=0.0, le=1e6)
    mscale_all_dim: float = Field(default=0.0, ge=0.0, le=1e6)

    def attention_factor(self, weight: float) -> float:
        """Return 0.1 * weight * ln(factor) + 1, YaRN's magnitude correction m."""
        return 0.1 * weight * math.log(self.factor) + 1.0

    @property
    def rotary_factor(self) -> float:
        """The amplitude of cos and sin: 1 when mscale equals mscale_all_dim, as released."""
        return self.attention_factor(self.mscale) / self.attention_factor(self.mscale_all_dim)


class ModelConfig(Frozen):
    """Everything that fixes the parameters and the function of one model.

    Field names and meanings are those of Hugging Face's `DeepseekV3Config`. Defaults are the plain choice (one group,
    no scaling, no dense layer, no MTP); `from_hf` fills in Hugging Face's own. Paper: §4.2 for the 671B model's values.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    moe_intermediate_size: PositiveInt
    num_hidden_layers: int = Field(ge=1, le=MOST_LAYERS)
    num_nextn_predict_layers: int = Field(default=0, ge=0, le=MOST_LAYERS)
    num_attention_heads: PositiveInt
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    n_routed_experts: int = Field(ge=1, le=MOST_EXPERTS)
    n_shared_experts: PositiveInt = 1
    num_experts_per_tok: PositiveInt
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: PositiveFloat = 1.0
    first_k_dense_replace: int = Field(default=0, ge=0)
    max_position_embeddings: int = Field(ge=1, le=MOST_POSITIONS)
    rope_theta: float = Field(default=10000.0, gt=1.0)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: PositiveFloat = 1e-6
    initializer_range: PositiveFloat = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = Field(default=0, ge=0)
    eos_token_id: int | None = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        experts_per_group, rest = divmod(self.n_routed_experts, self.n_group)
        divisors = [str(n) for n in range(1, self.n_routed_experts + 1) if self.n_routed_experts % n == 0]
        rules = [
            (
                self.qk_rope_head_dim % 2 == 0,
                f"qk_rope_head_dim={self.qk_rope_head_dim}: must be even (RoPE rotates pairs); "
                f"nearest: {self.qk_rope_head_dim + 1}",
            ),
            (
                rest == 0,
                f"n_group={self.n_group}: must divide n_routed_experts={self.n_routed_experts}; "
                f"possible: {', '.join(divisors)}",
            ),
            (
                self.n_group == 1 or experts_per_group >= 2,
                f"n_group={self.n_group}: leaves {experts_per_group} expert a group, "
                "but a group is scored by its best 2 (§2.1.2)",
            ),
            (
                self.topk_group <= self.n_group,
                f"topk_group={self.topk_group}: must be at most n_group={self.n_group}",
            ),
            (
                self.num_experts_per_tok <= self.topk_group * experts_per_group,
                f"num_experts_per_tok={self.num_experts_per_tok}: at most {self.topk_group * experts_per_group} "
                f"experts stand in the {self.topk_group} of {self.n_group} groups a token may use",
            ),
            (
                self.first_k_dense_replace <= self.num_hidden_layers,
                f"first_k_dense_replace={self.first_k_dense_replace}: must be at most "
                f"num_hidden_layers={self.num_hidden_layers}",
            ),
            *(
                (
                    token is None or token < self.vocab_size,
                    f"{name}={token}: must be below vocab_size={self.vocab_size}",
                )
                for name, token in (("bos_token_id", self.bos_token_id), ("eos_token_id", self.eos_token_id))
            ),
        ]
        for holds, sentence in rules:
            if not holds:
                raise ValueError(sentence)
        return self

    # Derived values

    @property
    def qk_head_dim(self) -> int:
        """Query and key dims a head: nope + rope."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_layers(self) -> int:
        """Main layers plus MTP layers: the number of entries under `model.layers`."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts, which are held as one wider expert."""
        return self.moe_intermediate_size * self.n_shared_experts

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times m squared under YaRN. Paper: §2.1.1 eq. 10, §4.3."""
        scale = math.pow(self.qk_head_dim, -0.5)
        if self.rope_scaling is not None:
            scale *= self.rope_scaling.attention_factor(self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` routes to experts; MTP layers always do. Paper: §4.2."""
        return layer >= self.first_k_dense_replace

    # Hugging Face's config.json

    #: Fields with one value we implement; a config.json that asks for another is refused.
    FIXED: ClassVar[dict[str, Any]] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    #: Fields that do not change the function we compute; read and left.
    # fmt: off
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            "architectures", "auto_map", "aux_loss_alpha", "chunk_size_feed_forward", "dtype", "ep_size", "head_dim",
            "id2label", "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states",
            "pad_token_id", "pretraining_tp", "problem_type", "producer", "qk_head_dim", "quantization_config",
            "return_dict", "seq_aux", "torch_dtype", "transformers_version", "unsloth_fixed", "use_cache",
        }
    )
    # fmt: on
    #: What Hugging Face takes where a config.json leaves a field out and our default is another.
    HF_DEFAULTS: ClassVar[dict[str, Any]] = {
        "first_k_dense_replace": 3,
        "n_group": 8,
        "q_lora_rank": 1536,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
    }
    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("deepseek_v3", "kimi_k2")

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read a `config.json`.

        Raises:
            ConfigError: no such file, not JSON, another architecture, or a field that is unknown or contradicts.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a model directory needs a config.json") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number too long to be one
            raise ConfigError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: must hold a JSON object")
        return cls.from_hf(values, source=str(path))

    @classmethod
    def from_hf(cls, values: dict[str, Any], source: str = "config") -> Self:
        """Build from the fields of a Hugging Face config, with its defaults for those left out.

        Only `num_nextn_predict_layers` stays 0 where it is left out: such a directory has no MTP weights.

        Raises:
            ConfigError: another architecture, or a field that is unknown or contradicts.
        """
        model_type = values.get("model_type", "deepseek_v3")
        if model_type not in cls.MODEL_TYPES:
            raise ConfigError(f"{source}: model_type={model_type!r}: must be one of {', '.join(cls.MODEL_TYPES)}")
        for name, only in cls.FIXED.items():
            if values.get(name, only) not in (only, None):
                raise ConfigError(f"{source}: {name}={values[name]!r}: only {only!r} is implemented")
        BlockFP8.from_hf(values, source)  # not of the model's shape: read again by who reads the weights
        fields = cls.HF_DEFAULTS | {
            name: value
            for name, value in values.items()
            if name not in cls.FIXED and name not in cls.IGNORED and not name.startswith("_")
        }
        heads, kv_heads = fields.get("num_attention_heads"), fields.pop("num_key_value_heads", None)
        if kv_heads not in (None, heads):
            raise ConfigError(
                f"{source}: num_key_value_heads={kv_heads}: must equal num_attention_heads={heads} "
                "(MLA has one latent for all heads)"
            )
        fields |= _read_rope(fields.pop("rope_parameters", None), fields.pop("rope_scaling", None), fields, source)
        for name in ("n_group", "topk_group"):  # null means one group in Hugging Face's config
            if fields[name] is None:
                fields[name] = 1
        config = cls.parse(fields, source)
        if config.rope_scaling is not None and config.rope_scaling.factor == 1:  # which changes nothing: see `to_hf`
            config = config.model_copy(update={"rope_scaling": None})
        if values.get("qk_head_dim") not in (None, config.qk_head_dim):
            raise ConfigError(
                f"{source}: qk_head_dim={values['qk_head_dim']}: must be qk_nope_head_dim + qk_rope_head_dim = "
                f"{config.qk_head_dim}"
            )
        return config

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return the fields of a Hugging Face `config.json`, with every key that other engines read.

        transformers drops `topk_method` and `scoring_func`; without them vLLM fails and llama.cpp takes a softmax gate.
        Two things are written in the one of their spellings that every engine understands: no YaRN as YaRN by a factor
        of 1, because vLLM's CPU build computes something else without, and groups of which all are kept as one group,
        because llama.cpp's converter refuses them. `from_hf` reads the former back as none.
        """
        fields = self.model_dump(exclude={"rope_scaling"})
        fields["num_key_value_heads"] = self.num_attention_heads
        if self.topk_group == self.n_group:
            fields |= {"n_group": 1, "topk_group": 1}
        scaling = self.rope_scaling or RopeScaling(
            factor=1.0, original_max_position_embeddings=self.max_position_embeddings, mscale_all_dim=1.0
        )
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **fields,
            "rope_scaling": scaling.model_dump(),
            **self.FIXED,
            "torch_dtype": dtype,
            "use_cache": True,
        }


def _read_rope(parameters: Any, scaling: Any, fields: dict[str, Any], source: str) -> dict[str, Any]:
    """Turn both of Hugging Face's spellings into our `rope_theta` and `rope_scaling`.

    Its newer versions write `rope_parameters` with `rope_type` and `rope_theta`; releases have `rope_scaling` with
    `type`, and `rope_theta` beside it. A file may hold both, but then they must agree.
    """
    found: dict[str, Any] = {}
    for name, values in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {name}={values!r}: must be an object")
        rope = dict(values)
        kinds = [kind for kind in (rope.pop("rope_type", None), rope.pop("type", None)) if kind is not None]
        if len(kinds) == 2 and kinds[0] != kinds[1]:
            raise ConfigError(f"{source}: {name}: rope_type={kinds[0]!r} and type={kinds[1]!r} contradict each other")
        read = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
        kind = kinds[0] if kinds else "default"
        if kind != "default":
            read["rope_scaling"] = {"type": kind, **rope}
        elif rope:
            raise ConfigError(f"{source}: {name}: {', '.join(rope)}: without a type these mean nothing; allowed: yarn")
        for field, value in read.items():
            known = found.get(field, fields.get(field, value))
            if known != value:
                raise ConfigError(f"{source}: {name}: {field}={value!r} contradicts {field}={known!r}")
        found |= read
    return found
