"""Run what `launch/reproduce.sh` says, in a directory with model/, data/ and recipes/: each line is
one `opfa` command, printed before it runs. What is finished is not run again.

Every method fine-tunes for as many steps. Its learning rate is chosen on a tenth of the training
examples, at 90 % and with one seed; then all of them train, and the validation split is measured
once for each seed.
"""

import json
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from table import write_table

OPFA = str(Path(sys.executable).with_name("opfa"))
PERCENT = (90, 85)
RATES = "sweep.learning_rate=[5e-5, 1e-4, 2e-4, 4e-4]"
HELD_OUT = "selection.holdout=0.1"
SEEDS = {"sst2": 3, "rte": 3, "mnli": 3, "squad": 2}
FIRST = "seed-42"
DENSE = ("model.init=model", "model.zeros=free")
SHORT = (
    *("training.steps=300", "training.warmup_steps=10", "logging.evaluate_steps=300"),
    *("pruning.schedule.end=150", "pruning.schedule.hold_until=240", "pruning.schedule.every=10"),
)
ABLATIONS = {
    "as-shipped": (),
    "no-distillation": ("distillation=",),
    "no-rewinding": ("training.rewind_learning_rate=false",),
    "kd-masked-tokens": ("distillation.tokens=masked",),
    "kd-hidden-states": ("distillation.tokens=masked", "distillation.hidden_weight=10"),
    "monotone": ("pruning.pattern.monotone=true",),
    "global": ("pruning.pattern.scope=global",),
    "30-updates": ("pruning.schedule.every=5",),
    "3-updates": ("pruning.schedule.every=50",),
}


def opfa(command: str, recipe: str, output: str, *arguments: str) -> None:
    """Run one command to its end, unless that was done before; leave with its exit code if it
    fails.
    """
    done = Path(output) / "finished"
    if done.exists():
        return
    resume = ["--resume"] if (Path(output) / "recipe.toml").exists() else []
    words = [
        "opfa",
        command,
        f"recipes/minilm-{recipe}.toml",
        "--output",
        output,
        *resume,
        *arguments,
    ]
    print("$", shlex.join(words), flush=True)
    if status := execute(words[1:]):
        sys.exit(status)
    done.touch()


def execute(arguments: list[str]) -> int:
    """Run `opfa` in a process of its own; its exit code."""
    child = subprocess.Popen([OPFA, *arguments], stdout=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, lambda *_: None)  # a Ctrl-C reaches the command too, which saves
    signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
    return child.wait()


def students() -> None:
    """The teacher, and what is pruned under it."""
    opfa("prepare", "teacher", "prepared")
    for name in ("teacher", *(f"sparse-{percent}" for percent in PERCENT)):
        opfa("pretrain", name, f"runs/{name}")


def methods(task: str) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Name, sparsity in percent, and what differs from the recipe."""
    yield "dense", 0, DENSE
    done = Path(f"runs/{task}/dense-0/{FIRST}/done.json")
    steps = json.loads(done.read_text())["step"]  # every method takes as many
    for percent in PERCENT:
        one_shot = f"pruning.schedule={{end=0, target=0.{percent}}}"
        yield "one-shot", percent, (*DENSE, one_shot)
    for percent in PERCENT:
        ramp = f"start={steps // 10}, end={steps * 6 // 10}, every=10, target=0.{percent}"
        yield "gradual", percent, (*DENSE, f"pruning.schedule={{{ramp}}}")
    for percent in PERCENT:
        yield "prune-once", percent, (f"model.init=runs/sparse-{percent}/model",)


def fine_tunings(task: str) -> None:
    """All methods on one task."""
    epochs = tomllib.loads(Path(f"recipes/minilm-{task}.toml").read_text())["training"]["epochs"]
    rates: dict[str, float] = {}
    for name, percent, changes in methods(task):
        if name not in rates:
            run = f"runs/{task}/{name}-rates"
            opfa("finetune", task, run, RATES, HELD_OUT, *changes)
            rates[name] = json.loads(Path(run, "results.json").read_text())["learning_rate"]
        run = f"runs/{task}/{name}-{percent}"
        rate = f"training.learning_rate={rates[name]}"
        seeds = ("--seeds", str(SEEDS[task]))
        opfa("finetune", task, run, *seeds, rate, *changes)
        if name == "prune-once":  # and on to 8 bits: a fifth of the steps, at a fifth of the rate
            eight = (
                f"model.init={run}/{FIRST}/model",
                f"training.learning_rate={rates[name] / 5}",
                f"training.epochs={epochs / 5}",
                *("training.precision=fp32", "quantization.bits=8"),
            )
            opfa("finetune", task, f"runs/{task}/{name}-8bit-{percent}", *seeds, *eight)


def ablations() -> None:
    """Short prunings to 90 %, one change each, and SST-2 from them, on examples held out."""
    for name, changes in ABLATIONS.items():
        run = f"runs/ablations/{name}"
        opfa("pretrain", "sparse-90", run, *SHORT, *changes)
        opfa("finetune", "sst2", f"{run}-sst2", f"model.init={run}/model", HELD_OUT)


def main(parts: list[str]) -> None:
    """Run the parts named, or all; then write the table of what is there."""
    todo = {
        "students": students,
        **{task: partial(fine_tunings, task) for task in SEEDS},
        "ablations": ablations,
    }
    unknown = [part for part in parts if part not in todo]
    if unknown:
        sys.exit(f"{unknown[0]}: no such part; there are {', '.join(todo)}")
    for part in parts or todo:
        todo[part]()
        write_table(Path())


if __name__ == "__main__":
    main(sys.argv[1:])
