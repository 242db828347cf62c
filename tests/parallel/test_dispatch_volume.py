"""What dispatchers send, counted by other code; rows in FP8 and bf16."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from abyssal.config.parallel import ParallelConfig
from abyssal.model.dispatcher import ExpertRows
from abyssal.ops.experts import expert_ffn
from abyssal.ops.permute import expert_order
from abyssal.ops.row_fp8 import dequantise_rows, quantise_rows
from abyssal.parallel.dispatch import expert_parallel_dispatcher
from abyssal.parallel.dispatch.build import node_groups
from abyssal.parallel.layout import RankLayout
from ranks import run_ranks
from ranks.choices import (
    Choices,
    assert_equal_to_one_process,
    composed,
    differentiated,
    draw_cases,
    in_one_process,
)

pytestmark = pytest.mark.slow

DISPATCH = ("direct", "node_limited")


def weigh(rows: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
    """Experts without matrices, whose rounding is known: each row times its weight."""
    return (rows.to(weights.dtype) * weights[:, None]).to(rows.dtype)


def run_all(drawn: list[Choices], node_size: int, dispatch_dtype: str, kernel: Any) -> dict[tuple[str, str], Any]:
    """Run every case in both ways; return what came, results, types and volumes."""
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    layout = RankLayout(1, 1, 1, ranks, node_size)
    found = {}
    for case in drawn:
        for dispatch in DISPATCH:
            config = ParallelConfig.model_validate(
                {"ep_size": ranks, "dispatch": dispatch, "dispatch_dtype": dispatch_dtype}
            )
            dispatcher = expert_parallel_dispatcher(config, layout, dist.group.WORLD, case.num_experts)
            inputs, *stacks = case.of_rank(dist.get_rank())
            seen: list[ExpertRows] = []

            def run(received: ExpertRows, seen: Any = seen, stacks: Any = stacks) -> Tensor:
                seen.append(received)
                return kernel(received.rows, received.row_weights, received.counts, *stacks)  # type: ignore[no-any-return]

            output = composed(dispatcher, inputs, run)
            rows, row_weights, *_ = seen[0]
            if kernel is weigh:  # which has no gradients for the experts
                for stack in stacks:
                    stack.grad = torch.zeros_like(stack)
            found[case.name, dispatch] = {
                "rows": rows.detach().double().numpy(),
                "types": (rows.dtype, row_weights.dtype, output.dtype),
                "results": differentiated(inputs, output, *stacks),
                "volumes": {name: asdict(volume) for name, volume in dispatcher.volumes.items()},
            }
    return found


def crossings(case: Choices, node_size: int) -> dict[str, list[int]]:
    """Count, for each sending rank, what crosses, token by token."""
    per_node = case.experts * node_size
    counted: dict[str, list[int]] = {
        name: [0] * len(case.tokens) for name in ("pairs to ranks", "pairs to nodes", "tokens to nodes", "relayed")
    }
    for rank, inputs in enumerate(case.draw()[0]):
        home = rank // node_size
        for chosen in inputs["experts"].tolist():
            counted["pairs to ranks"][rank] += sum(expert // case.experts != rank for expert in chosen)
            counted["pairs to nodes"][rank] += sum(expert // per_node != home for expert in chosen)
            counted["tokens to nodes"][rank] += len({expert // per_node for expert in chosen} - {home})
            for expert in chosen:
                relay = expert // per_node * node_size + rank % node_size
                counted["relayed"][relay] += expert // case.experts != relay
    return counted


def test_eight_ranks_on_two_nodes_send_a_token_to_a_node_once_and_get_equal_results() -> None:
    drawn = draw_cases(8)
    drawn.append(replace(drawn[0], name="fp32", dtype=torch.float32, top_k=5))
    found = run_ranks(8, run_all, drawn, 4, "compute", expert_ffn)
    for case in drawn:
        expected = in_one_process(case)
        counted = crossings(case, 4)
        for dispatch in DISPATCH:
            results = [part[case.name, dispatch]["results"] for part in found]
            tolerance = 1e-12 if case.dtype == torch.float64 else 1e-5
            assert_equal_to_one_process(results, expected, f"{case}, {dispatch}", tolerance)
        for rank, part in enumerate(found):
            direct, limited = (part[case.name, dispatch]["volumes"] for dispatch in DISPATCH)
            for name in ("dispatch", "combine_backward"):
                assert direct[name]["rows"] == counted["pairs to ranks"][rank]
                assert direct[name]["internode_rows"] == counted["pairs to nodes"][rank]
                assert limited[name]["internode_rows"] == counted["tokens to nodes"][rank]
                assert limited[name]["rows"] == counted["tokens to nodes"][rank] + counted["relayed"][rank]
                assert limited[name]["internode_rows"] <= direct[name]["internode_rows"]
        for name in ("dispatch", "combine", "dispatch_backward", "combine_backward"):
            crossed = {
                dispatch: sum(part[case.name, dispatch]["volumes"][name]["internode_rows"] for part in found)
                for dispatch in DISPATCH
            }
            assert crossed["direct"] == sum(counted["pairs to nodes"])
            assert crossed["node_limited"] == sum(counted["tokens to nodes"])
            if crossed["direct"]:
                ratio = crossed["node_limited"] / crossed["direct"]
                print(f"{case.name}, {name}: {crossed} rows cross nodes, {ratio:.2f} as many")


def rounded(rows: Tensor) -> Tensor:
    """The definition: there and back in FP8."""
    return dequantise_rows(*quantise_rows(rows, power_of_two=True), rows.dtype)


class _Sent(torch.autograd.Function):
    """Tokens are rounded, their gradients are not."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rounded(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Returned(torch.autograd.Function):
    """Outputs are not rounded, their gradients are."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return rounded(grad)


@pytest.mark.parametrize("width", [11, 256, 300], ids="width{}".format)
def test_fp8_rounds_what_goes_to_experts_in_both_directions_and_nothing_that_comes_back(width: int) -> None:
    drawn = draw_cases(4, width=width)
    found = run_ranks(4, run_all, drawn, 2, "fp8", expert_ffn)
    for case in drawn:
        expected = in_one_process(case, sent=_Sent.apply, returned=_Returned.apply)
        inputs = case.of_all()[0]
        order, _, _ = expert_order(inputs["experts"], case.num_experts)
        sent = inputs["hidden"].detach()[order // case.top_k].numpy()  # by expert, tokens of a lower rank first
        bound = error_bound(sent)
        for dispatch in DISPATCH:
            parts = [part[case.name, dispatch] for part in found]
            assert_equal_to_one_process([part["results"] for part in parts], expected, f"{case}, {dispatch}")
            if dispatch == "direct":  # the other has another order within an expert
                assert (np.abs(np.concatenate([part["rows"] for part in parts]) - sent) <= bound).all(), case


def error_bound(rows: np.ndarray) -> np.ndarray:
    """Half a step of e4m3: 1/16 of a value, or 2**-10 of the scale; a scale is at most twice its group's amax / 448."""
    bounds = np.empty_like(rows)
    for start in range(0, rows.shape[1], 128):
        group = np.abs(rows[:, start : start + 128])
        bounds[:, start : start + 128] = np.maximum(group / 16, group.max(1, keepdims=True) * 2 / 448 * 2.0**-10)
    return bounds * (1 + 1e-6)  # the scale and the value are divided in fp32


