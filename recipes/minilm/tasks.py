"""What the released students keep on each task, fine-tuned under a dense teacher, beside it.

python recipes/minilm/tasks.py RESULTS.json MODEL=RUN ...

Each RUN is a finished fine-tuning by a recipe of this directory. One that trained without the
examples held out (`split.py`) is measured on the validation file, once. `gpu_minutes.json` beside
RESULTS.json has the dense models that a GPU fine-tuned.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import opfa
from opfa.downstream.recipe import FinetuneRecipe
from opfa.storage import seal

HERE = Path(__file__).parent
TASKS = {"sst2": "SST-2", "mnli": "MNLI", "squad": "SQuAD, F1", "stsb": "STS-B"}
ABOVE = ("sst2", "mnli")  # where a most frequent class is something
DENSE = "dense"
Row = Mapping[str, Any]


def table(found: Mapping[str, Any]) -> str:
    """One line for each model, in Markdown: its scores and their shares of the dense model's."""
    above = [f"{TASKS[task]}, above" for task in ABOVE]
    lines = [("model", "zeros", *TASKS.values(), *above), ("---", *["---:"] * 7)]
    rows = found["rows"]
    dense = {
        task: _mean(r for r in rows if (r["model"], r["task"]) == (DENSE, task)) for task in TASKS
    }
    for model, group in groupby(rows, key=lambda row: row["model"]):
        own = list(group)
        means = {task: _mean(row for row in own if row["task"] == task) for task in TASKS}
        scores = [_score(means[task], dense[task], task) for task in TASKS]
        parts = [_above(means[task], dense[task], found["majority"][task]) for task in ABOVE]
        lines.append((model, f"{own[0]['sparsity']:.0%}".replace("%", " %"), *scores, *parts))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(rows: Iterator[Row]) -> float | None:
    values = [row["value"] for row in rows]
    return fmean(values) if values else None


def _score(value: float | None, dense: float | None, task: str) -> str:
    if value is None or dense is None:
        return ""
    return f"{value:.{2 if task == 'squad' else 4}f} ({value / dense:.1%})"


def _above(value: float | None, dense: float | None, least: float) -> str:
    return "" if value is None or dense is None else f"{(value - least) / (dense - least):.1%}"


def measured(model: str, run: Path) -> dict[str, Any]:
    """What a run found on the validation file, and how it differs from its recipe."""
    recipe = FinetuneRecipe.read(run / "recipe.toml")
    usual = FinetuneRecipe.read(HERE / f"{recipe.name}.toml")
    done, file = seal.read_json(run / "results.json"), usual.task.validation
    metrics, held_out = done["metrics"], {}
    if recipe.task.validation != file:
        held_out = {"held_out": next(iter(metrics.values()))}
        metrics = opfa.evaluate(run, recipe, {"task.validation": file}).metrics
    kept = {key: done[key] for key in ("seed", "sparsity", "recipe_sha256", "model_sha256")}
    words = [
        f"{key}={'' if value is None else json.dumps(value)}"
        for key, value in changes(recipe, usual)
    ]
    return {**_row(model, recipe.name, metrics), **held_out, **kept, "words": words}


def _row(model: str, recipe: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    metric, value = next(iter(metrics.items()))
    task = recipe.removeprefix("minilm-")
    return {"model": model, "task": task, "metric": metric, "value": value}


def changes(recipe: FinetuneRecipe, usual: FinetuneRecipe) -> Iterator[tuple[str, Any]]:
    """Each `section.key` with another value than usual; None for one that it lacks."""
    both = [each.model_dump(mode="json", exclude_none=True) for each in (recipe, usual)]
    ours, theirs = (dict(_flat(values)) for values in both)
    yield from ((key, value) for key, value in ours.items() if theirs.get(key) != value)
    yield from ((key, None) for key in theirs if key not in ours)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def on_a_gpu(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The dense models of `gpu_minutes.py`."""
    for name, run in found.items():
        if match := re.fullmatch(r"dense-(\w+)-(\d+)", name):
            task, seed = match.groups()
            metrics = {key: value for key, value in run["evaluation"].items() if key != "step"}
            row = _row(DENSE, task, metrics)
            yield {**row, "seed": int(seed), "sparsity": 0.0, "words": run["words"][1:]}


def main(results: str, *runs: str) -> None:
    """Measure what was not measured before, and write all rows."""
    file = Path(results)
    beside = (
        json.loads(file.with_name(f"{name}.json").read_text()) for name in ("gpu_minutes", "table")
    )
    gpu, tasks = beside
    majority = {task: tasks["tasks"][task]["majority"] for task in ABOVE}
    rows = json.loads(file.read_text())["rows"] if file.exists() else list(on_a_gpu(gpu))
    found = {"majority": majority, "rows": _sorted(rows)}
    for each in runs:
        model, _, run = each.partition("=")
        rows.append(measured(model, Path(run)))
        found["rows"] = _sorted(rows)
        file.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def _sorted(rows: Sequence[Row]) -> list[Row]:
    """The last of each model, task and seed; dense first, then by zeros and name."""
    last = {(row["model"], row["task"], row["seed"]): row for row in rows}
    tasks, least = [*TASKS], dict[str, float]()
    for row in last.values():
        least[row["model"]] = min(row["sparsity"], least.get(row["model"], 1.0))
    return sorted(
        last.values(),
        key=lambda row: (
            row["model"] != DENSE,
            least[row["model"]],
            row["model"],
            tasks.index(row["task"]),
            row["seed"],
        ),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
