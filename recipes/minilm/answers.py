"""Which examples each fine-tuned model has right, and whether one method has more of them right
than another: differences are paired by example, as all methods answer the same ones.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RunError
from opfa.storage import seal

FILE = "answers.jsonl"
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
    shares = {}  # [N] by task, method and percent
    for row in rows:
        runs = [f"{row['run']}/seed-{seed}" for seed in row["seeds"]]
        if all(run in right for run in runs):
            seeds = [np.array([*right[run]], dtype=float) for run in runs]
            shares[row["task"], row["method"], row["percent"]] = np.mean(seeds, axis=0)
    found = []
    for (task, method, percent), (one, other) in product(shares, PAIRS):
        against = shares.get((task, other, 0 if other == "dense" else percent))
        if method == one and against is not None:
            paired = shares[task, method, percent] - against
            error = paired.std(ddof=1) / len(paired) ** 0.5
            place = {"task": task, "percent": percent, "method": one, "other": other}
            found.append({**place, "mean": float(paired.mean()), "error": float(error)})
    return found
