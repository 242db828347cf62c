"""Expert load in buckets: tokens add up, extremes stay in the picture, anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest

from abyssal.report.expert_load import LoadHistory, load_image


def history(loads: list[dict[str, list[int]]], max_buckets: int = 240) -> LoadHistory:
    kept = LoadHistory(max_buckets)
    for step, load in enumerate(loads, 1):
        assert kept.add(step, 7.0 * step, load)
    return kept


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 8, 9, 31, 32, 33])
def test_buckets_stay_few_and_end_where_the_run_ends(steps: int) -> None:
    kept = history([{"1": [step, 1], "2": [1, 1]} for step in range(steps)], max_buckets=4)
    assert len(kept) <= 4
    assert kept.ends("steps")[-1] == steps
    assert kept.ends("tokens")[-1] == 7.0 * steps
    assert (np.diff(kept.ends("steps")) > 0).all()


def test_load_of_a_bucket_is_of_all_its_tokens() -> None:
    kept = history([{"1": [1, 3]}, {"1": [5, 3]}, {"1": [9, 0]}], max_buckets=2)
    np.testing.assert_allclose(kept.relative(), [[[6 / 6, 6 / 6]], [[9 / 4.5, 0.0]]])


def test_layer_without_a_token_has_no_load() -> None:
    assert np.isnan(history([{"1": [0, 0]}]).relative()).all()


def test_picture_has_a_band_of_rows_a_layer_and_equally_long_columns() -> None:
    kept = history([{"1": [1, 1, 4], "2": [2, 2, 2]}, {"1": [3, 3, 3], "2": [1, 1, 4]}])
    image, ends = load_image(kept, "tokens", columns=4)
    assert image.shape == (6, 4)
    assert ends == (0.0, 14.0)
    np.testing.assert_allclose(image[2], [1, 1, 0, 0])
    np.testing.assert_allclose(image[5], [0, 0, 1, 1])


def test_expert_that_is_left_out_stays_visible_among_many() -> None:
    load = [10] * 100
    load[37] = 0
    image, _ = load_image(history([{"1": load, "2": [10] * 100}]), "steps", columns=2, rows=20)
    assert image.shape == (20, 2)
    assert np.isneginf(image[:10, 0]).sum() == 1
    assert np.isfinite(image[10:]).all()


@pytest.mark.parametrize(
    "load",
    [None, {}, [1, 2], {"1": []}, {"1": [1, 2], "2": [1]}, {"<b>": [1, 2]}, {"1": ["a", 2]}, {"1": [-1, 2]}, {"1": 3}],
)
def test_anything_but_a_load_is_refused(load: object) -> None:
    assert not LoadHistory().add(1, 2, load)


def test_load_of_another_shape_is_refused() -> None:
    kept = history([{"1": [1, 2]}])
    assert not kept.add(2, 14, {"1": [1, 2, 3]})
    assert not kept.add(2, 14, {"2": [1, 2]})
    assert len(kept) == 1
