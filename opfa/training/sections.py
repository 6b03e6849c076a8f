"""Sections that recipes of pre-training and of fine-tuning have in common."""

from pydantic import Field

from opfa.compression.pattern import Pattern
from opfa.compression.schedules import Gradual
from opfa.recipe import Section, Weight


class Pruning(Section):
    """Magnitude pruning: when and how sparse, and where. Without it nothing is pruned."""

    schedule: Gradual
    """When masks are updated, and to which sparsity."""
    pattern: Pattern = Pattern()
    """Which weights are pruned."""


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
