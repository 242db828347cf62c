"""Which expert lives on which GPU: copies of the busiest experts, packed so that GPUs are loaded alike.

The policy is the published one of DeepSeek's expert-parallel load balancer (EPLB), written from its description.
L layers, E experts, R places for experts, G GPUs.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from abyssal.errors import UsageError

Loads = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Placement:
    """The expert in each place of each layer, [L][R]; GPU g has the places from g R/G to (g+1) R/G, as far as whole.

    A token goes to one of its expert's copies, so each copy bears an equal part of the expert's load.
    """

    experts: tuple[tuple[int, ...], ...]
    gpus: int

    def on_gpu(self, layer: int, gpu: int) -> tuple[int, ...]:
        """Return the experts on a GPU."""
        places = self.experts[layer]
        return places[gpu * len(places) // self.gpus : (gpu + 1) * len(places) // self.gpus]

    def gpu_loads(self, loads: Loads) -> list[list[float]]:
        """Return the load of each GPU in each layer, [L][G]."""
        rows = []
        for layer, expert_loads in enumerate(loads):
            copies = Counter(self.experts[layer])
            rows.append(
                [
                    sum(expert_loads[expert] / copies[expert] for expert in self.on_gpu(layer, gpu))
                    for gpu in range(self.gpus)
                ]
            )
        return rows

    def imbalance(self, loads: Loads) -> list[float]:
        """Return the busiest GPU's load over the mean GPU's in each layer, [L]; 1 where a layer has no load."""
        return [max(row) * len(row) / total if (total := sum(row)) > 0 else 1.0 for row in self.gpu_loads(loads)]

    @property
    def num_duplicates(self) -> int:
        """How often a GPU holds a second copy of the same expert, which spreads nothing; over all layers."""
        return sum(
            len(here) - len(set(here))
            for layer in range(len(self.experts))
            for gpu in range(self.gpus)
            for here in (self.on_gpu(layer, gpu),)
        )


def placement_in_order(layers: int, experts: int, gpus: int) -> Placement:
    """Return the placement without copies: the experts in order, as evenly by number as they divide."""
    return Placement((tuple(range(experts)),) * layers, gpus)


def place_experts(loads: Loads, *, redundant: int, gpus: int, groups: int = 1, nodes: int = 1) -> Placement:
    """Copy the busiest experts into `redundant` more places, and pack all of them onto GPUs by load.

    Where `nodes` divides `groups`, the policy is hierarchical: groups of experts are packed onto nodes first, so that
    a token that is limited to few groups meets few nodes, and copies stay on their expert's node. Otherwise it is
    global: groups and nodes are ignored.

    Args:
        loads: tokens of each expert in each layer, [L][E]; any unit.
        redundant: copies beyond one of each expert.
        gpus: those that share the experts of a layer; each gets equally many places.
        groups: into which the gate divides the experts, consecutive and equally large (`n_group`).
        nodes: that the GPUs stand in, equally many each.

    Raises:
        UsageError: the numbers do not divide; the nearest that do are named.
    """
    experts = len(loads[0])
    check_division(experts, redundant=redundant, gpus=gpus, groups=groups, nodes=nodes)
    if groups % nodes:
        groups = nodes = 1
    return Placement(tuple(_place_layer(layer, experts + redundant, gpus, groups, nodes) for layer in loads), gpus)


def check_division(experts: int, *, redundant: int, gpus: int, groups: int, nodes: int) -> None:
    """Raise UsageError where `place_experts` cannot give each GPU and each node equally much."""
    for name, value, least in (
        ("redundant", redundant, 0),
        ("gpus", gpus, 1),
        ("groups", groups, 1),
        ("nodes", nodes, 1),
    ):
        if value < least:
            raise UsageError(f"{name}={value}: must be at least {least}")
    if over := (experts + redundant) % gpus:
        below, above = redundant - over, redundant - over + gpus
        near = ", ".join(str(number) for number in (below, above) if number >= 0)
        raise UsageError(
            f"redundant={redundant}: {experts} experts and {redundant} copies cannot be divided equally among "
            f"gpus={gpus}; nearest: {near}"
        )
    if redundant > experts * (gpus - 1):
        raise UsageError(
            f"redundant={redundant}: must be at most {experts * (gpus - 1)}, a copy of each of {experts} experts on "
            f"each of gpus={gpus}"
        )
    for name, value, of, whole in (("groups", groups, "experts", experts), ("nodes", nodes, "gpus", gpus)):
        if whole % value:
            divisors = sorted((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: abs(d - value))
            near = ", ".join(str(divisor) for divisor in sorted(divisors[:2]))
            raise UsageError(f"{name}={value}: must divide {of}={whole}; nearest: {near}")


def _place_layer(loads: Sequence[float], places: int, gpus: int, groups: int, nodes: int) -> tuple[int, ...]:
    """Place the experts of one layer: groups onto nodes, copies within a node, places onto the node's GPUs."""
    size = len(loads) // groups
    group_loads = [sum(loads[group * size : (group + 1) * size]) for group in range(groups)]
    placed: list[int] = []
    for node_groups in _pack(group_loads, nodes):
        local = [group * size + expert for group in node_groups for expert in range(size)]
        copies = _replicate([loads[expert] for expert in local], places // nodes)
        counts = Counter(copies)
        shares = [loads[local[copy]] / counts[copy] for copy in copies]
        for gpu_places in _pack(shares, gpus // nodes):
            placed += [local[copies[place]] for place in gpu_places]
    return tuple(placed)


def _replicate(loads: Sequence[float], places: int) -> list[int]:
    """Return the expert of each place: every expert once, then one by one the expert whose copies bear most each."""
    copies = list(range(len(loads)))
    counts = [1] * len(loads)
    busiest = [(-load, expert) for expert, load in enumerate(loads)]  # of equal ones the first
    heapq.heapify(busiest)
    for _ in range(places - len(loads)):
        expert = busiest[0][1]
        copies.append(expert)
        counts[expert] += 1
        heapq.heapreplace(busiest, (-loads[expert] / counts[expert], expert))
    return copies


def _pack(loads: Sequence[float], packs: int) -> list[list[int]]:
    """Divide items into packs of equally many: the heaviest item first, each into the lightest pack with room.

    Where a pack takes a single item there is nothing to choose, and the items keep their order.
    """
    room = len(loads) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    packed: list[list[int]] = [[] for _ in range(packs)]
    lightest = [(0.0, pack) for pack in range(packs)]  # those with room; of equal ones the first
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        weight, pack = heapq.heappop(lightest)
        packed[pack].append(item)
        if len(packed[pack]) < room:
            heapq.heappush(lightest, (weight + loads[item], pack))
    return packed
