"""Run what `launch/reproduce.sh` says, in a directory with model/, data/ and recipes/: `opfa`
commands, each printed before it runs and not run again once it is finished.

The learning rate of each method is chosen at 90 % with one seed, by examples that are held out of
training (see split.py): on SST-2 the best of three, and of more while the best is at an edge, with
dropout and without, which was better for sparse methods on the whole and is what they have; on the
other tasks, for which a sweep costs more than the runs that it is for, the better of two. Then
all training examples train, and the accuracy on the validation split is what counts. All methods
take as many steps; 8 bits take a fifth more, from each seed's own model, and so do their twins in
fp32.
"""

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import FrameType

from ablations import ABLATIONS
from answers import write_answers
from split import VALIDATION, write_split
from table import TASKS, write_table

from opfa.errors import STOPPED, RunError
from opfa.storage import seal

OPFA = [sys.executable, "-m", "opfa"]
PERCENT = (90, 85)
RATES = (5e-5, 1.5e-4, 4.5e-4)
EDGES = (5e-6, 5e-3)  # no rate beyond them is tried
SHORTER = {  # to choose rates
    "sst2": ("training.epochs=0.25",),
    "squad": ("training.epochs=0.25",),
}
ABLATIONS_RATE = 4.5e-4  # of SST-2 after each; the students' best
SEEDS = {"sst2": 3, "rte": 3, "mnli": 1, "squad": 1}
CONTROLLED = "sst2"  # has more rates, methods and twins, and differences paired by example
RELEASED = ("sst2", "squad")
LICENCE = ("--license", "apache-2.0", "--base-model", "sentence-transformers/all-MiniLM-L6-v2")
DENSE = ("model.init=model", "model.zeros=free")
NO_DROPOUT = "training.dropout=0.0"  # for what is sparse


def opfa(command: str, recipe: str, output: str, *arguments: str) -> None:
    """Run one command to its end, unless that was done before; leave with its exit code if it
    fails or was told to stop.
    """
    words = ["opfa", command, f"recipes/minilm-{recipe}.toml", "--output", output, *arguments]
    values = sha256(json.dumps(_recipe(recipe)).encode()).hexdigest()
    what = f"{shlex.join(words)}\nits recipe's values (SHA-256): {values}\n"
    finished = Path(output) / "finished"
    if finished.exists():
        if finished.read_text() != what:
            sys.exit(f"{output}: was made by another command or recipe, see {finished}; move it")
        return
    resume = ["--resume"] if (Path(output) / "recipe.toml").exists() else []
    print("$", shlex.join(words), flush=True)
    if status := execute([*words[1:], *resume]):
        sys.exit(status)
    finished.write_text(what)


