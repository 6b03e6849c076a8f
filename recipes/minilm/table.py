"""What `reproduce.py` found: results/ with tables and pictures, from the runs that are finished."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib.pyplot as plt
from ablations import ABLATIONS

from opfa import provenance
from opfa.plan import operations, shape_of
from opfa.records import read_records
from opfa.report import BLUE, GREEN, GREY, ORANGE
from opfa.run import write_json, write_text
from opfa.tables import figure, markdown_table
from opfa.upstream.recipe import PretrainRecipe

TASKS = {"sst2": "accuracy", "rte": "accuracy", "mnli": "accuracy", "squad": "squad_f1"}
COLOURS = {"one-shot": GREY, "gradual": ORANGE, "prune-once": BLUE, "prune-once-8bit": GREEN}
METHODS = [
    *(("dense", 0), ("dense-8bit", 0), ("dense-teacher", 0)),
    *((method, percent) for method in COLOURS for percent in (85, 90)),
]
NOTES = """\
Mean and sample deviation over seeds, in brackets the share of the dense model's mean (which says
little near chance: see the most frequent class). Sparsity is that of the encoder's linear weights.
*dense*, *one-shot* and *gradual* start from the original model; *prune-once* from a student of the
teacher, which read more text; *dense-teacher* from that teacher. *8bit* trains each seed's model on
for a fifth of the steps. What upstream training costs is not counted.
"""
Row = dict[str, Any]


def write_table(output: Path) -> None:
    """Write what is there under `output`; raises `RunError`, and writes nothing, where a run began
    with a model that was made anew since.
    """
    trace = trace_table(output)
    rows = [row for task in TASKS for row in task_rows(output, task)]
    tasks = {task: examples_of(output, task) for task in dict.fromkeys(row["task"] for row in rows)}
    ablations = ablation_rows(output)
    results = output / "results"
    results.mkdir(exist_ok=True)
    write_json(results / "table.json", {"tasks": tasks, "rows": rows, "ablations": ablations})
    parts = [methods_table(tasks, rows), NOTES.strip() if rows else ""]
    parts += [ablations_table(ablations), trace]
    write_text(results / "table.md", "\n\n".join(part for part in parts if part) + "\n")
    if rows:
        accuracy_picture(rows, results / "accuracy.png")
    cost_picture(output, results / "cost.png")
    for picture in (output / "runs").glob("sparse-*/report/*.png"):
        shutil.copyfile(picture, results / f"{picture.parent.parent.name}-{picture.name}")


def task_rows(output: Path, task: str) -> list[Row]:
    """One row for each method and sparsity of which a seed is finished."""
    rows: list[Row] = []
    dense: float | None = None
    for method, percent in METHODS:
        run = f"runs/{task}/{method}-{percent}"
        files = sorted((output / run).glob("seed-*/results.json"))
        found = [json.loads(file.read_text()) for file in files]
        if not found:
            continue
        values = [results["metrics"][TASKS[task]] for results in found]
        mean = fmean(values)
        dense = mean if method == "dense" else dense
        rows.append(
            {
                "task": task,
                "method": method,
                "percent": percent,
                "mean": mean,
                "std": stdev(values) if len(values) > 1 else None,
                "recovery": mean / dense if dense else None,
                "values": values,
                "seeds": [results["seed"] for results in found],
                "recipes_sha256": [results["recipe_sha256"] for results in found],
                "models_sha256": [results["model_sha256"] for results in found],
                "run": run,
            }
        )
    return rows


def ablation_rows(output: Path) -> list[Row]:
    """One row for each change of the short pruning's recipe."""
    rows = []
    for name, (question, changes) in ABLATIONS.items():
        run = output / "runs/ablations" / name
        after = run.with_name(f"{name}-sst2")
        if not (after / "finished").exists():
            continue
        results = json.loads((after / "results.json").read_text())
        rows.append(
            {
                "name": name,
                "question": question,
                "changes": changes,
                "mlm_loss": provenance.row_of(name, run).metrics["mlm_loss"],
                "held_out_accuracy": results["selected"]["accuracy"],
                "operations": cost_of(run)[1],
                "seed": results["seed"],
                "run": str(run.relative_to(output)),
            }
        )
    return rows


def examples_of(output: Path, task: str) -> Row:
    """How many examples the validation split has, and the share of the most frequent class."""
    labels = [
        record.get("label")
        for file in sorted((output / "data" / task).glob("validation*"))
        for _, record in read_records(file)
    ]
    most = Counter(labels).most_common(1)[0][1] / len(labels)
    return {"examples": len(labels), "majority": None if task == "squad" else most}


