"""What recipes of pre-training and of fine-tuning have in common."""

from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from opfa.compression.measured import FromText
from opfa.compression.pattern import PartPattern, Pattern, bind
from opfa.compression.schedules import Gradual, Interval, LearningRate, Ramp
from opfa.extras import require
from opfa.recipe import Count, Section, Weight

if TYPE_CHECKING:  # a recipe is read without waiting for torch
    from torch import nn


class Pruning(Section):
    """Pruning: when, how sparse and where. Without it nothing is pruned."""

    schedule: Ramp
    """When masks are updated, and to which sparsity."""
    pattern: Pattern = Pattern()
    """Which weights are pruned."""
    parts: tuple[PartPattern, ...] = Field(default=(), exclude_if=lambda parts: not parts)
    """Several patterns instead of `pattern`, of which no two prune the same matrix."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.parts and "pattern" in self.model_fields_set:
            raise ValueError("pattern, parts: give one of the two")
        initial = self.schedule.initial
        for index, part in enumerate(self.parts):
            if part.target is not None and part.target < initial:
                what = f"must not be below pruning.schedule.initial = {initial}"
                raise ValueError(f"parts.{index}.target = {part.target}: {what}")
        for pattern in self.patterns:
            try:
                pattern.score.check(pattern.schedule(self.schedule))
            except ValueError as error:
                raise ValueError(f"schedule.{error}") from None
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:  # Any: plain values
        """Without the pattern that parts replace."""
        values = write(self)
        if self.parts:
            values.pop("pattern", None)
        return values

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The parts, or the one pattern."""
        return self.parts or (self.pattern,)

    def layers(self, model: "nn.Module") -> "dict[str, nn.Linear]":
        """The linear layers that are pruned; raises `RecipeError` where patterns don't fit."""
        return {name: m for each in bind(model, self.patterns) for name, m in each.layers.items()}

    def ramp(self, steps: int) -> Gradual:
        """The schedule in steps of a run of `steps`; raises `ValueError` that names the key."""
        try:
            return self.schedule.over(steps)
        except ValueError as error:
            raise ValueError(f"pruning.schedule: {error}") from None

    def measurements(self, steps: int) -> int:
        """How often text is measured in a run of `steps`, for the score that asks most often."""
        ramp, scores = self.ramp(steps), [each.score for each in self.patterns]
        updates = ramp.updates_before(ramp.last_update) + 1
        found = (each.measurements(updates) for each in scores if isinstance(each, FromText))
        return max(found, default=0)


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


class Rates(Protocol):
    """What both kinds of [training] say of the learning rate."""

    @property
    def learning_rate(self) -> float:
        """The highest."""
        ...

    @property
    def lowest_learning_rate(self) -> float | None:
        """Where its decay ends; None for zero."""
        ...

    @property
    def rewind_learning_rate(self) -> bool | None:
        """Whether the decay begins anew at each mask update of the ramp."""
        ...

    @property
    def cyclic_learning_rate(self) -> bool:
        """Whether it also ends before each of them."""
        ...


def learning_rate(
    training: Rates, pruning: Pruning | None, *, steps: int, warmup_steps: int
) -> LearningRate:
    """The schedule of [training] in a run of `steps`."""
    follows = training.rewind_learning_rate or training.cyclic_learning_rate
    return LearningRate(
        peak=training.learning_rate,
        lowest=training.lowest_learning_rate or 0.0,
        warmup_steps=warmup_steps,
        steps=steps,
        rewind_at=pruning.ramp(steps) if pruning and follows else None,
        is_cyclic=training.cyclic_learning_rate,
    )


def check_rates(training: Rates, pruning: Pruning | None) -> None:
    """Refuse a lowest rate that isn't below the highest, and rates that follow mask updates where
    there are none, or in two ways.
    """
    lowest, peak = training.lowest_learning_rate, training.learning_rate
    if lowest is not None and lowest >= peak:
        what = f"must be below training.learning_rate = {peak}"
        raise ValueError(f"training.lowest_learning_rate = {lowest}: {what}")
    if training.rewind_learning_rate and training.cyclic_learning_rate:
        keys = "rewind_learning_rate, cyclic_learning_rate"
        raise ValueError(f"training.{keys}: give one of the two")
    if pruning is None and (training.rewind_learning_rate or training.cyclic_learning_rate):
        key = "rewind" if training.rewind_learning_rate else "cyclic"
        what = "needs [pruning], whose updates it follows"
        raise ValueError(f"training.{key}_learning_rate: {what}")
