"""Grains: which weights are pruned together, as a unit with one score."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from opfa.recipe import Section

if TYPE_CHECKING:  # recipes hold grains, and a recipe is read without waiting for torch
    from torch import Size, Tensor

    from opfa.sparsity.masks import Masks


class Grain(Section):
    """Base of all grains; a new one is a class with `pool` and `spread`.

    Both see all pruned tensors, so a unit may span several. The target sparsity counts units.
    """

    needs_whole: ClassVar[bool] = True  # tensors; else each rank pools and spreads its own runs

    def pool(self, scores: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """One fp32 score for each unit, in tensors of any name and shape.

        Masks are pooled too, as zeros and ones: a unit with any kept weight must come out positive.
        """
        raise NotImplementedError

    def spread(self, kept: "Mapping[str, Tensor]", shapes: "Mapping[str, Size]") -> "Masks":
        """The masks, by name and shape of the pruned weights, from which units are kept."""
        raise NotImplementedError


class Weight(Grain):
    """Every weight for itself."""

    kind: Literal["weight"] = "weight"
    """Its name in a recipe."""
    needs_whole: ClassVar[bool] = False

    def pool(self, scores: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """The scores themselves."""
        return scores

    def spread(self, kept: "Mapping[str, Tensor]", shapes: "Mapping[str, Size]") -> "Masks":
        """The masks themselves."""
        return dict(kept)


# All that a recipe may name; of several, Annotated[A | B, Field(discriminator="kind")].
AnyGrain = Weight
