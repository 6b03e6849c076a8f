"""Grains: which weights are pruned together, as a unit with one score.

weight    every weight for itself
block     `rows` x `columns` weights of one matrix
neurons   in the feed-forward: the first matrix' row, in gated layers of input and gate, and the
          second's column
heads     in the attention: the rows of queries, keys and values, and the output's columns

A unit is worth the sum of its weights' scores, and all of its weights die together. So a neuron or
a head that is pruned can be removed exactly (`opfa shrink`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from opfa.errors import RecipeError
from opfa.recipe import Count, Section

if TYPE_CHECKING:  # recipes hold grains, and a recipe is read without waiting for torch
    from torch import Size, Tensor, nn

    from opfa.sparsity.masks import Masks
    from opfa.sparsity.units import Units


class Grain(Section):
    """Base of all grains; a new one is a class with `pool` and `spread`.

    Both see all pruned tensors, so a unit may span several. The target sparsity counts units.
    """

    needs_whole: ClassVar[bool] = True  # tensors; else each rank pools and spreads its own runs
    units: ClassVar[str] = "units"  # what rows and logs call them

    def of(self, model: "nn.Module", layers: "Mapping[str, nn.Linear]") -> "tuple[Self, list[str]]":
        """This grain for a model, and which of the layers that a pattern names it prunes.

        Raises `RecipeError`, whose message begins with "grain", where they don't fit.
        """
        return self, list(layers)

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
    units: ClassVar[str] = "weights"

    def pool(self, scores: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """The scores themselves."""
        return scores

    def spread(self, kept: "Mapping[str, Tensor]", shapes: "Mapping[str, Size]") -> "Masks":
        """The masks themselves."""
        return dict(kept)


class Block(Grain):
    """Blocks of weights that lie together, `rows` x `columns`; "32x32" for short."""

    kind: Literal["block"] = "block"
    """Its name in a recipe."""
    rows: Count
    """Rows of a block; must divide the rows (outputs) of each matrix."""
    columns: Count
    """Columns of a block; must divide the columns (inputs) of each matrix."""
    units: ClassVar[str] = "blocks"

    def of(self, model: "nn.Module", layers: "Mapping[str, nn.Linear]") -> tuple[Self, list[str]]:
        """Raises `RecipeError` for a matrix that isn't made of whole blocks."""
        for name, layer in layers.items():
            shape = tuple(layer.weight.shape)
            for key, size, length in zip(("rows", "columns"), self._size, shape, strict=True):
                if length % size:
                    fit = [str(n) for n in range(1, length + 1) if length % n == 0]
                    what = f"does not divide the {length} {key} of {name}.weight {list(shape)}"
                    raise RecipeError(f"grain.{key} = {size}: {what}; {', '.join(fit)} do")
        return self, list(layers)

    @property
    def _size(self) -> tuple[int, int]:
        return self.rows, self.columns

    def pool(self, scores: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """The sum over each block, [blocks down, blocks across]."""
        return {name: _sum(self._blocks(score), (1, 3)).float() for name, score in scores.items()}

    def spread(self, kept: "Mapping[str, Tensor]", shapes: "Mapping[str, Size]") -> "Masks":
        """Each block as a whole."""
        masks = {name: units.new_empty(shapes[name]) for name, units in kept.items()}
        for name, units in kept.items():
            self._blocks(masks[name]).copy_(units[:, None, :, None])
        return masks

    def _blocks(self, matrix: "Tensor") -> "Tensor":
        """A view [blocks down, rows, blocks across, columns]."""
        return matrix.unflatten(0, (-1, self.rows)).unflatten(2, (-1, self.columns))


@dataclass(frozen=True)
class Lines:
    """Rows (axis 0) or columns (axis 1) of one matrix: `size` for each of `count` units."""

    layer: str
    axis: int
    start: int
    count: int
    size: int
    shape: list[int]

    @property
    def weight(self) -> str:
        """The name of the matrix."""
        return f"{self.layer}.weight"

    def of(self, matrix: "Tensor") -> "Tensor":
        """A view of them, [units, lines of a unit, length of a line]."""
        lines = matrix.movedim(self.axis, 0).narrow(0, self.start, self.count * self.size)
        return lines.unflatten(0, (self.count, self.size))


def _lines(path: str, units: "Units") -> list[Lines]:
    """Where the units of the encoder's layer at `path` lie."""
    width, count, size = units.out.in_features, units.count, units.size
    places = [(row.path, 0, row.piece * width) for row in units.rows]
    return [
        Lines(f"{path}.{name}", axis, start, count, size, units.shape(name))
        for name, axis, start in [*places, (units.out_path, 1, 0)]
    ]


class OfLayers(Grain):
    """Base of neurons and heads: lines of several matrices of an encoder's layer. Of the matrices
    that a pattern names, those that hold none stay dense.
    """

    _lines: dict[str, list[Lines]] = PrivateAttr(default_factory=dict)  # by layer, for one model

    def of(self, model: "nn.Module", layers: "Mapping[str, nn.Linear]") -> tuple[Self, list[str]]:
        """Raises `RecipeError` where no unit, or not all of one, is named, and of other models."""
        from opfa.sparsity.units import FAMILIES, layers_with_units

        by_layer = {
            path: _lines(path, units[self.units]) for path, units in layers_with_units(model)
        }
        found = {path: lines for path, lines in by_layer.items() if self._has_all(lines, layers)}
        if not by_layer:
            what = f"are known of {', '.join(FAMILIES)} only; this is a {type(model).__name__}"
            raise RecipeError(f"grain = {self.units!r}: {what}")
        if not found:
            some = ", ".join(list(layers)[:3])
            wanted = ", ".join(dict.fromkeys(line.layer for line in next(iter(by_layer.values()))))
            what = f"the pruned matrices ({some}, …) have none; include {wanted} and so on"
            raise RecipeError(f"grain = {self.units!r}: {what}")
        bound = self.model_copy()
        bound._lines = found
        used = {line.layer for lines in found.values() for line in lines}
        return bound, [name for name in layers if name in used]

    def _has_all(self, lines: list[Lines], layers: "Mapping[str, nn.Linear]") -> bool:
        missing = [line for line in lines if line.layer not in layers]
        if missing and len(missing) < len(lines):
            given = next(line for line in lines if line.layer in layers)
            what = f"{missing[0].weight} {missing[0].shape} is not pruned, and {given.weight} is"
            raise RecipeError(
                f"grain = {self.units!r}: {what}; they share {self.units}: include or exclude both"
            )
        return not missing

    def pool(self, scores: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """The sum over each unit, [units], by layer."""
        import torch

        found = {}
        for path, lines in self._lines.items():
            sums = [_sum(line.of(scores[line.weight]), (1, 2)) for line in lines]
            found[path] = torch.stack(sums).sum(0).float()
        return found

    def spread(self, kept: "Mapping[str, Tensor]", shapes: "Mapping[str, Size]") -> "Masks":
        """Each unit in all of its matrices."""
        masks: Masks = {}
        for path, lines in self._lines.items():
            units = kept[path]
            for line in lines:
                if line.weight not in masks:
                    masks[line.weight] = units.new_empty(shapes[line.weight])
                line.of(masks[line.weight]).copy_(units[:, None, None])
        return masks


class Neurons(OfLayers):
    """Neurons of the feed-forward, each with its row, its gate and its column."""

    kind: Literal["neurons"] = "neurons"
    """Its name in a recipe."""
    units: ClassVar[str] = "neurons"


class Heads(OfLayers):
    """Heads of the attention, each with its queries, keys, values and its columns of the output."""

    kind: Literal["heads"] = "heads"
    """Its name in a recipe."""
    units: ClassVar[str] = "heads"


def _sum(scores: "Tensor", axes: tuple[int, ...]) -> "Tensor":
    """In fp64, so that after rounding to fp32 the order of a sum, which is a matter of threads and
    devices, doesn't decide which unit is lower.
    """
    return scores.double().sum(axes)


# All that a recipe may name.
AnyGrain = Annotated[Weight | Block | Neurons | Heads, Field(discriminator="kind")]
