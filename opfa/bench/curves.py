"""Latency against sparsity and against tokens."""

from collections.abc import Mapping
from pathlib import Path

from opfa.bench import forms
from opfa.bench.contest import CALLS, Stage, Task, Turns, task
from opfa.bench.contestants import TORCH, Plan
from opfa.bench.speed import Sweep

Point = tuple[str, str]  # a contestant and a value


def by_sparsity(plan: Plan, models: Mapping[str, Path]) -> Sweep:
    """Time models of one shape by their sparsity; torch computes all in the same time."""
    for directory in models.values():
        forms.write_ranges(directory)
    tasks: dict[Point, Task] = {}
    with Stage(plan) as stage:
        for name in plan.ours:
            if worker := stage.add(name, models):
                tasks |= {
                    (name, value): task(worker, [plan.tokens], model=value) for value in models
                }
        if worker := stage.add(TORCH, {"": next(iter(models.values()))}):
            tasks |= {(TORCH, value): task(worker, [plan.tokens], calls=1) for value in models}
        return _measured(tasks, plan.few_rounds)


def by_tokens(plan: Plan, directory: Path) -> Sweep:
    """Time one sequence by its length."""
    tasks: dict[Point, Task] = {}
    with Stage(plan) as stage:
        for name in (*plan.ours, TORCH):
            if worker := stage.add(name, {"": directory}):
                calls = CALLS if name in plan.ours else 1
                tasks |= {(name, str(n)): task(worker, [n], calls=calls) for n in plan.lengths}
        return _measured(tasks, plan.few_rounds)


def _measured(tasks: Mapping[Point, Task], rounds: int) -> Sweep:
    """Medians of each curve; ratios of ours to torch by round."""
    turns = Turns().take({" ".join(point): found for point, found in tasks.items()}, rounds)
    milliseconds: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for name, value in tasks:
        milliseconds.setdefault(name, {})[value] = turns.median(f"{name} {value}")
        if name != TORCH and (TORCH, value) in tasks:
            ratio = turns.ratio(f"{TORCH} {value}", f"{name} {value}")
            ratios.setdefault(name, {})[value] = ratio
    return Sweep(milliseconds=milliseconds, ratios=ratios)
