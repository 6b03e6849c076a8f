"""What is inside the matrices of a slice: zeros, and 8 bits.

Nothing is trained. A matrix loses the weights with the least |w| times the norm of their input
(Sun et al., 2023, eq. 1, here over a whole matrix). 8 bits have the whole model's ranges, as `opfa
calibrate` finds them. So a candidate is judged as it is before it is trained on.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opfa.compression import quant
from opfa.compression.selection import magnitude_mask, num_zeros
from opfa.downstream.calibrate import observe
from opfa.downstream.recipe import Quantization
from opfa.downstream.student import prepare_8_bits
from opfa.models.removal import groups_of
from opfa.models.stepping import inputs_of
from opfa.search.shapes import Space
from opfa.sparsity.units import Units
from opfa.tasks import kinds as tasks
from opfa.tasks.features import Batch
from opfa.tasks.recipe import Task

SETTINGS = Quantization()
NORM = ".norm"


def observed(
    model: PreTrainedModel, task: Task, batches: Sequence[Batch], space: Space
) -> dict[str, Tensor]:
    """What the forms of a space need to know: norms of inputs [in] by the path of their matrix, and
    ranges of activations.
    """
    found = _norms(model, task, batches) if space.settings.zeros else {}
    if space.settings.eight_bits:
        watched = copy.deepcopy(model)
        prepare_8_bits(watched, SETTINGS)
        observe(task, watched, batches, torch.device("cpu"))
        found |= quant.ranges(watched)
    return found


def _norms(model: PreTrainedModel, task: Task, batches: Sequence[Batch]) -> dict[str, Tensor]:
    paths = {module: path for path, module in model.named_modules()}
    linears = [linear for units in groups_of(model) for linear in units.linears()]
    found = {linear: torch.zeros(linear.in_features, dtype=torch.float64) for linear in linears}
    for batch in batches:
        is_token = batch["attention_mask"].flatten(0, -2).bool()
        with ExitStack() as watching:
            given = {linear: watching.enter_context(inputs_of(linear)) for linear in linears}
            tasks.call(task, model, batch)
        for linear, (states,) in given.items():
            found[linear] += states[is_token].double().square().sum(0)
    return {paths[linear] + NORM: sums.sqrt().float() for linear, sums in found.items()}


def erase(units: Units, zeros: float, norms: Mapping[nn.Module, Tensor]) -> None:
    """Make a share of each matrix of units zero, by magnitude where a norm isn't known. Matrices
    are new; those that units had before stay as they are.
    """
    for linear in units.linears():
        weight = linear.weight.detach()
        if number := num_zeros(zeros, weight.numel()):
            worth = weight.abs()
            if (norm := norms.get(linear)) is not None:
                worth = worth * norm[: weight.shape[1]]
            kept = weight * magnitude_mask(worth, number)
            linear.weight = nn.Parameter(kept, requires_grad=False)


def to_8_bits(model: PreTrainedModel, ranges: Mapping[str, Tensor]) -> None:
    """Let a slice compute in 8 bits, in place, with ranges by the whole model's paths; without any,
    as one that is only timed has them, from 0 to 1.
    """
    if not any(linear.weight.numel() for units in groups_of(model) for linear in units.linears()):
        return
    for layer in prepare_8_bits(model, SETTINGS).values():
        layer.high.fill_(1)
    if ranges:
        quant.set_ranges(model, dict(ranges))
    quant.start(model)
    quant.freeze(model)
