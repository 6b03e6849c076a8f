"""Which score makes the better student: distance of hidden states on held-out text, equal steps.

python recipes/minilm/scores.py PREPARED RUNS RESULTS.json [STEPS ...]

PREPARED is what `opfa prepare minilm-sparse-90` wrote; the model is in `model`. The same command
goes on after a stop. STEPS are lengths of runs; by default 480 and 4,800.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import opfa

RECIPE = Path(__file__).with_name("minilm-sparse-90.toml")
MASKED = {"masking.probability": 0.15}
TARGETS, SEEDS = (0.9, 0.97), (42, 43)


def scores(steps: int) -> dict[str, dict[str, Any]]:
    """By a row's name what differs from the recipe in a run of so many steps."""
    curvature = {"kind": "curvature"}
    again = {**curvature, "every": max(1, steps // 80), "decay": 0.5}  # ten times in the ramp
    return {
        "magnitude": {},
        "activation": {"pruning.pattern.score": "activation"},
        "curvature": {"pruning.pattern.score": curvature},
        "curvature, again": {"pruning.pattern.score": again},
        "curvature, masked text": {"pruning.pattern.score": curvature, **MASKED},
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each score and target, one column for each length, in Markdown."""
    lengths = sorted({row["steps"] for row in rows})
    lines = [("score", "zeros", *(f"{steps:,} steps" for steps in lengths))]
    lines.append(("---", "---:", *["---:"] * len(lengths)))
    for score, target in dict.fromkeys((row["score"], row["target"]) for row in rows):
        cells = []
        for steps in lengths:
            wanted = (score, target, steps)
            found = [r for r in rows if (r["score"], r["target"], r["steps"]) == wanted]
            cells.append(" ".join(f"{row['distance']:.4f}" for row in found))
        lines.append((score, f"{target:.0%}", *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(prepared: str, runs: str, results: str, *lengths: str) -> None:
    """Train what isn't trained yet, shortest runs first, and write how far each student is."""
    file = Path(results)
    rows = json.loads(file.read_text()) if file.exists() else []
    done = {(row["score"], row["target"], row["steps"], row["seed"]) for row in rows}
    for steps in map(int, lengths or ("480", "4800")):
        for seed in SEEDS:
            for target in TARGETS:
                for score in scores(steps):
                    wanted = (score, target, steps, seed)
                    if wanted not in done:
                        distance = _distance(prepared, Path(runs), *wanted)
                        keys = ("score", "target", "steps", "seed")
                        rows.append({**dict(zip(keys, wanted, strict=True)), "distance": distance})
                        file.write_text(json.dumps(rows, indent=2) + "\n")


def _distance(prepared: str, runs: Path, score: str, target: float, steps: int, seed: int) -> float:
    """Of a student: the mean squared difference of hidden states on the held-out text."""
    output = runs / f"{score.replace(', ', '-')}-{target:g}-{steps}-{seed}"
    changes: dict[str, Any] = {
        **{"data": prepared, "seed": seed, "training.steps": steps, **scores(steps)[score]},
        **{"pruning.schedule.target": target, "pruning.schedule.end": steps // 2},
        **{"pruning.schedule.hold_until": 4 * steps // 5, "logging.evaluate_steps": steps},
        "training.warmup_steps": max(10, steps // 60),
    }
    opfa.pretrain(RECIPE, output, changes, resume=output.exists())
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["hidden_loss"] for row in rows if row.get("eval")][-1]


if __name__ == "__main__":
    main(*sys.argv[1:])
