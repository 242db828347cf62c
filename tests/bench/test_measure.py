from __future__ import annotations

import random

import pytest

from abyssal.bench.client import RequestResult
from abyssal.bench.measure import Distribution, ServingResult


def test_percentiles_are_those_of_the_sorted_values() -> None:
    values = [float(value) for value in range(1, 1002)]
    random.shuffle(values)
    found = Distribution.of(values)
    assert found is not None
    assert found.quantiles == {50: 501, 90: 901, 95: 951, 99: 991}
    assert (found.count, found.mean, found.most) == (1001, 501, 1001)
    assert Distribution.of([]) is None


def test_quantities_are_what_they_are_called() -> None:
    slow = RequestResult(due_s=1.0, sent_s=1.5, ended_s=5.25, chunks_s=[2.0, 2.5, 5.0], output_tokens=7)
    single = RequestResult(due_s=3.0, sent_s=3.0, ended_s=4.0, chunks_s=[3.75], output_tokens=1)
    failed = RequestResult(due_s=0.0, sent_s=0.0, ended_s=9.0, chunks_s=[0.5, 0.75], error="HTTP 503: full")
    result = ServingResult([slow, single, failed], seconds=10.0)
    assert result.samples() == {
        "ttft": [1.0, 0.75],  # from when the request was due, though it was sent later
        "tpot": [3.0 / 6],
        "itl": [0.5, 2.5],
        "latency": [4.25, 1.0],
    }
    totals = result.totals()
    assert (totals["requests_per_s"], totals["output_tokens_per_s"], totals["failed"]) == (0.2, 0.8, 1)
    assert result.errors() == {"HTTP 503: full": 1}
    assert result.acceptance() is None


def test_acceptance_is_over_all_drafts_of_requests_that_ended_well() -> None:
    counted = [RequestResult(0.0, accepted_drafts=a, rejected_drafts=r) for a, r in ((1, 3), (5, 1))]
    lost = RequestResult(0.0, accepted_drafts=9, rejected_drafts=0, error="x")
    assert ServingResult([*counted, lost], 1.0).acceptance() == pytest.approx(0.6)
