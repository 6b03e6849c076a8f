"""Where a model comes from: the runs on the way to it, and the results of runs, read from their
directories.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from opfa.downstream.recipe import FinetuneRecipe
from opfa.recipe import Recipe, RunError
from opfa.upstream.recipe import PretrainRecipe

Facts = Mapping[str, Any]  # what JSON files of runs hold


@dataclass(frozen=True, kw_only=True)
class Step:
    """One run on the way to a model: its recipe and what its run directory says."""

    recipe: Facts  # resolved, as in recipe.toml
    sha256: str  # of the recipe
    environment: Facts
    steps: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the results: a model's metrics, means where there are several seeds."""

    label: str
    metrics: Mapping[str, float]
    deviations: Mapping[str, float | None] = field(default_factory=dict)
    num_seeds: int = 1
    sparsity: float


def steps(run: Path) -> Iterator[Step]:
    """This run, and those that its model was made from, as far as they are here."""
    path = run / "recipe.toml"
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    kind: type[Recipe] = FinetuneRecipe if "task" in values else PretrainRecipe
    recipe = kind.check(values, str(path))
    yield Step(
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        sha256=recipe.sha256(),
        environment=_json(run / "environment.json"),
        steps=_json(run / "done.json")["step"],
    )
    start = Path(values["model"].get("init", ""))
    if start.name == "model" and (start.parent / "done.json").is_file():
        yield from steps(start.parent)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RunError(f"{path}: is missing; only a finished run can be released")
    return json.loads(path.read_text())


def own_rows(run: Path) -> list[Row]:
    """The results of a run, and the mean over the seeds of its recipe where there are several."""
    rows = [row_of("this model", run)]
    for parent in (run.parent, run.parent.parent):
        for row in _json_rows(parent):
            names = [one["run"] for one in row["runs"]]
            if len(names) > 1 and any(parent / name == run for name in names):
                rows.append(_mean("its recipe", row))
    return rows


def _json_rows(directory: Path) -> list[dict[str, Any]]:
    path = directory / "results.json"
    return json.loads(path.read_text()).get("rows", []) if path.is_file() else []


def _mean(label: str, row: dict[str, Any]) -> Row:
    runs = row["runs"]
    sparsity = runs[0]["sparsity"]
    means, deviations = row["mean"], row["std"]
    return Row(
        label=label, metrics=means, deviations=deviations, num_seeds=len(runs), sparsity=sparsity
    )


def row_of(label: str, run: Path) -> Row:
    """The results of a run, or of the best of several; of a pre-training its loss on held-out
    text.
    """
    if rows := [row for row in _json_rows(run) if row["score"] is not None]:
        return _mean(label, max(rows, key=lambda row: row["score"]))
    if (run / "results.json").is_file():
        results = _json(run / "results.json")
        return Row(label=label, metrics=results["metrics"], sparsity=results["sparsity"])
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "done.json").exists() else []
    evaluations = [row for row in map(json.loads, lines) if row.get("eval")]
    if not evaluations:
        raise RunError(f"{run}: has no results to show; was this run finished?")
    loss = {"mlm_loss": evaluations[-1]["mlm_loss"]}
    return Row(label=label, metrics=loss, sparsity=_json(run / "done.json")["sparsity"])


def base_model(path: Sequence[Step]) -> str | None:
    """The Hub's model that all began with; None where it was a local one, or from scratch."""
    start = path[-1].recipe["model"].get("init", "")
    try:
        validate_repo_id(start)
    except HFValidationError:
        return None
    return start if start and not Path(start).exists() else None
