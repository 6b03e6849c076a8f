"""How long engines take for one sentence of a released sentence encoder, on one core and on two.

python recipes/minilm/embed_speed.py MODEL RESULTS.json [PYTHON ...]

Each PYTHON has other engines: those in `~/.cache/opfa/bench`, where `launch/bench_inference.sh`
installs them. All engines take turns in one run.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from opfa.bench import forms
from opfa.bench.contestants import Plan
from opfa.bench.figures import figures
from opfa.bench.race import race
from opfa.training.machine import processor

TOKENS, ROUNDS, CORES = (16, 128), 15, 2
BASE = "ONNX Runtime, fp32"


def table(found: Mapping[str, Any]) -> str:
    """One line for each engine, the fastest first, in Markdown."""
    few, many = (found["milliseconds"][str(tokens)] for tokens in TOKENS)
    head = ("engine", "16 tokens, ms", "128 tokens, ms", f"against {BASE}", "a second, two cores")
    lines = [head, ("---", *["---:"] * 4)]
    for name in sorted(many, key=many.__getitem__):
        times = f"{few[name]:.1f}", f"{many[name]:.1f}", f"{many[BASE] / many[name]:.1f}x"
        lines.append((name, *times, f"{1e3 / found['two_cores'][name]:.0f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(model: str, results: str, *peers: str) -> None:
    """Measure, and write the results."""
    plan = Plan(rounds=ROUNDS, threads=1, peers=peers)
    plan = replace(plan, contestants=[n for n in plan.contestants if "AVX2" not in n])
    with tempfile.TemporaryDirectory() as aside:
        places = {tokens: Path(aside, str(tokens)) for tokens in TOKENS}  # an engine's model may
        for directory in places.values():  # be for so many tokens alone
            forms.write_given(model, directory)
        times = {n: _medians(replace(plan, tokens=n), place) for n, place in places.items()}
        both, place = replace(plan, threads=CORES), places[plan.tokens]
        two_cores, streams = _medians(both, place), figures(both, place).streams
    found = {
        "model": model,
        "processor": processor(),
        "milliseconds": times,
        "two_cores": two_cores,
        "streams": streams,
    }
    Path(results).write_text(json.dumps(found, indent=1) + "\n")
    print(table(json.loads(Path(results).read_text())))


def _medians(plan: Plan, directory: Path) -> dict[str, float]:
    return {name: speed.median for name, speed in race(plan, directory).speeds.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
