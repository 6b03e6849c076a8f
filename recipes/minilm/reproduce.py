"""Run what `launch/reproduce.sh` says, in a directory with model/, data/ and recipes/: `opfa`
commands, each printed before it runs and not run again once it is finished.

The learning rate of each method is chosen at 90 % with one seed, by what a tenth of the training
examples, held out, say at the end (MNLI's after one epoch; SQuAD's are those of MNLI). Then all
training examples train, and the accuracy on the validation split is what counts. All methods take
as many steps; 8 bits take a fifth more, from each seed's own model.
"""

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
from table import TASKS, write_table

from opfa.recipe import STOPPED, RunError

OPFA = [sys.executable, "-m", "opfa"]
PERCENT = (90, 85)
RATES = "sweep.learning_rate=[5e-5, 1.5e-4, 4.5e-4]"
RATES_FROM = {"squad": "mnli"}  # three times as many runs of the longest task would be too long
SHORTER = {"mnli": ("training.epochs=1",)}
HELD_OUT = ("selection.holdout=0.1", "selection.every_steps=1000000")  # looked at once, at the end
SEEDS = {"sst2": 3, "rte": 3, "mnli": 3, "squad": 1}
RELEASED = ("sst2", "squad")
LICENCE = ("--license", "apache-2.0", "--base-model", "sentence-transformers/all-MiniLM-L6-v2")
DENSE = ("model.init=model", "model.zeros=free")
TAUGHT = ("model.init=runs/teacher/model", "model.zeros=free")


def opfa(command: str, recipe: str, output: str, *arguments: str) -> None:
    """Run one command to its end, unless that was done before; leave with its exit code if it
    fails or was told to stop.
    """
    file = Path(f"recipes/minilm-{recipe}.toml")
    words = ["opfa", command, str(file), "--output", output, *arguments]
    what = f"{shlex.join(words)}\nrecipe (SHA-256): {sha256(file.read_bytes()).hexdigest()}\n"
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
    asked = []
    child = subprocess.Popen([*OPFA, *arguments], stdout=subprocess.DEVNULL, start_new_session=True)

    def stop(number: int, _: FrameType | None) -> None:
        asked.append(number)
        child.terminate()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if status < 0:
        print(f"opfa was ended by signal {-status}", file=sys.stderr)
    return status or (STOPPED if asked else 0)


def students() -> None:
    """The teacher, and what is pruned under it."""
    if not Path("prepared/corpus.json").exists():  # written whole or not at all
        opfa("prepare", "teacher", "prepared")
    for name in ("teacher", *(f"sparse-{percent}" for percent in PERCENT)):
        opfa("pretrain", name, f"runs/{name}")


def methods(dense: str) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Name, sparsity in percent, and what differs from the recipe. The first is to be run in
    `dense` before the others are asked for: as many steps is what they take.
    """
    yield "dense", 0, DENSE
    yield "dense-teacher", 0, TAUGHT
    steps = _steps(Path(dense))
    for percent in PERCENT:
        yield "one-shot", percent, (*DENSE, f"pruning.schedule={{end=0, target=0.{percent}}}")
        ramp = f"start={steps // 10}, end={steps * 6 // 10}, every=10, target=0.{percent}"
        yield "gradual", percent, (*DENSE, f"pruning.schedule={{{ramp}}}")
        yield "prune-once", percent, (f"model.init=runs/sparse-{percent}/model",)


def learning_rates(task: str) -> dict[str, float]:
    """The best for each method, by examples held out."""
    rates: dict[str, float] = {}
    for name, _, changes in methods(f"runs/{task}/dense-rates"):
        if name not in rates:
            run = f"runs/{task}/{name}-rates"
            opfa("finetune", task, run, RATES, *HELD_OUT, *SHORTER.get(task, ()), *changes)
            rates[name] = json.loads(Path(run, "results.json").read_text())["learning_rate"]
    return rates


def fine_tunings(task: str) -> None:
    """All methods on one task."""
    rates = learning_rates(RATES_FROM.get(task, task))
    steps = set()
    for name, percent, changes in methods(f"runs/{task}/dense-0"):
        run = f"runs/{task}/{name}-{percent}"
        rate = f"training.learning_rate={rates[name]}"
        opfa("finetune", task, run, "--seeds", str(SEEDS[task]), rate, *changes)
        steps.add(_steps(Path(run)))
        assert len(steps) == 1, f"{run}: methods took {sorted(steps)} steps"
        if name in ("dense", "prune-once"):
            _in_8_bits(task, name, percent, rates[name])


def _in_8_bits(task: str, name: str, percent: int, rate: float) -> None:
    """Each seed's model trained on: a fifth of the steps, at a fifth of the rate."""
    for path in sorted(Path(f"runs/{task}/{name}-{percent}").glob("seed-*")):
        changes = (
            f"seed={path.name.removeprefix('seed-')}",
            f"model.init={path}/model",
            f"model.zeros={'held' if percent else 'free'}",
            f"training.learning_rate={rate / 5}",
            f"training.epochs={_recipe(task)['training']['epochs'] / 5}",
            *("training.precision=fp32", "quantization.bits=8"),
        )
        opfa("finetune", task, f"runs/{task}/{name}-8bit-{percent}/{path.name}", *changes)


