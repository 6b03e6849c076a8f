"""What `launch/gpu_minutes.sh` runs, in a directory with model/, data/, prepared/ and texts.jsonl:
students, then four tasks and sentence vectors from each, as processes side by side on one GPU. What
isn't done when the time is over is left out of results.json.

Learning rates are chosen by examples that are held out of training (see split.py): for the dense
model, for a sparse one (--rates-from) and for gradual pruning. The dense model of the best rate,
which has not seen those examples, teaches meanwhile. Then all training examples train, under a
dense model that saw them too, and the validation split is measured once, at the end.

Processes take turns on a GPU: beyond a few each only waits longer. On an H200 one student
alone read 509,000 tokens a second, and three beside twelve fine-tunings 626,000 together.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split import write_split

HERE = Path(__file__).parent
OPFA = [sys.executable, "-m", "opfa"]
EPOCHS = {"sst2": 3, "squad": 2, "mnli": 5, "stsb": 5}  # the longest first
TRIED = {"squad": 1, "sst2": 1}  # epochs of a run that only compares rates, where they are fewer
METRICS = {"stsb": "spearman", "mnli": "accuracy", "squad": "squad_f1", "sst2": "accuracy"}
BATCH = {"sst2": 64}
RATES = {
    "dense": (1.5e-5, 5e-5, 1.5e-4, 4.5e-4),
    "sparse": (1.5e-4, 4.5e-4, 1.35e-3),
    "gradual": (5e-5, 1.5e-4, 4.5e-4),
}
FASTER = {"squad": 3}  # how much higher all rates of a task are
SEEDS = (42, 43, 44)
FIRST = "sparse-90"
# Students of as few tokens as a CPU's: by curvature, and pruned by magnitude before the first step.
SHORT, FIXED = "short-90", "fixed-90"
SHORT_WORDS = ("training.steps=4800", "training.batch=4", "training.learning_rate=7.5e-4")
SEQUENCE_TOKENS = 128
SECONDS_TO_STOP = 10

Words = Sequence[str]
DENSE = ("model.init=model", "model.zeros=free")
NO_DROPOUT = "training.dropout=0.0"
# As in GMP*: a first step, a rate that rewinds at each mask update, and a teacher.
GRADUAL = (
    *(*DENSE, NO_DROPOUT, "training.rewind_learning_rate=true"),
    "pruning.schedule={start=0.05, end=0.7, every=0.01, initial=0.5, target=0.90}",
)


@dataclass(frozen=True)
class Job:
    """One `opfa` command, whose words are asked for as soon as the runs it needs are done."""

    run: str
    words: Callable[[], Words]
    needs: frozenset[str] = frozenset()


def student(percent: str, options: argparse.Namespace) -> Job:
    """A student of so many percent zeros, or a short one."""
    schedule = ["pruning.schedule.end=0.5", "pruning.schedule.hold_until=0.8"]
    if percent == FIXED:
        schedule = ["pruning.schedule={end=0, target=0.90}", "pruning.pattern.score=magnitude"]
    else:
        target = percent.removeprefix("short-")
        schedule += [f"pruning.schedule.target=0.{target}", "pruning.schedule.every=0.005"]
    long = (
        f"training.steps={options.steps}",
        f"training.batch={options.batch}",
        f"training.learning_rate={options.rate}",
    )
    words = (
        *("pretrain", f"{HERE}/minilm-curvature.toml", f"name=minilm-sparse-{percent}", *schedule),
        *(SHORT_WORDS if percent in (SHORT, FIXED) else long),
        "training.warmup_steps=0.02",
        *("logging.evaluate_steps=0.25", "logging.checkpoint_steps=1.0"),
        *options.student,
    )
    return Job(f"sparse-{percent}", lambda: words)


def trial(family: str, task: str, rate: float, options: argparse.Namespace) -> Job:
    """A run that compares rates by examples held out."""

    def words() -> Words:
        files = (
            f"task.train=split/{task}/fit.jsonl.gz",
            f"task.validation=split/{task}/held.jsonl.gz",
        )
        more = []
        if family != "dense":
            more = [f"distillation.teacher={_tried('dense', task, best_rate('dense', task))}/model"]
        epochs = options.epochs * TRIED.get(task, EPOCHS[task])
        changes = _changes(family, options.rates_from)
        return _finetuning(task, rate, epochs, *changes, *files, *more)

    needs = trials("dense", task) if family != "dense" else frozenset()
    if family == "sparse" and options.rates_from.startswith(FIRST):
        needs |= {FIRST}
    return Job(_tried(family, task, rate), words, needs)


def fine_tuning(
    name: str, family: str, task: str, seed: int, options: argparse.Namespace, times: int = 1
) -> Job:
    """A run on all training examples; under the first dense one, unless it is dense itself."""
    first = f"dense-{task}-{SEEDS[0]}"
    needs = trials(family, task)
    if family != "dense":
        needs |= {first}
    if family == "sparse":
        needs |= {f"sparse-{name}"}

    def words() -> Words:
        teacher = () if family == "dense" else (f"distillation.teacher={first}/model",)
        changes = _changes(family, f"sparse-{name}/model")
        epochs = options.epochs * times * EPOCHS[task]
        return _finetuning(
            task, best_rate(family, task), epochs, *changes, *teacher, f"seed={seed}"
        )

    return Job(f"{name}-{task}-{seed}", words, frozenset(needs))


def eight_bits(percent: str, task: str, options: argparse.Namespace) -> Job:
    """The first run of a sparse model, trained on in 8 bits: a fifth of its steps and its rate."""
    run = f"{percent}-{task}-{SEEDS[0]}"
    changes = (f"model.init={run}/model", NO_DROPOUT, "quantization.bits=8")
    fp32 = ("training.precision=fp32", f"distillation.teacher=dense-{task}-{SEEDS[0]}/model")

    def words() -> Words:
        epochs = options.epochs * EPOCHS[task] / 5
        return _finetuning(
            task, float(f"{best_rate('sparse', task) / 5:g}"), epochs, *changes, *fp32
        )

    return Job(f"{percent}-8bit-{task}-{SEEDS[0]}", words, frozenset([run]))


def vectors(percent: str, options: argparse.Namespace) -> Job:
    """A sentence encoder from a student; STS-B's test file is left for `opfa evaluate`."""
    files = ("task.train=texts.jsonl", "task.validation=data/stsb/train.jsonl.gz")
    words = _finetuning("embed", None, options.epochs, f"model.init=sparse-{percent}/model", *files)
    return Job(f"embed-{percent}", lambda: words, frozenset([f"sparse-{percent}"]))