def execute(arguments: Sequence[str]) -> int:
    """Run `opfa` in a process of its own; its exit code, or `STOPPED` if a signal asked for that.

    Ctrl-C and the other signals that end a program reach it as SIGTERM, so that it saves.
    """
    asked: list[int] = []
    child: subprocess.Popen | None = None

    def stop(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            child.terminate()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    child = subprocess.Popen([*OPFA, *arguments], stdout=subprocess.DEVNULL, start_new_session=True)
    if asked:  # before there was a child to be told
        child.terminate()
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if status < 0:
        print(f"opfa was ended by signal {-status}", file=sys.stderr)
    return status or (STOPPED if asked else 0)


def students() -> None:
    """What is pruned under the original model, once for all tasks."""
    prepare()
    for percent in PERCENT:
        opfa("pretrain", f"sparse-{percent}", f"runs/sparse-{percent}")


def prepare() -> None:
    """The text of all pre-training, unless that was done before."""
    if not Path("prepared/corpus.json").exists():  # written whole or not at all
        opfa("prepare", f"sparse-{PERCENT[0]}", "prepared")


def methods(task: str, dense: str) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Name, sparsity in percent, and what differs from the recipe. The first is to be run in
    `dense` before the others are asked for: as many steps is what they take.
    """
    yield "dense", 0, DENSE
    steps = _steps(Path(dense))
    for percent in PERCENT:
        one_shot = f"pruning.schedule={{end=0, target=0.{percent}}}"
        yield "one-shot", percent, (*DENSE, NO_DROPOUT, one_shot)
        yield "gradual", percent, (*DENSE, NO_DROPOUT, _ramp(steps, 6, percent))
        yield "prune-once", percent, (f"model.init=runs/sparse-{percent}/model", NO_DROPOUT)
        if task == CONTROLLED and percent == PERCENT[0]:
            yield "gradual-early", percent, (*DENSE, NO_DROPOUT, _ramp(steps, 3, percent))


def _ramp(steps: int, tenths: int, percent: int) -> str:
    """Gradual pruning from a tenth of the steps until so many."""
    start, end = steps // 10, steps * tenths // 10
    return f"pruning.schedule={{start={start}, end={end}, every=10, target=0.{percent}}}"


def learning_rates(task: str) -> dict[str, float]:
    """The best for each method, by examples held out."""
    rates: dict[str, float] = {}
    for name, _, changes in methods(task, f"runs/{task}/dense-rates"):
        if name not in rates:
            if task == CONTROLLED:  # the other way: how it is known which one is better
                other = [change for change in changes if change != NO_DROPOUT]
                other += [NO_DROPOUT] if NO_DROPOUT not in changes else []
                learning_rate(task, sweep_of(task, name, other), other)
            rates[name] = learning_rate(task, sweep_of(task, name, changes), changes)
    return rates


def sweep_of(task: str, name: str, changes: Sequence[str]) -> str:
    """The directory where a method's learning rates are tried."""
    return f"runs/{task}/{name}{'-no-dropout' if NO_DROPOUT in changes else ''}-rates"


def learning_rate(task: str, run: str, changes: Sequence[str]) -> float:
    """The best one; of more and more of them while it is at an edge, on the controlled task."""
    begun, rates = Path(run, "recipe.toml"), [*(RATES if task == CONTROLLED else RATES[1:])]
    if begun.exists():
        rates = seal.read_toml(begun)["sweep"]["learning_rate"]
    while True:
        sweep = f"sweep.learning_rate={rates}"
        opfa("finetune", task, run, sweep, *held_out(task), *SHORTER.get(task, ()), *changes)
        best = seal.read_json(Path(run, "results.json"))["learning_rate"]
        beyond = {min(rates): best / 3, max(rates): best * 3}.get(best)
        is_edge = beyond is not None and EDGES[0] <= beyond <= EDGES[1]
        if task != CONTROLLED or not is_edge:
            return best
        rates = sorted([*rates, float(f"{beyond:.2g}")])
        Path(run, "finished").unlink()


def held_out(task: str) -> tuple[str, str]:
    """What is to be trained on, and what is to be measured on, while choosing."""
    if not Path(f"split/{task}").exists():
        write_split(Path("data", task), Path("split", task))
    return f"task.train=split/{task}/fit.jsonl.gz", f"task.validation=split/{task}/held.jsonl.gz"


def fine_tunings(task: str) -> None:
    """All methods on one task."""
    rates = learning_rates(task)
    steps = set()
    for name, percent, changes in methods(task, f"runs/{task}/dense-0"):
        run = f"runs/{task}/{name}-{percent}"
        rate = f"training.learning_rate={rates[name]}"
        opfa("finetune", task, run, "--seeds", str(SEEDS[task]), rate, *changes)
        steps.add(_steps(Path(run)))
        assert len(steps) == 1, f"{run}: methods took {sorted(steps)} steps"
        if name == "prune-once" or (name == "dense" and task == CONTROLLED):
            dropout = [NO_DROPOUT] if NO_DROPOUT in changes else []
            longer(task, name, percent, rates[name], dropout)
    if task == CONTROLLED:
        write_answers(Path("runs", task))


def longer(task: str, name: str, percent: int, rate: float, dropout: Sequence[str]) -> None:
    """Each seed's model trained on in 8 bits, and in fp32 for comparison: a fifth of the steps, at
    a fifth of the rate, with as much dropout as before.
    """
    for path in sorted(Path(f"runs/{task}/{name}-{percent}").glob("seed-*")):
        changes = (
            f"seed={path.name.removeprefix('seed-')}",
            f"model.init={path}/model",
            f"model.zeros={'held' if percent else 'free'}",
            f"training.learning_rate={rate / 5}",
            f"training.epochs={_recipe(task)['training']['epochs'] / 5}",
            "training.precision=fp32",
            *dropout,
        )
        for form, added in (("8bit", ("quantization.bits=8",)), ("fp32", ())):
            run = f"runs/{task}/{name}-{form}-{percent}/{path.name}"
            opfa("finetune", task, run, *changes, *added)


def ablations() -> None:
    """Short prunings to 90 % under a teacher that learns masked tokens first, and SST-2 from them
    on examples held out.
    """
    prepare()
    opfa("pretrain", "teacher", "runs/teacher")
    for name, (_, changes) in ABLATIONS.items():
        run = f"runs/ablations/{name}"
        opfa("pretrain", "ablation", run, *changes)
        after = [change for change in changes if change.startswith("seed=")]
        after += [f"model.init={run}/model", f"training.learning_rate={ABLATIONS_RATE}", NO_DROPOUT]
        opfa("finetune", "sst2", f"{run}-sst2", *SHORTER["sst2"], *held_out("sst2"), *after)


def releases() -> None:
    """The students, and what 8 bits made of them with the first seed: compact files and cards; and
    ONNX at the higher sparsity.
    """
    runs = Path("runs")
    for percent, other in zip(PERCENT, reversed(PERCENT), strict=True):
        name = f"minilm-sparse-{percent}"
        release(name, runs / f"sparse-{percent}", "compact", runs / f"sparse-{other}")
        for task in RELEASED:
            first, *others = sorted((runs / task).glob(f"prune-once-8bit-{percent}/seed-*"))
            for method in ("prune-once", "gradual", "one-shot"):
                others.append(runs / task / f"{method}-{percent}")
            release(f"{name}-{task}", first, "compact-int8", *others, runs / task / "dense-0")
    for task in RELEASED:
        exports(task)


def release(name: str, run: Path, form: str, *compare: Path) -> None:
    """Make a run a release."""
    output = Path("releases", name)
    words = [*LICENCE, *(f"--compare={path.relative_to('runs')}={path}" for path in compare)]
    once(output, run, "release", str(run), "--output", str(output), "--format", form, *words)


def exports(task: str) -> None:
    """The first seed's model as ONNX, in fp32, in 8 bits as it was trained so, and as its twin in
    fp32 is when calibrated; what `opfa export` says of each is kept.
    """
    runs, directory = Path("runs", task), Path("exports", task)
    qat, fp32 = (
        min(runs.glob(f"prune-once-{form}-{PERCENT[0]}/seed-*")) for form in ("8bit", "fp32")
    )
    calibrated, recipe = directory / "calibrated", ("--recipe", f"{fp32}/recipe.toml")
    words = ("--output", str(calibrated), "quantization.embeddings=true")
    validation = _recipe(task)["task"]["validation"]
    once(calibrated, fp32, "calibrate", f"{fp32}/model", *recipe, *words)
    for name, run, model in (
        ("fp32", fp32, fp32 / "model"),
        ("8bit", qat, qat / "model"),
        ("calibrated", fp32, calibrated),
    ):
        file, report = directory / f"onnx-{name}/model.onnx", directory / f"{name}.json"
        words = ("--verify", validation, *recipe, "--report", str(report))
        once(file, run, "export", str(model), "--output", str(file), *words)


def once(output: Path, run: Path, *words: str) -> None:
    """Run a command whose output is written whole or not at all, unless that was done before with
    the model that the run has now.
    """
    if output.exists():
        if output.stat().st_mtime < (run / "done.json").stat().st_mtime:
            sys.exit(f"{output}: is older than {run}, of which it was made; move it")
        return
    print("$", shlex.join(["opfa", *words]), flush=True)
    if status := execute(words):
        sys.exit(status)


def _steps(sweep: Path) -> int:
    """How many steps each run of a sweep, or of several seeds, took."""
    steps = {seal.read_json(path)["step"] for path in sweep.rglob("done.json")}
    assert len(steps) == 1, f"{sweep}: runs of {sorted(steps)} steps"
    return steps.pop()


def _recipe(name: str) -> dict:
    return tomllib.loads(Path(f"recipes/minilm-{name}.toml").read_text())


def _check(parts: Sequence[str]) -> None:
    """Leave before anything runs when a part lacks what it reads."""
    for part in parts:
        task = "sst2" if part == "ablations" else part
        for name in ("train", VALIDATION.get(task, "validation")) if task in TASKS else ():
            if not Path(file := f"data/{task}/{name}.jsonl.gz").exists():
                sys.exit(f"{file}: is not there, and {part} needs it")
    needs_students = "students" not in parts and set(parts) != {"ablations"}
    for run in (f"runs/sparse-{percent}" for percent in PERCENT) if needs_students else ():
        if not Path(run, "finished").exists():
            sys.exit(f"{run}: is not finished; the part students makes it")
    for task in RELEASED if "releases" in parts else ():
        last = Path(f"runs/{task}").glob(f"prune-once-8bit-{PERCENT[-1]}/seed-*/finished")
        if task not in parts and len(list(last)) < SEEDS[task]:
            sys.exit(f"runs/{task}: is not finished, and releases needs it")


def main(parts: Sequence[str]) -> None:
    """Run the parts named, or all, in their order; then write the table of what is there."""
    todo = {
        "students": students,
        **{task: partial(fine_tunings, task) for task in TASKS},
        "ablations": ablations,
        "releases": releases,
    }
    unknown = [part for part in parts if part not in todo]
    if unknown:
        sys.exit(f"{unknown[0]}: no such part; there are {', '.join(todo)}")
    parts = [part for part in todo if part in parts or not parts]
    _check(parts)
    try:
        for part in parts:
            todo[part]()
    except SystemExit:
        with contextlib.suppress(RunError):  # what stopped it says more
            write_table(Path())
        raise
    write_table(Path())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RunError as error:
        sys.exit(str(error))
