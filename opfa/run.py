"""The run directory: what ran, on what, and how it went.

    recipe.toml        resolved and complete
    environment.json   versions, machine, world size, digests of data, tokenizer and first model
    metrics.jsonl      one object per logged step; evaluation rows carry "eval": true
    checkpoints/       resume points
    model/ report/     what came out
    done.json          written last: the run is complete
    stop               made by whoever wants a run to save and end; it becomes `stopped`
    .lock              held while a process trains here

A row goes to the file, to wandb and to the console: the same dict. Only rank 0 writes.
"""

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Self
from uuid import uuid4

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opfa.aside import lock
from opfa.errors import RunError, redacted
from opfa.files import check_directory, write_json, write_text, writing
from opfa.recipe import Recipe

Row = dict[str, Any]  # step and eval, then numbers
LIBRARIES = (
    "opfa",
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "deepspeed",
    "safetensors",
    "numpy",
)
STARTS = {"checkpoints", ".lock", ".recipe.toml.incomplete", "stop", "stopped"}
NO_NUMBERS = ("step", "eval", "final")
# Zero where a recipe has no such term, and then not on the console.
OPTIONAL = ("nsp_loss", "distill_loss", "hidden_loss")
CONTINUED = "the run continues from its newest resume point with --resume"
log = logging.getLogger(__name__)


