"""Scores: what each weight is worth. The pruner removes the lowest.

A score is a frozen section of a recipe and has no state of its own. What it gathers over steps the
pruner keeps in runs beside the weights, shards as they are sharded, and saves in resume points.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from opfa.recipe import Count, Fraction, Positive, Section

if TYPE_CHECKING:  # recipes hold scores, and a recipe is read without waiting for torch
    from torch import Size, Tensor

    from opfa.compression.calibration import Quantity

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


class Magnitude(Score):
    """|w|."""

    kind: Literal["magnitude"] = "magnitude"
    """Its name in a recipe."""

    def of(self, part: Part) -> "Tensor":
        """The absolute value of each weight."""
        return part.weight.abs()


class FromText(Score):
    """Base of scores of which text says something, before the first mask update or at several."""

    sequences: Count
    quantity: "ClassVar[Quantity]"
    kept: ClassVar[int] = 1
    every: Count | None = None
    """Mask updates from one measurement to the next; by default there is only the first."""
    decay: Fraction = 0.0
    """Share of a new measurement that the former ones keep."""

    def asks(self, part: Part) -> Ask | None:
        """At the first update, and at every `every`-th."""
        is_due = not part.state or (self.every is not None and part.update % self.every == 0)
        return Ask(self.quantity, self.sequences) if is_due else None

    def calibrate(self, part: Part, found: "Tensor") -> State:
        """What was found, averaged with what is known."""
        known = part.state.get("text")
        return {"text": found if known is None else known.lerp(found, 1 - self.decay)}


class Curvature(FromText):
    """|w| sqrt(G), the root of what pruning adds to the loss by a diagonal quadratic model: LeCun
    et al. (1990), eq. 5, with G of Gauss and Newton, from random cotangents of the outputs.
    """

    kind: Literal["curvature"] = "curvature"
    """Its name in a recipe."""
    sequences: Count = 384
    """Sequences of the training text that are measured, forward and backward."""
    quantity: "ClassVar[Quantity]" = "curvature"

    def of(self, part: Part) -> "Tensor":
        """|w| times the root of the curvature."""
        return part.weight.abs() * part.state["text"].sqrt()


class Activation(FromText):
    """|w| times the norm of the weight's inputs: Sun et al. (2023), eq. 1, with its own scope."""

    kind: Literal["activation"] = "activation"
    """Its name in a recipe."""
    sequences: Count = 128
    """Sequences of the training text that are measured, forward only."""
    quantity: "ClassVar[Quantity]" = "activation"

    def of(self, part: Part) -> "Tensor":
        """|w| times the norm of the column's inputs."""
        return part.weight.abs() * part.state["text"]


class Fisher(FromText):
    """w^2 / (2 [F^-1]_qq) with Fisher information in blocks. At each update that is measured, what
    is kept makes up for what goes: Kurtic et al. (2022), sections 3.1 and 3.2. Gradients are of
    random cotangents, as for "curvature".
    """

    kind: Literal["fisher"] = "fisher"
    """Its name in a recipe."""
    sequences: Count = 4096
    """Sequences of the training text; four give one gradient."""
    every: Count | None = 1
    """Mask updates from one measurement to the next."""
    block: int = Field(default=50, ge=1, le=1024)
    """Weights of a block. A weight takes as many fp32 values, and 16 more, while it is measured."""
    damping: Positive = 1e-4
    """Added to the diagonal, times the mean diagonal of the matrix."""
    quantity: "ClassVar[Quantity]" = "fisher"

    def asks(self, part: Part) -> Ask | None:
        """With the size of blocks, and the damping."""
        ask = super().asks(part)
        return ask and ask._replace(block=self.block, damping=self.damping)

    def of(self, part: Part) -> "Tensor":
        """What the loss gains by the weight alone, half of it by a quadratic model."""
        return part.weight.square() / (2 * part.state["text"])


# All that a recipe may name.
AnyScore = Annotated[Magnitude | Curvature | Activation | Fisher, Field(discriminator="kind")]
