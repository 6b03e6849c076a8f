"""What `reproduce.py` found: table.md, table.json and pictures, from the runs that are finished.

Recovery is a mean as a share of the dense one's. Deviations are over seeds; for 8 bits those of the
last steps only, since all begin with the same model.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from opfa.report import BLUE, GREEN, GREY, ORANGE
from opfa.run import write_json, write_text
from opfa.tables import figure

METRICS = {"sst2": "accuracy", "rte": "accuracy", "mnli": "accuracy", "squad": "squad_f1"}
COLOURS = {"one-shot": GREY, "gradual": ORANGE, "prune-once": BLUE, "prune-once-8bit": GREEN}
METHODS = [("dense", 0), *((method, percent) for method in COLOURS for percent in (85, 90))]
Row = dict[str, Any]


def write_table(output: Path) -> None:
    """Write what is there under `output`."""
    rows = [row for task in METRICS for row in task_rows(output, task)]
    ablations = ablation_rows(output)
    write_json(output / "table.json", {"rows": rows, "ablations": ablations})
    parts = [methods_table(rows), ablations_table(ablations), trace_table([*rows, *ablations])]
    write_text(output / "table.md", "\n\n".join(part for part in parts if part) + "\n")
    if rows:
        accuracy_picture(rows, output / "accuracy.png")
    cost_picture(output, output / "cost.png")


def task_rows(output: Path, task: str) -> list[Row]:
    """One row for each method and sparsity."""
    rows = []
    for method, percent in METHODS:
        run = f"runs/{task}/{method}-{percent}"
        if not (output / run / "finished").exists():
            continue
        results = json.loads((output / run / "results.json").read_text())
        rows.append(
            {
                "task": task,
                "method": method,
                "percent": percent,
                "mean": results["metrics"][METRICS[task]],
                "std": results["std"][METRICS[task]],
                "recovery": None,
                "learning_rate": results["learning_rate"],
                "seeds": [run["seed"] for run in results["rows"][0]["runs"]],
                "run": run,
                "recipe_sha256": results["recipe_sha256"],
            }
        )
    for row in rows:  # the dense one is the first
        row["recovery"] = row["mean"] / rows[0]["mean"] if rows[0]["method"] == "dense" else None
    return rows


def ablation_rows(output: Path) -> list[Row]:
    """One row for each change of the student's recipe."""
    rows = []
    for path in sorted((output / "runs/ablations").glob("*-sst2/finished")):
        run = path.parent.with_name(path.parent.name.removesuffix("-sst2"))
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        results = json.loads((path.parent / "results.json").read_text())
        rows.append(
            {
                "change": run.name,
                "mlm_loss": last["mlm_loss"],
                "held_out_accuracy": results["selected"]["accuracy"],
                "seeds": [results["seed"]],
                "run": str(path.parent.relative_to(output)),
                "recipe_sha256": results["recipe_sha256"],
            }
        )
    return rows


def methods_table(rows: Sequence[Row]) -> str:
    """Methods against tasks: mean, deviation and recovery."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = {}
    for row in rows:
        recovery = "" if row["recovery"] is None else f" ({row['recovery']:.1%})"
        place = row["method"], row["percent"], row["task"]
        cells[place] = figure(row["mean"], row["std"]) + recovery
    head = ["method", "sparsity", *(f"{task}, {METRICS[task]}" for task in tasks)]
    lines = [
        [method, f"{percent} %", *(cells.get((method, percent, task), "") for task in tasks)]
        for method, percent in METHODS
        if any((method, percent, task) in cells for task in tasks)
    ]
    return _markdown(head, lines)


def ablations_table(rows: Sequence[Row]) -> str:
    """What each change of the student's recipe gives after a short pruning."""
    lines = [
        [row["change"], f"{row['mlm_loss']:.3f}", f"{row['held_out_accuracy']:.4f}"] for row in rows
    ]
    return _markdown(["change", "MLM loss", "sst2, held-out accuracy"], lines)


def trace_table(rows: Sequence[Row]) -> str:
    """Where each number is from."""
    lines = []
    for row in rows:
        rate, seeds = row.get("learning_rate", ""), ", ".join(map(str, row["seeds"]))
        lines.append([f"`{row['run']}`", str(rate), seeds, f"`{row['recipe_sha256'][:12]}`"])
    return _markdown(["run", "learning rate", "seeds", "recipe (SHA-256)"], lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if lines else ""


def accuracy_picture(rows: Sequence[Row], path: Path) -> None:
    """Draw each task's metric against sparsity, one line for each method."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    size = (1.0 + 3.2 * len(tasks), 3.6)
    figure_, columns = plt.subplots(
        ncols=len(tasks), figsize=size, squeeze=False, layout="constrained"
    )
    for axes, task in zip(columns[0], tasks, strict=True):
        found = [row for row in rows if row["task"] == task]
        for row in found:
            if row["method"] == "dense":
                axes.axhline(row["mean"], color="black", linestyle=":", label="dense")
        for method, colour in COLOURS.items():
            points = [row for row in found if row["method"] == method]
            if points:
                axes.errorbar(
                    [row["percent"] for row in points],
                    [row["mean"] for row in points],
                    [row["std"] or 0.0 for row in points],
                    fmt="o-",
                    color=colour,
                    capsize=3,
                    label=method,
                )
        axes.set_xticks([85, 90])
        axes.set_xlim(84, 91)
        axes.set_xlabel("Sparsity, %")
        axes.set_title(f"{task}: {METRICS[task]}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    columns[0][0].legend(frameon=False, fontsize=8)
    figure_.savefig(path, dpi=120)
    plt.close(figure_)


def cost_picture(output: Path, path: Path) -> None:
    """Draw the hours that upstream training took against its tokens."""
    figure_, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    names = ("teacher", "sparse-85", "sparse-90")
    for name, colour in zip(names, (GREY, BLUE, ORANGE), strict=True):
        file = output / "runs" / name / "metrics.jsonl"
        if not file.exists():
            continue
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [row for row in rows if "tokens_per_second" in row]
        tokens = seconds = 0.0
        line = [(0.0, 0.0)]
        for before, row in zip([{"step": 0}, *rows], rows, strict=False):
            new = (row["step"] - before["step"]) * 32 * 128
            tokens, seconds = tokens + new, seconds + new / row["tokens_per_second"]
            line.append((tokens / 1e6, seconds / 3600))
        axes.plot(*zip(*line, strict=True), color=colour, label=name)
    axes.set_xlabel("Tokens, millions")
    axes.set_ylabel("Hours")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure_.savefig(path, dpi=120)
    plt.close(figure_)
