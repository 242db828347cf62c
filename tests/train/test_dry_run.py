"""A dry run holds what a real run holds and sends what a real run sends, and its parts add up to the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from abyssal.config import RunConfig, load_recipe
from abyssal.errors import UsageError
from abyssal.parallel.apply import begin_step
from abyssal.parallel.layout import RankLayout, lay_out
from abyssal.plan import count_parameters
from abyssal.ranks.launch import Launch
from abyssal.ranks.placements import copies, local
from abyssal.ranks.ranks import Ranks
from abyssal.train.build import build_run
from abyssal.train.dry_run import DryRun, dry_run
from abyssal.train.dry_run.parts import DENSE, EMBEDDING, HEAD, MOE, MTP, build_parts, part_of
from abyssal.train.executor import forward
from abyssal.train.objective import MicroBatch, NextTokenObjective
from abyssal.train.step import train_step
from abyssal.train.training_state import TrainingState
from ranks import run_ranks
from ranks.training import SMALL


def recipe(**fields: Any) -> RunConfig:
    """The small demo of the other tests on many ranks; of each kind of block it has another number."""
    every = {
        **SMALL,
        "model.num_hidden_layers": 5,
        "model.first_k_dense_replace": 2,
        "train.micro_batch_size": 1,
        "train.compute_dtype": "bfloat16",
        **{name if "." in name else f"parallel.{name}": value for name, value in fields.items()},
    }
    return load_recipe("demo", [f"{name}={value}" for name, value in every.items()])


def held_by_all(config: RunConfig, layout: RankLayout) -> dict[tuple[str, str], float]:
    """Sum what the ranks of one stage hold of each parameter, each copy counting as its share of one."""
    found: Counter[tuple[str, str]] = Counter()
    for rank in range(layout.dp_size):
        for part, built in build_parts(config, layout, rank).items():
            for held in built.parameters:
                found[part, held.name] += held.local_elements / held.copies
            found[part, "biases"] += built.buffer_elements / layout.dp_size
    return dict(found)


@pytest.mark.parametrize(
    ("world_size", "fields"),
    [
        (1, {}),
        (2, {"zero_stage": 2}),
        (4, {"ep_size": 2}),
        (4, {"ep_size": 2, "dp_replicate_size": 2}),
        (8, {"ep_size": 4, "zero_stage": 3, "dispatch": "node_limited", "node_size": 2}),
        (12, {"pp_size": 3, "ep_size": 2, "dp_replicate_size": 2}),
    ],
)
def test_what_all_ranks_hold_is_the_model_once(world_size: int, fields: dict[str, Any]) -> None:
    config = recipe(**fields)
    run = dry_run(config, world_size)
    by_part: Counter[str] = Counter()
    for (part, _), elements in held_by_all(config, run.layout).items():
        by_part[part] += elements
    every = sum(by_part[part] * count for stage in run.stages for part, count in stage.cut.parts.items())
    second = sum(stage.cut.copied for stage in run.stages) * by_part[EMBEDDING]
    assert every - second == count_parameters(config.model).model
    assert run.elements["main"] == count_parameters(config.model).total
    assert run.elements["mtp"] == count_parameters(config.model).mtp.total
    assert not dist.is_initialized()


@pytest.mark.slow
def test_what_2048_ranks_hold_is_the_published_model_once() -> None:
    config = load_recipe("v3_671b")
    run = dry_run(config, 2048)
    assert (run.layout.sizes, len(run.stages)) == ((16, 1, 2, 64), 16)
    by_part = Counter[str]()
    for first, last in alike(config, run.layout, 0, 127):
        for part, built in build_parts(config, run.layout, first).items():
            by_part[part] += (last - first + 1) * built.sum("local_elements") + built.buffer_elements / 128 * (
                last - first + 1
            )
    counted = count_parameters(config.model)
    every = sum(by_part[part] * count for stage in run.stages for part, count in stage.cut.parts.items())
    assert every - by_part[EMBEDDING] == counted.model  # the last stage has a second one, for MTP
    assert run.elements == {"main": counted.total, "mtp": counted.mtp.total, "second_embedding": 129280 * 7168}


def alike(config: RunConfig, layout: RankLayout, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of ranks that hold as much of every parameter; it never grows from one rank to the next."""
    shapes = [
        [held.local for part in build_parts(config, layout, rank).values() for held in part.parameters]
        for rank in (first, last)
    ]
    if shapes[0] == shapes[1]:
        yield first, last
    else:
        middle = (first + last) // 2
        yield from alike(config, layout, first, middle)
        yield from alike(config, layout, middle + 1, last)


