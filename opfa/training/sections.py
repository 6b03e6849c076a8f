"""What recipes of pre-training and of fine-tuning have in common."""

from typing import Literal

from pydantic import Field

from opfa.compression.pattern import Pattern
from opfa.compression.schedules import Gradual, Interval, LearningRate, Ramp
from opfa.extras import require
from opfa.recipe import Count, Section, Weight


class Pruning(Section):
    """Pruning: when, how sparse and where. Without it nothing is pruned."""

    schedule: Ramp
    """When masks are updated, and to which sparsity."""
    pattern: Pattern = Pattern()
    """Which weights are pruned."""

    def ramp(self, steps: int) -> Gradual:
        """The schedule in steps of a run of `steps`; raises `ValueError` that names the key."""
        try:
            return self.schedule.over(steps)
        except ValueError as error:
            raise ValueError(f"pruning.schedule: {error}") from None


class Teacher(Section):
    """What both kinds of distillation say."""

    teacher: str
    """The teacher: a directory or a Hub name."""
    hard_weight: Weight = 0.5
    """Weight of the loss against the labels."""
    soft_weight: Weight = 0.5
    """Weight of the loss against the teacher's softened answers."""
    hidden_weight: Weight = 0.0
    """Weight of the distance between all hidden states; 0 leaves them out."""
    temperature: float = Field(default=2.0, gt=0.0)
    """Temperature T of the softened answers."""


class Saving(Section):
    """How often a run is saved, and where else its metrics go."""

    checkpoint_steps: Interval = 1_000
    """Steps between resume points, or their share of the run."""
    keep_checkpoints: Count = 2
    """Resume points that are kept."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Log to Weights & Biases too."""
    wandb_project: str = "opfa"
    """Its project there."""

    def check_packages(self) -> None:
        """Raise `RunError` if wandb is wanted and not installed."""
        if self.wandb != "disabled":
            require(f"logging.wandb = {self.wandb!r}", "opfa[wandb]", "wandb")


def learning_rate(
    peak: float, pruning: Pruning | None, rewinds: bool | None, *, steps: int, warmup_steps: int
) -> LearningRate:
    """The schedule of [training]; `rewinds` is its `rewind_learning_rate`."""
    rewind_at = pruning.ramp(steps) if pruning and rewinds else None
    return LearningRate(peak=peak, warmup_steps=warmup_steps, steps=steps, rewind_at=rewind_at)


def check_rewinding(pruning: Pruning | None, rewinds: bool | None) -> None:
    """Refuse `training.rewind_learning_rate` without updates to follow."""
    if rewinds and pruning is None:
        what = "needs [pruning], whose updates it follows"
        raise ValueError(f"training.rewind_learning_rate: {what}")
