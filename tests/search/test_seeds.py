"""Seeds of a search against every shape of a small space."""

import itertools

import numpy as np
import pytest

from opfa.compression.budget import Curve
from opfa.models.costs import Costs
from opfa.search.recipe import Space as Settings
from opfa.search.seeds import Worth, greedy_front
from opfa.search.shapes import Shape, Space

SPACE = Space((2, 2, 2), (4, 4, 4), 1, Settings(neuron_steps=2))
RANDOM = np.random.default_rng(0)
CURVES: list[Curve] = [np.array([0.0, 3.0, 6.0]), np.array([0.0, 2.0, 4.0, 6.0, 8.0])] * 3
COSTS = Costs(CURVES, 10.0, (2.0, 2.0, 2.0))
WORTH = Worth(
    [np.sort(RANDOM.uniform(0, 2, len(curve)))[::-1].copy() for curve in CURVES],
    [0.0, 1.5, 2.5, 9.0],
    [2, 0, 1],
)


def loss(shape: Shape) -> float:
    units = [WORTH.units[g][n] for g, n in enumerate(shape.groups) if shape.layers[g // 2]]
    return float(sum(units)) + WORTH.layers[len(shape.gone)]


def all_shapes() -> set[Shape]:
    steps = [range(len(each)) for each in SPACE.steps.values()]
    chosen = (dict(zip(SPACE.steps, each, strict=True)) for each in itertools.product(*steps))
    shapes = {SPACE.shape(params) for params in chosen}
    in_order = ([], [2], [0, 2])  # as layers go; layer 1 always stays
    return {shape for shape in shapes if shape.gone in in_order}


@pytest.mark.parametrize("num", [1, 4, 9])
def test_each_seed_loses_least_under_its_budget(num: int) -> None:
    least = COSTS.of(SPACE.least.groups, SPACE.least.gone)
    expected = []
    for budget in np.linspace(COSTS.whole, least, num + 1)[:-1]:
        allowed = [s for s in all_shapes() if COSTS.of(s.groups, s.gone) <= budget + 1e-9]
        expected.append(min(map(loss, allowed)))
    found = greedy_front(SPACE, COSTS, WORTH, num)
    assert sorted({round(loss(shape), 9) for shape in found}) == sorted(
        {round(each, 9) for each in expected}
    )
    assert found[0] == SPACE.whole or loss(found[0]) <= loss(SPACE.whole)


def test_there_may_be_none() -> None:
    assert greedy_front(SPACE, COSTS, WORTH, 0) == []
