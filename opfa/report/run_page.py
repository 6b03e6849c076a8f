"""RUN/report/index.html: a run's curves, evaluations, recipe and environment in one file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opfa.report.curves import Plan, charts
from opfa.report.logged import NO_NUMBERS, Row, by_kind
from opfa.report.page import percent, render
from opfa.report.tables import figure
from opfa.sparsity.anatomy import by_layer, layer_labels, short_kinds
from opfa.sparsity.chosen import KEY, in_words
from opfa.storage import seal
from opfa.storage.files import write_text

FILE = "report/index.html"


def write_run_page(run: Path, rows: Sequence[Row], plan: Plan, sparsity: Mapping[str, Any]) -> None:
    """Write the page of a run, of which recipe.toml and environment.json are there. `sparsity` is
    the report of its finished model.
    """
    write_text(run / FILE, run_page(run, rows, plan, sparsity))


def run_page(run: Path, rows: Sequence[Row], plan: Plan, sparsity: Mapping[str, Any]) -> str:
    """That page. Raises `RunError` where one of these files is damaged."""
    recipe = seal.read_toml(run / "recipe.toml")
    environment = seal.read_json(run / "environment.json")
    _, evaluations = by_kind(rows)
    metrics = _metrics(evaluations)
    values = {
        "name": str(recipe.get("name", run.name)),
        "kind": "Fine-tuning" if "task" in recipe else "Pre-training",
        "directory": run.absolute().name,
        "cards": list(_cards(rows, metrics, plan, sparsity, recipe)),
        "metrics": ("step", *metrics),
        "evaluations": [_evaluation(row, metrics) for row in evaluations],
        "heat": _heat(sparsity["tensors"]),
        "recipe": (run / "recipe.toml").read_text(encoding="utf-8"),
        "environment": list(_facts(environment)),
        "launches": _launches(environment.get("launches", [])),
        "everything": json.dumps(environment, indent=2),
    }
    drawn = [asdict(chart) for chart in charts(rows, plan)]
    return render("run", values, {"charts": drawn}, {})


def _metrics(evaluations: Sequence[Row]) -> list[str]:
    """What was evaluated; without what is zero in all, and a loss that is another one again."""
    names = dict.fromkeys(n for row in evaluations for n in row if n not in NO_NUMBERS)
    values = {name: [row.get(name) for row in evaluations] for name in names}
    values = {name: found for name, found in values.items() if any(found)}
    others = [found for name, found in values.items() if name != "loss"]
    return [name for name, found in values.items() if name != "loss" or found not in others]


def _evaluation(row: Row, metrics: Sequence[str]) -> tuple[str, ...]:
    step = f"{row['step']:,}" + (" (finished model)" if row.get("final") else "")
    found = (row.get(name) for name in metrics)
    return (step, *("" if value is None else f"{value:.4f}" for value in found))


def _cards(
    rows: Sequence[Row],
    metrics: Sequence[str],
    plan: Plan,
    sparsity: Mapping[str, Any],
    recipe: Mapping[str, Any],
) -> Iterator[tuple[str, str, str]]:
    """What matters most: label, value, note."""
    last = next(reversed(by_kind(rows)[1]), {})
    where = f"{last.get('split', 'held out')}, at the end"
    for name in metrics:
        if last.get(name):
            yield name.replace("_", " "), figure(last[name], None), where
    total = sparsity["total"]
    if total["zeros"]:
        note = f"{total['zeros']:,} of {total['size']:,} weights of pruned matrices"
        yield "zeros", percent(total["sparsity"]), note
    if KEY in sparsity:
        kinds = ", ".join(dict.fromkeys(str(each["kind"]) for each in sparsity[KEY]))
        yield "zeros chosen by", kinds, in_words(sparsity[KEY])
    yield "steps", f"{len(plan.learning_rate):,}", f"seed {recipe.get('seed', '')}"
    yield "learning rate", f"{max(plan.learning_rate):g}", "the highest"


def _heat(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Zeros by layer and kind of matrix; None where a layer has no such matrix."""
    layers = by_layer({name: tensor["sparsity"] for name, tensor in tensors.items()})
    kinds = short_kinds(kind for row in layers.values() for kind in row)
    labels = layer_labels(list(layers))
    cells = [[row.get(kind) for kind in kinds] for row in layers.values()]
    return {"kinds": list(kinds.values()), "rows": list(zip(labels, cells, strict=True))}


def _facts(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    machine = environment.get("machine", {})
    yield "started", str(environment.get("time", ""))
    yield "command", "opfa " + " ".join(map(str, environment.get("command", [])))
    yield "processes", str(environment.get("world_size", ""))
    for name, value in machine.items():
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
        yield name, str(shown)
    yield "code", str(environment.get("git_commit") or "an installed package")
    for name, value in environment.get("versions", {}).items():
        yield name, str(value)


def _launches(launches: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """A table of what each launch had: head and rows."""
    plain = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in launches]
    names = list(dict.fromkeys(name for row in plain for name in row if name != "git_commit"))
    return [n.replace("_", " ") for n in names], [[_text(r.get(n)) for n in names] for r in plain]


def _text(value: object) -> str:
    return "none" if value is None else str(value)
