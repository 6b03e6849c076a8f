"""One-shot pruning: the seam once, without a schedule and without training."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from opfa.compression.calibration import Calibration
from opfa.compression.grains import Grain
from opfa.compression.pattern import Pattern
from opfa.compression.pruner import Pruner
from opfa.compression.schedules import Gradual
from opfa.compression.scores import Score
from opfa.compression.selection import num_zeros
from opfa.errors import ModelError, RunError
from opfa.recipe import Fraction, Recipe
from opfa.sparsity.layers import (
    SPARSE_FROM,
    MaskedLinear,
    fuse,
    masked_layers,
    whole_weight,
)


class OneShot(Recipe, Pattern):
    """How sparse, and which weights: what a pattern says, and a sparsity."""

    sparsity: Fraction
    """Share of the units to prune, of each tensor or (scope = "global") of all together."""
    where: ClassVar[str] = ""


def prune_once(
    model: nn.Module,
    settings: OneShot,
    *,
    score: Score | None = None,
    grain: Grain | None = None,
    calibration: Calibration | None = None,
    fit: Callable[[Mapping[str, MaskedLinear]], None] | None = None,
) -> dict[str, Any]:
    """Make the units that are worth least +0.0, in place: exactly round(sparsity * size) of them.

    `score` and `grain` replace the pattern's; some scores need a `calibration`. `fit` may change
    the masked layers, by the names of their weights, before their zeros are written. The model
    stays plain, so it can be saved, or locked and trained. Returns the sparsity report, and in
    `left` how many units are left, and of how many. Raises `ModelError`, with the model as it was
    before `fit`, where it is locked, partitioned, not finite, or has more zeros already, or zeros
    in units that are kept.
    """
    if masked_layers(model):
        raise ModelError("this model is locked; prune it after opfa.fuse(model)")
    layers = settings.layers(model)
    weights = {f"{name}.weight": whole_weight(name, layer) for name, layer in layers.items()}
    if not (grain or settings.grain).needs_whole:
        _check_zeros(weights, settings)
    if (score or settings.score).observes(0):
        raise ModelError("this score needs gradients, and one-shot pruning has none; train with it")
    schedule = Gradual(end=0, target=settings.sparsity)
    pruner = Pruner(model, schedule, settings, score=score, grain=grain, calibration=calibration)
    try:
        pruner.after_step(0)
        _check_units(pruner.layers)
        if fit is not None:
            fit(pruner.layers)
        return {"left": pruner.left(), **fuse(model)}
    except BaseException as error:  # also Ctrl-C: the model is plain again
        for layer in masked_layers(model).values():
            layer.unmask()
        if isinstance(error, (ModelError, RunError)):
            raise ModelError(str(error).removeprefix("step 0: ")) from error
        raise


def _check_zeros(weights: Mapping[str, Tensor], settings: OneShot) -> None:
    """Refuse what has more zeros than it would get: some would come to life as tiny numbers."""
    found = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    if settings.scope == "global":
        found, sizes = {"the model": sum(found.values())}, {"the model": sum(sizes.values())}
    for name, size in sizes.items():
        if found[name] > num_zeros(settings.sparsity, size):
            what = f"has {found[name]:,} zeros of {size:,} already, more than sparsity = "
            raise ModelError(f"{name}: {what}{settings.sparsity:g} asks for")


def _check_units(layers: Mapping[str, MaskedLinear]) -> None:
    """Refuse a sparse model whose zeros lie in units that are kept: they would come to life too."""
    for name, layer in layers.items():
        lost, size = int(((layer.weight == 0) & layer.mask).sum()), layer.weight.numel()
        if lost >= SPARSE_FROM * size:
            what = f"has {lost:,} zeros of {size:,} in what is kept, where they would be lost"
            raise ModelError(f"{name}: {what}; prune units first and single weights after that")