def release(run: str) -> Job:
    """One compact archive of 8 bits."""
    words = ("release", run, "--format", "compact-int8", "--license", "apache-2.0")
    return Job(f"released/{run}", lambda: words, frozenset([run]))


def trials(family: str, task: str) -> frozenset[str]:
    """The runs that compare learning rates."""
    return frozenset(_tried(family, task, rate) for rate in rates(family, task))


def rates(family: str, task: str) -> list[float]:
    """The learning rates that are tried."""
    return [float(f"{rate * FASTER.get(task, 1):g}") for rate in RATES[family]]


def best_rate(family: str, task: str) -> float:
    """Of the rates that were tried."""
    tried = rates(family, task)
    found = {rate: evaluations(_tried(family, task, rate))[-1][METRICS[task]] for rate in tried}
    return max(found, key=found.__getitem__)


def evaluations(run: str) -> list[dict[str, Any]]:
    """The evaluations that a run has logged."""
    rows = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row.get("eval")]


def _tried(family: str, task: str, rate: float) -> str:
    return f"rates/{family}-{task}-{rate}"


def _changes(family: str, sparse: str) -> Words:
    changes = {"dense": (*DENSE, "training.dropout=0.1"), "gradual": GRADUAL}
    return changes.get(family) or (f"model.init={sparse}", NO_DROPOUT)


def _finetuning(task: str, rate: float | None, epochs: float, *more: str) -> Words:
    recipe, batch = f"{HERE}/minilm-{task}.toml", BATCH.get(task)
    return (
        *("finetune", recipe, f"training.epochs={epochs}", "training.precision=bf16"),
        *([f"training.learning_rate={rate}"] if rate else []),
        *([f"training.batch={batch}"] if batch else []),
        *("logging.checkpoint_steps=1.0", "logging.every_steps=0.05", *more),
    )


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """All that there is to do, what matters more first."""
    first, tasks, percents = SEEDS[0], options.tasks, options.percents
    for percent in percents:
        yield student(percent, options)
    for family in RATES:
        for task in tasks:
            yield from (trial(family, task, rate, options) for rate in rates(family, task))
        if family == "dense":
            yield from (fine_tuning("dense", "dense", task, first, options) for task in tasks)
    long = [percent for percent in percents if percent not in (SHORT, FIXED)]
    yield from (vectors(percent, options) for percent in long)
    for seed in SEEDS:
        if seed != first:
            yield from (fine_tuning("dense", "dense", t, seed, options) for t in tasks)
        for percent in percents if seed == first else long:
            yield from (fine_tuning(percent, "sparse", t, seed, options) for t in tasks)
        if seed == first:
            for percent in long:
                yield release(f"sparse-{percent}")
                yield release(f"embed-{percent}")
            yield from (fine_tuning("gradual", "gradual", t, seed, options) for t in tasks)
            for task in tasks:
                yield fine_tuning("gradual-x3", "gradual", task, seed, options, times=3)
    yield from (eight_bits(percent, task, options) for percent in long for task in tasks)


