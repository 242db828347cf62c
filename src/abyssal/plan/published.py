"""Published figures that the plan is held against; docs/plan.md shows both side by side."""

from __future__ import annotations

from dataclasses import dataclass

from abyssal.plan.layout import PUBLISHED, Layout

#: Seconds of the published step's parts (arXiv 2505.09343, table 4); of which rank is not said.
STEP_S = 19.926
STEP_PARTS = {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "optimizer": 0.29}
MFU, MFU_NOT_CAUSAL = 0.3894, 0.4373
#: Device hours of the report's table 1, and the price that it takes.
PRETRAINING_HOURS, EXTENSION_HOURS, POST_TRAINING_HOURS, PRICE = 2_664_000.0, 119_000.0, 5_000.0, 2.0


@dataclass(frozen=True)
class PublishedRun:
    """Somebody's training at length 4,096; nothing was fitted to it.

    Where `reason` is given the prediction is more than a quarter off, and it says why.
    """

    who: str
    cluster: str
    layout: Layout
    sequences: int
    tokens_per_device_s: float
    reason: str = ""
    recipe: str = "v3_671b"


def _interleaved(pp_size: int, stages_per_rank: int, ep_size: int, precision: str, tp_size: int = 1) -> Layout:
    return Layout(
        pp_size=pp_size,
        ep_size=ep_size,
        tp_size=tp_size,
        schedule="interleaved",
        stages_per_rank=stages_per_rank,
        precision="fp8" if precision == "fp8" else "bf16",
    )


#: The layouts are those of the projects' own tables and recipes; a batch that they do not state is that of the
#: neighbouring release.
HELD_OUT = (
    PublishedRun("Megatron-Bridge 25.09, FP8", "h100:1024", _interleaved(8, 4, 64, "fp8", 2), 8192, 1297),
    PublishedRun("Megatron-Bridge 2026-08, BF16", "h100:1024", _interleaved(8, 4, 64, "bf16", 2), 16384, 1061),
    PublishedRun("NeMo Automodel, BF16", "h100:256", _interleaved(4, 8, 64, "bf16"), 512, 1002),
    PublishedRun(
        "Megatron-Bridge 26.04, MXFP8",
        "b200:256",
        _interleaved(8, 2, 32, "fp8"),
        4096,
        3328,
        "32 expert-parallel devices lie on four nodes; the project's later recipe names EP8, inside a node, and with "
        "that the plan says what stands in the row below",
    ),
    PublishedRun("the same with EP8", "b200:256", _interleaved(8, 2, 8, "fp8"), 4096, 3328),
    PublishedRun("Megatron-Bridge 25.11, BF16", "gb200:256", _interleaved(4, 4, 64, "bf16"), 4096, 3139),
    PublishedRun("Megatron-Bridge 25.11, MXFP8", "gb200:256", _interleaved(8, 4, 32, "fp8"), 4096, 4018),
    PublishedRun("Megatron-Bridge 26.08, MXFP8", "gb200:256", _interleaved(4, 4, 64, "fp8"), 4096, 4912),
    PublishedRun(
        "Megatron-Bridge 26.08, MXFP8",
        "gb300:256",
        _interleaved(2, 8, 32, "fp8"),
        4096,
        6288,
        "it multiplies attention and its output in FP8, recomputes nothing and replays whole steps as CUDA graphs, so "
        "that launches cost nothing; the plan takes bf16 attention, the report's recomputation, and the time between "
        "kernels of an H800 in early 2025",
    ),
    PublishedRun(
        "torchtitan + Nebius, MXFP8 experts",
        "b200:256",
        Layout(pp_size=8, ep_size=32, schedule="1f1b", precision="bf16"),
        1024,
        918,
        "its layout is not stated, so this one is a guess; at 11% MFU it shows what a plain stack leaves unused, which "
        "no ceiling predicts",
    ),
    PublishedRun(
        "torchtitan, 16B, all-to-all not overlapped",
        "h100:32",
        Layout(ep_size=32, precision="bf16", overlap=False),
        1024,
        7670,
        "a 16B model whose kernels are short, on 80 GB devices that are not named: time between launches, which the "
        "plan scales with the kernels, weighs more",
        recipe="v3_16b",
    ),
    PublishedRun(
        "torchtitan, 16B, overlapped",
        "h100:32",
        Layout(ep_size=32, precision="bf16", overlap=True),
        1024,
        9775,
        "the same",
        recipe="v3_16b",
    ),
)

__all__ = [
    "EXTENSION_HOURS",
    "HELD_OUT",
    "MFU",
    "MFU_NOT_CAUSAL",
    "POST_TRAINING_HOURS",
    "PRETRAINING_HOURS",
    "PRICE",
    "PUBLISHED",
    "STEP_PARTS",
    "STEP_S",
    "PublishedRun",
]
