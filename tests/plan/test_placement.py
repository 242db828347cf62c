"""Placement of experts on GPUs: the published example, and what any placement must keep."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.errors import UsageError
from abyssal.plan.placement import Placement, place_experts, placement_in_order

#: The example of the README of deepseek-ai/EPLB: two layers of 12 experts, 16 places on 8 GPUs of 2 nodes.
LOADS = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
PUBLISHED = ((5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1), (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1))


def test_the_published_example_gives_the_identical_placement():
    placed = place_experts(LOADS, redundant=4, gpus=8, groups=4, nodes=2)
    assert placed.experts == PUBLISHED


def test_without_whole_groups_a_node_the_policy_is_global():
    placed = place_experts(LOADS, redundant=4, gpus=8, groups=3, nodes=2)
    assert placed == place_experts(LOADS, redundant=4, gpus=8)
    assert placed.experts != PUBLISHED


@st.composite
def problems(draw):
    """Loads, and sizes that divide."""
    nodes, gpus_a_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = nodes * draw(st.integers(1, 3))
    experts = groups * draw(st.integers(1, 4))
    gpus = nodes * gpus_a_node
    redundant = -experts % gpus + gpus * draw(st.integers(0, 2))
    redundant = min(redundant, experts * (gpus - 1))  # which divides as well
    load = st.integers(0, 1000)
    loads = draw(st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=1, max_size=3))
    return loads, {"redundant": redundant, "gpus": gpus, "groups": groups, "nodes": nodes}


@settings(deadline=None)
@given(problems())
def test_every_expert_has_a_place_and_every_gpu_equally_many(problem):
    loads, sizes = problem
    placed = place_experts(loads, **sizes)
    places = len(loads[0]) + sizes["redundant"]
    for layer in range(len(loads)):
        on_gpus = [placed.on_gpu(layer, gpu) for gpu in range(sizes["gpus"])]
        assert {len(here) for here in on_gpus} == {places // sizes["gpus"]}
        assert tuple(itertools.chain(*on_gpus)) == placed.experts[layer]
        assert set(placed.experts[layer]) == set(range(len(loads[0])))
    for row, expert_loads in zip(placed.gpu_loads(loads), loads, strict=True):
        assert math.isclose(sum(row), sum(expert_loads), abs_tol=1e-6)


@settings(deadline=None)
@given(problems())
def test_a_group_and_the_copies_of_its_experts_stay_on_one_node(problem):
    loads, sizes = problem
    placed = place_experts(loads, **sizes)
    size = len(loads[0]) // sizes["groups"]
    a_node = sizes["gpus"] // sizes["nodes"]
    for layer in range(len(loads)):
        nodes_of = {}
        for gpu in range(sizes["gpus"]):
            for expert in placed.on_gpu(layer, gpu):
                nodes_of.setdefault(expert // size, set()).add(gpu // a_node)
        assert {len(nodes) for nodes in nodes_of.values()} == {1}
        groups_a_node = Counter(min(nodes) for nodes in nodes_of.values())
        assert set(groups_a_node.values()) == {sizes["groups"] // sizes["nodes"]}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=5), st.integers(0, 4))
def test_copies_leave_the_busiest_copy_as_idle_as_any_choice_of_copies_could(loads, redundant):
    # one place a GPU, so a GPU's load is that of a copy; all ways of copying are tried
    placed = place_experts([loads], redundant=redundant, gpus=len(loads) + redundant)
    ways = itertools.product(range(1, redundant + 2), repeat=len(loads))
    best = min(
        max(load / copies for load, copies in zip(loads, way, strict=True))
        for way in ways
        if sum(way) == len(loads) + redundant
    )
    assert max(placed.gpu_loads([loads])[0]) == pytest.approx(best)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=8, max_size=8))
def test_two_experts_a_gpu_are_packed_as_well_as_can_be(loads):
    placed = place_experts([loads], redundant=0, gpus=4)
    ordered = sorted(loads)
    # the busiest with the idlest, the second with the second: no other pairs have a smaller maximum
    best = max(light + heavy for light, heavy in zip(ordered[:4], ordered[:3:-1], strict=True))
    assert max(placed.gpu_loads([loads])[0]) == best


def test_in_order_divides_by_number_even_where_there_are_more_gpus_than_experts():
    placement = placement_in_order(1, 3, 5)
    assert [placement.on_gpu(0, gpu) for gpu in range(5)] == [(), (0,), (), (1,), (2,)]
    assert placement.imbalance([[1, 1, 1]]) == [5 / 3]
    placement = placement_in_order(2, 7, 3)
    assert [len(placement.on_gpu(1, gpu)) for gpu in range(3)] == [2, 2, 3]


def test_imbalance_is_the_busiest_gpu_over_the_mean_and_1_without_load():
    placement = Placement(((0, 1, 1, 2), (2, 0, 1, 0)), 2)
    assert placement.gpu_loads([[3, 8, 5], [4, 0, 0]]) == [[7, 9], [2, 2]]
    assert placement.imbalance([[3, 8, 5], [4, 0, 0]]) == [9 / 8, 1.0]
    assert placement.imbalance([[0, 0, 0], [0, 0, 0]]) == [1.0, 1.0]


def test_duplicates_are_copies_that_share_a_gpu():
    assert Placement(((0, 0, 1, 2), (1, 2, 0, 1), (0, 1, 2, 2)), 2).num_duplicates == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"redundant": 3, "gpus": 8}, "redundant=3: 12 experts and 3 copies .* gpus=8; nearest: 4$"),
        ({"redundant": 5, "gpus": 8}, "redundant=5: .*; nearest: 4, 12"),
        (
            {"redundant": 92, "gpus": 8},
            "redundant=92: must be at most 84, a copy of each of 12 experts on each of gpus=8",
        ),
        ({"redundant": -1, "gpus": 8}, "redundant=-1: must be at least 0"),
        ({"redundant": 4, "gpus": 0}, "gpus=0: must be at least 1"),
        ({"redundant": 4, "gpus": 8, "groups": 5}, "groups=5: must divide experts=12; nearest: 4, 6"),
        ({"redundant": 4, "gpus": 8, "nodes": 3}, "nodes=3: must divide gpus=8; nearest: 2, 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(sizes, message):
    with pytest.raises(UsageError, match=message):
        place_experts(LOADS, **sizes)
