"""Accuracy against sparsity, and what upstream training cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from opfa.report.pictures import BLUE, GREEN, GREY, LOSSES, ORANGE
from opfa.storage import seal
from opfa.upstream.formulas import operations, shape_of
from opfa.upstream.recipe import PretrainRecipe

TASKS = {"sst2": "accuracy", "rte": "accuracy", "mnli": "accuracy", "squad": "squad_f1"}
COLOURS = {
    **{"one-shot": GREY, "gradual": ORANGE, "prune-once": BLUE, "prune-once-8bit": GREEN},
    "gradual-early": "tab:brown",
}


def cost_of(run: Path) -> tuple[int, float]:
    """Tokens and floating-point operations of a finished pre-training."""
    recipe = PretrainRecipe.read(run / "recipe.toml")
    steps = seal.read_json(run / "done.json")["step"]
    tokens = steps * recipe.training.batch * recipe.corpus.sequence_tokens
    return tokens, steps * operations(shape_of(recipe), recipe.training.batch)


def standard_error(accuracy: float, num_examples: int) -> float:
    """Of an accuracy, over the examples that it was measured on."""
    return (accuracy * (1 - accuracy) / num_examples) ** 0.5


def accuracy_picture(
    rows: Sequence[Mapping[str, Any]], examples: Mapping[str, int], path: Path
) -> None:
    """Draw each task's metric, of so many examples, against sparsity, one line for each method."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    size = (1.0 + 3.2 * len(tasks), 3.6)
    picture, columns = plt.subplots(
        ncols=len(tasks), figsize=size, squeeze=False, layout="constrained"
    )
    for axes, task in zip(columns[0], tasks, strict=True):
        found = [row for row in rows if row["task"] == task]
        for row in found:
            if row["method"] == "dense":
                mean = row["mean"]
                axes.axhline(mean, color="black", linestyle=":", label="dense")
                if TASKS[task] == "accuracy":  # a mean of right and wrong
                    error = standard_error(mean, examples[task])
                    band = (mean - error, mean + error)
                    axes.axhspan(*band, color="black", alpha=0.08, label="its standard error")
        for place, (method, colour) in enumerate(COLOURS.items()):
            points = [row for row in found if row["method"] == method]
            x = [row["percent"] + 0.12 * (place - len(COLOURS) / 2) for row in points]
            means = [row["mean"] for row in points]
            deviations = [row["std"] for row in points]
            if None in deviations:
                deviations = None
            if points:
                axes.errorbar(x, means, deviations, fmt="o-", color=colour, capsize=3, label=method)
        axes.set_xticks([85, 90])
        axes.set_xlim(84, 91)
        axes.set_xlabel("Sparsity, % (bars: over seeds)")
        axes.set_title(f"{task}, {examples[task]:,} examples", fontsize=10)
        axes.set_ylabel(TASKS[task])
        axes.spines[["top", "right"]].set_visible(False)
    lines, labels = columns[0][0].get_legend_handles_labels()
    picture.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    picture.savefig(path, dpi=120)
    plt.close(picture)


def cost_picture(students: Mapping[Path, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw what is learnt, by batches and on held-out text, against the tokens that it took; by run
    what was logged.
    """
    picture, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for (run, logged), colour in zip(students.items(), (ORANGE, BLUE), strict=False):
        tokens, cost = cost_of(run)
        metric = PretrainRecipe.read(run / "recipe.toml").metric
        each = tokens / logged[-1]["step"] / 1e6
        numbers = f"{tokens / 1e6:.1f} million tokens, {cost / 1e12:.0f}·10¹² operations"
        for is_held, style, label in ((False, "-", None), (True, "o", f"{run.name}: {numbers}")):
            rows = [row for row in logged if bool(row.get("eval")) == is_held]
            points = [row["step"] * each for row in rows], [row[metric] for row in rows]
            axes.plot(*points, style, color=colour, markersize=5, linewidth=0.8, label=label)
        axes.set_ylabel(LOSSES[metric])
    axes.set_xlim(left=0)
    axes.set_xlabel("Tokens, million (lines: batches; points: held-out text)")
    picture.legend(loc="outside upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=120)
    plt.close(picture)
