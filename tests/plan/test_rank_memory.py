"""Memory: the ranks together hold the model once (or twice), and excess is said in one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from abyssal.config import load_recipe
from abyssal.plan.calibration import Calibration
from abyssal.plan.hardware import packaged_chips, parse_cluster
from abyssal.plan.layout import PUBLISHED, Layout
from abyssal.plan.operations import DeviceWork
from abyssal.plan.parameters import count_parameters
from abyssal.plan.rank_memory import (
    RankMemory,
    block_activation_bytes,
    estimate_memory,
    memory_fault,
    rank_parameters,
    replicas,
)
from abyssal.plan.trainer_memory import trainer_activation_bytes
from abyssal.plan.training_plan import plan_step

LAYOUTS = [
    PUBLISHED,
    Layout(pp_size=8, ep_size=64, schedule="dualpipev"),
    Layout(pp_size=4, ep_size=32, schedule="interleaved", stages_per_rank=4),
    Layout(pp_size=2, ep_size=8, tp_size=2),
    Layout(ep_size=128),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_hold_every_parameter_once_or_twice(layout: Layout) -> None:
    """Experts over ep_size devices; DualPipe holds everything twice; MTP needs the embedding beside it."""
    run, cluster = load_recipe("v3_671b"), parse_cluster("h800:2048", packaged_chips())
    step = plan_step(run, cluster, layout, Calibration(), 16384)
    stages = step.pipeline.stages
    held = [rank_parameters(run.model, layout, [stages[n] for n in numbers]) for numbers in layout.stages_of_ranks]
    count = count_parameters(run.model)
    times = 2 if layout.schedule == "dualpipe" else 1
    experts = (count.main.routed_experts + count.mtp.routed_experts) * times
    assert sum(h.experts for h in held) * layout.ep_size == pytest.approx(experts)
    if layout.tp_size == 1:
        together = layout.schedule in ("dualpipe", "dualpipev") or layout.pp_size == 1
        copy = 0 if together else count.main.embedding
        latents = 62 * (512 + 1536) + 4 * 7168  # norms that the plan leaves out: those of latents, and four at the ends
        rest = times * (count.trainable + copy - latents) - experts
        assert sum(h.dense + h.unquantized for h in held) == pytest.approx(rest, rel=1e-6)


def test_dualpipe_holds_attention_twice_as_often_and_zero_shards_over_both() -> None:
    cluster = parse_cluster("h800:2048", packaged_chips())
    assert replicas(PUBLISHED, cluster) == (256, 4)
    assert replicas(replace(PUBLISHED, schedule="zb1p"), cluster) == (128, 2)
    assert replicas(Layout(pp_size=4, tp_size=2, ep_size=64), cluster) == (256, 8)


def test_closed_form_of_activations_is_near_the_table() -> None:
    run, cluster = load_recipe("v3_671b"), parse_cluster("h800:2048", packaged_chips())
    for layout in LAYOUTS[:3]:
        step = plan_step(run, cluster, layout, Calibration(), 16384)
        estimate = estimate_memory(DeviceWork(run.model, layout, 4096), cluster, step.pipeline.stages)
        exact_most, near_most = (max(m.activations for m in memory) for memory in (step.memory, estimate))
        assert near_most == pytest.approx(exact_most, rel=0.2)
        for exact, near in zip(step.memory, estimate, strict=True):
            assert replace(near, activations=0.0) == replace(exact, activations=0.0)


def test_recomputing_more_keeps_less_and_fp8_half_of_the_operands() -> None:
    model = load_recipe("v3_671b").model

    def kept(**changes: str) -> float:
        return block_activation_bytes(DeviceWork(model, Layout(ep_size=8, **changes), 4096), "moe")  # type: ignore[arg-type]

    assert kept(recompute="full") == 4096 * 7168 * 2
    assert kept(recompute="full") < kept() < kept(recompute="none")
    assert kept(precision="fp8") < 0.62 * kept(precision="bf16")


def test_fault_says_how_much_what_and_where() -> None:
    memory = (RankMemory(parameters=2e9), RankMemory(gradients=3e9, activations=6e9))
    fault = memory_fault(PUBLISHED, memory, 5e9)
    assert fault is not None
    assert str(fault) == (
        "a device of pipeline rank 1 needs 9.0 GB of 5.0 GB, 4.0 GB too many; most are activations, 6.0 GB"
    )
    assert memory_fault(PUBLISHED, memory, 9e9) is None


def test_the_trainer_keeps_what_autograd_keeps() -> None:
    """Counted with torch's own hooks, on a model whose dims all differ; bench/plan.py does it at real sizes."""
    torch = pytest.importorskip("torch")
    from abyssal.model import Transformer, initialise
    from abyssal.ops.kernels import choose_kernels
    from abyssal.train.executor import forward
    from abyssal.train.objective import MicroBatch, NextTokenObjective

    config = load_recipe("demo").model.model_copy(
        update={
            "vocab_size": 700, "hidden_size": 112, "intermediate_size": 304, "moe_intermediate_size": 80,
            "q_lora_rank": 72, "kv_lora_rank": 56, "num_attention_heads": 3, "num_hidden_layers": 3,
        }
    )  # fmt: skip
    length, sequences = 256, 6
    kernels = choose_kernels(torch.device("cpu"), torch.bfloat16, "train")
    model = initialise(Transformer(config, kernels, torch.bfloat16), 0)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, object]] = {}

    def pack(tensor):  # type: ignore[no-untyped-def]
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    windows = torch.randint(config.vocab_size, (sequences, length + 1), generator=torch.Generator().manual_seed(1))
    objective = NextTokenObjective(tokens=sequences * length, sequences=sequences, mtp=0.3, balance=1e-4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, objective, MicroBatch(windows))
    measured = sum(size for size, _ in kept.values())
    del loss
    work = DeviceWork(
        config, Layout(precision="bf16", recompute="none", state="trainer", micro_batch_size=sequences), length
    )
    blocks = {"dense": 1, "moe": 2, "mtp": 1, "heads": 2}
    predicted = sum(times * trainer_activation_bytes(work, kind) for kind, times in blocks.items())
    casts = 2 * (count_parameters(config).model - 2 * config.vocab_size * config.hidden_size)
    assert predicted + casts == pytest.approx(measured, rel=0.08)
