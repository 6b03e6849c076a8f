"""Milliseconds of slices, measured: in torch, or in the CPU runtime of opfa."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from opfa.compression.budget import Curve
from opfa.errors import RunError, blaming
from opfa.models.costs import FIRST_ID, Costs, medians, threads
from opfa.runtime.build import why_not
from opfa.runtime.encoder import own_type, with_kernels
from opfa.search.recipe import Search
from opfa.search.shapes import Form, Shape, Space
from opfa.search.slices import Slices

TOGETHER = 8  # models that take turns
WIDTHS = (1 / 16, 1 / 4, 1 / 2, 1)  # of groups, that the runtime is timed for; linear between two


def measured(slices: Slices, shapes: Sequence[Shape], search: Search, tokens: int) -> list[float]:
    """Milliseconds of the models of shapes, for inputs as the recipe says, by its engine. A few are
    in memory at once, and take turns.
    """
    size, found = (search.batch, search.tokens or tokens), list[float]()
    for start in range(0, len(shapes), TOGETHER):
        tasks = {}
        for number, shape in enumerate(shapes[start : start + TOGETHER]):
            model = slices.cut(shape)
            if search.engine == "runtime":
                with blaming("search.engine", "runtime"):
                    with_kernels(model, search.threads, own_type(model))
            encoder = model.base_model
            config: Any = encoder.config  # of a family
            ids = torch.randint(FIRST_ID, config.vocab_size, size)
            tasks[number] = partial(encoder, input_ids=ids)
        with threads(search.threads), torch.inference_mode():
            found += medians(tasks).values()
    return found


def in_kernels(
    model: PreTrainedModel, space: Space, search: Search, tokens: int
) -> tuple[Costs, dict[Form, list[Curve]]]:
    """Milliseconds in the runtime: of dense groups, and of groups in other forms.

    Times of matrices add up there. So models are timed that have units of one kind alone, of some
    widths and in each form, and a layer's part of their time is that of its units. All units
    together may take a little less or more: the parts are scaled to that sum. Raises `RunError`
    where the runtime can't run.
    """
    if why := why_not():
        raise RunError(f'search.engine = "runtime": {why}')
    units = (space.heads, space.neurons)
    stays = [True] * len(space.heads)
    one = [number == space.kept for number in range(len(stays))]

    def some(shares: Sequence[float], form: Form) -> Shape:
        heads, neurons = (
            [math.ceil(num * share) for num in each]
            for each, share in zip(units, shares, strict=True)
        )
        return space.clean(heads, neurons, stays, [form.zeros] * 2, form.bits)

    nothing = some((0, 0), Form())
    least = space.clean(nothing.heads, nothing.neurons, one)
    alone = [(form, kind, width) for form in space.forms for kind in range(2) for width in WIDTHS]
    shapes = [some([width * (kind == each) for each in range(2)], f) for f, kind, width in alone]
    whole = [some((1, 1), form) for form in space.forms]
    both = measured(Slices(model, space), [nothing, least, *whole, *shapes], search, tokens)
    empty, rest = both[0], both[1]
    more = [max(0.0, time - empty) for time in both[2:]]
    together = dict(zip(space.forms, more, strict=False))
    known = dict(zip(alone, more[len(together) :], strict=True))
    found: dict[Form, list[Curve]] = {}
    for form in space.forms:
        apart = sum(known[form, kind, 1] for kind in range(2))
        share = together[form] / apart if apart else 1.0
        lines = [[share * known[form, kind, width] for width in WIDTHS] for kind in range(2)]
        found[form] = [
            _curve(counts[layer], np.maximum.accumulate(line) * counts[layer] / max(1, sum(counts)))
            for layer in range(len(stays))
            for counts, line in zip(units, lines, strict=True)
        ]
    of_layer = max(0.0, empty - rest) / max(1, len(stays) - 1)
    return Costs(found.pop(Form()), empty, (of_layer,) * len(stays)), found


def _curve(count: int, times: np.ndarray) -> Curve:
    """Of 0, 1, ... units, by the times of some widths; fewer than the narrowest take as long."""
    curve = np.interp(range(count + 1), [math.ceil(count * width) for width in WIDTHS], times)
    curve[0] = 0
    return curve
