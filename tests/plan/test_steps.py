"""Steps of a run whose batch grows."""

import math

import pytest

from abyssal.config import load_recipe
from abyssal.plan import count_steps

V3 = load_recipe("v3_671b")


def test_the_published_warm_up_of_2000_steps_is_28_1_billion_tokens():
    assert count_steps(V3, 28.1e9) == pytest.approx(2000, rel=0.01)


def test_the_published_run_has_227785_steps_after_its_ramp():
    ramp, whole = count_steps(V3, 469e9), count_steps(V3)
    assert whole - ramp == pytest.approx(227_785, rel=1e-4)
    # a ramp linear in tokens: the integral of 1 / batch is a logarithm
    assert ramp == pytest.approx(math.log(15360 / 3072) * 469e9 / ((15360 - 3072) * 4096), rel=1e-3)


@pytest.mark.parametrize("name", ["v3_671b_32k", "v3_671b_128k"])
def test_a_phase_of_the_context_extension_has_1000_steps(name):
    assert count_steps(load_recipe(name)) == 1000


def test_a_constant_batch_divides_and_rounds_up():
    run = load_recipe("v3_16b")
    a_step = run.batch_size_at(0) * run.train.sequence_length
    assert count_steps(run) == math.ceil(run.train.tokens / a_step)
    assert [count_steps(run, tokens) for tokens in (0, 1, a_step, a_step + 1)] == [0, 1, 1, 2]


def test_the_steps_are_those_of_a_walk_through_the_run():
    segments = "[{until=0.5, shape='linear', to=9}, {until=0.7, to=5}]"
    ramp = f"schedule.batch_size={{start=2, unit='fraction', segments={segments}}}"
    run = load_recipe("v3_16b", [ramp, "train.tokens=1_600_003", "train.batch_multiple=2"])
    for end in (0, 4096, 600_000, 900_000, 1_200_000, 1_600_003):
        seen = steps = 0
        while seen < end:
            seen += run.batch_size_at(seen) * run.train.sequence_length
            steps += 1
        assert count_steps(run, end) == steps
