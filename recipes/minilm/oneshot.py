"""All-MiniLM-L6-v2 pruned in one shot, by each score, with and without least squares: how far the
hidden states move.

python recipes/minilm/oneshot.py MODEL TEXT.jsonl RESULTS.json [SPARSITY ...]

Rows that RESULTS.json has already are kept.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import opfa

SEQUENCES = 96  # of 128 tokens; a tenth is held out
SPARSITIES = (0.9, 0.97)
METHODS: tuple[tuple[Any, bool], ...] = (  # score, and whether what is left is fitted
    *((score, False) for score in ("magnitude", "activation", "curvature")),
    *((score, True) for score in ("magnitude", "activation", "curvature", "admm")),
)
Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Distances by score and sparsity, in Markdown."""
    by_place = {(row["score"], row["is_reconstructed"], row["asked"]): row for row in rows}
    heads = (f"{100 * each:g} %, final / mean" for each in SPARSITIES)
    lines: list[tuple[str, ...]] = [("score", *heads)]
    lines.append(("---", *("---:" for _ in lines[0][1:])))
    for score, is_fitted in METHODS:
        found = [by_place[score, is_fitted, each] for each in SPARSITIES]
        cells = (f"{row['final_distance']:.3f} / {row['mean_distance']:.3f}" for row in found)
        name = f"`{score}`, least squares" if is_fitted else f"`{score}`"
        lines.append((name, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(model: str, text: str, results: str, *sparsities: str) -> None:
    """Prune in each way, and write what came out after each."""
    path = Path(results)
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    known = {(row["score"], row["is_reconstructed"], row["asked"]) for row in rows}
    for sparsity in map(float, sparsities or SPARSITIES):
        for score, is_fitted in METHODS:
            if (score, is_fitted, sparsity) in known:
                continue
            with tempfile.TemporaryDirectory() as aside:
                found = opfa.prune(
                    model,
                    sparsity,
                    Path(aside, "model"),
                    score=score,
                    reconstruct=is_fitted,
                    texts=Path(text),
                    sequences=SEQUENCES,
                )
            left_out = {"directory", "tensors", "left"}
            rows.append({"asked": sparsity, **found.model_dump(mode="json", exclude=left_out)})
            path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
