"""The training loop of upstream and downstream, and what a concern is.

    batch, forward passes, loss, backward, step; then whatever the concerns do: prune, log, save

README.md says how a `Trainer` and a `Concern` share the work.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from opfa.compression.schedules import LearningRate
from opfa.training.checkpoint import seed_step
from opfa.training.engine import Engine
from opfa.training.metrics import Row
from opfa.training.run import Run
from opfa.training.solo import SoloEngine

Losses = Sequence[Tensor]  # of one micro-batch: the total, then its parts


class Concern:
    """Something that happens while a model trains; README.md says when which hook is called."""

    def begin(self, at: "Progress") -> None:
        """Before the first step of this launch; `at.step` is above 0 after a resume."""

    def before_step(self, at: "Progress") -> None:
        """Before a step; `at.step` steps are finished."""

    def after_backward(self, at: "Progress") -> None:
        """Gradients are there and weights are not changed yet; `at.step` steps are finished."""

    def after_step(self, at: "Progress") -> None:
        """After a step; it is counted in `at.step`."""

    def end(self, at: "Progress") -> None:
        """After the last step of this launch."""

    def save(self, at: "Progress", directory: Path) -> None:
        """Write own files into a resume point."""

    def load(self, at: "Progress", directory: Path) -> None:
        """Read from a resume point what `save` wrote after `at.step` steps."""


@dataclass(kw_only=True)
class Progress:
    """Where a run is: what concerns look at, and how they ask for something."""

    run: Run
    model: nn.Module  # its parameters may be 16-bit or shards: read them through `engine`
    engine: Engine | SoloEngine
    concerns: Sequence[Concern] = ()
    steps: int  # of the whole run
    step: int = 0  # finished steps
    losses: list[Losses] = field(default_factory=list)  # of this step's micro-batches, detached
    learning_rate: float = 0.0  # of this step, from its backward pass on
    pace: float = 0.0  # its share of the highest learning rate
    grad_norm: Tensor | None = None  # None: gradients overflowed fp16 and the step was skipped
    best_step: int | None = None  # its resume point is kept
    wants_point: bool = False  # a concern asks for a resume point after this step
    is_over: bool = False  # a concern asks to end after this step

    @property
    def is_end(self) -> bool:
        """Whether the last step is finished."""
        return self.step >= self.steps

    def is_due(self, every_steps: int) -> bool:
        """Whether something is due that happens every `every_steps` steps, and at the end."""
        return self.step % every_steps == 0 or self.is_end


class Trainer(Protocol):
    """Data, model, loss and optimizer of one kind of training; its batches are its own affair."""

    seed: int
    rank: int
    schedule: LearningRate
    student: Any  # the model that is trained
    engine: Any  # Engine or SoloEngine
    launched: dict[str, Any]  # what environment.json says of this launch

    def batches(self, start: int) -> Iterator[list[Any]]:
        """This rank's micro-batches of every step from `start` on."""
        ...

    def counts(self, micro_batches: list[Any]) -> Any:
        """What the losses of this step are divided by. Collective."""

    def holding(self, num_passes: int) -> AbstractContextManager[None]:
        """A block of passes with the same weights, in which shared values are computed once."""
        ...

    def losses(self, batch: Any, counts: Any) -> Losses:
        """The forward passes of one micro-batch, and its share of the step's loss."""
        ...

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients."""

    def optimize(self, step: int, learning_rate: float, losses: list[Losses]) -> Tensor | None:
        """Change the weights; the gradient norm. Raises `RunError` where it is not finite."""

    def facts(self) -> dict[str, Any]:
        """What the run begins with."""
        ...

    def concerns(self) -> tuple[list[Concern], Concern]:
        """Those that change the model, and the one that evaluates it."""
        ...

    def row(self, at: Progress) -> Row:
        """What is logged of a step. Collective."""
        ...

    def finish(self, at: Progress) -> None:
        """Write the finished model. Collective."""


def train(trainer: Trainer, at: Progress) -> None:
    """The steps from `at.step` to the end, or until a concern ends them. Collective."""
    for concern in at.concerns:
        concern.begin(at)
    batches = trainer.batches(at.step)
    while not (at.is_over or at.is_end):
        for concern in at.concerns:
            concern.before_step(at)
        micro_batches = next(batches)  # a loader that starts draws a random number
        seed_step(trainer.seed, at.step, trainer.rank)
        at.losses = accumulate(trainer, micro_batches)
        at.learning_rate = trainer.schedule.at(at.step)
        at.pace = at.learning_rate / trainer.schedule.peak
        for concern in at.concerns:
            concern.after_backward(at)
        at.grad_norm = trainer.optimize(at.step, at.learning_rate, at.losses)
        at.step += 1
        for concern in at.concerns:
            concern.after_step(at)
    for concern in reversed(at.concerns):
        concern.end(at)


def accumulate(trainer: Trainer, micro_batches: list[Any]) -> list[Losses]:
    """Forward and backward passes of one step; the losses stay where they were computed."""
    counts, losses = trainer.counts(micro_batches), []
    with trainer.holding(len(micro_batches)):
        for index, batch in enumerate(micro_batches, 1):
            found = trainer.losses(batch, counts)
            trainer.backward(found[0], index == len(micro_batches))
            losses.append(tuple(part.detach() for part in found))
    return losses
