"""Shapes of models that can be cut out of one, and the space of all of them.

A shape says how many heads and neurons each layer keeps, and which layers stay; its form, how many
zeros its matrices have and whether it computes in 8 bits. In the space each of these numbers is a
step from 0, nothing, to the last one, everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple, Self

from transformers import PreTrainedModel

from opfa.models.depth import first_stays
from opfa.models.removal import layers_of
from opfa.report.search_page import inside
from opfa.report.tables import Row
from opfa.search.recipe import Space as Settings
from opfa.sparsity.units import HEADS, NEURONS

EVEN = 8
FP32, INT8 = 32, 8  # bits
KINDS = (HEADS, NEURONS)


class Form(NamedTuple):
    """What is inside a matrix: its share of zeros, and the bits of a weight."""

    zeros: float = 0.0
    bits: int = FP32

    def __str__(self) -> str:
        """As `Form.read` reads it."""
        return f"{self.zeros:g}/{self.bits}"

    @classmethod
    def read(cls, text: str) -> Self:
        """What `str` gave."""
        zeros, _, bits = text.partition("/")
        return cls(float(zeros), int(bits))


class Shape(Row):
    """Heads and neurons that each layer keeps, zeros where it is gone, and which layers stay; the
    share of zeros in the matrices of attention and in those of neurons, and the bits of a weight.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    layers: tuple[bool, ...]
    zeros: tuple[float, float] = (0.0, 0.0)
    bits: int = FP32

    @property
    def groups(self) -> list[int]:
        """Units that stay: heads of layer 0, its neurons, heads of layer 1, ..."""
        return [num for pair in zip(self.heads, self.neurons, strict=True) for num in pair]

    @property
    def gone(self) -> list[int]:
        """The numbers of the layers that are gone."""
        return [number for number, stays in enumerate(self.layers) if not stays]

    @property
    def forms(self) -> tuple[Form, Form]:
        """Of the matrices of attention, and of those of neurons."""
        attention, neurons = self.zeros
        return Form(attention, self.bits), Form(neurons, self.bits)

    @property
    def dense(self) -> "Shape":
        """The same units without zeros, in fp32."""
        return self.model_copy(update={"zeros": (0.0, 0.0), "bits": FP32})

    def __hash__(self) -> int:
        """Equal shapes are one."""
        return hash((self.heads, self.neurons, self.layers, self.zeros, self.bits))

    def __str__(self) -> str:
        """Each layer as heads+neurons, a layer that is gone as a dash; then zeros and bits."""
        layers = zip(self.heads, self.neurons, self.layers, strict=True)
        units = " ".join(f"{h}+{n}" if stays else "-" for h, n, stays in layers)
        return f"{units}, {self.inside}".removesuffix(", ")

    @property
    def inside(self) -> str:
        """Zeros of attention and of neurons, and 8 bits, in words."""
        return inside(self.zeros, self.bits)


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
    def steps(self) -> dict[str, list[Any]]:  # Any: counts, shares, or bits
        """For each number that may differ, what its steps stand for."""
        found: dict[str, list[Any]] = {}
        num = self.settings.neuron_steps
        for layer, (heads, neurons) in enumerate(zip(self.heads, self.neurons, strict=True)):
            if self.settings.layers and layer != self.kept:
                found[f"layers.{layer}"] = [0, 1]
            if self.settings.heads and heads:
                found[f"heads.{layer}"] = list(range(heads + 1))
            if num and neurons:
                widths = {-(-neurons * step // num) for step in range(num + 1)}
                found[f"neurons.{layer}"] = sorted(widths)
        if self.settings.zeros:
            shares = [*sorted(self.settings.zeros, reverse=True), 0.0]
            found |= {f"zeros.{kind}": shares for kind in KINDS}
        if self.settings.eight_bits:
            found["bits"] = [INT8, FP32]
        return found

    @property
    def forms(self) -> list[Form]:
        """What may be inside a matrix; dense, in fp32, comes first."""
        bits = (FP32, INT8) if self.settings.eight_bits else (FP32,)
        shares = (0.0, *sorted(self.settings.zeros))
        return [Form(zeros, num) for num, zeros in product(bits, shares)]

    def lighter(self, shape: Shape) -> Shape:
        """The same units with the fewest zeros that the space has, and in 8 bits if it has them."""
        zeros, bits = min(self.settings.zeros, default=0.0), self.steps.get("bits", [FP32])[0]
        return self.clean(shape.heads, shape.neurons, shape.layers, [zeros] * 2, bits)

    @property
    def size(self) -> int:
        """How many different shapes there are, but for zeros in what is gone."""
        total = len(self.steps.get("bits", [FP32])) * (1 + len(self.settings.zeros)) ** 2
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
            [chosen.get(f"zeros.{kind}", 0.0) for kind in KINDS],
            chosen.get("bits", FP32),
        )

    def clean(
        self,
        heads: Sequence[int],
        neurons: Sequence[int],
        stays: Sequence[bool],
        zeros: Sequence[float] = (0.0, 0.0),
        bits: int = FP32,
    ) -> Shape:
        """A shape: no units in layers that are gone, and no zeros where no unit is left."""
        counts = [
            tuple(num * is_in for num, is_in in zip(units, stays, strict=True))
            for units in (heads, neurons)
        ]
        attention, inner = (share * any(units) for share, units in zip(zeros, counts, strict=True))
        return Shape(
            heads=counts[0],
            neurons=counts[1],
            layers=tuple(stays),
            zeros=(attention, inner),
            bits=bits,
        )

    def params(self, shape: Shape) -> dict[str, int]:
        """The steps that stand for a shape; a layer that is gone has all of its units in them."""
        values = dict(zip((f"zeros.{kind}" for kind in KINDS), shape.zeros, strict=True))
        values["bits"] = shape.bits
        of_layers = {"layers": shape.layers, "heads": shape.heads, "neurons": shape.neurons}
        for kind, numbers in of_layers.items():
            for layer, (value, stays) in enumerate(zip(numbers, shape.layers, strict=True)):
                if kind == "layers" or stays:
                    values[f"{kind}.{layer}"] = int(value)
        return {
            name: steps.index(values[name]) if name in values else len(steps) - 1
            for name, steps in self.steps.items()
        }

    @property
    def whole(self) -> Shape:
        """Everything."""
        return self.shape({})

    @property
    def even(self) -> list[Shape]:
        """Shapes whose layers keep the same share of heads and neurons: 1/8, 2/8, ..., 7/8."""
        found = []
        for part in range(1, EVEN):
            units = {n: s for n, s in self.steps.items() if n.partition(".")[0] in KINDS}
            chosen = {name: round(part / EVEN * (len(s) - 1)) for name, s in units.items()}
            found.append(self.shape(chosen))
        return list(dict.fromkeys(found))

    @property
    def least(self) -> Shape:
        """As little as there can be."""
        return self.shape(dict.fromkeys(self.steps, 0))

    @property
    def in_all_forms(self) -> list[Shape]:
        """The least units in each form; zeros, or 8 bits, may cost more than they save."""
        least = self.least
        units = least.heads, least.neurons, least.layers
        return [self.clean(*units, [form.zeros] * 2, form.bits) for form in self.forms]