@pytest.mark.parametrize("dispatch", DISPATCH)
@pytest.mark.parametrize("dispatch_dtype", ["compute", "fp8"])
def test_bytes_are_those_of_rows_weights_lists_and_counts(dispatch: str, dispatch_dtype: str) -> None:
    """In bf16 with fp32 weights, as a run has them."""
    case = replace(draw_cases(4)[1], dtype=torch.bfloat16, width=300)
    found = run_ranks(4, run_all, [case], 2, dispatch_dtype, expert_ffn)
    counted = crossings(case, 2)
    out = 300 + math.ceil(300 / 128) if dispatch_dtype == "fp8" else 2 * 300
    back = 2 * 300
    for rank, part in enumerate(found):
        volumes = part[case.name, dispatch]["volumes"]
        if dispatch == "direct":
            pairs, plan = counted["pairs to nodes"][rank], 2 * case.experts * 8  # to two ranks of the other node
            assert volumes["dispatch"]["internode_bytes"] == pairs * (out + 4) + plan
            assert volumes["combine_backward"]["internode_bytes"] == pairs * out
            pairs, plan = counted["pairs to ranks"][rank], 3 * case.experts * 8
            assert volumes["dispatch"]["bytes"] == pairs * (out + 4) + plan
            assert volumes["combine_backward"]["bytes"] == pairs * out
        else:
            rows, pairs = counted["tokens to nodes"][rank], counted["pairs to nodes"][rank]
            plan = 2 * (2 * case.experts + 1) * 8
            assert volumes["dispatch"]["internode_bytes"] == rows * out + pairs * (4 + 4) + plan
            assert volumes["combine_backward"]["internode_bytes"] == rows * out
    for name, of_weights in (("combine", 0), ("dispatch_backward", 4)):
        sent = sum(part[case.name, dispatch]["volumes"][name]["internode_bytes"] for part in found)
        rows = sum(counted["pairs to nodes" if dispatch == "direct" else "tokens to nodes"])
        assert sent == rows * back + sum(counted["pairs to nodes"]) * of_weights


