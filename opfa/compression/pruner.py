"""The pruner: score -> grain -> selection -> masks, the same on every rank, by a schedule."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opfa.compression.grains import Grain
from opfa.compression.pattern import Pattern
from opfa.compression.schedules import Gradual
from opfa.compression.scores import Part, Score, State
from opfa.compression.selection import ALONE, Ranks, select
from opfa.errors import RunError
from opfa.sparsity.layers import MaskedLinear, mask_layers, masks_of, set_masks
from opfa.sparsity.masks import Masks, fingerprint

FILE = "scores.safetensors"  # in a resume point: what a score has gathered


class Weights:
    """Where fp32 weights are: all in this process. An engine whose ranks hold runs of flattened
    parameters overrides every method, each then collective.
    """

    ranks: Ranks = ALONE

    def read(self, parameter: Tensor) -> Tensor:
        """This rank's run of a parameter's flattened fp32 value, [n]; possibly empty."""
        return parameter.detach().float().view(-1)

    def read_gradient(self, layer: MaskedLinear) -> Tensor:
        """This rank's fp32 run of the global batch's gradient, which the layer has to keep."""
        return layer.take_gradient().view(-1)

    def join(self, parameter: Tensor, run: Tensor) -> Tensor:
        """The whole tensor, in the parameter's shape, from every rank's run, bit for bit."""
        return run.view(parameter.shape)

    def cut(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """This rank's run, [n], of a tensor in the parameter's shape."""
        return whole.to(parameter.device).view(-1)

    def compare(self, text: str) -> list[str]:
        """This text of every rank."""
        return [text]


HERE = Weights()


class Pruner:
    """Holds the masks of a model over time. Make it before an engine wraps the model.

    Every method that takes `weights` is collective.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Gradual,
        pattern: Pattern,
        *,
        score: Score | None = None,
        grain: Grain | None = None,
    ) -> None:
        """Mask the layers that the pattern names. `score` and `grain` replace the pattern's."""
        self.schedule, self.pattern = schedule, pattern
        layers = mask_layers(model, pattern.layers(model))
        self._model, self.layers = model, {f"{name}.weight": m for name, m in layers.items()}
        self._score, self._grain = score or pattern.score, grain or pattern.grain
        self._states: dict[str, State] = {}
        self._keep_gradients(0, 1)

    @torch.no_grad()
    def after_backward(self, step: int, weights: Weights = HERE) -> None:
        """Let the score observe the gradient before the optimizer's step number `step`.

        A gradient that overflowed fp16 is left out, as the optimizer leaves out its step.
        """
        if not self._observes(step):
            return
        gradients = {name: weights.read_gradient(m) for name, m in self.layers.items()}
        num_bad = sum(not bool(gradient.isfinite().all()) for gradient in gradients.values())
        if not weights.ranks.total(np.array([num_bad])).any():
            for name, gradient in gradients.items():
                part = self._part(name, step, weights)
                self._states[name] = self._score.observe(part, gradient)

    @torch.no_grad()
    def after_step(self, step: int, weights: Weights = HERE) -> bool:
        """Update the masks if the schedule says so after `step` steps; whether it did.

        Raises `RunError` on every rank for scores that aren't finite and masks that differ.
        """
        self._keep_gradients(step + 1)
        if not self.schedule.is_update(step):
            return False
        try:
            masks = self._select(step, weights)
        except ValueError as error:  # on every rank
            raise RunError(f"step {step}: {error}") from error
        _check_same(step, masks, weights)
        set_masks(self._model, masks)
        return True

    def _select(self, step: int, weights: Weights) -> Masks:
        """New masks, from the runs of scores, or from whole tensors where the grain needs them."""
        layers, grain, has_whole = self.layers, self._grain, self._grain.needs_whole
        scores, lives = {}, {}
        for name, layer in layers.items():
            part = self._part(name, step, weights)
            score = self._score.of(part)
            assert score.shape == part.weight.shape, f"{name}: one score for each weight"
            scores[name] = weights.join(layer.weight, score) if has_whole else score
            if self.pattern.monotone:
                mask = layer.mask if has_whole else part.cut(layer.mask)
                lives[name] = mask.float()
        candidates = {n: live > 0 for n, live in grain.pool(lives).items()} if lives else None
        ranks = ALONE if has_whole else weights.ranks
        sparsity = self.schedule.sparsity_at(step)
        kept = select(grain.pool(scores), sparsity, self.pattern.scope, ranks, candidates)
        masks = grain.spread(kept, {name: layer.mask.shape for name, layer in layers.items()})
        if has_whole:
            return masks
        return {name: weights.join(layers[name].weight, run) for name, run in masks.items()}

    def _part(self, name: str, step: int, weights: Weights) -> Part:
        layer = self.layers[name]
        return Part(
            step=step,
            name=name,
            weight=weights.read(layer.weight),
            state=self._states.get(name, {}),
            shape=layer.mask.shape,
            cut=lambda whole: weights.cut(layer.weight, whole),
        )

    def _observes(self, step: int) -> bool:
        return step <= self.schedule.last_update and self._score.observes(step)

    def _keep_gradients(self, *steps: int) -> None:
        """Let layers keep what the score will observe in these steps, and nothing else."""
        for layer in self.layers.values():
            layer.keep_gradient(any(map(self._observes, steps)))

    def save(self, directory: Path, weights: Weights = HERE, is_writer: bool = True) -> None:
        """Write what the score has gathered, if anything, into a resume point."""
        whole = {}
        for name, state in self._states.items():
            for key, run in state.items():
                found = weights.join(self.layers[name].weight, run)
                if is_writer:
                    whole[f"{key}/{name}"] = found.cpu().contiguous()
        if whole:
            save_file(whole, directory / FILE)

    def load(self, directory: Path, step: int, weights: Weights = HERE) -> None:
        """Read what `save` wrote after `step` steps, on any number of ranks."""
        states: dict[str, dict[str, Tensor]] = {}
        found = load_file(directory / FILE) if (directory / FILE).exists() else {}
        for path, whole in found.items():
            key, _, name = path.partition("/")
            states.setdefault(name, {})[key] = weights.cut(self.layers[name].weight, whole)
        self._states = dict(states)
        self._keep_gradients(step + 1)

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
