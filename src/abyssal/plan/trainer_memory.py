"""What Abyssal's own trainer keeps of a micro-batch: autograd's saved tensors, as they are.

Norms keep their rows before and after the scale; attention makes its scores again; the cross-entropy keeps the head's
gradient instead of logits. bench/plan.py compares this with what autograd holds.
"""

from __future__ import annotations

from abyssal.plan.operations import GRADIENT_BYTES, VALUE_BYTES, DeviceWork

#: A norm's rows, normalised and scaled; its input is the residual, which nobody keeps.
NORM = 2 * VALUE_BYTES
#: Tensors of an FFN's width that autograd keeps: gate, up, silu(gate), their product.
FFN_TENSORS = 4


def trainer_activation_bytes(work: DeviceWork, kind: str) -> float:
    """Return the bytes that one block of a kind keeps of a micro-batch for its backward pass."""
    model, tokens = work.model, work.tokens
    hidden = model.hidden_size
    if kind == "heads":
        return tokens * hidden * (NORM + VALUE_BYTES) + model.vocab_size * hidden * GRADIENT_BYTES
    heads = model.num_attention_heads
    kept = 2.0 * hidden * NORM + ((model.q_lora_rank or 0) + model.kv_lora_rank) * NORM
    widths = 2 * model.qk_head_dim + model.qk_nope_head_dim + 2 * model.v_head_dim  # q, k, kv, output
    kept += heads * widths * VALUE_BYTES
    if kind == "dense":
        return tokens * (kept + FFN_TENSORS * model.intermediate_size * VALUE_BYTES)
    width = model.moe_intermediate_size
    kept += model.num_experts_per_tok * (hidden + 2 * width) * VALUE_BYTES + hidden * 4  # rows; their sum in fp32
    kept += FFN_TENSORS * model.n_shared_experts * width * VALUE_BYTES
    if kind == "mtp":
        kept += 3 * hidden * NORM + 2 * hidden * VALUE_BYTES
    return tokens * kept