def ablations() -> None:
    """Short prunings to 90 %, and SST-2 from them on examples held out."""
    for name, (_, changes) in ABLATIONS.items():
        run = f"runs/ablations/{name}"
        opfa("pretrain", "ablation", run, *changes)
        opfa("finetune", "sst2", f"{run}-sst2", f"model.init={run}/model", *HELD_OUT)


def releases() -> None:
    """The students, and what 8 bits made of them with the first seed: compact files and cards."""
    runs = Path("runs")
    for percent in PERCENT:
        name = f"minilm-sparse-{percent}"
        release(name, runs / f"sparse-{percent}", "compact", runs / "teacher")
        for task in RELEASED:
            first, *others = sorted((runs / task).glob(f"prune-once-8bit-{percent}/seed-*"))
            for method in ("prune-once", "gradual", "one-shot"):
                others.append(runs / task / f"{method}-{percent}")
            release(f"{name}-{task}", first, "compact-int8", *others, runs / task / "dense-0")


def release(name: str, run: Path, form: str, *compare: Path) -> None:
    """Make a run a release, unless that was done before."""
    if Path("releases", name).exists():  # written whole or not at all
        return
    words = ["opfa", "release", str(run), "--output", f"releases/{name}", "--format", form]
    words += [*LICENCE, *(f"--compare={path.relative_to('runs')}={path}" for path in compare)]
    print("$", shlex.join(words), flush=True)
    if status := execute(words[1:]):
        sys.exit(status)


def _steps(sweep: Path) -> int:
    """How many steps each run of a sweep, or of several seeds, took."""
    steps = {json.loads(path.read_text())["step"] for path in sweep.rglob("done.json")}
    assert len(steps) == 1, f"{sweep}: runs of {sorted(steps)} steps"
    return steps.pop()


def _recipe(name: str) -> dict:
    return tomllib.loads(Path(f"recipes/minilm-{name}.toml").read_text())


def _check(parts: Sequence[str]) -> None:
    """Leave before anything runs when a part lacks what it reads."""
    for part in parts:
        tasks = {"sst2"} if part == "ablations" else {part, RATES_FROM.get(part, part)} & {*TASKS}
        for task in sorted(tasks):
            for key in ("train", "validation"):
                if not Path(file := _recipe(task)["task"][key]).exists():
                    sys.exit(f"{file}: is not there, and {part} needs it")
    names = ["teacher"] if set(parts) == {"ablations"} else ["sparse-90", "sparse-85"]
    for name in names if "students" not in parts else ():
        if not Path(f"runs/{name}/finished").exists():
            sys.exit(f"runs/{name}: is not finished; the part students makes it")
    for task in RELEASED if "releases" in parts else ():
        last = Path(f"runs/{task}").glob(f"prune-once-8bit-{PERCENT[-1]}/seed-*/finished")
        if task not in parts and len(list(last)) < SEEDS[task]:
            sys.exit(f"runs/{task}: is not finished, and releases needs it")


def main(parts: Sequence[str]) -> None:
    """Run the parts named, or all; then write the table of what is there."""
    todo = {
        "students": students,
        **{task: partial(fine_tunings, task) for task in TASKS},
        "ablations": ablations,
        "releases": releases,
    }
    unknown = [part for part in parts if part not in todo]
    if unknown:
        sys.exit(f"{unknown[0]}: no such part; there are {', '.join(todo)}")
    parts = parts or list(todo)
    _check(parts)
    try:
        for part in parts:
            todo[part]()
    finally:
        write_table(Path())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RunError as error:
        sys.exit(str(error))
