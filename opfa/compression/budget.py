"""How many units of each group to keep: the exact choice under a budget.

A group is the heads or the neurons of one layer. Its units go in a given order, so all that is left
to choose is how many stay: a knapsack with one item of each group, solved by dynamic programming.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opfa.errors import RunError

Curve = NDArray[np.float64]  # one value for 0, 1, ... units that are kept
STEPS = 200_000  # at most, of the budget; costs are rounded up to one


def choose(losses: Sequence[Curve], costs: Sequence[Curve], budget: float) -> list[int]:
    """How many units of each group stay, so that the sum of losses is least and the sum of costs at
    most `budget`. Raises `RunError` if the cheapest choice costs more.
    """
    if (least := sum(float(cost.min()) for cost in costs)) > budget:
        raise RunError(f"{budget:,.6g}: must be at least {least:,.6g}, what is left without units")
    excess = [cost - cost.min() for cost in costs]
    step = _step(excess, budget - least)
    steps = int((budget - least) / step + 1e-9)
    best, choices = np.zeros(steps + 1), list[NDArray[np.int32]]()
    prices = [np.ceil(cost / step - 1e-9).astype(np.int64) for cost in excess]
    for loss, price in zip(losses, prices, strict=True):
        sums, choice = np.full(steps + 1, np.inf), np.zeros(steps + 1, np.int32)
        for kept in range(len(loss)):
            if (cost := int(price[kept])) <= steps:
                found = best[: steps + 1 - cost] + loss[kept]
                is_better = found < sums[cost:]
                sums[cost:][is_better] = found[is_better]
                choice[cost:][is_better] = kept
        best = sums
        choices.append(choice)
    left, kept_by_group = int(best.argmin()), list[int]()
    for choice, price in zip(reversed(choices), reversed(prices), strict=True):
        kept_by_group.append(int(choice[left]))
        left -= int(price[kept_by_group[-1]])
    return kept_by_group[::-1]


def _step(costs: Sequence[Curve], budget: float) -> float:
    """The greatest common divisor of whole numbers; else, or if it is too small, a small share."""
    values, coarse = np.concatenate(costs), budget / STEPS
    if (values != values.round()).any():
        return coarse or 1.0
    return max(float(np.gcd.reduce(values.astype(np.int64))), coarse) or 1.0