def methods_table(tasks: Mapping[str, Row], rows: Sequence[Row]) -> str:
    """Methods against tasks: mean, deviation and recovery."""
    cells = {}
    for row in rows:
        recovery = "" if row["recovery"] is None else f" ({row['recovery']:.1%})"
        seeds = len(row["seeds"])
        num_seeds = f", {seeds} seed{'s' if seeds > 1 else ''}" if seeds != 3 else ""
        place = row["method"], row["percent"], row["task"]
        cells[place] = figure(row["mean"], row["std"]) + recovery + num_seeds
    head, majority = ["method", "sparsity"], ["most frequent class", ""]
    for task, about in tasks.items():
        head.append(f"{task}, {TASKS[task]}, {about['examples']:,} examples")
        majority.append("" if about["majority"] is None else figure(about["majority"], None))
    lines = [majority]
    for method, percent in METHODS:
        line = [cells.get((method, percent, task), "") for task in tasks]
        if any(line):
            lines.append([method, f"{percent} %", *line])
    return markdown_table(head, lines) if rows else ""


def cost_of(run: Path) -> tuple[int, float]:
    """Tokens and floating-point operations of a finished pre-training."""
    recipe = PretrainRecipe.read(run / "recipe.toml")
    steps = json.loads((run / "done.json").read_text())["step"]
    tokens = steps * recipe.training.batch * recipe.corpus.sequence_tokens
    return tokens, steps * operations(shape_of(recipe), recipe.training.batch)


def ablations_table(rows: Sequence[Row]) -> str:
    """What each change gives after a short pruning to 90 %."""
    lines = []
    for row in rows:
        changes = " ".join(f"`{change}`" for change in row["changes"])
        loss, accuracy = f"{row['mlm_loss']:.3f}", f"{row['held_out_accuracy']:.4f}"
        cost = f"{row['operations'] / 1e15:.2f}"
        lines.append([row["name"], row["question"], changes, cost, loss, accuracy])
    head = ["short pruning to 90 %", "question", "changes", "operations, 10¹⁵"]
    head += ["MLM loss", "sst2: accuracy on held-out training phrases"]
    return markdown_table(head, lines) if rows else ""


def trace_table(output: Path) -> str:
    """Every finished run: its place, seed, rate, recipe and model; raises `RunError` where one
    began with a model that was made anew since.
    """
    lines = []
    for file in sorted((output / "runs").rglob("done.json")):
        step, *_ = provenance.steps(file.parent)
        rate = step.recipe["training"]["learning_rate"]
        model = json.loads(file.read_text())["model_sha256"]
        place = f"`{file.parent.relative_to(output)}`"
        line = [place, str(step.recipe["seed"]), f"{rate:.2g}", f"{step.steps:,}"]
        lines.append([*line, f"`{step.sha256[:12]}`", f"`{model[:12]}`"])
    head = ["run", "seed", "learning rate", "steps", "recipe (SHA-256)", "model (SHA-256)"]
    return markdown_table(head, lines) if lines else ""


def accuracy_picture(rows: Sequence[Row], path: Path) -> None:
    """Draw each task's metric against sparsity, one line for each method."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    size = (1.0 + 3.2 * len(tasks), 3.6)
    picture, columns = plt.subplots(
        ncols=len(tasks), figsize=size, squeeze=False, layout="constrained"
    )
    for axes, task in zip(columns[0], tasks, strict=True):
        found = [row for row in rows if row["task"] == task]
        for row in found:
            if row["method"] == "dense":
                axes.axhline(row["mean"], color="black", linestyle=":", label="dense")
        for method, colour in COLOURS.items():
            points = [row for row in found if row["method"] == method]
            x, means = [row["percent"] for row in points], [row["mean"] for row in points]
            deviations = [row["std"] or 0.0 for row in points]
            if points:
                axes.errorbar(x, means, deviations, fmt="o-", color=colour, capsize=3, label=method)
        axes.set_xticks([85, 90])
        axes.set_xlim(84, 91)
        axes.set_xlabel("Sparsity, %")
        axes.set_title(f"{task}: {TASKS[task]}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    columns[0][0].legend(frameon=False, fontsize=8)
    picture.savefig(path, dpi=120)
    plt.close(picture)


def cost_picture(output: Path, path: Path) -> None:
    """Draw the floating-point operations of upstream training against its tokens."""
    picture, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, colour in zip(("teacher", "sparse-85", "sparse-90"), COLOURS.values(), strict=False):
        if (output / "runs" / name / "done.json").exists():
            tokens, cost = cost_of(output / "runs" / name)
            axes.plot([0, tokens / 1e6], [0, cost / 1e15], color=colour, label=name)
    axes.set_xlabel("Tokens, millions")
    axes.set_ylabel("Floating-point operations, 10¹⁵")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=120)
    plt.close(picture)
