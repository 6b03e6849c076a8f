"""Scores that text is measured for, before the first mask update or at several."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from opfa.compression.scores import Ask, Part, Score, State
from opfa.recipe import Count, Fraction, Positive

GRADIENTS = 16  # of Fisher information, that are added together

if TYPE_CHECKING:
    from torch import Tensor

    from opfa.compression.calibration import Quantity


class FromText(Score):
    """Base of scores that are measured on text, before the first mask update or at several."""

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

    def measurements(self, updates: int) -> int:
        """How often text is measured in a run of so many mask updates."""
        return 1 if self.every is None else -(-updates // self.every)

    @property
    def values(self) -> int:
        """Fp32 values a pruned weight, beside a copy of all weights, while text is measured."""
        return 2

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
    """|w| times the norm of the weight's inputs: Sun et al. (2023), eq. 1. In the paper the weights
    of an output row compete; here the pattern's scope decides.
    """

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

    @property
    def values(self) -> int:
        """A row of its block, and the gradients that are added together."""
        return self.block + GRADIENTS

    def asks(self, part: Part) -> Ask | None:
        """With the size of blocks, and the damping."""
        ask = super().asks(part)
        return ask and ask._replace(block=self.block, damping=self.damping)

    def of(self, part: Part) -> "Tensor":
        """How much the loss grows if this weight alone goes, by a quadratic model."""
        return part.weight.square() / (2 * part.state["text"])
