"""The curves of a run: what its rows hold, and what its recipe asks of every step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from opfa.report.logged import NO_NUMBERS, Row, by_kind

MOST = 4000  # points of a curve; more can't be told apart, and a page should stay small
LABELS = {  # what rows may hold, in the order of a page: title and unit
    "loss": ("Training loss", ""),
    "mlm_loss": ("Masked-token loss", "nats a token"),
    "nsp_loss": ("Next-sentence loss", "nats a pair"),
    "distill_loss": ("Distillation loss", "nats"),
    "hidden_loss": ("Hidden states: squared distance from the teacher", ""),
}
LAST = {
    "grad_norm": ("Gradient norm, before clipping", ""),
    "tokens_per_second": ("Speed", "tokens a second"),
}
COLOURS = ("blue", "orange", "green", "purple")  # of the style
PLANNED = ("sparsity", "learning_rate")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe asks of each step: element i is step i + 1."""

    learning_rate: Sequence[float]
    sparsity: Sequence[float] = ()  # empty where nothing is pruned


@dataclass(frozen=True)
class Curve:
    """A line: `how` is line, faint, steps (a value holds until the next one) or points."""

    name: str
    colour: str
    how: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Lines over the same axes."""

    title: str
    unit: str
    curves: Sequence[Curve]
    has_zero: bool = False  # the axis begins there
    x_label: str = "step"
    has_log_x: bool = False


def charts(rows: Sequence[Row], plan: Plan) -> list[Chart]:
    """One chart for each number of the rows, and two for the plan."""
    training, evaluations = by_kind(rows)
    names = dict.fromkeys(n for row in [*training, *evaluations] for n in row)
    measured = [n for n in names if n not in (*NO_NUMBERS, *PLANNED, *LABELS, *LAST)]
    logged = {n for row in training for n in row}
    labels = {**LABELS, **{n: (_title(n, n in logged), "") for n in measured}}
    found = [_chart(n, label, training, evaluations) for n, label in labels.items()]
    found += [_sparsity(training, plan), _learning_rate(plan)]
    found += [_chart(n, label, training, evaluations) for n, label in LAST.items()]
    return [chart for chart in found if any(y for curve in chart.curves for y in curve.y)]


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """The steps at which rows have a number, and the numbers."""
    found = [row for row in rows if isinstance(row.get(key), (int, float))]
    return [row["step"] for row in found], [row[key] for row in found]


def smoothed(steps: Sequence[int], values: Sequence[float]) -> tuple[int, list[int], list[float]]:
    """Means over a twentieth of the run: over how many values, the steps in their middles, and
    the means; none where there are fewer than two values to a mean.
    """
    width = len(values) // 20
    if width < 2:
        return width, [], []
    means = np.convolve(values, np.full(width, 1 / width), mode="valid").tolist()
    return width, list(steps[width // 2 :][: len(means)]), means


def corners(values: Sequence[float]) -> tuple[list[int], list[float]]:
    """The steps at which a curve of straight pieces bends, from step 1 on, and its values there.
    Straight lines between them give all of it.
    """
    slopes = [after - before for before, after in pairwise(values)]
    bends = [
        index
        for index, (before, after) in enumerate(pairwise(slopes), 1)
        if not math.isclose(before, after, rel_tol=1e-6, abs_tol=1e-9 * abs(values[index]))
    ]
    kept = sorted({0, *bends, len(values) - 1}) if values else []
    return [index + 1 for index in kept], [values[index] for index in kept]


def _title(name: str, is_logged: bool) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:] if is_logged else f"Held-out {words}"


def _chart(
    name: str, label: tuple[str, str], training: Sequence[Row], evaluations: Sequence[Row]
) -> Chart:
    title, unit = label
    return Chart(title, unit, [*_batches(name, training), *_held_out(name, evaluations, training)])


def _batches(name: str, training: Sequence[Row]) -> Iterator[Curve]:
    """What was logged of batches, faint where a mean of them is drawn too."""
    steps, values = series(training, name)
    width, middles, means = smoothed(steps, values)
    if values:
        what = "a batch" if name.endswith("loss") else "logged"
        yield _curve(what, "blue", "faint" if means else "line", steps, values)
    if means:
        yield _curve(f"mean of {width}", "blue", "line", middles, means)


def _held_out(name: str, evaluations: Sequence[Row], training: Sequence[Row]) -> Iterator[Curve]:
    """What was evaluated. The loss of an evaluation is another one than what training minimises."""
    if name == "loss" and series(training, name)[0]:
        return
    during = [row for row in evaluations if not row.get("final")]
    after = [row for row in evaluations if row.get("final")]
    for rows, label, colour in ((during, "held out", "green"), (after, "finished model", "orange")):
        steps, values = series(rows, name)
        if values:
            yield _curve(label, colour, "line" if len(values) > 1 else "points", steps, values)


def _sparsity(training: Sequence[Row], plan: Plan) -> Chart:
    steps, values = series(training, "sparsity")
    asked = [index for index in range(len(plan.sparsity)) if _changes(plan.sparsity, index)]
    curves = []
    if asked:
        ends = [*asked, len(plan.sparsity) - 1]
        shares = [100 * plan.sparsity[index] for index in ends]
        curves = [_curve("recipe", "orange", "steps", [index + 1 for index in ends], shares)]
    if any(values):
        curves.append(_curve("logged", "blue", "points", steps, [100 * value for value in values]))
    return Chart("Sparsity of the pruned matrices", "%", curves, has_zero=True)


def _changes(values: Sequence[float], index: int) -> bool:
    return index == 0 or values[index] != values[index - 1]


def _learning_rate(plan: Plan) -> Chart:
    steps, rates = corners(plan.learning_rate)
    curve = Curve("every step", "blue", "exact", steps, rates)
    return Chart("Learning rate", "", [curve], has_zero=True)


def _curve(name: str, colour: str, how: str, x: Sequence[float], y: Sequence[float]) -> Curve:
    """A curve of six digits. Only corners are kept whatever their number."""
    every = 1 if how == "exact" else math.ceil(len(x) / MOST)
    kept = [*range(0, len(x) - 1, every), len(x) - 1]
    shown = name if every == 1 else f"{name}, one in {every}"
    return Curve(shown, colour, how, [x[i] for i in kept], [float(f"{y[i]:.6g}") for i in kept])
