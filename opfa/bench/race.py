"""Every contestant on one model, and where ours spends its time."""

import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opfa.bench import forms
from opfa.bench.contest import Stage, Turns, Worker, python_with, task
from opfa.bench.contestants import CONTESTANTS, OURS, Plan
from opfa.bench.ours import ATTENTION, LINEAR, REST, STEPS
from opfa.bench.speed import Anatomy, Part, Race, Shape, Speed
from opfa.errors import RunError
from opfa.models.configs import load_config

CALL = "a call"  # all steps, and what transformers does around them
log = logging.getLogger(__name__)


def race(plan: Plan, directory: Path) -> Race:
    """Let every contestant compute once a round."""
    _write_forms(plan, directory)
    with Stage(plan) as stage:
        found = {name: stage.add(name, {"": directory}) for name in plan.contestants}
        workers = {name: worker for name, worker in found.items() if worker is not None}
        if OURS not in workers:
            raise RunError(f"{OURS}: {stage.left_out[OURS]}")
        tasks = {name: task(worker, [plan.tokens]) for name, worker in workers.items()}
        turns = Turns().take(tasks, plan.rounds)
        return Race(
            shape=_shape(directory, workers[OURS]),
            tokens=plan.tokens,
            rounds=plan.rounds,
            speeds={name: _speed(turns, name) for name in workers},
            left_out=stage.left_out,
            peak=turns.steadiness(),
        )


def _write_forms(plan: Plan, directory: Path) -> None:
    """Write what the contestants read."""
    forms.write_ranges(directory)
    asked = [CONTESTANTS[name] for name in plan.contestants if CONTESTANTS[name].form]
    if any(python_with(contestant.package, plan.peers) for contestant in asked):
        from opfa.bench.graphs import write_onnx  # needs opfa[export]

        log.info("%s: writing it as ONNX", directory)
        write_onnx(directory, plan.tokens)


def _shape(directory: Path, worker: Worker) -> Shape:
    config: Any = load_config(str(directory))  # Any: of a family
    return Shape(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        sparsity=worker.ask("sparsity"),
    )


def _speed(turns: Turns, name: str) -> Speed:
    low, middle, high = turns.quartiles(name, OURS)
    return Speed(
        fastest=turns.fastest[name],
        median=turns.median(name),
        ratio=middle,
        low=low,
        high=high,
        milliseconds=turns.milliseconds[name],
    )


def anatomy(plan: Plan, directory: Path) -> Anatomy:
    """Time the steps of each kind alone, in each type."""
    tasks, work = {}, {}
    with Stage(plan) as stage:
        for name in plan.ours:
            if (worker := stage.add(name, {"": directory})) is None:
                continue
            work[name] = worker.ask("work", tokens=plan.tokens)
            for part in (LINEAR, ATTENTION, REST, STEPS):
                key = f"{name}: {part}"
                tasks[key] = task(worker, do="part", name=part, tokens=plan.tokens)
            tasks[f"{name}: {CALL}"] = task(worker, [plan.tokens])
        turns = Turns().take(tasks, plan.rounds)
    parts = {name: _part(turns, name, work, plan.threads) for name in tasks}
    return Anatomy(parts=parts, peak=turns.steadiness())


def _part(turns: Turns, key: str, work: Mapping[str, Mapping[str, float]], threads: int) -> Part:
    name, _, part = key.partition(": ")
    rate = share = None
    if operations := work[name].get(part):
        rates = [operations / 1e6 / milliseconds for milliseconds in turns.milliseconds[key]]
        able = [threads * peak for peak in turns.peaks[key]]
        rate = statistics.median(rates)
        share = statistics.median(r / a for r, a in zip(rates, able, strict=True))
    return Part(fastest=turns.fastest[key], median=turns.median(key), rate=rate, share=share)
