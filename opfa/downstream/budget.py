"""What structured pruning may keep: a budget, and how units are chosen under it."""

from typing import Annotated, Literal

from pydantic import Field

from opfa.recipe import Recipe


class Budget(Recipe):
    """How much of its cost a model keeps. Costs are those of heads and neurons, but milliseconds
    are of the whole encoder.
    """

    keep: Annotated[float, Field(gt=0, lt=1)]
    """The share of the cost that may be left."""
    of: Literal["macs", "milliseconds", "parameters"] = "macs"
    """The cost: multiply-adds, time on this machine, or weights and biases."""
    score: Literal["fisher", "magnitude"] = "fisher"
    """What a unit is worth: Fisher information of its gate, or the squares of its weights."""
    examples: Annotated[int, Field(ge=1)] = 8192
    """Training examples that scores see, at most; they end at 262,144 tokens."""
    batch: Annotated[int, Field(ge=1)] = 1
    """Sequences of the input that multiply-adds and milliseconds are of."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of each; by default `task.sequence_tokens`."""
