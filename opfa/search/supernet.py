"""A super-network: a model whose slices are trained together, so that they are good when cut out.

Sandwich rule with in-place distillation (Yu and Huang 2019, "Universally Slimmable Networks and
Improved Training Techniques"). Each step trains the largest model on the task, then the smallest
and some random ones on what the largest answers; gradients add up. Units of a slice that are gone
are zero behind their gates, which is what cutting them out does.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from opfa.compression.schedules import LearningRate
from opfa.data.order import generator
from opfa.downstream.teacher import soft_mean
from opfa.errors import DivergedError
from opfa.models.pretraining import decay_groups
from opfa.models.removal import groups_of, layers_of
from opfa.report.bars import Bar
from opfa.search.recipe import SearchRecipe
from opfa.search.shapes import Shape, Space
from opfa.tasks import kinds as tasks
from opfa.tasks.batches import in_context
from opfa.tasks.features import Batch, Split
from opfa.tasks.recipe import Task
from opfa.training.solo import SoloEngine

TEMPERATURE = 1.0


class Masked:
    """Lets a model whose units are in order compute as a slice of it, while it is a context."""

    def __init__(self, model: PreTrainedModel, shape: Shape) -> None:
        """Nothing changes yet."""
        self._model, self._shape, self._handles = model, shape, list[Any]()

    def __enter__(self) -> None:
        """Put the gates in."""
        for units, count in zip(groups_of(self._model), self._shape.groups, strict=True):
            if count < units.count:
                is_in = torch.arange(units.out.in_features) < count * units.size
                hook = partial(_gate, is_in.to(units.out.weight.dtype))
                self._handles.append(units.out.register_forward_pre_hook(hook))
        for number, (layer, _) in enumerate(layers_of(self._model)):
            if not self._shape.layers[number]:
                self._handles.append(layer.register_forward_hook(_pass))

    def __exit__(self, *_: object) -> None:
        """Take them out."""
        for handle in self._handles:
            handle.remove()


def _gate(is_in: Tensor, _: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
    return (args[0] * is_in,)


def _pass(_: nn.Module, args: tuple[Any, ...], found: Any) -> Any:
    """The layer's input, as if it wasn't there."""
    return (args[0], *found[1:]) if isinstance(found, tuple) else args[0]


def train_supernet(
    model: PreTrainedModel, task: Task, split: Split, space: Space, recipe: SearchRecipe
) -> None:
    """Train a model in place, so that what is cut out of it answers as it does.

    Raises `DivergedError` when a gradient is not finite.
    """
    settings, batch = recipe.search.supernet, recipe.training.batch
    assert settings is not None, "the recipe asks for it"
    steps = max(1, math.ceil(settings.epochs * len(split.features) / batch))
    rates = LearningRate(
        peak=settings.learning_rate, warmup_steps=int(recipe.training.warmup * steps), steps=steps
    )
    model.requires_grad_(True)
    engine = SoloEngine(
        model,
        decay_groups(model, recipe.training.weight_decay),
        max_grad_norm=recipe.training.max_grad_norm,
    )
    with Bar("super-network", steps) as bar:
        for step, inputs in enumerate(_batches(split, batch, steps, recipe.seed)):
            shapes = _sandwich(space, settings.random, (recipe.seed, step))
            _add_gradients(model, task, inputs, shapes)
            try:
                engine.step(rates.at(step))
            except DivergedError as error:
                raise DivergedError(f"search.supernet, step {step + 1}: {error}") from None
            bar.advance(1)
    model.requires_grad_(False)


def _add_gradients(
    model: PreTrainedModel, task: Task, batch: Batch, shapes: Sequence[Shape]
) -> None:
    """Of the largest model's task loss, and of each slice's distance from what it answers."""
    outputs = tasks.call(task, model, batch)
    tasks.task_loss(task, outputs, batch).backward()
    logits = [each.detach() for each in tasks.logits_of(task, outputs)]
    targets = in_context(task, logits, batch)
    for shape in shapes:
        with Masked(model, shape):
            found = tasks.call(task, model, batch)
        soft_mean(task, found, targets, batch, TEMPERATURE).backward()


def _sandwich(space: Space, num: int, seeds: tuple[int, int]) -> list[Shape]:
    """The smallest shape, and random ones."""
    drawn = generator(*seeds)
    shapes = [space.least]
    for _ in range(num):
        steps = {name: int(drawn.integers(len(each))) for name, each in space.steps.items()}
        shapes.append(space.shape(steps))
    return shapes


def _batches(split: Split, size: int, steps: int, seed: int) -> Iterator[Batch]:
    """Batches of a new shuffle for each epoch."""
    drawn, rows = generator(seed), list[int]()
    while len(rows) < steps * size:
        rows += drawn.permutation(len(split.features)).tolist()
    chosen = Subset(split.features, rows[: steps * size])
    yield from DataLoader(chosen, batch_size=size, collate_fn=split.collate)
