"""The concerns that upstream and downstream share: prune, log, evaluate, stop, save."""

import logging
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from opfa.compression.pruner import Pruner
from opfa.training import distributed, points
from opfa.training.distributed import Stopped, Supervisor
from opfa.training.loop import Concern, Progress
from opfa.training.metrics import TRAINING, VALIDATION, Row

log = logging.getLogger(__name__)


@dataclass
class Pruning(Concern):
    """Lets a pruner see every gradient and update the masks when its schedule says so."""

    pruner: Pruner  # has masked the model already

    def begin(self, at: Progress) -> None:
        """The schedule may begin with an update."""
        if at.step == 0:
            self.after_step(at)

    def after_backward(self, at: Progress) -> None:
        """A score may observe gradients."""
        self.pruner.after_backward(at.step + 1, at.engine, at.pace)

    def after_step(self, at: Progress) -> None:
        """Update the masks when it is time, and say what the last update left."""
        is_update = self.pruner.after_step(at.step, at.engine)
        left = self.pruner.left() if at.step == self.pruner.schedule.last_update else {}
        if is_update and left and at.run.is_writer:
            counts = [f"{kept:,} of {size:,} {name}" for name, (kept, size) in left.items()]
            log.info("step %d: the last masks leave %s", at.step, ", ".join(counts))

    def save(self, at: Progress, directory: Path) -> None:
        """Write what the score has gathered; the masks of all layers are saved anyway."""
        self.pruner.save(directory, at.engine, at.run.is_writer)

    def load(self, at: Progress, directory: Path) -> None:
        """Read it."""
        self.pruner.load(directory, at.step, at.engine)


@dataclass
class Logging(Concern):
    """Moves the progress bar, and logs a row every `every_steps` steps."""

    every_steps: int
    row: Callable[[Progress], Row]  # asked on every rank, and may be collective

    def after_step(self, at: Progress) -> None:
        """Log when it is time."""
        at.run.advance(at.step)
        if at.is_due(self.every_steps):
            at.run.log({"step": at.step, "split": TRAINING, **self.row(at)})


@dataclass
class Evaluating(Concern):
    """Logs an evaluation every `every_steps` steps."""

    every_steps: int
    evaluate: Callable[[], dict[str, float]]  # asked on every rank, and may be collective
    _: KW_ONLY
    at_end: bool = True
    split: str = VALIDATION  # what it evaluates on

    def after_step(self, at: Progress) -> None:
        """Evaluate when it is time."""
        if at.is_due(self.every_steps) and (self.at_end or not at.is_end):
            with at.run.doing("evaluating"):
                found = self.evaluate()
            self.see(at, {"step": at.step, "split": self.split, "eval": True, **found})

    def see(self, at: Progress, row: Row) -> None:
        """Do something with an evaluation."""
        at.run.log(row)


@dataclass
class Stopping(Concern):
    """Ends a run early, after a resume point, when a signal or a file asks for it."""

    supervisor: Supervisor
    is_stopping: bool = False

    def begin(self, at: Progress) -> None:
        """From now on there is something to save."""
        self.supervisor.save_on_signals()

    def before_step(self, at: Progress) -> None:
        """Tell the watchdog what comes."""
        self.supervisor.beat(f"training step {at.step + 1}")

    def after_step(self, at: Progress) -> None:
        """All ranks stop when one was asked to."""
        if at.is_end:
            return
        is_asked = bool(self.supervisor.signal) or (at.run.is_writer and at.run.is_told_to_stop)
        if distributed.sum_over_ranks([is_asked])[0]:
            self.is_stopping = at.wants_point = at.is_over = True

    def end(self, at: Progress) -> None:
        """Raise `Stopped`, if that is why the loop ended."""
        if self.is_stopping:
            at.run.stopped()
            raise Stopped(
                f"{at.run.directory}: stopped at step {at.step}, which is saved; continue with the "
                "same command and --resume (the scripts of launch/ add it)"
            )


@dataclass
class Saving(Concern):
    """Saves a resume point every `every_steps` steps, and when another concern asks for one."""

    every_steps: int
    keep: int  # so many of the newest stay
    supervisor: Supervisor

    def after_step(self, at: Progress) -> None:
        """Save when it is time."""
        is_due = at.step % self.every_steps == 0 and not at.is_end
        if is_due or at.wants_point:
            self.supervisor.beat(f"saving step {at.step}")
            points.save(at, self.keep)
            at.wants_point = False
