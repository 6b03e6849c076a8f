"""The first models of a search: those that Fisher information would choose, without any trial.

Under each of several budgets, and with each number of layers gone, an exact choice says how many
units of each group stay; the one with the least loss is taken. Losses are the quadratic model's.
In a space with zeros or 8 bits, every other shape has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opfa.compression.budget import Curve, choose
from opfa.models.costs import Costs
from opfa.search.shapes import Shape, Space


@dataclass(frozen=True)
class Worth:
    """What the quadratic model says is lost: for each group when 0, 1, ... units are kept, and for
    the layers when 0, 1, ... of them are gone, in the order in which they go.
    """

    units: Sequence[Curve]
    layers: Sequence[float]
    order: Sequence[int]


def greedy_front(space: Space, costs: Costs, worth: Worth, num: int) -> list[Shape]:
    """At most `num` shapes, from the whole model's cost down to the least."""
    least = costs.of(space.least.groups, space.least.gone)
    budgets = np.linspace(costs.whole, least, num + 1)[:-1]
    found = [_best(space, costs, worth, budget) for budget in budgets]
    if space.settings.has_forms:
        found[1::2] = [shape and space.lighter(shape) for shape in found[1::2]]
    return list(dict.fromkeys(shape for shape in found if shape is not None))


def _best(space: Space, costs: Costs, worth: Worth, budget: float) -> Shape | None:
    """The shape under a budget of whose units and layers the least is lost."""
    best: tuple[float, Shape] | None = None
    droppable = [number for number in worth.order if f"layers.{number}" in space.steps]
    for num_gone in range(len(droppable) + 1):
        gone = set(droppable[:num_gone])
        shape = _with_layers(space, costs, worth, gone, budget)
        if shape is not None:
            loss = _loss(worth, shape, num_gone)
            if best is None or loss < best[0]:
                best = loss, shape
    return None if best is None else best[1]


def _with_layers(
    space: Space, costs: Costs, worth: Worth, gone: set[int], budget: float
) -> Shape | None:
    """The best shape without these layers; None where none is cheap enough."""
    stays = [number not in gone for number in range(len(space.heads))]
    steps, losses, prices = [], [], []
    fixed = costs.of([0] * len(costs.curves), gone)
    for layer, kind in np.ndindex(len(stays), 2):
        name = f"{('heads', 'neurons')[kind]}.{layer}"
        counts = space.steps.get(name, [(space.heads, space.neurons)[kind][layer]])
        counts = counts if stays[layer] else [0]
        steps.append(counts)
        losses.append(worth.units[2 * layer + kind][counts] if stays[layer] else np.zeros(1))
        prices.append(costs.curves[2 * layer + kind][counts])
    left = budget - fixed
    if sum(float(price.min()) for price in prices) > left:
        return None
    kept = choose(losses, prices, left)
    counts = [each[step] for each, step in zip(steps, kept, strict=True)]
    return space.clean(counts[::2], counts[1::2], stays)


def _loss(worth: Worth, shape: Shape, num_gone: int) -> float:
    units = sum(
        float(worth.units[group][count])
        for group, count in enumerate(shape.groups)
        if shape.layers[group // 2]
    )
    return units + worth.layers[num_gone]