def run_all(todo: Sequence[Job], at_once: int, until: float) -> None:
    """Run jobs side by side, in their order as far as what they need is there."""
    waiting, running, failed = list(todo), {}, set[str]()
    while (waiting or running) and time.monotonic() < until:
        ended = [job for job, child in running.items() if child.poll() is not None]
        for job in ended:
            status = running.pop(job).returncode
            print(time.strftime("%X"), job.run, status or "done", flush=True)
            if status:
                failed.add(job.run)
                print(Path(f"{job.run}.log").read_text(errors="replace")[-600:], flush=True)
        if ended:
            gather(todo)
        waiting = [job for job in waiting if not (is_done(job.run) or failed & job.needs)]
        there = [job for job in waiting if all(map(is_done, job.needs))]
        for job in there[: at_once - len(running)]:
            waiting.remove(job)
            running[job] = _start(job)
        time.sleep(0.2)
    for child in running.values():
        child.terminate()
    end = time.monotonic() + SECONDS_TO_STOP
    for child in running.values():
        try:
            child.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            child.kill()


def is_done(run: str) -> bool:
    """Whether a run is finished, or a release there, which is written whole or not at all."""
    return Path(run, "done.json").exists() or Path(run, "release.json").exists()


def _start(job: Job) -> "subprocess.Popen[bytes]":
    command, *words = job.words()
    resume = ["--resume"] if Path(job.run, "recipe.toml").exists() else []
    Path(job.run).parent.mkdir(exist_ok=True)
    with open(f"{job.run}.log", "ab") as log:
        arguments = [*OPFA, command, *words, "--output", job.run, *resume]
        return subprocess.Popen(arguments, stdout=log, stderr=log)


def gather(todo: Iterable[Job]) -> None:
    """What finished runs say of themselves, as results.json."""
    found = {}
    for job in todo:
        if Path(job.run, "done.json").exists():
            done = json.loads(Path(job.run, "done.json").read_text())
            command = json.loads(Path(job.run, "environment.json").read_text())["command"]
            words = [word.replace(f"{HERE}/", "") for word in command[: command.index("--output")]]
            found[job.run] = {"words": words, "evaluation": evaluations(job.run)[-1], "done": done}
    Path("results.json").write_text(json.dumps(found, indent=1) + "\n")


def table(found: dict[str, Any]) -> str:
    """Markdown of results.json: the students, and the best of the rates there was time for."""
    lines = ["| student | tokens | hidden loss, held out |", "| --- | ---: | ---: |"]
    for run, one in found.items():
        if run.startswith("sparse-"):
            loss, steps = one["evaluation"]["hidden_loss"], one["evaluation"]["step"]
            (batch,) = [w for w in one["words"] if w.startswith("training.batch=")]
            tokens = steps * int(batch.partition("=")[2]) * SEQUENCE_TOKENS
            lines.append(f"| {run.removeprefix('sparse-')} % zeros | {tokens:,} | {loss:.5f} |")
    lines += [
        "",
        "| task, metric | " + " | ".join(RATES) + " |",
        "| --- |" + " ---: |" * len(RATES),
    ]
    for task, metric in METRICS.items():
        cells, dense = [], 0.0
        for family in RATES:
            names = {rate: _tried(family, task, rate) for rate in rates(family, task)}
            values = {r: found[n]["evaluation"][metric] for r, n in names.items() if n in found}
            rate = max(values, key=values.__getitem__)
            dense = dense or values[rate]
            cells.append(f"{values[rate]:.4g} ({values[rate] / dense:.1%}), {rate:g}")
        lines.append(f"| {task}, {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what there is time for."""
    began = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--percents", nargs="+", default=["90", "85", "97", SHORT, FIXED])
    parser.add_argument("--tasks", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--steps", type=int, default=4000, help="of a student")
    parser.add_argument("--batch", type=int, default=128, help="of a student")
    parser.add_argument("--rate", type=float, default=1e-3, help="of a student")
    parser.add_argument("--student", nargs="*", default=[], help="other keys of a student")
    parser.add_argument("--rates-from", default=f"{FIRST}/model", help="a sparse model")
    parser.add_argument("--epochs", type=float, default=1.0, help="share of those of each task")
    parser.add_argument("--at-once", type=int, default=6, help="processes")
    options = parser.parse_args()
    for task in options.tasks:
        if not Path("split", task).exists():
            write_split(Path("data", task), Path("split", task))
    todo = list(jobs(options))
    run_all(todo, options.at_once, began + options.seconds)
    gather(todo)


if __name__ == "__main__":
    main()
