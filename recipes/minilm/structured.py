"""Heads and neurons pruned without training: what is left of a fine-tuned model's accuracy.

python recipes/minilm/structured.py RUN VALIDATION RESULTS.json

RUN was fine-tuned for SST-2 and measured on held-out training sentences (`split.py`). VALIDATION is
the file of the validation sentences, on which each model is measured once.
"""

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

import opfa

Score = Literal["fisher", "magnitude"]
CHOICES: list[tuple[Score, float]] = [
    ("fisher", 0.6),
    ("fisher", 0.4),
    ("fisher", 0.25),
    ("magnitude", 0.6),
    ("magnitude", 0.4),
]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each model, in Markdown."""
    head = ("score", "MACs", "heads", "neurons", "held out", "validation", "seconds")
    lines = [head, ("---", *["---:"] * 6)]
    for row in rows:
        held, validation = (_share(row[name]) for name in ("held_out", "validation"))
        units = (f"{row[name][0]:,} of {row[name][1]:,}" for name in ("heads", "neurons"))
        lines.append((row["score"], f"{row['macs']:.1%}", *units, held, validation, row["seconds"]))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _share(values: Mapping[str, float]) -> str:
    return f"{values['after']:.4f} ({values['after'] / values['before']:.1%})"


def main(run: str, validation: str, results: str) -> None:
    """Prune by each score to each share of MACs, and write what is left."""
    rows: list[dict[str, Any]] = []
    split = {"task.validation": validation}
    dense = opfa.evaluate(run, overrides=split).metrics["accuracy"]
    for score, keep in CHOICES:
        with tempfile.TemporaryDirectory() as aside:
            start = time.perf_counter()
            found = opfa.prune_structured(run, Path(aside, "model"), keep=keep, score=score)
            seconds = time.perf_counter() - start
            recipe = Path(run, "recipe.toml")
            after = opfa.evaluate(found.directory, recipe, split).metrics["accuracy"]
        held = found.before["accuracy"], found.after["accuracy"]
        rows.append(
            {
                "score": score,
                "keep": keep,
                "macs": found.left / found.cost,
                "heads": [
                    sum(k.heads for k in found.layers),
                    sum(k.of_heads for k in found.layers),
                ],
                "neurons": [
                    sum(k.neurons for k in found.layers),
                    sum(k.of_neurons for k in found.layers),
                ],
                "held_out": {"before": held[0], "after": held[1]},
                "validation": {"before": dense, "after": after},
                "examples": found.examples,
                "seconds": round(seconds),
                "threads": torch.get_num_threads(),
            }
        )
        Path(results).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
