"""Slices: smaller models cut out of one whose units are in the order of what they are worth.

The first k units of a group stay, as smaller matrices. What goes is made up for by the output
matrix and its bias, fitted by least squares to the whole model's own inputs:

    W_K + D' with D = (X_K' X_K + ridge)^-1 X_K' X_R W_R'

with X_K the inputs of units that stay, X_R of those that go. So a fit depends on one group and its
count alone. All fits of the space are made once. A slice costs what is cut, and the zeros and 8
bits of its form.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from opfa.models.depth import drop_layers
from opfa.models.refit import fitted
from opfa.models.removal import groups_of, layers_of, tell_shapes
from opfa.models.stepping import inputs_of
from opfa.report.bars import Bar
from opfa.search import inside
from opfa.search.shapes import INT8, Shape, Space
from opfa.sparsity.units import HEADS, NEURONS, Units
from opfa.tasks import kinds as tasks
from opfa.tasks.features import Batch
from opfa.tasks.recipe import Task

FITTED_TOKENS = 1 << 15  # that least squares see


def in_order(model: PreTrainedModel, orders: Sequence[Tensor]) -> None:
    """Put the units of each group into the reverse of the order in which they go."""
    for units, order in zip(groups_of(model), orders, strict=True):
        units.keep(order.flip(0))


@torch.no_grad()
def write_fits(
    model: PreTrainedModel, task: Task, batches: Sequence[Batch], space: Space, path: Path
) -> None:
    """Fit the output matrices of all slices, and write them: weights and biases by group and count.
    The file has what forms need to know, too.

    The model's units are in order. Batches are training examples.
    """
    groups = groups_of(model)
    grams = _grams(model, task, batches, groups)
    found = inside.observed(model, task, batches, space)
    with Bar("fitting slices", len(groups)) as bar:
        for number, (units, gram) in enumerate(zip(groups, grams, strict=True)):
            layer, kind = divmod(number, 2)
            name = f"{(HEADS, NEURONS)[kind]}.{layer}"
            for count in space.steps.get(name, []):
                if count < units.count:
                    weight, bias = _fit(units, gram, count)
                    found[f"{name}.{count}.weight"] = weight
                    if bias is not None:
                        found[f"{name}.{count}.bias"] = bias
            bar.advance(1)
    save_file(found, path)


def _grams(
    model: PreTrainedModel, task: Task, batches: Sequence[Batch], groups: Sequence[Units]
) -> list[Tensor]:
    """X' X of each output matrix, [width + 1, width + 1], fp64; the last input is a one."""
    found = [torch.zeros(2 * [units.out.in_features + 1], dtype=torch.float64) for units in groups]
    num_tokens = 0
    shuffled = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    with Bar("reading for slices", len(batches)) as bar:
        for number in shuffled:
            batch = batches[number]
            is_token = batch["attention_mask"].flatten(0, -2).bool()
            with ExitStack() as watching:
                given = [watching.enter_context(inputs_of(units.out)) for units in groups]
                tasks.call(task, model, batch)
            for group, (states,) in enumerate(given):
                inputs = states[is_token]
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
                found[group] += inputs.T @ inputs
            num_tokens += int(is_token.sum())
            bar.advance(1)
            if num_tokens >= FITTED_TOKENS:
                break
    return found


def _fit(units: Units, gram: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """The output matrix [hidden, width] and bias of the first `count` units."""
    weight, bias = units.out.weight.double(), units.out.bias
    width = count * units.size
    kept = torch.tensor([*range(width), len(gram) - 1])
    missing = gram[kept, width:-1] @ weight[:, width:].T
    live = weight[:, :width]
    inside = gram[kept][:, kept]
    change, of_bias = fitted(live, inside, missing, units.size, has_bias=bias is not None)
    found = (live + change).float().contiguous()
    return found, None if bias is None else (bias + of_bias).float()


class Slices:
    """Cuts slices out of a model whose units are in order."""

    def __init__(self, model: PreTrainedModel, space: Space, fits: Path | None = None) -> None:
        """With the file of fits; without one output matrices are cut alone."""
        self._model, self._space, self._fits = model, space, fits
        with self._opened() as opened:
            self._names = set() if opened is None else set(opened.keys())
        whole = [*model.parameters(), *model.buffers()]
        self._shared = {id(each): each for each in whole}  # what deepcopy doesn't copy

    @torch.no_grad()
    def cut(self, shape: Shape) -> PreTrainedModel:
        """The model of a shape, to be read: it shares with the whole one what isn't cut."""
        model = copy.deepcopy(self._model, dict[int, Any](self._shared))
        with self._opened() as fits:
            for layer, (_, by_kind) in enumerate(layers_of(model)):
                counts = {HEADS: shape.heads[layer], NEURONS: shape.neurons[layer]}
                for kind, units in by_kind.items():
                    if shape.layers[layer] and counts[kind] < units.count:
                        units.keep(torch.arange(counts[kind]))
                        name = f"{kind}.{layer}.{counts[kind]}"
                        if f"{name}.weight" in self._names:
                            _put(fits, name, units.out)
            self._fill(model, shape, fits)
        drop_layers(model, [number for number, stays in enumerate(shape.layers) if stays])
        tell_shapes(model)
        return model

    def _fill(self, model: PreTrainedModel, shape: Shape, fits: Any) -> None:  # Any: no types
        """Put zeros and 8 bits into a slice all of whose layers are there."""
        if any(shape.zeros):
            paths = [name for name in self._names if name.endswith(inside.NORM)]
            found = {path.removesuffix(inside.NORM): fits.get_tensor(path) for path in paths}
            norms = {model.get_submodule(path): norm for path, norm in found.items()}
            for units, form in zip(groups_of(model), cycle(shape.forms), strict=False):
                inside.erase(units, form.zeros, norms)
        if shape.bits == INT8:
            ends = tuple(f".input_{end}" for end in ("low", "high"))
            names = [name for name in self._names if name.endswith(ends)]
            inside.to_8_bits(model, {name: fits.get_tensor(name) for name in names})

    def _opened(self) -> AbstractContextManager[Any]:  # Any: safetensors has no types
        """The fits, mapped for one slice: else all that were ever used would stay in memory."""
        return nullcontext() if self._fits is None else safe_open(self._fits, "pt")


def _put(fits: Any, name: str, linear: nn.Linear) -> None:  # Any: safetensors has no types
    linear.weight = nn.Parameter(fits.get_tensor(f"{name}.weight"))
    if linear.bias is not None:
        linear.bias = nn.Parameter(fits.get_tensor(f"{name}.bias"))
    linear.requires_grad_(False)
