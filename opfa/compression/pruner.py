"""The pruner: when the schedule says so, turn fp32 weights into exact masks, the same on every
rank.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from opfa.compression.pattern import Pattern
from opfa.compression.schedules import Gradual
from opfa.errors import RunError
from opfa.sparsity.layers import mask_layers, masks_of, set_masks
from opfa.sparsity.masks import ALONE, Ranks, fingerprint

TINY = torch.finfo(torch.float32).tiny  # above every pruned weight, when those stay pruned


class Weights(Protocol):
    """Where fp32 weights are: all here, or in runs on several ranks. Every method is collective."""

    ranks: Ranks

    def read(self, parameter: Tensor) -> Tensor:
        """This rank's run of a parameter's flattened fp32 value, [n]; possibly empty."""
        ...

    def join(self, parameter: Tensor, run: Tensor) -> Tensor:
        """The whole tensor, in the parameter's shape, from every rank's run."""
        ...

    def cut(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """This rank's run of a tensor in the parameter's shape."""
        ...

    def compare(self, text: str) -> list[str]:
        """This text of every rank."""
        ...


class OneProcess:
    """`Weights` of a model that one process holds."""

    ranks = ALONE

    def read(self, parameter: Tensor) -> Tensor:
        """All of it."""
        return parameter.detach().view(-1)

    def join(self, parameter: Tensor, run: Tensor) -> Tensor:
        """The run is the whole."""
        return run.view(parameter.shape)

    def cut(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """All of it."""
        return whole.view(-1)

    def compare(self, text: str) -> list[str]:
        """There is nobody to differ."""
        return [text]


class Pruner:
    """Holds the masks of a model over time. Make it before an engine wraps the model."""

    def __init__(self, model: nn.Module, schedule: Gradual, pattern: Pattern) -> None:
        """Mask the layers that the pattern names; all their weights are kept until the first
        update.
        """
        self.schedule = schedule
        self.pattern = pattern
        self.layers = mask_layers(model, pattern.layers(model))
        self._model = model

    @torch.no_grad()
    def after_step(self, step: int, weights: Weights | None = None) -> bool:
        """Update the masks if the schedule says so after `step` steps; whether it did.

        Each rank scores the runs that it holds. Collective. Raises `RunError` on every rank when
        the ranks come to different masks.
        """
        if not self.schedule.is_update(step):
            return False
        weights = weights or OneProcess()
        parameters = {f"{name}.weight": layer.weight for name, layer in self.layers.items()}
        runs = {name: weights.read(parameter) for name, parameter in parameters.items()}
        if self.pattern.monotone:
            for name, mask in self.masks().items():
                lives = weights.cut(parameters[name], mask)
                runs[name] = runs[name].abs().clamp_min(TINY) * lives
        try:
            kept = self.pattern.masks(runs, self.schedule.sparsity_at(step), weights.ranks)
        except ValueError as error:  # on every rank
            raise RunError(f"step {step}: {error}") from error
        masks = {name: weights.join(parameters[name], run) for name, run in kept.items()}
        _check_same(step, masks, weights)
        set_masks(self._model, masks)
        return True

    def after_backward(self, step: int, weights: Weights | None = None) -> None:
        """Let a score see the gradients of a step; magnitudes need none."""

    def save(self, directory: Path, weights: Weights | None = None, is_writer: bool = True) -> None:
        """Write what a score has gathered."""

    def load(self, directory: Path, step: int, weights: Weights | None = None) -> None:
        """Read it."""

    def restore(self, masks: Mapping[str, Tensor]) -> None:
        """Put back the masks of a resume point."""
        set_masks(self._model, masks)

    def masks(self) -> dict[str, Tensor]:
        """The masks in force."""
        return masks_of(self._model)

    def sparsity(self) -> float:
        """The fraction of zeros in the pruned tensors, counted."""
        masks = self.masks().values()
        return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def _check_same(step: int, masks: Mapping[str, Tensor], weights: Weights) -> None:
    if len(set(weights.compare(fingerprint(masks)))) == 1:
        return
    own = {name: fingerprint({name: mask})[:12] for name, mask in masks.items()}
    digests = [json.loads(text) for text in weights.compare(json.dumps(own))]
    for name in own:
        found = [digest[name] for digest in digests]
        if len(set(found)) > 1:
            listing = ", ".join(f"rank {rank}: {digest}" for rank, digest in enumerate(found))
            raise RunError(f"step {step}: the ranks computed different masks of {name} ({listing})")
