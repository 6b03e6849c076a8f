"""The curves of a run: what is drawn is what was logged and what the recipe asks for."""

import numpy as np
import pytest

from opfa.compression.schedules import Gradual, LearningRate
from opfa.report.curves import Plan, charts, corners, smoothed

RAMP = Gradual(start=10, end=50, every=7, target=0.9, hold_until=64)
RATE = LearningRate(peak=3e-4, warmup_steps=5, steps=200, rewind_at=RAMP)


def test_corners_give_the_learning_rate_of_every_step_of_a_rewinding_schedule() -> None:
    rates = [RATE.at(step) for step in range(200)]
    steps, values = corners(RATE.rates())
    assert len(steps) < 20
    np.testing.assert_allclose(np.interp(range(1, 201), steps, values), rates, rtol=1e-5)
    assert corners([2.0]) == ([1], [2.0]) and corners([]) == ([], [])


def test_the_planned_sparsity_is_of_the_newest_update() -> None:
    found = RAMP.sparsities(70)
    assert found[8] == 0.0 and found[9] == RAMP.sparsity_at(10)  # after steps 9 and 10
    assert found[15] == found[9] and found[16] == RAMP.sparsity_at(17)
    assert found[49] == found[69] == 0.9
    assert Gradual(end=0, target=0.5).sparsities(2) == [0.5, 0.5]


def test_means_are_over_a_twentieth_of_the_run() -> None:
    steps, values = list(range(5, 205, 5)), [float(i * i) for i in range(40)]
    width, middles, means = smoothed(steps, values)
    assert (width, middles[0], means[:2]) == (2, 10, [0.5, 2.5])
    assert smoothed([1], [2.0]) == (0, [], [])


def test_each_number_of_the_rows_is_drawn_and_an_evaluation_apart_from_batches() -> None:
    rows = [
        {"step": 1, "loss": 2.0, "mlm_loss": 4.0, "nsp_loss": 0.0, "sparsity": 0.5},
        {"step": 2, "loss": 1.5, "mlm_loss": 3.0, "nsp_loss": 0.0, "sparsity": 0.9, "new": 7},
        {"step": 2, "eval": True, "loss": 3.5, "mlm_loss": 3.5, "accuracy": 0.75},
        {"step": 2, "eval": True, "final": True, "accuracy": 0.8},
    ]
    plan = Plan(learning_rate=[0.1, 0.2], sparsity=[0.5, 0.9])
    found = {chart.title: chart for chart in charts(rows, plan)}
    assert list(found) == [
        "Training loss",
        "Masked-token loss",
        "New",
        "Held-out accuracy",
        "Sparsity of the pruned matrices",
        "Learning rate",
    ]
    curves = {
        title: {curve.name: (curve.x, curve.y) for curve in chart.curves}
        for title, chart in found.items()
    }
    assert curves["Training loss"] == {"a batch": ([1, 2], [2.0, 1.5])}
    assert curves["Masked-token loss"] == {"a batch": ([1, 2], [4, 3]), "held out": ([2], [3.5])}
    assert curves["Held-out accuracy"] == {
        "held out": ([2], [0.75]),
        "finished model": ([2], [0.8]),
    }
    assert curves["Sparsity of the pruned matrices"]["recipe"] == ([1, 2, 2], [50.0, 90.0, 90.0])
    assert curves["Learning rate"] == {"every step": ([1, 2], [0.1, 0.2])}


@pytest.mark.parametrize("num_rows", [4_000, 50_000])
def test_a_long_run_is_thinned_out_and_says_so(num_rows: int) -> None:
    rows = [{"step": step, "loss": 1.0} for step in range(1, num_rows + 1)]
    (curve, _) = charts(rows, Plan(learning_rate=[1.0]))[0].curves
    assert curve.x[-1] == num_rows and len(curve.x) <= 4_001
    assert curve.name == ("a batch" if num_rows == 4_000 else "a batch, one in 13")
