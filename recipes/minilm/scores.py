"""Which score makes the better student: how far its hidden states are from the dense model's on
held-out text, after equal steps.

python recipes/minilm/scores.py PREPARED RUNS RESULTS.json [--scores NAME ...] [--targets 0.9 ...]
    [--steps 480 ...] [--seeds 42 ...]

PREPARED is what `opfa prepare minilm-sparse-90` wrote; the model is in `model`. The same command
goes on after a stop. Texts are measured without masked tokens, whatever the student read.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

import opfa
from opfa.models.reconstruct import distance
from opfa.upstream.recipe import PretrainRecipe

HERE = Path(__file__).parent
SEQUENCES, BATCH = 256, 16  # of held-out text, that students are measured on
TARGETS, STEPS, SEEDS = (0.9, 0.97), (480, 4_800), (42, 43)
OWN_RECIPES = {"oBERT": "minilm-obert.toml"}
LAST = tuple(OWN_RECIPES)  # which take long, so they are made only if asked for
FIXED = ("magnitude, fixed", "ADMM, fixed")  # pruned before the first step
ONE_SHOT_SEQUENCES = 96  # of text that one-shot pruning is fitted to
Row = Mapping[str, Any]


def scores(steps: int) -> dict[str, dict[str, Any]]:
    """By a row's name what differs from its recipe in a run of so many steps."""
    curvature = {"kind": "curvature"}
    again = {**curvature, "every": max(1, steps // 80), "decay": 0.5}  # ten times in the ramp
    return {
        "magnitude": {},
        "activation": {"pruning.pattern.score": "activation"},
        "curvature": {"pruning.pattern.score": curvature},
        "curvature, again": {"pruning.pattern.score": again},
        "curvature, clean text": {"pruning.pattern.score": curvature, "masking.probability": 0.0},
        **{name: {} for name in (*FIXED, *OWN_RECIPES)},
    }


def changes(score: str, steps: int, target: float) -> dict[str, Any]:
    """What is changed of the row's recipe: its moments keep their shares of the run."""
    warmup = {"training.warmup_steps": min(steps - 1, max(10, steps // 60))}
    if score in FIXED:  # by magnitude, the zeros that are there stay
        return {"pruning.schedule": {"end": 0, "target": target}, **warmup}
    if score in OWN_RECIPES:
        moments, warmup = {"end": 11 * steps // 12, "every": max(1, steps // 12)}, {}
    else:
        moments = {"end": steps // 2, "hold_until": 4 * steps // 5}
    moments = {f"pruning.schedule.{key}": value for key, value in moments.items()}
    return {**moments, "pruning.schedule.target": target, **warmup, **scores(steps)[score]}


def pruned(dense: Path, runs: Path, target: float) -> Path:
    """The dense model without so many weights of each matrix, by ADMM."""
    found = runs / f"ADMM-{target:g}"
    if not found.exists():
        opfa.prune(
            str(dense),
            target,
            found,
            score="admm",
            reconstruct=True,
            texts=Path("data/pretrain/train-*.jsonl.gz"),
            sequences=ONE_SHOT_SEQUENCES,
        )
    return found


def table(rows: Sequence[Row]) -> str:
    """One line for each score and target, one column for each length, in Markdown."""
    lengths = sorted({row["steps"] for row in rows})
    lines = [("score", "zeros", *(f"{steps:,} steps, final / mean" for steps in lengths))]
    lines.append(("---", "---:", *["---:"] * len(lengths)))
    places = sorted({(row["target"], row["score"]) for row in rows}, key=_place)
    for target, score in places:
        cells = []
        for steps in lengths:
            place = {"score": score, "target": target, "steps": steps}
            cells.append(_cell([row for row in rows if place.items() <= row.items()]))
        lines.append((score, f"{target:.0%}", *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _place(place: tuple[float, str]) -> tuple[float, int]:
    return place[0], list(scores(1)).index(place[1])


def _cell(rows: Sequence[Row]) -> str:
    """Means over seeds; with several also the sample deviation of the mean over all states."""
    if not rows:
        return ""
    final, mean = ([row[f"{name}_distance"] for row in rows] for name in ("final", "mean"))
    more = f" ± {stdev(mean):.4f}" if len(rows) > 1 else ", 1 seed"
    return f"{fmean(final):.4f} / {fmean(mean):.4f}{more}"


def measured(model: Path, dense: Path, prepared: Path) -> dict[str, float]:
    """How far hidden states are on held-out text: in the last layer, and in all."""
    student, teacher = (AutoModel.from_pretrained(each).eval() for each in (model, dense))
    found = distance(student, dict(teacher.named_parameters()), _batches(prepared))
    return dict(zip(("final_distance", "mean_distance"), found, strict=True))


def _batches(prepared: Path) -> Iterator[dict[str, torch.Tensor]]:
    examples = load_from_disk(str(prepared / "validation"))
    assert isinstance(examples, Dataset)
    ids = [torch.tensor(row) for row in examples[:SEQUENCES]["input_ids"]]
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        real = pad_sequence([torch.ones_like(each) for each in batch], batch_first=True)
        yield {"input_ids": pad_sequence(batch, batch_first=True), "attention_mask": real}


def student(prepared: Path, runs: Path, score: str, target: float, steps: int, seed: int) -> Row:
    """Train one, or go on with it, and say how far it is."""
    recipe = HERE / OWN_RECIPES.get(score, "minilm-sparse-90.toml")
    run = runs / f"{score.replace(', ', '-').replace(' ', '-')}-{target:g}-{steps}-{seed}"
    dense = Path(str(PretrainRecipe.read(recipe).model.init))
    own = {}
    if score == "ADMM, fixed":
        own = {"model.init": str(pruned(dense, runs, target))}
    start = time.monotonic()
    result = opfa.pretrain(
        recipe,
        run,
        {
            **{"name": run.name, "data": str(prepared), "seed": seed, "training.steps": steps},
            **{"logging.evaluate_steps": steps, **own},
            **changes(score, steps, target),
        },
        resume=run.exists(),
    )
    return {
        "score": score,
        "target": target,
        "steps": steps,
        "seed": seed,
        **measured(run / "model", dense, prepared),
        "sparsity": result.sparsity,
        "seconds": round(time.monotonic() - start),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what isn't trained yet, shortest runs first, and write how far each student is."""
    given = _given(arguments)
    rows = json.loads(given.results.read_text()) if given.results.exists() else []
    done = {(row["score"], row["target"], row["steps"], row["seed"]) for row in rows}
    for steps, seed, target, score in product(
        sorted(given.steps), given.seeds, given.targets, given.scores
    ):
        if (score, target, steps, seed) not in done:
            rows.append(student(given.prepared, given.runs, score, target, steps, seed))
            given.results.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))


def _given(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = list(scores(1))
    parser = argparse.ArgumentParser()
    for name in ("prepared", "runs", "results"):
        parser.add_argument(name, type=Path)
    usual = [name for name in names if name not in LAST]
    parser.add_argument("--scores", nargs="+", choices=names, default=usual)
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