def test_the_first_rank_of_a_stage_holds_the_most() -> None:
    config = load_recipe("v3_671b")
    layout = lay_out(config.parallel, config.model, 2048, 8)
    first, last = (build_parts(config, layout, rank) for rank in (0, 127))
    for part, built in first.items():
        for field in ("stored_bytes", "use_bytes", "gradient_bytes"):
            assert built.sum(field) == last[part].sum(field) > 0  # padded alike
        assert built.sum("moment_bytes") >= last[part].sum("moment_bytes")
        for ours, theirs in zip(built.parameters, last[part].parameters, strict=True):
            assert ours.local_elements >= theirs.local_elements
    assert first["MoE block"].sum("local_elements") > last["MoE block"].sum("local_elements")  # 576 rows over 128 ranks


# A real run


def _real(cases: list[RunConfig]) -> list[dict[str, Any]]:
    """Make one step of each run on this rank; return shapes, bytes of the state, and bytes of every collective."""
    dist.init_process_group("gloo")
    ranks, found = Ranks.of_world(Launch(local_world_size=dist.get_world_size())), []
    for config in cases:
        state = TrainingState(config, torch.device("cpu"), ranks)
        sequences = config.batch_size_at(0) // state.layout.dp_size
        windows = torch.randint(320, (sequences, config.train.sequence_length + 1))
        for _ in range(2):  # the first step of ZeRO-3 gathers once more, to set up what is gathered
            with Collectives() as collectives:
                train_step(state.model, state.optimizer, windows, config, 0, ranks=ranks)
        held = {}
        for name, parameter in state.model.named_parameters():
            assert parameter.grad is not None, name
            moments = state.tensors["optimizer"][name]
            held[name] = {
                "shape": tuple(parameter.shape),
                "local": tuple(local(parameter).shape),
                "copies": copies(parameter),
                "stored_bytes": local(parameter).untyped_storage().nbytes(),
                "moment_bytes": sum(
                    local(moment).untyped_storage().nbytes() for key, moment in moments.items() if key != "step"
                ),
            }
        found.append({"held": held, "sent": dict(collectives.sent)})
    return found


class Collectives(TorchDispatchMode):
    """Counts the bytes that a ring of ranks sends from this one for FSDP's collectives, two ranks to an all-reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:  # its own dispatch comes here again, with the local tensors
            return NotImplemented
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            self.sent["all_gather"] += args[0].nbytes - args[1].nbytes
        elif name == "c10d::_reduce_scatter_base_":
            self.sent["reduce_scatter"] += args[1].nbytes - args[0].nbytes
        elif name == "c10d::allreduce_" and args[0][0].numel() > 64:  # the others are sums of losses and loads
            self.sent["all_reduce"] += args[0][0].nbytes
        return func(*args, **(kwargs or {}))


REAL = {
    "ep 2, ZeRO-1": {"ep_size": 2},
    "ep 2, ZeRO-2": {"ep_size": 2, "zero_stage": 2},
    "ep 2, ZeRO-3": {"ep_size": 2, "zero_stage": 3},
    "dp 4": {},
    "ep 2, no MTP": {"ep_size": 2, "model.num_nextn_predict_layers": 0},
    "ep 2, replicated": {"ep_size": 2, "dp_replicate_size": 2, "zero_stage": 2},
}


@pytest.fixture(scope="module")
def real() -> dict[str, list[dict[str, Any]]]:
    """What each of four ranks held and sent, by layout."""
    by_rank = run_ranks(4, _real, [recipe(**fields) for fields in REAL.values()])
    return {name: [found[number] for found in by_rank] for number, name in enumerate(REAL)}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.slow
def test_every_rank_holds_what_it_holds_in_a_real_run(name: str, real: dict[str, Any]) -> None:
    config = recipe(**REAL[name])
    layout = lay_out(config.parallel, config.model, 4, 4)
    for rank, found in enumerate(real[name]):
        parts = build_parts(config, layout, rank)
        ours = {(part, tail(held.name)): asdict(held) for part, built in parts.items() for held in built.parameters}
        for parameter, theirs in found["held"].items():
            held = ours[part_of(parameter, config.model), tail(parameter)]
            assert {key: held[key] for key in theirs} == theirs, (rank, parameter)
        assert {(part_of(p, config.model), tail(p)) for p in found["held"]} == set(ours)


def tail(name: str) -> str:
    """Return a parameter's name without the number of its layer."""
    return name.split(".", 3)[3] if name.startswith("model.layers.") else name


