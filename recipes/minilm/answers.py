"""Which examples each fine-tuned model has right, and whether one method has more of them right
than another: differences are paired by example, as all methods answer the same ones.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from pictures import standard_error

from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RunError
from opfa.storage import seal

FILE = "answers.jsonl"
DRAWS = 2_000  # of a bootstrap
PAIRS = [
    *(("prune-once", other) for other in ("dense", "one-shot", "gradual", "gradual-early")),
    *((f"{method}-8bit", f"{method}-fp32") for method in ("prune-once", "dense")),
]


def write_answers(task: Path) -> None:
    """Ask each finished run of a task, RUNS/TASK/METHOD-PERCENT/SEED, that was not asked before."""
    for done in sorted(task.glob("*/seed-*/done.json")):
        run = done.parent
        if not (run / FILE).exists():
            recipe = FinetuneRecipe.read(run / "recipe.toml")
            evaluate_model(str(run / "model"), recipe, run / FILE)


def right_of(run: Path) -> str:
    """1 for each example that a run has right, 0 for each other, in order; raises `RunError` where
    that is not the accuracy of the run.
    """
    rows = map(json.loads, (run / FILE).read_text().splitlines())
    right = "".join(str(int(row["prediction"] == row["label"])) for row in rows)
    accuracy = seal.read_json(run / "results.json")["metrics"]["accuracy"]
    if right.count("1") / len(right) != accuracy:
        raise RunError(f"{run / FILE}: is not of this model, whose accuracy is {accuracy}; move it")
    return right


def differences(rows: Sequence[Mapping[str, Any]], right: Mapping[str, str]) -> list[dict]:
    """How much more of a task one method has right than another, mean of their seeds, and the
    standard error of that over examples.
    """
    shares = {place: answers.mean(axis=0) for place, answers in _answers(rows, right).items()}
    found = []
    for (task, method, percent), (one, other) in product(shares, PAIRS):
        against = shares.get((task, other, 0 if other == "dense" else percent))
        if method == one and against is not None:
            paired = shares[task, method, percent] - against
            error = paired.std(ddof=1) / len(paired) ** 0.5
            place = {"task": task, "percent": percent, "method": one, "other": other}
            found.append({**place, "mean": float(paired.mean()), "error": float(error)})
    return found


def recoveries(
    rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Any], right: Mapping[str, str]
) -> list[dict]:
    """What each sparse method keeps of the dense accuracy, and of what that is above the most
    frequent class; where each example's answer is known, with an interval of 95 % by bootstrap over
    examples and seeds.
    """
    answers, found = _answers(rows, right), []
    dense = {row["task"]: row["mean"] for row in rows if row["method"] == "dense"}
    for row in rows:
        task, least = row["task"], tasks[row["task"]]["majority"]
        if least is None or not row["percent"] or task not in dense:
            continue
        if dense[task] - least < 2 * standard_error(dense[task], tasks[task]["examples"]):
            continue  # the dense model didn't learn it
        place = {key: row[key] for key in ("task", "method", "percent")}
        share, above = _shares(row["mean"], dense[task], least)
        ours, theirs = answers.get((*place.values(),)), answers.get((task, "dense", 0))
        interval = None
        if ours is not None and theirs is not None:
            drawn = _shares(*_drawn(ours, theirs), least)[1]
            interval = [float(end) for end in np.quantile(drawn, (0.025, 0.975))]
        found.append({**place, "share": share, "above": above, "interval": interval})
    return found


def _shares(mean: Any, dense: Any, least: float) -> tuple[Any, Any]:  # Any: numbers, or arrays
    return mean / dense, (mean - least) / (dense - least)


def _drawn(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of two methods over examples and seeds drawn anew; the same examples for both."""
    rng, num_examples = np.random.default_rng(0), ours.shape[1]
    means = np.empty((2, DRAWS))
    for draw in range(DRAWS):
        examples = rng.integers(num_examples, size=num_examples)
        for index, answers in enumerate((ours, theirs)):
            seeds = rng.integers(len(answers), size=len(answers))
            means[index, draw] = answers[seeds][:, examples].mean()
    return means[0], means[1]


def _answers(
    rows: Sequence[Mapping[str, Any]], right: Mapping[str, str]
) -> dict[tuple[str, str, int], np.ndarray]:
    """What is right, [seeds, N] of 0 and 1, by task, method and percent."""
    found = {}
    for row in rows:
        runs = [f"{row['run']}/seed-{seed}" for seed in row["seeds"]]
        if all(run in right for run in runs):
            seeds = [np.array([*right[run]], dtype=float) for run in runs]
            found[row["task"], row["method"], row["percent"]] = np.stack(seeds)
    return found
