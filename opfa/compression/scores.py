"""Scores: what each weight is worth. The pruner removes the lowest.

A score is a frozen section of a recipe and has no state of its own. What it gathers over steps the
pruner keeps in runs beside the weights, shards as they are sharded, and saves in resume points.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from opfa.recipe import Section
from opfa.sparsity.chosen import Chosen

if TYPE_CHECKING:  # recipes hold scores, and a recipe is read without waiting for torch
    from torch import Size, Tensor

    from opfa.compression.calibration import Quantity
    from opfa.compression.schedules import Gradual, Ramp

State = Mapping[str, "Tensor"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """This rank's run [n] of one pruned weight, as a score sees it after `step` steps."""

    step: int
    update: int  # mask updates before this one
    name: str
    weight: "Tensor"  # [n], fp32, with the values that pruned weights had
    state: State  # what `observe` or `calibrate` returned last; empty before
    shape: "Size"  # of the whole weight, [out, in]
    cut: "Callable[[Tensor], Tensor]"  # from a tensor of that shape to this rank's run of it
    matrices: int = 1  # weights that are pruned by the same pattern, this one included
    ramp: float = 1.0  # how far the schedule's ramp was in this step's pass, from 0 to 1
    pace: float = 1.0  # this step's share of the highest learning rate


class Ask(NamedTuple):
    """What a score wants to know of each weight, from how many sequences of text."""

    quantity: "Quantity"
    sequences: int
    block: int = 0  # of Fisher information: weights
    damping: float = 0.0


class Score(Section):
    """Base of all scores; a new one is a class with `of`, and `observe` if it needs gradients, or
    `asks` and `calibrate` if text has to be measured.
    """

    kept: ClassVar[int] = 0  # fp32 values a weight in its state

    def facts(self) -> Chosen:
        """Its kind, or the name of its class, and its numbers."""
        values = self.model_dump(mode="json", exclude_none=True)
        return {"kind": values.pop("kind", type(self).__name__), **values}

    def check(self, schedule: "Gradual | Ramp") -> None:
        """Raise `ValueError` for what a schedule can't ask of this score."""

    def observes(self, step: int) -> bool:
        """Whether `observe` is called before `step`; 0 is a calibration before training."""
        return False

    def observe(self, part: Part, gradient: "Tensor") -> State:
        """The new state, fp32 runs [n], after the global batch's gradient [n] before masking."""
        raise NotImplementedError

    def asks(self, part: Part) -> Ask | None:
        """What has to be measured on text before the masks of this update are chosen."""
        return None

    def calibrate(self, part: Part, found: "Tensor") -> State:
        """The new state, fp32 runs [n], after what was asked for was found [n]."""
        raise NotImplementedError

    def of(self, part: Part) -> "Tensor":
        """The scores [n] of a run, in fp32."""
        raise NotImplementedError

    def threshold_at(self, ramp: float) -> float | None:
        """Prune scores at or below this, up to the schedule's target, and not a given number."""
        return None


class Magnitude(Score):
    """|w|."""

    kind: Literal["magnitude"] = "magnitude"
    """Its name in a recipe."""

    def of(self, part: Part) -> "Tensor":
        """The absolute value of each weight."""
        return part.weight.abs()
