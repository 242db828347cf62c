"""Schedules: pure functions of the tokens seen, and the published values at the published token counts."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.config import Segment, ValueSchedule, load_recipe
from abyssal.errors import ConfigError

T = 1e12
V3 = load_recipe("v3_671b")


def at(name, tokens):
    return getattr(V3.schedule, name).at(tokens, V3.train.tokens)


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (0, 0.0),
        (14.05e9, 1.1e-4),  # half of the warm-up
        (28.1e9, 2.2e-4),
        (5 * T, 2.2e-4),
        (9.999 * T, 2.2e-4),
        (10 * T, 2.2e-4),
        (12.15 * T, 1.21e-4),  # half of the cosine: the mean of its ends
        (11.075 * T, 2.2e-5 + 1.98e-4 * (1 + math.cos(math.pi / 4)) / 2),
        (14.3 * T, 2.2e-5),
        (14.5 * T, 2.2e-5),
        (14.632 * T, 2.2e-5),
        (14.634 * T, 7.3e-6),
        (14.8 * T, 7.3e-6),
    ],
)
def test_learning_rate_is_the_published_one(tokens, value):
    assert at("learning_rate", tokens) == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("tokens", "value"), [(0, 1e-3), (14.29 * T, 1e-3), (14.31 * T, 0.0), (14.8 * T, 0.0)])
def test_bias_update_speed_is_the_published_one(tokens, value):
    assert at("bias_update_speed", tokens) == value


@pytest.mark.parametrize(("tokens", "value"), [(0, 0.3), (9.99 * T, 0.3), (10.01 * T, 0.1), (14.8 * T, 0.1)])
def test_mtp_weight_is_the_published_one(tokens, value):
    assert at("mtp_weight", tokens) == value


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 3072), (469e9, 15360), (T, 15360), (14.8 * T, 15360)])
def test_batch_size_is_the_published_one(tokens, sequences):
    assert V3.batch_size_at(tokens) == sequences


def test_batch_size_stays_a_multiple_that_all_ranks_can_share():
    sizes = [V3.batch_size_at(tokens) for tokens in range(0, int(500e9), int(1e9))]
    assert all(size % 128 == 0 for size in sizes)
    assert sizes == sorted(sizes)
    assert max(abs(V3.batch_size_at(x) - at("batch_size", x)) for x in range(0, int(469e9), int(1e9))) <= 64


def test_the_constants_of_the_published_recipe():
    assert V3.train.tokens == 14.8e12
    assert V3.train.sequence_length == 4096
    assert (V3.optimizer.weight_decay, V3.optimizer.max_grad_norm) == (0.1, 1.0)
    assert V3.objective.balance_alpha == 1e-4
    assert V3.model.initializer_range == 0.006
    assert V3.model.rope_scaling is None


@pytest.mark.parametrize(("name", "length", "batch"), [("v3_671b_32k", 32768, 1920), ("v3_671b_128k", 131072, 480)])
def test_context_extension_is_the_published_one(name, length, batch):
    run = load_recipe(name)
    assert run.train.sequence_length == length
    assert run.train.tokens == 1000 * batch * length
    for tokens in (0, run.train.tokens // 2, run.train.tokens):
        assert run.batch_size_at(tokens) == batch
        assert run.schedule.learning_rate.at(tokens, run.train.tokens) == 7.3e-6
        assert run.schedule.bias_update_speed.at(tokens, run.train.tokens) == 0.0
        assert run.schedule.mtp_weight.at(tokens, run.train.tokens) == 0.1
    scaling = run.model.rope_scaling
    assert (scaling.factor, scaling.beta_fast, scaling.beta_slow) == (40.0, 32.0, 1.0)
    assert scaling.rotary_factor == 1.0
    assert run.model.max_position_embeddings >= length


def test_a_fraction_schedule_scales_with_the_run():
    schedule = ValueSchedule(start=1.0, unit="fraction", segments=(Segment(until=0.25, shape="linear", to=5.0),))
    assert [schedule.at(x, 400) for x in (0, 50, 100, 300)] == [1.0, 3.0, 5.0, 5.0]
    assert [schedule.at(x, 4000) for x in (0, 500, 1000, 3000)] == [1.0, 3.0, 5.0, 5.0]


def test_a_constant_segment_without_a_value_holds_what_was_reached():
    schedule = ValueSchedule(
        start=2.0,
        segments=(
            Segment(until=10),
            Segment(until=20, shape="linear", to=4.0),
            Segment(until=30),
            Segment(until=40, to=1),
        ),
    )
    assert [schedule.at(x, 100) for x in (0, 9, 15, 20, 25, 30, 35, 50)] == [2.0, 2.0, 3.0, 4.0, 4.0, 1.0, 1.0, 1.0]
    assert schedule.lowest == 1.0


@settings(deadline=None)
@given(
    st.floats(0, 10),
    st.lists(
        st.tuples(st.floats(0.01, 5), st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 10)), max_size=4
    ),
    st.floats(0, 30),
)
def test_a_schedule_stays_between_its_values(start, parts, tokens):
    ends, segments = 0.0, []
    for width, shape, to in parts:
        ends += width
        segments.append(Segment(until=ends, shape=shape, to=to))
    schedule = ValueSchedule(start=start, segments=tuple(segments))
    values = [start, *(to for _, _, to in parts)]
    assert min(values) - 1e-12 <= schedule.at(tokens, 100.0) <= max(values) + 1e-12
    assert schedule.lowest == min(values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"start": -1}, "start=-1: input should be greater than or equal to 0"),
        ({"start": 1, "segments": [{"until": 2}, {"until": 1}]}, "each `until` must be larger than the one before"),
        ({"start": 1, "segments": [{"until": 0}]}, "segments.0.until=0: input should be greater than 0"),
        ({"start": 1, "segments": [{"until": 3, "shape": "cosine"}]}, "segments.0.to: required, a cosine segment"),
        ({"start": 1, "segments": [{"until": 3, "shape": "step"}]}, "segments.0.shape='step': input should be"),
        ({"start": 1, "unit": "fraction", "segments": [{"until": 1.5}]}, "until=1.5: must be at most 1"),
    ],
)
def test_a_senseless_schedule_is_refused(values, sentence):
    with pytest.raises(ConfigError) as caught:
        ValueSchedule.parse(values, source="here")
    assert sentence in str(caught.value)
