"""Milliseconds of slices, measured: in torch, or in the CPU runtime of opfa."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from opfa.compression.budget import Curve
from opfa.errors import RunError
from opfa.models.costs import FIRST_ID, Costs, medians, threads
from opfa.runtime.build import why_not
from opfa.runtime.encoder import with_kernels
from opfa.search.inside import bits_of
from opfa.search.recipe import Search
from opfa.search.shapes import Form, Shape, Space
from opfa.search.slices import Slices

TOGETHER = 8  # models that take turns
PARTS = 4  # widths of groups that the runtime is timed for; time is linear between two of them


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
                with_kernels(model, search.threads, bits_of(model))
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

    Times of matrices add up there. So models are timed that have units of one kind alone, in each
    form and of some widths, and a layer's share of them is that of its units. Raises `RunError`
    where the runtime can't run.
    """
    if why := why_not():
        raise RunError(f'search.engine = "runtime": {why}')
    units = (space.heads, space.neurons)
    nothing, stays = [0] * len(space.heads), [True] * len(space.heads)
    steps = range(1, PARTS + 1)

    def alone(kind: int, part: int, form: Form) -> Shape:
        counts = [[-(-num * part // PARTS) for num in each] for each in units]
        counts[1 - kind] = nothing
        heads, neurons = counts
        return space.clean(heads, neurons, stays, [form.zeros] * 2, form.bits)

    one = [number == space.kept for number in range(len(nothing))]
    ends = [space.whole, space.clean(nothing, nothing, stays), space.clean(nothing, nothing, one)]
    asked = [(form, kind, part) for form in space.forms for kind in range(2) for part in steps]
    shapes = [alone(kind, part, form) for form, kind, part in asked]
    whole, empty, least, *more = measured(Slices(model, space), [*ends, *shapes], search, tokens)
    known = {each: max(0.0, time - empty) for each, time in zip(asked, more, strict=True)}
    apart = sum(known[Form(), kind, PARTS] for kind in range(2))
    share = max(0.0, whole - empty) / apart if apart else 1.0  # what they take together
    forms: dict[Form, list[Curve]] = {form: [] for form in space.forms}
    for form, curves in forms.items():
        times = [[0.0, *(known[form, kind, part] for part in steps)] for kind in range(2)]
        for layer in range(len(nothing)):
            for line, counts in zip(times, units, strict=True):
                count = counts[layer]
                widths = [-(-count * part // PARTS) for part in range(PARTS + 1)]
                height = np.maximum.accumulate(line) * share * count / max(1, sum(counts))
                curves.append(np.interp(range(count + 1), widths, height))
    of_layer = max(0.0, empty - least) / max(1, len(nothing) - 1)
    return Costs(forms.pop(Form()), empty, (of_layer,) * len(nothing)), forms
