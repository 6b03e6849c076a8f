"""The choice under a budget, and the order in which units go, against looking at every choice."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opfa.compression.budget import choose
from opfa.compression.fisher import improve, removal
from opfa.errors import RunError

SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 1_000), st.floats(0.0, 1.1), st.booleans())
def test_no_other_choice_is_better(
    sizes: list[int], seed: int, share: float, is_whole: bool
) -> None:
    random = np.random.default_rng(seed)
    losses = [random.normal(size=size + 1) for size in sizes]  # they may rise and fall
    costs = [np.sort(random.random(size + 1) * 9) for size in sizes]
    if is_whole:
        costs = [np.floor(cost) * 6 for cost in costs]
    least, most = (sum(float(cost[i]) for cost in costs) for i in (0, -1))
    budget = least + share * (most - least) + 1e-3 * most
    kept = choose(losses, costs, budget)
    assert _sum(costs, kept) <= budget
    choices = itertools.product(*(range(size + 1) for size in sizes))
    within = budget if is_whole else budget * (1 - 1e-4)  # a cost is rounded up to a small step
    best = min(_sum(losses, each) for each in choices if _sum(costs, each) <= within)
    assert _sum(losses, kept) <= best + 1e-9


def _sum(curves: list[np.ndarray], kept: "list[int] | tuple[int, ...]") -> float:
    return sum(float(curve[k]) for curve, k in zip(curves, kept, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_rounded_costs_never_exceed_the_budget(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opfa.compression.budget.STEPS", 12)
    random = np.random.default_rng(seed)
    losses = [-np.arange(6.0)] * 3  # more units are always better
    costs = [np.sort(random.random(6) * 9) for _ in losses]
    least, most = (_sum(costs, [place] * 3) for place in (0, -1))
    budget = least + 0.4 * (most - least)
    kept = choose(losses, costs, budget)
    assert least < _sum(costs, kept) <= budget


def test_a_budget_that_nothing_meets_is_refused() -> None:
    with pytest.raises(RunError, match=r"1\.5: must be at least 2, what is left without units"):
        choose([np.zeros(2)] * 2, [np.array([1.0, 2.0])] * 2, 1.5)


def fisher(seed: int, units: int) -> torch.Tensor:
    gradients = torch.randn(5, units, generator=torch.Generator().manual_seed(seed)).double()
    return gradients.T @ gradients


def loss(information: torch.Tensor, gone: "tuple[int, ...] | list[int]") -> float:
    return float(information[list(gone)][:, list(gone)].sum() / 2)


def test_losses_are_those_of_the_units_that_went() -> None:
    information = fisher(0, 6)
    order, losses = removal(information)
    assert sorted(order.tolist()) == list(range(6)) and losses[0] == 0
    for number in range(7):
        expected = loss(information, order[:number].tolist())
        assert losses[number].item() == pytest.approx(expected, abs=1e-9)
    others = [loss(information, (unit,)) for unit in range(6)]
    assert losses[1].item() == pytest.approx(min(others))


def test_independent_units_go_by_their_own_information() -> None:
    order, losses = removal(torch.tensor([3.0, 1.0, 2.0]).diag())
    assert order.tolist() == [1, 2, 0] and losses.tolist() == [0.0, 0.5, 1.5, 3.0]


@pytest.mark.parametrize("seed", range(20))
def test_exchanges_end_where_no_single_one_helps(seed: int) -> None:
    information = fisher(seed, 8)
    is_gone = torch.arange(8) < 4
    found = improve(information, is_gone)
    assert found.sum() == 4
    gone = set(found.nonzero()[:, 0].tolist())
    now = loss(information, [*gone])
    assert now <= loss(information, range(4)) + 1e-9  # pyright: ignore[reportArgumentType]
    for back, away in itertools.product(gone, set(range(8)) - gone):
        assert now <= loss(information, [*(gone - {back} | {away})]) + 1e-6


def test_groups_without_units() -> None:
    order, losses = removal(torch.zeros(0, 0))
    assert not len(order) and losses.tolist() == [0.0]
    assert not len(improve(torch.zeros(0, 0), torch.zeros(0, dtype=torch.bool)))
    assert choose([np.zeros(1), np.zeros(3)], [np.zeros(1), np.arange(3.0)], 1.0) == [0, 0]