@pytest.mark.parametrize("name", REAL)
@pytest.mark.slow
def test_first_rank_gathers_and_reduces_as_many_bytes_as_in_a_real_step(name: str, real: dict[str, Any]) -> None:
    config = recipe(**REAL[name])
    run = dry_run(config, 4)
    traffic, sent = run.stages[0].communication, Counter(real[name][0]["sent"])
    assert run.share.micro_batches == 4
    in_vain = 0.0  # before the first block's backward pass FSDP fetches what was last in the micro-batch before
    if config.parallel.zero_stage == 3:
        held = [held for held in run.parts[MTP].parameters if held.unit == "block"]
        in_vain = sum(h.use_bytes / h.gathered_from * (h.gathered_from - 1) for h in held)
    assert traffic.all_gather + in_vain == sent["all_gather"] > 0
    assert traffic.reduce_scatter == sent["reduce_scatter"] > 0
    assert traffic.all_reduce == sent["all_reduce"]


# Memory, stages, refusals


def total(run: DryRun, field: str) -> int:
    """Sum a field over every parameter of the first stage."""
    return sum(run.parts[part].sum(field) * count for part, count in run.stages[0].cut.parts.items())


def test_gradients_and_gathered_weights_follow_the_zero_stage() -> None:
    first, second, third = (dry_run(recipe(ep_size=2, zero_stage=stage), 4) for stage in (1, 2, 3))
    whole, shards = total(first, "gradient_bytes"), total(first, "stored_bytes")
    memories = [run.stages[0].memory for run in (first, second, third)]
    assert memories[0].gradients == whole
    assert shards < memories[1].gradients == memories[2].gradients < whole
    assert memories[0].gathered == memories[1].gathered == total(first, "use_bytes")
    largest = max(first.parts[part].sum("use_bytes") for part in (DENSE, MOE, MTP))
    tables = sum(first.parts[part].sum("use_bytes") for part in (EMBEDDING, HEAD))
    assert memories[2].gathered == tables + largest
    for memory in memories:
        assert (memory.weights, memory.moments) == (memories[0].weights, memories[0].moments)
    traffic = [run.stages[0].communication for run in (first, second, third)]
    assert traffic[1].reduce_scatter == 4 * traffic[0].reduce_scatter  # every micro-batch
    assert traffic[0].all_gather == traffic[1].all_gather < traffic[2].all_gather


def test_weights_are_gathered_in_the_compute_dtype_but_for_the_router_and_cast_in_one_process() -> None:
    parts = dry_run(recipe(ep_size=2), 4).parts
    held = [held for held in parts[MOE].parameters if held.unit == "experts"]
    assert parts[MOE].sum("use_bytes", "experts") == 2 * sum(h.elements for h in held) / 2  # bf16, half of them here
    assert parts[MOE].sum("use_bytes", "router") == parts[MOE].sum("gradient_bytes", "router") > 0
    for part, unit in ((MOE, "block"), (EMBEDDING, "root"), (HEAD, "root")):
        assert 2 * parts[part].sum("use_bytes", unit) == parts[part].sum("gradient_bytes", unit) > 0
    assert all(part.sum("cast_bytes") == 0 for part in parts.values())
    alone = dry_run(recipe(), 1).parts
    assert alone[MOE].sum("use_bytes") == 0  # used where they are stored
    assert alone[MOE].sum("cast_bytes", "experts") == 2 * sum(h.elements for h in held)


