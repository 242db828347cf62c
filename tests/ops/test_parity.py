"""Every version of every operation, as the registry lists them, against the definition in float64.

The definitions themselves are compared with loops by hand in each operation's own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from abyssal.ops import attention as attention_module
from abyssal.ops.kernels import OPERATIONS
from abyssal.ops.version import Version

CPU = torch.device("cpu")
SEEDS = range(4)  # an error is that over so many draws, so that no lucky one decides
#: The error of a result that is rounded once, relative to its norm; in float64 what two orders of a sum may differ by.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2.0**-23 / 5, torch.bfloat16: 2.0**-7 / 5}


class Inputs(NamedTuple):
    """What an operation is called with, in float64."""

    arguments: tuple[Any, ...]
    differentiable: tuple[int, ...]  # a tensor, or a list of them
    wide: tuple[int, ...] = ()  # never in less than fp32
    prepared: tuple[int, ...] = ()  # weights, for `Version.prepare`


Normal = Callable[..., Tensor]


def attention(
    normal: Normal, q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], key_dims: int, value_dims: int
) -> Inputs:
    heads, queries, keys = 3, sum(q_lengths), sum(k_lengths)
    q, k, v = normal(queries, heads, key_dims), normal(keys, heads, key_dims), normal(keys, heads, value_dims)
    return Inputs((2 * q, k, v, q_lengths, k_lengths, key_dims**-0.5), (0, 1, 2))


def latent_attention(normal: Normal, *case: tuple[int, int]) -> Inputs:
    heads, latent, rope, tokens = 3, 22, 6, sum(new for new, _ in case)
    cached = [normal(seen, latent + rope) for _, seen in case]
    lengths = [new for new, _ in case]
    return Inputs(
        (2 * normal(tokens, heads, latent), 2 * normal(tokens, heads, rope), cached, lengths, 0.19), (0, 1, 2)
    )


def linear(normal: Normal, rows: int, columns: int, width: int) -> Inputs:
    return Inputs((normal(rows, width), normal(columns, width)), (0, 1), prepared=(1,))


def experts(normal: Normal, counts: tuple[int, ...], hidden: int, width: int) -> Inputs:
    rows = sum(counts)
    stacks = normal(len(counts), 2 * width, hidden), normal(len(counts), hidden, width)
    weights = normal(rows).sigmoid()
    return Inputs((normal(rows, hidden), weights, torch.tensor(counts), *stacks), (0, 1, 3, 4), (1, 3, 4), (3, 4))


def targets_of(logits: Tensor) -> Tensor:
    return (logits.argmax(-1) + torch.arange(len(logits)) % 3).remainder(logits.shape[1])  # every third the likeliest


def log_probabilities(normal: Normal, tokens: int, hidden: int, vocabulary: int) -> Inputs:
    h, head = normal(tokens, hidden), normal(vocabulary, hidden) / 2
    return Inputs((h, head, targets_of(h @ head.T)), (0, 1), (1,))


def cross_entropy(normal: Normal, tokens: int, hidden: int, vocabulary: int, weighted: bool) -> Inputs:
    inputs = log_probabilities(normal, tokens, hidden, vocabulary)
    return inputs._replace(arguments=(*inputs.arguments, normal(tokens)), wide=(1, 3)) if weighted else inputs


def rms_norm(normal: Normal, *shape: int) -> Inputs:
    return Inputs((normal(*shape), 1 + normal(shape[-1]) / 2, 1e-3), (0, 1), (1,))


#: How to draw the inputs of each operation, and the sizes to draw; no two dims of a case are alike.
CASES: dict[str, tuple[Callable[..., Inputs], list[tuple[Any, ...]]]] = {
    "attention": (
        attention,
        [
            ((33,), (33,), 24, 16),
            ((8, 8), (8, 8), 11, 13),
            ((3, 17, 9), (3, 17, 9), 24, 16),
            ((5, 1), (31, 20), 24, 16),
            ((150,), (150,), 10, 6),
            ((140,), (170,), 10, 6),
        ],
    ),
    "latent_attention": (
        latent_attention,
        [((1, 39),), ((1, 39), (1, 22), (1, 1)), ((1, 8), (1, 8)), ((7, 21), (5, 5)), ((41, 41),), ((3, 8), (1, 40))],
    ),
    "linear": (linear, [(1, 13, 24), (7, 13, 24), (33, 40, 65)]),
    "experts": (experts, [((9, 0, 13, 1), 24, 17), ((0, 70, 5), 19, 23), ((1,), 12, 7)]),
    "cross_entropy": (cross_entropy, [(41, 24, 31, False), (41, 24, 31, True), (1100, 9, 300, True)]),
    "log_probabilities": (log_probabilities, [(41, 24, 31), (1100, 9, 300)]),
    "rms_norm": (rms_norm, [(40, 96), (5, 3, 14)]),
}
ROWS = [
    pytest.param(operation, version, case, id=f"{operation}-{version.name}-{case}")
    for operation, versions in OPERATIONS.items()
    for version in versions[:-1]
    for case in CASES[operation][1]
]


def draw(operation: str, case: tuple[Any, ...], seed: int, dtype: torch.dtype) -> tuple[Inputs, Normal]:
    """Return inputs in float64 that `dtype` holds exactly, and what draws more."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    inputs = CASES[operation][0](normal, *case)
    return inputs._replace(arguments=tuple(convert(x, dtype, torch.float64) for x in inputs.arguments)), normal


