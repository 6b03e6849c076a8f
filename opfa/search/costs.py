"""What a shape costs, predicted: milliseconds from a measured table, multiply-adds, and bytes.

A matrix with zeros has multiply-adds and bytes of its live weights, and one bit a weight for where
they are; one in 8 bits has a byte a weight.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any, Self

import numpy as np
from transformers import PreTrainedModel

from opfa.compression.budget import Curve
from opfa.models import costs as models
from opfa.models.costs import Costs, threads
from opfa.models.removal import groups_of, layers_of
from opfa.search.recipe import Search
from opfa.search.shapes import Form, Shape, Space
from opfa.search.timing import in_kernels

FP32 = 4  # bytes of a weight
BYTE = 8  # bits


@dataclass(frozen=True)
class Prices:
    """Costs of each kind, which are sums over groups and layers. `forms` are the curves of groups
    with zeros or in 8 bits.
    """

    costs: Mapping[str, Costs]
    forms: Mapping[str, Mapping[Form, list[Curve]]] = field(default_factory=dict)

    @classmethod
    def measured(cls, model: PreTrainedModel, search: Search, tokens: int) -> Self:
        """Of a model, for inputs as the recipe says. Times are measured on this machine."""
        size = search.batch, search.tokens or tokens
        space = Space.of(model, search.space, [0.0] * len(list(layers_of(model))))
        costs = {"macs": models.macs(model, *size), "bytes": _bytes(model)}
        saved = {
            "macs": lambda form: form.zeros * math.prod(size),
            "bytes": lambda form: FP32 - _stored(form),
        }
        forms = {
            aim: _in_forms(model, space, costs[aim].curves, each) for aim, each in saved.items()
        }
        if search.engine == "runtime":
            milliseconds, forms["milliseconds"] = in_kernels(model, space, search, tokens)
        else:
            with threads(search.threads):
                milliseconds = models.milliseconds(model, *size)
            forms["milliseconds"] = dict.fromkeys(space.forms[1:], milliseconds.curves)
        return cls({"milliseconds": milliseconds, **costs}, forms)

    def of(self, shape: Shape) -> dict[str, float]:
        """What a shape costs."""
        found = {}
        for aim, costs in self.costs.items():
            curves = {Form(): costs.curves, **self.forms.get(aim, {})}
            both = [curves[form] for form in shape.forms]
            chosen = [each[group] for group, each in zip(range(len(costs.curves)), cycle(both))]
            found[aim] = replace(costs, curves=chosen).of(shape.groups, shape.gone)
        return found

    def values(self) -> dict[str, Any]:
        """As JSON has them."""
        return {
            aim: {
                "curves": [curve.tolist() for curve in costs.curves],
                "rest": costs.rest,
                "layers": list(costs.layers),
                "forms": {
                    str(form): [curve.tolist() for curve in curves]
                    for form, curves in self.forms.get(aim, {}).items()
                },
            }
            for aim, costs in self.costs.items()
        }

    @classmethod
    def read(cls, values: Mapping[str, Mapping[str, Any]]) -> Self:
        """What `values` gave."""

        def curves(lists: Any) -> list[Curve]:  # Any: from JSON
            return [np.array(each) for each in lists]

        return cls(
            {
                aim: Costs(curves(each["curves"]), each["rest"], tuple(each["layers"]))
                for aim, each in values.items()
            },
            {
                aim: {
                    Form.read(form): curves(lists) for form, lists in each.get("forms", {}).items()
                }
                for aim, each in values.items()
            },
        )


def _in_forms(
    model: PreTrainedModel, space: Space, curves: list[Curve], saved: Callable[[Form], float]
) -> dict[Form, list[Curve]]:
    """Curves of groups in each form that isn't dense, which saves so much for each weight."""
    each = [models.weights(units) for units in groups_of(model)]
    return {
        form: [
            curve - saved(form) * weights * np.arange(len(curve))
            for curve, weights in zip(curves, each, strict=True)
        ]
        for form in space.forms[1:]
    }


def _stored(form: Form) -> float:
    """Bytes of a weight: live ones, and one bit for where they are if there are zeros."""
    return (1 - form.zeros) * form.bits / BYTE + (1 / BYTE if form.zeros else 0.0)


def _bytes(model: PreTrainedModel) -> Costs:
    """Of all weights in fp32."""
    units = models.parameters(model)
    kinds = len(groups_of(model)) // len(list(layers_of(model)))
    left = []
    for number, (layer, _) in enumerate(layers_of(model)):
        curves = units.curves[kinds * number : kinds * (number + 1)]
        size = sum(each.numel() for each in layer.parameters())
        left.append(FP32 * (size - sum(float(curve[-1]) for curve in curves)))
    rest = FP32 * (sum(each.numel() for each in model.parameters()) - units.whole)
    return Costs([FP32 * curve for curve in units.curves], rest, tuple(left))
