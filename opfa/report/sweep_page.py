"""report/index.html of several fine-tunings: other seeds, the values of a sweep."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opfa.report.curves import COLOURS, Chart, Curve
from opfa.report.page import render
from opfa.report.run_page import FILE
from opfa.report.tables import figure
from opfa.storage.files import write_text


def write_sweep_page(output: Path, result: Mapping[str, Any]) -> None:
    """Write the page of a comparison, which is `result` in its results.json."""
    ended = [row for row in result["rows"] if row["runs"]]
    metrics = list(result["metrics"])
    drawn = _by_rate(ended, metrics) if len(ended) > 1 else _by_seed(ended[0], metrics)
    note = "mean over seeds" + (f" at {result['learning_rate']}" if len(ended) > 1 else "")
    values = {
        "name": result["task"],
        "directory": output.absolute().name,
        "best": result["best_run"],
        "cards": [
            (name.replace("_", " "), figure(value, result["std"][name]), note)
            for name, value in result["metrics"].items()
        ],
        "metrics": metrics,
        "means": [_means(row, metrics) for row in result["rows"]],
        "runs": [_run(output, run, row, metrics) for row in ended for run in row["runs"]],
        "recipe": (output / "recipe.toml").read_text(encoding="utf-8"),
    }
    write_text(output / FILE, render("sweep", values, {"charts": [asdict(c) for c in drawn]}, {}))


def _by_rate(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Iterator[Chart]:
    """Each metric against the learning rate: of each seed, and the mean."""
    rows = sorted(rows, key=lambda row: row["learning_rate"])
    seeds = sorted({run["seed"] for row in rows for run in row["runs"]})
    for metric in metrics:
        means = [(row["learning_rate"], row["mean"][metric]) for row in rows]
        curves = [_curve("mean", "blue", "line", means)] if len(seeds) > 1 else []
        for index, seed in enumerate(seeds):
            found = [
                (row["learning_rate"], run["metrics"][metric])
                for row in rows
                for run in row["runs"]
                if run["seed"] == seed
            ]
            colour, how = COLOURS[(index + 1) % len(COLOURS)], "points" if curves else "line"
            curves.append(_curve(f"seed {seed}", colour, how, found))
        title = f"Held-out {metric.replace('_', ' ')}"
        yield Chart(title, "", curves, x_label="learning rate", has_log_x=True)


def _by_seed(row: Mapping[str, Any], metrics: Sequence[str]) -> Iterator[Chart]:
    for metric in metrics:
        found = sorted((run["seed"], run["metrics"][metric]) for run in row["runs"])
        curve = _curve("a run", "blue", "points", found)
        yield Chart(f"Held-out {metric.replace('_', ' ')}", "", [curve], x_label="seed")


def _curve(name: str, colour: str, how: str, points: Sequence[tuple[float, float]]) -> Curve:
    return Curve(name, colour, how, [x for x, _ in points], [y for _, y in points])


def _means(row: Mapping[str, Any], metrics: Sequence[str]) -> tuple[str, ...]:
    diverged = f", {row['num_diverged']} diverged" if row["num_diverged"] else ""
    cells = (figure(row["mean"][n], row["std"][n]) if row["runs"] else "" for n in metrics)
    return (str(row["learning_rate"]), f"{len(row['runs'])}{diverged}", *cells)


def _run(
    output: Path, run: Mapping[str, Any], row: Mapping[str, Any], metrics: Sequence[str]
) -> dict[str, Any]:
    """A run, and where its page is; an earlier version's has none."""
    return {
        "name": run["run"],
        "page": f"../{run['run']}/{FILE}" if (output / run["run"] / FILE).exists() else None,
        "cells": [str(row["learning_rate"]), *(figure(run["metrics"][n], None) for n in metrics)],
    }
