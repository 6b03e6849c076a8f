"""Single numbers of the runtime: threads, streams, batches, memory, loading, idling."""

import statistics
from pathlib import Path

from opfa.bench.contest import Stage, Turns, Worker, task
from opfa.bench.contestants import OURS, TORCH, Plan
from opfa.bench.speed import Figures

STREAM_SECONDS = 0.5
IDLE_ROUNDS = 3


def figures(plan: Plan, directory: Path) -> Figures:
    """Measure ours, and torch where it says something."""
    main = {"": directory}
    with Stage(plan) as stage:
        workers = {name: stage.need(name, main) for name in (OURS, TORCH)}
        ours = workers[OURS]
        single = stage.need(OURS, main, threads=1)
        several = {"": directory} | {str(n): directory for n in range(1, plan.threads)}
        streams = stage.need(OURS, several, threads=1)
        even = [round(sum(plan.batch) / len(plan.batch))] * len(plan.batch)
        lengths = {"ours": [plan.tokens], "batch": [*plan.batch], "even": even}
        tasks = {name: task(ours, each) for name, each in lengths.items()}
        turns = Turns().take({**tasks, "one": task(single, [plan.tokens])}, plan.rounds)
        many, one = [], []
        for _ in range(plan.few_rounds):
            many.append(_a_second(streams, plan.tokens))
            one.append(_a_second(ours, plan.tokens))
        loads = {name: worker.ask("loading") for name, worker in workers.items()}
        idle = {
            name: min(worker.ask("idle", lengths=[plan.tokens]) for _ in range(IDLE_ROUNDS))
            for name, worker in workers.items()
        }
        types = {name: stage.add(name, main) for name in plan.ours}
        sizes = {name: worker.ask("bytes_a_weight") for name, worker in types.items() if worker}
    tokens = {name: sum(each) for name, each in lengths.items()}
    return Figures(
        one_thread=turns.ratio("one", "ours"),
        batch_lengths=list(plan.batch),
        batch=turns.ratio("batch", "ours") * tokens["ours"] / tokens["batch"],
        batch_even=turns.ratio("batch", "even") * tokens["even"] / tokens["batch"],
        streams=statistics.median(many),
        one_stream=statistics.median(one),
        memory={name: load["grown"] for name, load in loads.items()},
        loads={name: load["seconds"] for name, load in loads.items()},
        idle=idle,
        bytes_a_weight=sizes,
    )


def _a_second(worker: Worker, tokens: int) -> float:
    return worker.ask("streams", tokens=tokens, seconds=STREAM_SECONDS)
