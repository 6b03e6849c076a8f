"""The concerns that upstream and downstream share: prune, log, evaluate, stop, save."""

from collections.abc import Callable
from pathlib import Path

from opfa.compression.pruner import Pruner
from opfa.training import distributed, points
from opfa.training.distributed import Stopped, Supervisor
from opfa.training.loop import Concern, Progress
from opfa.training.metrics import Row


class Pruning(Concern):
    """Lets a pruner see every gradient and update the masks when its schedule says so."""

    def __init__(self, pruner: Pruner) -> None:
        """`pruner` has masked the model already."""
        self._pruner = pruner

    def begin(self, at: Progress) -> None:
        """The schedule may begin with an update."""
        if at.step == 0:
            self.after_step(at)

    def after_backward(self, at: Progress) -> None:
        """A score may observe gradients."""
        self._pruner.after_backward(at.step + 1, at.engine)

    def after_step(self, at: Progress) -> None:
        """Update the masks when it is time."""
        self._pruner.after_step(at.step, at.engine)

    def save(self, at: Progress, directory: Path) -> None:
        """Write what the score has gathered; the masks of all layers are saved anyway."""
        self._pruner.save(directory, at.engine, at.run.is_writer)

    def load(self, at: Progress, directory: Path) -> None:
        """Read it."""
        self._pruner.load(directory, at.step, at.engine)


class Logging(Concern):
    """Moves the progress bar, and logs a row every so many steps."""

    def __init__(self, every_steps: int, row: Callable[[Progress], Row]) -> None:
        """`row` is asked on every rank, and may be collective."""
        self._every_steps, self._row = every_steps, row

    def after_step(self, at: Progress) -> None:
        """Log when it is time."""
        at.run.advance(at.step)
        if at.is_due(self._every_steps):
            at.run.log({"step": at.step, **self._row(at)})


class Evaluating(Concern):
    """Logs an evaluation every so many steps."""

    def __init__(
        self, every_steps: int, evaluate: Callable[[], dict[str, float]], *, at_end: bool = True
    ) -> None:
        """`evaluate` is asked on every rank, and may be collective."""
        self._every_steps, self._evaluate, self._at_end = every_steps, evaluate, at_end

    def after_step(self, at: Progress) -> None:
        """Evaluate when it is time."""
        if at.is_due(self._every_steps) and (self._at_end or not at.is_end):
            self.see(at, {"step": at.step, "eval": True, **self._evaluate()})

    def see(self, at: Progress, row: Row) -> None:
        """Do something with an evaluation."""
        at.run.log(row)


class Stopping(Concern):
    """Ends a run early, after a resume point, when a signal or a file asks for it."""

    def __init__(self, supervisor: Supervisor) -> None:
        """`supervisor` notes the signals of this process."""
        self._supervisor, self._is_stopping = supervisor, False

    def begin(self, at: Progress) -> None:
        """From now on there is something to save."""
        self._supervisor.save_on_signals()

    def before_step(self, at: Progress) -> None:
        """Tell the watchdog what comes."""
        self._supervisor.beat(f"training step {at.step + 1}")

    def after_step(self, at: Progress) -> None:
        """All ranks stop when one was asked to."""
        if at.is_end:
            return
        is_asked = bool(self._supervisor.signal) or (at.run.is_writer and at.run.is_told_to_stop)
        if distributed.sum_over_ranks([is_asked])[0]:
            self._is_stopping = at.wants_point = at.is_over = True

    def end(self, at: Progress) -> None:
        """Raise `Stopped`, if that is why the loop ended."""
        if self._is_stopping:
            at.run.stopped()
            raise Stopped(
                f"{at.run.directory}: stopped at step {at.step}, which is saved; continue with the "
                "same command and --resume (the scripts of launch/ add it)"
            )


class Saving(Concern):
    """Saves a resume point every so many steps, and when another concern asks for one."""

    def __init__(self, every_steps: int, keep: int, supervisor: Supervisor) -> None:
        """`keep`: how many of the newest stay."""
        self._every_steps, self._keep, self._supervisor = every_steps, keep, supervisor

    def after_step(self, at: Progress) -> None:
        """Save when it is time."""
        is_due = at.step % self._every_steps == 0 and not at.is_end
        if is_due or at.wants_point:
            self._supervisor.beat(f"saving step {at.step}")
            points.save(at, self._keep)
            at.wants_point = False