def test_casts_are_the_weights_that_micro_batches_keep_for_their_backward_passes() -> None:
    config = recipe()
    run = dry_run(config, 1)
    model = build_run(config, torch.device("cpu")).model
    shapes = {tuple(sorted(parameter.shape)) for parameter in model.parameters() if parameter.dim() > 1}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    objective = NextTokenObjective(tokens=24, sequences=1, mtp=0.3, balance=1e-4)
    begin_step(model, config.parallel)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        windows = torch.randint(320, (2, 1, config.train.sequence_length + 1))
        held = [forward(model, objective, MicroBatch(window))[0] for window in windows]  # so no storage is used twice
    assert all(losses.total > 0 for losses in held)
    head = run.parts[HEAD].sum("cast_bytes")  # kept for the step, but by no backward pass
    assert sum(kept.values()) == total(run, "cast_bytes") - head > head > 0
    assert run.stages[0].memory.casts == total(run, "cast_bytes")


def test_muon_keeps_one_moment_of_hidden_matrices() -> None:
    config = recipe()
    adamw = dry_run(config, 1)
    optimizer = config.optimizer.model_copy(update={"name": "muon"})
    muon, shared = (dry_run(config.model_copy(update={"optimizer": optimizer}), ranks) for ranks in (1, 2))
    assert adamw.stages[0].memory.moments == 2 * total(adamw, "stored_bytes")
    assert total(adamw, "stored_bytes") < muon.stages[0].memory.moments < 1.5 * total(adamw, "stored_bytes")
    whole, half = muon.stages[0].memory.moments, shared.stages[0].memory.moments
    assert whole / 2 <= half < 0.52 * whole  # rows are shared unevenly where they are odd


def test_stages_hold_every_layer_once_and_neighbours_send_hidden_states() -> None:
    run = dry_run(recipe(pp_size=3, ep_size=2), 12)
    assert run.layout.dp_size == 4
    held = Counter[str]()
    for stage in run.stages:
        held.update(stage.cut.parts)
    assert held == {EMBEDDING: 2, DENSE: 2, MOE: 3, HEAD: 1, MTP: 1}
    assert [stage.cut.copied for stage in run.stages] == [False, False, True]
    assert [stage.cut.in_flight for stage in run.stages] == [3, 2, 1]
    hidden = run.share.sequences * run.share.length * 48 * 2
    assert [stage.communication.pipeline for stage in run.stages] == [hidden, 2 * hidden, hidden]
    embedding = 320 * 48 * 4 / 4  # a rank's rows, summed over the two stages that have them
    assert [stage.communication.all_reduce for stage in run.stages] == [embedding, 0, embedding]


def test_a_tied_head_is_a_second_embedding_of_the_last_stage() -> None:
    config = recipe(pp_size=2)
    model = config.model.model_copy(update={"tie_word_embeddings": True, "num_nextn_predict_layers": 0})
    run = dry_run(config.model_copy(update={"model": model}), 4)
    assert [stage.cut.copied for stage in run.stages] == [False, True]
    assert run.elements == {"main": count_parameters(model).total, "mtp": 0, "second_embedding": 320 * 48}
    assert [stage.communication.all_reduce for stage in run.stages] == [320 * 48 * 4 / 2] * 2


def test_a_pipeline_with_more_stages_than_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="6 stages, but the model has num_hidden_layers=5"):
        dry_run(recipe(pp_size=6), 6)


@pytest.mark.parametrize(("name", "world_size"), [("v3_16b", 64), ("v3_671b_32k", 2048), ("v3_671b_128k", 512)])
def test_every_packaged_recipe_has_a_dry_run(name: str, world_size: int) -> None:
    config = load_recipe(name)
    run = dry_run(config, world_size)
    assert run.elements["main"] == count_parameters(config.model).total
    assert run.share.sequences * run.layout.dp_size == config.batch_size_at(config.train.tokens)