def test_bf16_rows_keep_their_type_and_sums_are_rounded_once_or_once_a_node_too() -> None:
    drawn = draw_cases(4, dtype=torch.bfloat16)
    found = run_ranks(4, run_all, drawn, 2, "compute", weigh)
    for case in drawn:
        inputs = case.of_all()[0]
        hidden, weights = inputs["hidden"].detach(), inputs["weights"].detach()
        rows = (hidden.float()[:, None] * weights[..., None]).bfloat16().double()  # [T, K, D] as experts return them
        exact, sizes = rows.sum(1).numpy(), rows.abs().sum(1).numpy()
        for dispatch in DISPATCH:
            parts = [part[case.name, dispatch] for part in found]
            assert {part["types"] for part in parts} == {(torch.bfloat16, torch.float32, torch.bfloat16)}
            error = np.abs(np.concatenate([part["results"]["output"] for part in parts]) - exact)
            rounded_once = np.abs(exact) * 2.0**-8
            bound = rounded_once if dispatch == "direct" else rounded_once + sizes * 2.0**-8  # the sum of each node too
            assert (error <= bound * 1.01 + sizes * 2.0**-20).all(), f"{case}, {dispatch}"


def test_node_groups_are_rows_and_columns_of_every_expert_group() -> None:
    groups = node_groups(RankLayout(pp_size=2, dp_replicate_size=1, edp_size=1, ep_size=6, node_size=3))
    assert groups["experts_internode"] == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
    assert groups["experts_intranode"] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def run_beside(case: Choices) -> dict[str, Any]:
    """Dispatch in one of two expert groups of two ranks, each rank a node."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    layout = RankLayout(1, 1, 2, 2, 1)
    own, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    config = ParallelConfig(ep_size=2, dispatch="node_limited")
    dispatcher = expert_parallel_dispatcher(config, layout, own, case.num_experts)
    case = replace(case, seed=case.seed + rank // 2)
    inputs, *stacks = case.of_rank(rank % 2)
    output = composed(dispatcher, inputs, lambda received: expert_ffn(*received[:3], *stacks))
    return differentiated(inputs, output, *stacks)


def test_expert_groups_beside_one_another_do_not_meet() -> None:
    case = draw_cases(2)[0]
    found = run_ranks(4, run_beside, case)
    for group in range(2):
        other = replace(case, seed=case.seed + group)
        assert_equal_to_one_process(found[2 * group : 2 * group + 2], in_one_process(other), str(other))
