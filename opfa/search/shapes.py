"""Shapes of models that can be cut out of one, and the space of all of them.

A shape says how many heads and neurons each layer keeps, and which layers stay. In the space each
of these numbers is a step from 0, nothing, to the last one, everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from transformers import PreTrainedModel

from opfa.models.depth import first_stays
from opfa.models.removal import layers_of
from opfa.report.tables import Row
from opfa.search.recipe import Space as Settings
from opfa.sparsity.units import HEADS, NEURONS

EVEN = 8


class Shape(Row):
    """Heads and neurons that each layer keeps, zeros where it is gone, and which layers stay."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    layers: tuple[bool, ...]

    @property
    def groups(self) -> list[int]:
        """Units that stay: heads of layer 0, its neurons, heads of layer 1, ..."""
        return [num for pair in zip(self.heads, self.neurons, strict=True) for num in pair]

    @property
    def gone(self) -> list[int]:
        """The numbers of the layers that are gone."""
        return [number for number, stays in enumerate(self.layers) if not stays]

    def __hash__(self) -> int:
        """Equal shapes are one."""
        return hash((self.heads, self.neurons, self.layers))

    def __str__(self) -> str:
        """Each layer as heads+neurons; a layer that is gone as a dash."""
        layers = zip(self.heads, self.neurons, self.layers, strict=True)
        return " ".join(f"{h}+{n}" if stays else "-" for h, n, stays in layers)


@dataclass(frozen=True)
class Space:
    """All shapes between the whole model's and nothing. Layer `kept` always stays: without any a
    model would be no encoder.
    """

    heads: tuple[int, ...]  # of the whole model, by layer
    neurons: tuple[int, ...]
    kept: int
    settings: Settings

    @classmethod
    def of(cls, model: PreTrainedModel, settings: Settings, worth: Sequence[float]) -> Self:
        """The space of a model whose layers are worth so much."""
        units = [by_kind for _, by_kind in layers_of(model)]
        best = max(range(len(units)), key=lambda number: worth[number])
        return cls(
            tuple(each[HEADS].count for each in units),
            tuple(each[NEURONS].count for each in units),
            0 if first_stays(model) else best,
            settings,
        )

    @cached_property
    def steps(self) -> dict[str, list[int]]:
        """For each number that may differ, what its steps stand for."""
        found: dict[str, list[int]] = {}
        num = self.settings.neuron_steps
        for layer, (heads, neurons) in enumerate(zip(self.heads, self.neurons, strict=True)):
            if self.settings.layers and layer != self.kept:
                found[f"layers.{layer}"] = [0, 1]
            if self.settings.heads and heads:
                found[f"heads.{layer}"] = list(range(heads + 1))
            if num and neurons:
                widths = {-(-neurons * step // num) for step in range(num + 1)}
                found[f"neurons.{layer}"] = sorted(widths)
        return found

    @property
    def size(self) -> int:
        """How many different shapes there are."""
        total = 1
        for layer in range(len(self.heads)):
            names = (f"heads.{layer}", f"neurons.{layer}")
            inside = [len(self.steps[name]) for name in names if name in self.steps]
            shapes = 1
            for num in inside:
                shapes *= num
            total *= shapes + (f"layers.{layer}" in self.steps)
        return total

    def shape(self, params: Mapping[str, int]) -> Shape:
        """The shape that steps stand for; what isn't named is whole."""
        chosen = {name: self.steps[name][step] for name, step in params.items()}
        layers = range(len(self.heads))
        stays = [bool(chosen.get(f"layers.{layer}", 1)) for layer in layers]
        return self.clean(
            [chosen.get(f"heads.{layer}", self.heads[layer]) for layer in layers],
            [chosen.get(f"neurons.{layer}", self.neurons[layer]) for layer in layers],
            stays,
        )

    def clean(self, heads: Sequence[int], neurons: Sequence[int], stays: Sequence[bool]) -> Shape:
        """A shape whose layers that are gone have no units."""
        return Shape(
            heads=tuple(num * is_in for num, is_in in zip(heads, stays, strict=True)),
            neurons=tuple(num * is_in for num, is_in in zip(neurons, stays, strict=True)),
            layers=tuple(stays),
        )

    def params(self, shape: Shape) -> dict[str, int]:
        """The steps that stand for a shape; a layer that is gone has all of its units in them."""
        found = {}
        for name, steps in self.steps.items():
            kind, _, number = name.partition(".")
            layer = int(number)
            values = {"layers": shape.layers, "heads": shape.heads, "neurons": shape.neurons}
            is_in = kind == "layers" or shape.layers[layer]
            found[name] = steps.index(int(values[kind][layer])) if is_in else len(steps) - 1
        return found

    @property
    def whole(self) -> Shape:
        """Everything."""
        return self.shape({})

    @property
    def even(self) -> list[Shape]:
        """Shapes whose layers keep the same share of heads and neurons: 1/8, 2/8, ..., 7/8."""
        found = []
        for part in range(1, EVEN):
            inside = {n: s for n, s in self.steps.items() if not n.startswith("layers")}
            chosen = {name: round(part / EVEN * (len(s) - 1)) for name, s in inside.items()}
            found.append(self.shape(chosen))
        return list(dict.fromkeys(found))

    @property
    def least(self) -> Shape:
        """As little as there can be."""
        return self.shape(dict.fromkeys(self.steps, 0))
