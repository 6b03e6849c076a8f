"""The run directory: what ran, on what, and how it went. README.md lists its files."""

import logging
import os
import platform
import tomllib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Self

from opfa.errors import RunError
from opfa.recipe import Recipe
from opfa.report.bars import Bar
from opfa.report.logged import NO_NUMBERS
from opfa.storage import seal
from opfa.storage.files import check_directory, write_text, writing
from opfa.storage.temporary import lock
from opfa.training import launch, machine, metrics
from opfa.training.metrics import HELD_OUT, VALIDATION, Row
from opfa.training.tracker import Tracker

STARTS = {"checkpoints", ".lock", ".recipe.toml.incomplete", "stop", "stopped"}
# Zero where a recipe has no such term, and then not on the console.
WANDB_PREFIX = {VALIDATION: "eval/", HELD_OUT: "held_out/"}
OPTIONAL = ("nsp_loss", "distill_loss", "hidden_loss")
CONTINUED = "the run continues from its newest resume point with --resume"
log = logging.getLogger(__name__)


class Run:
    """An open run, as a context manager: bars and files are closed whatever happens."""

    def __init__(
        self,
        directory: Path,
        recipe: Recipe,
        *,
        steps: int,
        is_writer: bool = True,
        within: Path | None = None,
        title: str = "",
    ) -> None:
        """Make or reopen a directory. A `stop` in `within`, which has several runs, counts too.
        The bar and the lines of the log begin with `title`, or with the directory's name.
        """
        self.directory = directory
        self._stops = [path / "stop" for path in (directory, within) if path is not None]
        self.recipe = recipe
        self.is_writer = is_writer
        self._steps = steps
        self._tracker: Tracker | None = None
        self._title = title or directory.name
        self._bar = Bar(self._title, steps, is_wanted=is_writer)
        if is_writer:
            with writing(directory):
                (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
                self._lock = _locked(directory)
                (directory / "stopped").unlink(missing_ok=True)
            if not self.is_done:
                write_text(directory / "recipe.toml", recipe.to_toml())

    @property
    def is_done(self) -> bool:
        """Whether this run finished before."""
        return (self.directory / "done.json").exists()

    def __enter__(self) -> Self:
        """Show the progress bar."""
        self._bar.__enter__()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Close what is open."""
        self._bar.__exit__()
        if self._tracker is not None:
            self._tracker.finish(exit_code=0 if error is None else 1)
        if self.is_writer:
            self._lock.close()

    def describe(self, facts: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> None:
        """Write facts, software and machine to `environment.json`, and add this launch to it."""
        if not self.is_writer:
            return
        path = self.directory / "environment.json"
        before = seal.read_json(path) if path.exists() else {}
        now = machine.environment()
        if self.recipe.model_dump()["training"]["precision"] == "bf16" and not machine.has_bf16():
            log.warning("training.precision = 'bf16': this CPU multiplies fp32 faster")
        this = {"time": now["time"], "git_commit": now["git_commit"], **(more or {})}
        this |= self._arithmetic()
        launches = [*before.get("launches", []), this]
        seal.write_sealed(path, {**(before or {**now, **facts}), "launches": launches})

    def start_wandb(self, mode: str, project: str, name: str) -> None:
        """Also send rows to wandb."""
        if self.is_writer and mode in ("offline", "online"):
            config = self.recipe.model_dump(mode="json")
            self._tracker = Tracker(
                self.directory, mode, project=project, group=name, config=config
            )

    def state(self) -> dict[str, Any]:
        """What a resume point notes of this run: its rows so far, and how it computes."""
        return {"metrics": metrics.state(self.directory), "arithmetic": self._arithmetic()}

    def go_back(self, step: int, facts: Mapping[str, Any] | None = None) -> None:
        """Drop the rows after a resume point. Warns if the machine computes in another way now."""
        if not self.is_writer:
            return
        facts = facts or {"metrics": None}
        metrics.forget_after(self.directory, step, facts["metrics"])
        if changed := machine.changes(facts.get("arithmetic", {}), self._arithmetic()):
            what = "so its last bits may not be those of an unbroken run"
            log.warning("%s: %s; %s", self.directory, changed, what)

    def _arithmetic(self) -> dict[str, Any]:
        return {**machine.arithmetic(), "processes": launch.place().world_size}

    def rows(self) -> list[Row]:
        """All rows so far."""
        return metrics.read(self.directory)

    def log(self, row: Row) -> None:
        """Write one row everywhere."""
        if not self.is_writer:
            return
        with writing(self.directory / metrics.FILE, CONTINUED):
            metrics.append(self.directory, row)
        is_training = not row.get("eval")
        if self._tracker is not None:
            prefix = "" if is_training else WANDB_PREFIX[row.get("split", VALIDATION)]
            numbers = {prefix + k: v for k, v in row.items() if k not in NO_NUMBERS}
            self._tracker.log(numbers, row["step"])
        if is_training:
            self._bar.say(f"loss {_short(row['loss'])}")
        level = logging.DEBUG if is_training and self._bar.is_shown else logging.INFO
        log.log(level, "%s", self._line(row))

    def _line(self, row: Row) -> str:
        """A row for the log; a terminal breaks it between two numbers."""
        hidden = {*NO_NUMBERS, *(name for name in OPTIONAL if row.get(name) == 0)}
        numbers = "  ".join(f"{k}={_short(v)}" for k, v in row.items() if k not in hidden)
        when = "finished" if row.get("final") else f"step {row['step']}/{self._steps}"
        split = row.get("split", VALIDATION).replace("_", " ")
        what = f", {split}" if row.get("eval") else ""
        return f"{self._title}: {when}{what}:  {numbers}"

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._bar.move_to(step)

    def doing(self, what: str) -> AbstractContextManager[None]:
        """Show on the bar what happens in this block."""
        return self._bar.doing(what)

    @property
    def is_told_to_stop(self) -> bool:
        """Whether someone made RUN/stop, which asks a run to save and end."""
        return any(path.exists() for path in self._stops)

    def stopped(self) -> None:
        """Answer RUN/stop by renaming it, so that scripts know not to start again."""
        for path in self._stops:
            if self.is_writer and path.exists():
                os.replace(path, path.with_name("stopped"))


def _short(value: Any) -> str:  # Any: a number or a text
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_output(directory: Path, recipe: Recipe, resume: bool, has_several: bool = False) -> None:
    """Refuse a directory that holds something else, a resume of what isn't this run, and a recipe
    that needs packages which are missing.
    """
    recipe.check_packages()
    if launch.place().rank > 0:  # the first process alone makes the directory
        return
    check_directory(directory)
    for name in ("checkpoints", "model", "report", "wandb"):
        check_directory(directory / name)
    if not resume:
        if directory.exists() and _has_more_than_a_start(directory):
            what = "holds another run or other files; give a new directory, or --resume"
            raise RunError(f"{directory}: {what}")
        return
    path = directory / "recipe.toml"
    if not path.exists():
        raise RunError(f"{directory}: there is no run to resume here")
    after = tomllib.loads(recipe.to_toml())  # as that file is: without secrets
    before = seal.read_toml(path)
    for values in (before, after):
        for section in ("launch", "logging"):  # an old launch's files may be gone
            values.pop(section, None)
    changed = _changes(tomllib.loads(type(recipe).check(before, str(path)).to_toml()), after)
    free = (
        "logging",
        "launch",
        "sweep.learning_rate",
        "search.evaluations",
    )  # don't change what a run gives
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
        who = path.read_text(encoding="utf-8", errors="replace")
        raise RunError(f"{directory}: is being trained already, by {who}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file
