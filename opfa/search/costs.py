"""What a shape costs, predicted: milliseconds from a measured table, multiply-adds, and bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedModel

from opfa.models import costs as models
from opfa.models.costs import FIRST_ID, Costs, threads
from opfa.models.removal import groups_of, layers_of
from opfa.search.recipe import Search
from opfa.search.shapes import Shape
from opfa.search.slices import Slices

FP32 = 4  # bytes of a weight
TOGETHER = 8  # models that take turns


@dataclass(frozen=True)
class Prices:
    """Costs of each kind, which are sums over groups and layers."""

    costs: Mapping[str, Costs]

    @classmethod
    def measured(cls, model: PreTrainedModel, search: Search, tokens: int) -> Self:
        """Of a model, for inputs as the recipe says. Times are measured on this machine."""
        size = search.batch, search.tokens or tokens
        with threads(search.threads):
            milliseconds = models.milliseconds(model, *size)
        return cls(
            {
                "milliseconds": milliseconds,
                "macs": models.macs(model, *size),
                "bytes": _bytes(model),
            }
        )

    def of(self, shape: Shape) -> dict[str, float]:
        """What a shape costs."""
        return {aim: costs.of(shape.groups, shape.gone) for aim, costs in self.costs.items()}

    def values(self) -> dict[str, Any]:
        """As JSON has them."""
        return {
            aim: {
                "curves": [curve.tolist() for curve in costs.curves],
                "rest": costs.rest,
                "layers": list(costs.layers),
            }
            for aim, costs in self.costs.items()
        }

    @classmethod
    def read(cls, values: Mapping[str, Mapping[str, Any]]) -> Self:
        """What `values` gave."""
        return cls(
            {
                aim: Costs(
                    [np.array(curve) for curve in each["curves"]],
                    each["rest"],
                    tuple(each["layers"]),
                )
                for aim, each in values.items()
            }
        )


def measured(slices: Slices, shapes: Sequence[Shape], search: Search, tokens: int) -> list[float]:
    """Milliseconds of the models of shapes, for inputs as the recipe says. A few are in memory at
    once, and take turns.
    """
    size, found = (search.batch, search.tokens or tokens), list[float]()
    for start in range(0, len(shapes), TOGETHER):
        tasks = {}
        for number, shape in enumerate(shapes[start : start + TOGETHER]):
            encoder = slices.cut(shape).base_model
            config: Any = encoder.config  # of a family
            ids = torch.randint(FIRST_ID, config.vocab_size, size)
            tasks[number] = partial(encoder, input_ids=ids)
        with threads(search.threads), torch.inference_mode():
            found += models.medians(tasks).values()
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
