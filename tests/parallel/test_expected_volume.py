"""What a dispatcher is expected to send is what it sends where every choice of experts comes up equally often."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist

from abyssal.config import ModelConfig, load_recipe
from abyssal.config.parallel import ParallelConfig
from abyssal.parallel.dispatch import expert_parallel_dispatcher
from abyssal.parallel.dispatch.volume import CommunicationVolume, expected_volume
from abyssal.parallel.layout import RankLayout
from ranks import run_ranks
from ranks.choices import composed

RANKS, HIDDEN = 4, 136
#: Groups, of which a token may use so many, and experts a token.
ROUTINGS = {"free": (1, 1, 3), "groups": (4, 2, 3)}
CASES = [
    (dispatch, dtype, dispatch_dtype, node_size, routing)
    for dispatch, node_size in (
        ("direct", 2),
        ("direct", 3),
        ("node_limited", 2),
        ("node_limited", 1),
        ("node_limited", 4),
    )
    for dtype, dispatch_dtype in (("bfloat16", "fp8"), ("bfloat16", "compute"), ("float64", "compute"))
    for routing in ROUTINGS
]


def shape(routing: str) -> ModelConfig:
    groups, used, top_k = ROUTINGS[routing]
    return load_recipe("demo").model.model_copy(
        update={"hidden_size": HIDDEN, "n_group": groups, "topk_group": used, "num_experts_per_tok": top_k}
    )


def every_choice(model: ModelConfig) -> torch.Tensor:
    """Return each choice of experts within each choice of groups once: [T, K]."""
    size = model.n_routed_experts // model.n_group
    return torch.tensor(
        [
            chosen
            for groups in itertools.combinations(range(model.n_group), model.topk_group)
            for chosen in itertools.combinations(
                [group * size + k for group in groups for k in range(size)], model.num_experts_per_tok
            )
        ]
    )


def _dispatch() -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    found = []
    for dispatch, dtype, dispatch_dtype, node_size, routing in CASES:
        config = ParallelConfig.model_validate(
            {"ep_size": RANKS, "dispatch": dispatch, "dispatch_dtype": dispatch_dtype}
        )
        model, kind = shape(routing), getattr(torch, dtype)
        layout = RankLayout(1, 1, 1, RANKS, node_size)
        dispatcher = expert_parallel_dispatcher(config, layout, dist.group.WORLD, model.n_routed_experts)
        experts = every_choice(model)
        hidden = torch.ones(len(experts), HIDDEN, dtype=kind, requires_grad=True)
        weights = torch.ones(experts.shape, dtype=torch.promote_types(kind, torch.float32), requires_grad=True)
        inputs = {"hidden": hidden, "weights": weights, "experts": experts}
        composed(dispatcher, inputs, lambda r: (r.rows * r.row_weights[:, None]).to(r.rows.dtype)).sum().backward()
        found.append({name: asdict(volume) for name, volume in dispatcher.volumes.items()})
    return found


@pytest.fixture(scope="module")
def sent() -> list[list[dict[str, Any]]]:
    return run_ranks(RANKS, _dispatch)


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_expected_rows_and_bytes_are_those_of_balanced_choices(number: int, sent: list[list[dict[str, Any]]]) -> None:
    dispatch, dtype, dispatch_dtype, node_size, routing = CASES[number]
    config = ParallelConfig.model_validate({"ep_size": RANKS, "dispatch": dispatch, "dispatch_dtype": dispatch_dtype})
    model = shape(routing)
    layout = RankLayout(1, 1, 1, RANKS, node_size)
    tokens = len(every_choice(model))
    for rank in range(RANKS):
        token, micro_batch = expected_volume(config, layout, model, getattr(torch, dtype), rank)
        expected = {name: asdict(token[name] * tokens + micro_batch[name]) for name in token}
        assert expected["dispatch"]["rows"] > 0
        for name, counters in sent[rank][number].items():
            assert expected[name] == pytest.approx(counters, rel=1e-12, abs=1e-9), (name, rank)


def test_experts_of_one_rank_send_nothing() -> None:
    layout = RankLayout(1, 1, 4, 1, 8)
    token, micro_batch = expected_volume(ParallelConfig(), layout, shape("free"), torch.bfloat16)
    assert all(volume == CommunicationVolume() for volume in (*token.values(), *micro_batch.values()))