def convert(argument: Any, *dtypes: torch.dtype) -> Any:
    if isinstance(argument, list):
        return [convert(x, *dtypes) for x in argument]
    if isinstance(argument, Tensor) and argument.is_floating_point():
        for dtype in dtypes:
            argument = argument.to(dtype)
    return argument


@cache
def results(
    version: Version, operation: str, case: tuple[Any, ...], dtype: torch.dtype, of: torch.dtype
) -> list[Tensor]:
    """Return values, and gradients if it has any, computed in `dtype` from numbers that `of` holds; over all seeds."""
    runs = []
    for seed in SEEDS:
        inputs, normal = draw(operation, case, seed, of)
        wide = torch.promote_types(dtype, torch.float32)
        arguments = [convert(x, wide if i in inputs.wide else dtype) for i, x in enumerate(inputs.arguments)]
        trains = "train" in version.purposes
        chosen = [arguments[i] for i in inputs.differentiable]
        leaves = [leaf.requires_grad_(trains) for x in chosen for leaf in (x if isinstance(x, list) else [x])]
        for i in inputs.prepared:
            arguments[i] = version.prepare(arguments[i], dtype)
        out = version(*arguments)
        found = [out.detach().double()]
        coefficients = convert(normal(*out.shape), of, out.dtype)
        if trains:
            gradients = torch.autograd.grad(out, leaves, coefficients)
            assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
            found += [g.double() for g in gradients]
        runs.append([x.flatten() for x in found])
    return [torch.cat(parts) for parts in zip(*runs, strict=True)]


@pytest.fixture(autouse=True)
def _slow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plain products of bf16 be tested on every CPU: without the instructions they are slow, and the same."""
    monkeypatch.setattr(attention_module, "why_not_bfloat16_products", lambda: None)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("operation", "version", "case"), ROWS)
def test_error_is_within_the_versions_bound(
    operation: str, version: Version, case: tuple[Any, ...], dtype: torch.dtype
) -> None:
    """At most so many times the definition's own in the same dtype, values and gradients; see `Version.error_bound`."""
    if reason := version.why_not(CPU, dtype):
        pytest.skip(reason)
    definition = OPERATIONS[operation][-1]
    exact = results(definition, operation, case, torch.float64, dtype)
    known = results(definition, operation, case, dtype, dtype)
    for found, oracle, reference in zip(results(version, operation, case, dtype, dtype), exact, known, strict=False):
        own, allowed = ((x - oracle).norm() / oracle.norm() for x in (found, reference))
        assert own <= version.error_bound * max(allowed, ROUNDING[dtype])


def test_every_operation_has_cases() -> None:
    assert CASES.keys() == OPERATIONS.keys()
    assert all(len(cases) > 1 for _, cases in CASES.values())
