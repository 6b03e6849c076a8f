"""The released encoder on the task of the quickstart: in torch as any dense model, and small and
fast in the runtime, which skips zeros.

python recipes/quickstart/released.py QUICKSTART

QUICKSTART is what `opfa quickstart --output QUICKSTART` wrote. Beside it, in QUICKSTART-released,
come the run, the small model and results.json; the same command goes on after a stop.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

import opfa
from opfa import runtime
from opfa.bench.contest import Turns
from opfa.bench.measure import timed
from opfa.runtime.build import why_not

RECIPE = Path(__file__).with_name("finetune-released.toml")
ROUNDS = 50
Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """One line for each way to run it, in Markdown."""
    lines = ["| the released encoder | accuracy | a passage, ms | MB |", "|---|---:|---:|---:|"]
    for row in rows:
        cells = f"{row['accuracy']:.3f} | {row['milliseconds']:.1f} | {row['bytes'] / 1e6:.1f}"
        lines.append(f"| {row['way']} | {cells} |")
    return "\n".join(lines)


def right_of(model: Path, data: Path) -> float:
    """The accuracy of what `opfa predict` says, in the runtime where that is faster."""
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    found = opfa.predict(model, rows)
    return statistics.fmean(
        one.prediction == row["author"] for one, row in zip(found, rows, strict=True)
    )


@torch.no_grad()
def one_call(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[float]:
    """A turn, in seconds."""
    return [timed(lambda: model(**inputs))]


def main(quickstart: str, *changes: str) -> None:
    """Fine-tune, make it small, and compare; `changes` are of the recipe."""
    data = Path(quickstart, "data")
    work = Path(f"{quickstart}-released")
    run, small, results = work / "run", work / "small", work / "results.json"
    splits = [f"task.{name}={data / name}.jsonl" for name in ("train", "validation")]
    found = opfa.finetune(RECIPE, run, [*splits, *changes], resume=(run / "recipe.toml").exists())
    if not small.exists():
        opfa.release(run, small, format="compact-int8")
    if problem := why_not():
        print(f"The runtime can't be shown: {problem}")
        return
    dense, sparse = opfa.load(run), runtime.load(small)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    passage = json.loads((data / "validation.jsonl").read_text().splitlines()[0])["text"]
    inputs = tokenizer(passage, truncation=True, max_length=40, return_tensors="pt")
    models = {"torch": dense, "ours": sparse}
    calls = {name: partial(one_call, model, inputs) for name, model in models.items()}
    turns = Turns().take(calls, ROUNDS)
    ways = (
        ("torch", "torch, fp32, zeros computed with", found.metrics["accuracy"], run / "model"),
        ("ours", "opfa.runtime, zeros skipped, 8 bits on disk", right_of(small, data), small),
    )
    rows = [
        {
            "way": way,
            "accuracy": accuracy,
            "milliseconds": turns.median(name),
            "bytes": sum(file.stat().st_size for file in directory.glob("*.safetensors")),
        }
        for name, way, accuracy, directory in ways
    ]
    results.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
