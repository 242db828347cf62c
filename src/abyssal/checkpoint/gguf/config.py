"""A model's shape in GGUF's keys of the architecture `deepseek2`, as llama.cpp reads them.

llama.cpp guesses what a file leaves out, from the number of layers and the size of the vocabulary: its own GGUF of such
a model then runs with a softmax gate, or without a query latent, and says nothing. So every key is written.
"""

from __future__ import annotations

from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType

from abyssal.config import ModelConfig

ARCHITECTURE = "deepseek2"
#: Main layers at which llama.cpp takes a model for one without a query latent, whatever its keys say; 48 only with
#: a vocabulary of LITE_VOCABULARY.
LITE_LAYERS, LITE_VOCABULARY = (26, 27, 48), 128256
#: What llama.cpp takes for these two, which it does not read for this architecture.
BETA_FAST, BETA_SLOW = 32.0, 1.0
#: The eps of the norms on the latents, fixed in the released modelling code whatever `rms_norm_eps` says.
LATENT_EPS = 1e-6


def unsayable(config: ModelConfig) -> str | None:
    """Return why a GGUF file cannot hold this model, none if it can."""
    lite = config.num_hidden_layers in LITE_LAYERS[:2] or (
        config.num_hidden_layers == LITE_LAYERS[2] and config.vocab_size == LITE_VOCABULARY
    )
    if lite and config.q_lora_rank is not None:
        return (
            f"num_hidden_layers={config.num_hidden_layers}: llama.cpp takes a model of so many layers for one "
            f"without a query latent; only q_lora_rank=null can be written, not {config.q_lora_rank}"
        )
    if config.n_routed_experts < 2:
        return f"n_routed_experts={config.n_routed_experts}: llama.cpp needs at least 2"
    rope = config.rope_scaling
    if rope is None:
        return None
    if rope.mscale != rope.mscale_all_dim or rope.mscale_all_dim == 0.0:
        return (
            f"rope_scaling: mscale={rope.mscale}, mscale_all_dim={rope.mscale_all_dim}: llama.cpp computes as if both "
            "were equal and above 0; no other pair can be written"
        )
    if (rope.beta_fast, rope.beta_slow) != (BETA_FAST, BETA_SLOW):
        return (
            f"rope_scaling: beta_fast={rope.beta_fast}, beta_slow={rope.beta_slow}: llama.cpp computes with "
            f"{BETA_FAST:g} and {BETA_SLOW:g}; no other pair can be written"
        )
    return None


def remarks(config: ModelConfig) -> list[str]:
    """Return in what a GGUF file of this model is less than the model, a sentence each."""
    found = []
    if config.num_nextn_predict_layers:
        found.append("without the MTP layers, which llama.cpp's own conversion of this architecture leaves out too")
    if config.rms_norm_eps != LATENT_EPS:
        found.append(
            f"llama.cpp has one eps for all norms: those on the latents get rms_norm_eps={config.rms_norm_eps:g} in "
            f"place of {LATENT_EPS:g}"
        )
    return found


def add_config(writer: GGUFWriter, config: ModelConfig) -> None:
    """Add the keys of the model's shape; MTP layers are left out."""
    _add_size(writer, config)
    _add_attention(writer, config)
    _add_rope(writer, config)
    _add_experts(writer, config)


def _add_size(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_attention(writer: GGUFWriter, config: ModelConfig) -> None:
    """Add MLA as llama.cpp runs it, absorbed: one key of latent and rope for all heads, the latent as its value."""
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank or 0)  # 0 says that there is none; a missing key is refused
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)


def _add_rope(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    rope = config.rope_scaling
    if rope is None:
        writer.add_rope_scaling_type(RopeScalingType.NONE)
        return
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope.factor)
    writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
    # of this architecture alone, llama.cpp wants a tenth of mscale_all_dim and multiplies it back
    writer.add_rope_scaling_yarn_log_mul(0.1 * rope.mscale_all_dim)


def _add_experts(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    limited = config.topk_group < config.n_group  # llama.cpp aborts where a limit of groups limits nothing
    writer.add_expert_group_count(config.n_group if limited else 1)
    writer.add_expert_group_used_count(config.topk_group if limited else 1)
