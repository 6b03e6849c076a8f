"""What models keep that were pruned, shrunk and then trained on, beside the dense one.

python recipes/minilm/trained_on.py RESULTS.json VALIDATION DENSE NAME=MODEL ...

DENSE and each MODEL are runs, measured on training examples held out (`split.py`), or what
`opfa prune` wrote of DENSE. VALIDATION is the file on which each of them is measured once.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import opfa


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each model, in Markdown."""
    head = ("task", "model", "held out", "validation")
    lines = [head, ("---", "---", "---:", "---:")]
    for row in rows:
        scores = (_share(row[split]) for split in ("held_out", "validation"))
        lines.append((row["task"], row["model"], *scores))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _share(values: Mapping[str, float]) -> str:
    digits = 2 if values["dense"] > 1 else 4  # percent, or a share
    return f"{values['model']:.{digits}f} ({values['model'] / values['dense']:.1%})"


def main(results: str, validation: str, dense: str, *models: str) -> None:
    """Add what each model keeps to the results."""
    recipe = Path(dense, "recipe.toml")
    splits = {"held_out": {}, "validation": {"task.validation": validation}}
    file = Path(results)
    rows = json.loads(file.read_text()) if file.exists() else []
    before = {name: _measured(dense, recipe, split) for name, split in splits.items()}
    task = recipe.read_text().partition('name = "minilm-')[2].partition('"')[0]
    for each in models:
        name, _, model = each.partition("=")
        row: dict[str, Any] = {"task": task, "model": name}
        for split, changes in splits.items():
            after = _measured(model, recipe, changes)
            row[split] = {"dense": before[split], "model": after}
        rows = [*(r for r in rows if (r["task"], r["model"]) != (task, name)), row]
        file.write_text(json.dumps(rows, indent=2) + "\n")


def _measured(model: str, recipe: Path, split: Mapping[str, Any]) -> float:
    """The task's first metric."""
    return next(iter(opfa.evaluate(model, recipe, split).metrics.values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