class Run:
    """An open run.

    Use it as a context manager, so that bars and files are closed whatever happens.
    """

    def __init__(
        self,
        directory: Path,
        recipe: Recipe,
        *,
        steps: int,
        is_writer: bool = True,
        within: Path | None = None,
    ) -> None:
        """Make a run directory, or reopen one that `check_output` let pass. Of several runs,
        `within` is the directory of all; a `stop` there counts too.
        """
        self.directory = directory
        self._stops = [path / "stop" for path in (directory, within) if path is not None]
        self.recipe = recipe
        self.is_writer = is_writer
        self._steps = steps
        self._wandb: Any = None  # wandb's Run, if any
        self._progress: Progress | None = None
        if is_writer:
            with writing(directory):
                (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
                self._lock = _locked(directory)
                (directory / "stopped").unlink(missing_ok=True)
                write_text(directory / "recipe.toml", recipe.to_toml())

    @property
    def is_done(self) -> bool:
        """Whether this run finished before."""
        return (self.directory / "done.json").exists()

    def __enter__(self) -> Self:
        """Start the progress bar, on a terminal."""
        if self.is_writer and Console(stderr=True).is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(
                *columns, TextColumn("{task.fields[state]}"), console=Console(stderr=True)
            )
            self._task = self._progress.add_task(self.directory.name, total=self._steps, state="")
            self._progress.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Close what is open."""
        if self._progress is not None:
            self._progress.stop()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)
        if self.is_writer:
            self._lock.close()

    def describe(self, facts: dict[str, Any], launch: dict[str, Any] | None = None) -> None:
        """Write `environment.json`: these facts, and everything about the software and the machine;
        and add this launch to its list, which a resume continues.
        """
        if not self.is_writer:
            return
        path = self.directory / "environment.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        now = environment()
        if self.recipe.model_dump()["training"]["precision"] == "bf16" and not has_bf16():
            log.warning("training.precision = 'bf16': this CPU multiplies fp32 faster")
        this = {"time": now["time"], "git_commit": now["git_commit"], **(launch or {})}
        launches = [*before.get("launches", []), this]
        write_json(path, {**(before or {**now, **facts}), "launches": launches})

    def start_wandb(self, mode: str, project: str, name: str) -> None:
        """Also send rows to wandb, offline or online: to one run of its own for each directory,
        which a resume continues, in a group of all that have this recipe's name.
        """
        if mode == "disabled" or not self.is_writer:
            return
        import wandb  # only here: it is slow to import, and most runs don't use it

        path = self.directory / "wandb/id"
        if not path.exists():
            write_text(path, uuid4().hex)
        try:
            self._wandb = wandb.init(
                project=redacted(project),
                group=redacted(name),
                name=str(self.directory),
                id=path.read_text(encoding="utf-8"),
                resume="allow",
                mode="offline" if mode == "offline" else "online",
                dir=str(self.directory),
                config=redacted(self.recipe.model_dump(mode="json")),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise RunError(f"logging.wandb = {mode!r}: {error}") from error

    def forget_after(self, step: int) -> None:
        """Drop the rows of steps that are going to be run again, and of a final evaluation."""
        if self.is_writer:
            rows = [row for row in self.rows() if row["step"] <= step]
            kept = [row for row in rows if not row.get("final")]
            write_text(
                self.directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept)
            )

    def rows(self) -> list[Row]:
        """All rows so far. A line that a kill cut in half, or a power cut zeroed, is left out."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]

    def log(self, row: Row) -> None:
        """Write one row everywhere."""
        if not self.is_writer:
            return
        path = self.directory / "metrics.jsonl"
        with writing(path, CONTINUED), path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            step = row["step"]
            prefix = "eval/" if row.get("eval") else ""
            self._wandb.log(
                {prefix + k: v for k, v in row.items() if k not in NO_NUMBERS}, step=step
            )
        hidden = {*NO_NUMBERS, *(name for name in OPTIONAL if row.get(name) == 0)}
        shown = {k: v for k, v in row.items() if k not in hidden}
        text = "  ".join(f"{k} {_short(v)}" for k, v in shown.items())
        kind = "evaluation" if row.get("eval") else "step"
        if self._progress is not None and not row.get("eval"):
            self._progress.update(self._task, state=f"loss {_short(row['loss'])}")
        else:
            log.info("%s: %s %d/%d  %s", self.directory.name, kind, row["step"], self._steps, text)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    @property
    def is_told_to_stop(self) -> bool:
        """Whether someone made RUN/stop, which asks a run to save and end."""
        return any(path.exists() for path in self._stops)

    def stopped(self) -> None:
        """Answer RUN/stop by renaming it, so that scripts know not to start again."""
        for path in self._stops:
            if self.is_writer and path.exists():
                os.replace(path, path.with_name("stopped"))

    def finish(self, facts: dict[str, Any]) -> None:
        """Mark the run as complete."""
        if self.is_writer:
            write_json(self.directory / "done.json", facts)


def _short(value: Any) -> str:  # Any: a number or a text
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_output(
    directory: Path, recipe: Recipe, resume: bool, *, has_several: bool = False
) -> None:
    """Refuse a directory that holds something else, and a resume of nothing, of another recipe, or
    of several runs as one.

    Only the first process of a launch looks, since it alone makes the directory.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        return
    check_directory(directory)
    for name in ("checkpoints", "model", "report", "wandb"):
        check_directory(directory / name)
    if not resume:
        if directory.exists() and _has_more_than_a_start(directory):
            raise RunError(
                f"{directory}: holds another run or other files; give a new directory, or --resume"
            )
        return
    path = directory / "recipe.toml"
    if not path.exists():
        raise RunError(f"{directory}: there is no run to resume here")
    after = tomllib.loads(recipe.to_toml())  # as that file is: without secrets
    before = tomllib.loads(path.read_text(encoding="utf-8"))
    for values in (before, after):
        for section in ("launch", "logging"):  # an old launch's files may be gone
            values.pop(section, None)
    changed = _changes(tomllib.loads(type(recipe).check(before, str(path)).to_toml()), after)
    free = ("logging", "launch", "sweep.learning_rate")  # don't change what a run gives
    changed = [change for change in changed if not change.startswith(free)]
    if changed:
        raise RunError(f"{directory}: --resume with another recipe: " + "; ".join(changed))
    if not has_several and any(directory.glob("seed-*/recipe.toml")):
        what = "it holds several runs, one for each seed; say --seeds again"
        raise RunError(f"{directory}: --resume without --seeds: {what}")
    if has_several and (directory / "environment.json").exists():
        what = "it holds a single run; leave --seeds out, or give a new directory"
        raise RunError(f"{directory}: --resume with --seeds: {what}")


def _has_more_than_a_start(directory: Path) -> bool:
    """Whether there is more than what a run leaves that was killed while it made its directory."""
    names = {path.name for path in directory.iterdir()}
    points = directory / "checkpoints"
    return bool(names - STARTS) or (points.exists() and any(points.iterdir()))


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key} was {old!r} and is {new!r}")
    return changes


def _locked(directory: Path) -> IO[str]:
    """Hold RUN/.lock until this process ends; raises `RunError` while another one does."""
    path = directory / ".lock"
    try:
        file = lock(path)
    except BlockingIOError:
        who = path.read_text(encoding="utf-8")
        raise RunError(f"{directory}: is being trained already, by {who}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def has_bf16() -> bool:
    """Whether this machine has instructions for bf16: without them a matrix product in bf16 took
    ten times that in fp32.
    """
    import torch  # only here, so that reading a recipe stays fast

    able = torch.cpu.get_capabilities()
    is_accelerated = torch.cuda.is_available() or able["architecture"] != "x86_64"
    return is_accelerated or able["avx512_bf16"] or able["amx_bf16"]


def environment() -> dict[str, Any]:
    """The software and the machine."""
    import torch  # only here, so that reading a recipe stays fast

    git = shutil.which("git")
    commit = None
    if git:
        found = subprocess.run(
            [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        commit = found.stdout.strip() or None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "processors": os.cpu_count(),
            "accelerators": [
                torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
            ],
        },
        "git_commit": commit,
        "command": redacted(sys.argv[1:]),
    }


def _processor() -> str:
    """What the processor is called, where the system tells."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
