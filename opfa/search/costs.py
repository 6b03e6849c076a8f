"""What a shape costs, predicted: milliseconds from a measured table, multiply-adds, and bytes.

A matrix with zeros has multiply-adds and bytes of its live weights, and one bit a weight for where
they are; one in 8 bits has a byte a weight.
"""

from collections.abc import Mapping
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
    """Costs of each kind, which are sums over groups and layers; and what groups cost in forms that
    are not dense.
    """

    costs: Mapping[str, Costs]
    forms: Mapping[str, Mapping[Form, list[Curve]]] = field(default_factory=dict)

    @classmethod
    def measured(cls, model: PreTrainedModel, search: Search, tokens: int) -> Self:
        """Of a model, for inputs as the recipe says. Times are measured on this machine."""
        size = search.batch, search.tokens or tokens
        space = Space.of(model, search.space, [0.0] * len(list(layers_of(model))))
        forms = {"macs": _live(model, space, *size), "bytes": _stored(model, space)}
        if search.engine == "runtime":
            milliseconds, forms["milliseconds"] = in_kernels(model, space, search, tokens)
        else:
            with threads(search.threads):
                milliseconds = models.milliseconds(model, *size)
            forms["milliseconds"] = dict.fromkeys(space.forms[1:], milliseconds.curves)
        costs = {"milliseconds": milliseconds, "macs": models.macs(model, *size)}
        return cls({**costs, "bytes": _bytes(model)}, forms)

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


def _live(model: PreTrainedModel, space: Space, batch: int, tokens: int) -> dict[Form, list[Curve]]:
    """Multiply-adds of groups: those of zeros go."""
    whole, tokens = models.macs(model, batch, tokens).curves, batch * tokens
    each = [models.weights(units) for units in groups_of(model)]
    return {
        form: [
            curve - form.zeros * tokens * weights * np.arange(len(curve))
            for curve, weights in zip(whole, each, strict=True)
        ]
        for form in space.forms[1:]
    }


def _stored(model: PreTrainedModel, space: Space) -> dict[Form, list[Curve]]:
    """Bytes of groups: of their live weights, of one bit a weight where there are zeros, and of
    biases.
    """
    whole = [FP32 * curve for curve in models.parameters(model).curves]
    each = [models.weights(units) for units in groups_of(model)]
    found = {}
    for form in space.forms[1:]:
        size = (1 - form.zeros) * form.bits / BYTE + (1 / BYTE if form.zeros else 0.0)
        found[form] = [
            curve - (FP32 - size) * weights * np.arange(len(curve))
            for curve, weights in zip(whole, each, strict=True)
        ]
    return found


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
