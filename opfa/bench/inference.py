"""Benchmark of the CPU runtime against what a user would take instead, all in one run.

What a section found is kept beside the models, so a bench that was stopped goes on there.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from opfa.bench import forms
from opfa.bench.contest import python_with, version
from opfa.bench.contestants import CONTESTANTS, Plan
from opfa.bench.curves import by_sparsity, by_tokens
from opfa.bench.figures import figures
from opfa.bench.race import anatomy, race
from opfa.bench.speed import Anatomy, Figures, Inference, Race, Sweep
from opfa.report.tables import Row
from opfa.runtime.build import digest
from opfa.runtime.library import level
from opfa.storage.files import write_text
from opfa.training.machine import environment

Found = TypeVar("Found", bound=Row)
log = logging.getLogger(__name__)


def bench_inference(model: str | None, plan: Plan, work: Path) -> Inference:
    """Measure an encoder, by default a random one, with its forms and results in a directory.

    A given model isn't measured by sparsity, and nothing else than this model is. Raises
    `ModelError` for a model that can't be loaded, `RunError` for one that the runtime can't run.
    """
    random, small = work / "random", work / "small"
    if model is None:
        forms.write_random(random, plan.config, (plan.sparsity, *plan.sparsities))
        forms.write_random(small, plan.small, [plan.sparsity])
        main = random / f"{plan.sparsity:g}"
    else:
        main = work / f"given-{hashlib.sha256(model.encode()).hexdigest()[:12]}"
        forms.write_given(model, main)
    known = json.dumps([model, asdict(plan), digest()])
    results = work / f"results-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    results.mkdir(parents=True, exist_ok=True)

    def kept(name: str, kind: type[Found], measure: Callable[[], Found]) -> Found:
        file = results / f"{name}.json"
        if file.exists():
            return kind.model_validate_json(file.read_text())
        log.info("measuring: %s", name)
        found = measure()
        write_text(file, found.model_dump_json())
        return found

    is_random = model is None
    values = {f"{sparsity:g}": random / f"{sparsity:g}" for sparsity in plan.sparsities}
    smaller = small / f"{plan.sparsity:g}"
    return Inference(
        machine=environment()["machine"],
        level=level(),
        threads=plan.threads,
        versions=_versions(plan.contestants, plan.peers),
        race=kept("race", Race, lambda: race(plan, main)),
        anatomy=kept("anatomy", Anatomy, lambda: anatomy(plan, main)),
        by_sparsity=kept("sparsity", Sweep, lambda: by_sparsity(plan, values))
        if is_random
        else None,
        by_tokens=kept("tokens", Sweep, lambda: by_tokens(plan, main)),
        figures=kept("figures", Figures, lambda: figures(plan, main)),
        small=kept("small", Race, lambda: race(plan.on_small(), smaller)) if is_random else None,
    )


def _versions(contestants: Sequence[str], peers: Sequence[str]) -> dict[str, str]:
    packages = sorted({CONTESTANTS[name].package for name in contestants})
    pythons = {package: python_with(package, peers) for package in packages}
    return {name: version(name, python) for name, python in pythons.items() if python}
