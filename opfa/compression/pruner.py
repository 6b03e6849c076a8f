"""The pruner: score -> grain -> selection -> masks, the same on every rank, by a schedule."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opfa.compression.calibration import Calibration
from opfa.compression.grains import Grain
from opfa.compression.pattern import Bound, PartPattern, Pattern, bind
from opfa.compression.schedules import Gradual
from opfa.compression.scores import Ask, Part, Score, State
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

    def write(self, parameter: Tensor, whole: Tensor) -> None:
        """Give a parameter another fp32 value, in its shape."""
        parameter.data.copy_(whole)

    def compare(self, text: str) -> list[str]:
        """This text of every rank."""
        return [text]


HERE = Weights()


@dataclass(frozen=True)
class Group:
    """Weights that are pruned in one way: in one competition, or each tensor for itself."""

    pattern: Pattern
    score: Score
    grain: Grain
    names: Sequence[str]  # of weights
    size: int  # of them together

    def schedule(self, whole: Gradual) -> Gradual:
        """Up to its own target, if it has one."""
        if isinstance(self.pattern, PartPattern) and self.pattern.target is not None:
            return whole.model_copy(update={"target": self.pattern.target})
        return whole


class Pruner:
    """Holds the masks of a model over time. Make it before an engine wraps the model.

    Every method that takes `weights` is collective.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Gradual,
        pattern: Pattern | Sequence[Pattern],
        *,
        score: Score | None = None,
        grain: Grain | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Mask the layers that the pattern names, or several. `score` and `grain` replace theirs.
        Some scores need a `calibration` of the model.

        Raises `RecipeError`, with the model as it was, where they don't fit it.
        """
        self.schedule = schedule
        patterns = [pattern] if isinstance(pattern, Pattern) else pattern
        bound = bind(model, patterns, grain)
        layers = mask_layers(model, [name for each in bound for name in each.layers])
        self._model, self.layers = model, {f"{name}.weight": m for name, m in layers.items()}
        self._groups = [self._group(one, score or one.pattern.score) for one in bound]
        self._scores = {name: group.score for group in self._groups for name in group.names}
        self._states: dict[str, State] = {}
        self._calibration = calibration
        self._left: dict[str, tuple[int, int]] | None = None
        self._keep_gradients(0, 1)

    def _group(self, bound: Bound, score: Score) -> Group:
        names = [name for name in self.layers if name.removesuffix(".weight") in bound.layers]
        size = sum(layer.weight.numel() for layer in bound.layers.values())
        return Group(bound.pattern, score, bound.grain, names, size)

    @torch.no_grad()
    def after_backward(self, step: int, weights: Weights = HERE) -> None:
        """Let the score observe the gradient before the optimizer's step number `step`.

        A gradient that overflowed fp16 is left out, as the optimizer leaves out its step.
        """
        observed = {n: m for n, m in self.layers.items() if self._observes(n, step)}
        if not observed:
            return
        gradients = {name: weights.read_gradient(m) for name, m in observed.items()}
        num_bad = sum(not bool(gradient.isfinite().all()) for gradient in gradients.values())
        if not weights.ranks.total(np.array([num_bad])).any():
            for name, gradient in gradients.items():
                part = self._part(name, step, weights)
                self._states[name] = self._scores[name].observe(part, gradient)

    @torch.no_grad()
    def after_step(self, step: int, weights: Weights = HERE) -> bool:
        """Update the masks if the schedule says so after `step` steps; whether it did.

        Raises `RunError` on every rank for scores that aren't finite and masks that differ.
        """
        self._keep_gradients(step + 1)
        if not self.schedule.is_update(step):
            return False
        self._calibrate(step, weights)
        try:
            masks = {}
            for group in self._groups:
                masks |= self._select(group, step, weights)
        except ValueError as error:  # on every rank
            raise RunError(f"step {step}: {error}") from error
        _check_same(step, masks, weights)
        self._correct(masks, weights)
        set_masks(self._model, masks)
        self._left = None
        return True

    def _calibrate(self, step: int, weights: Weights) -> None:
        """Let scores that ask for it see what text says of the weights as they are now."""
        asking: dict[Ask, dict[str, MaskedLinear]] = {}
        for name, score in self._scores.items():
            if (ask := score.asks(self._part(name, step, weights))) is not None:
                asking.setdefault(ask, {})[name] = self.layers[name]
        for ask, layers in asking.items():
            if self._calibration is None:
                raise RunError(f"a score by {ask.quantity}: needs text, from which it is measured")
            for name, found in self._calibration.measure(ask, layers, weights).items():
                part = self._part(name, step, weights)
                self._states[name] = self._scores[name].calibrate(part, part.cut(found))

    def _correct(self, masks: Masks, weights: Weights) -> None:
        """Let what is kept make up for what goes, where Fisher information was measured now."""
        if self._calibration is None or (blocks := self._calibration.blocks) is None:
            return
        self._calibration.blocks = None
        for name in blocks.matrices:
            layer = self.layers[name]
            whole = weights.join(layer.weight, weights.read(layer.weight))
            weights.write(layer.weight, blocks.corrected(name, whole, layer.mask, masks[name]))

    def _select(self, group: Group, step: int, weights: Weights) -> Masks:
        """New masks, from the runs of scores, or from whole tensors where the grain needs them."""
        grain, has_whole = group.grain, group.grain.needs_whole
        layers = {name: self.layers[name] for name in group.names}
        scores, lives = {}, {}
        for name, layer in layers.items():
            part = self._part(name, step, weights)
            score = group.score.of(part)
            assert score.shape == part.weight.shape, f"{name}: one score for each weight"
            scores[name] = weights.join(layer.weight, score) if has_whole else score
            if group.pattern.monotone:
                mask = layer.mask if has_whole else part.cut(layer.mask)
                lives[name] = mask.float()
        candidates = {n: live > 0 for n, live in grain.pool(lives).items()} if lives else None
        ranks = ALONE if has_whole else weights.ranks
        sparsity = group.schedule(self.schedule).sparsity_at(step)
        kept = select(grain.pool(scores), sparsity, group.pattern.scope, ranks, candidates)
        masks = grain.spread(kept, {name: layer.mask.shape for name, layer in layers.items()})
        if has_whole:
            return masks
        return {name: weights.join(layers[name].weight, run) for name, run in masks.items()}

    def _part(self, name: str, step: int, weights: Weights) -> Part:
        layer = self.layers[name]
        return Part(
            step=step,
            update=self.schedule.updates_before(step),
            name=name,
            weight=weights.read(layer.weight),
            state=self._states.get(name, {}),
            shape=layer.mask.shape,
            cut=lambda whole: weights.cut(layer.weight, whole),
        )

    def _observes(self, name: str, step: int) -> bool:
        return step <= self.schedule.last_update and self._scores[name].observes(step)

    def _keep_gradients(self, *steps: int) -> None:
        """Let layers keep what the score will observe in these steps, and nothing else."""
        for name, layer in self.layers.items():
            layer.keep_gradient(any(self._observes(name, step) for step in steps))

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
        self._states, self._left = dict(states), None
        self._keep_gradients(step + 1)

    def masks(self) -> dict[str, Tensor]:
        """The masks in force."""
        return masks_of(self._model)

    def sparsity(self) -> float:
        """The fraction of zeros in the pruned tensors, counted."""
        masks = self.masks().values()
        return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)

    def left(self) -> dict[str, tuple[int, int]]:
        """How many blocks, neurons, heads, ... are left, and of how many; nothing of weights."""
        if self._left is None:
            masks, counts = self.masks(), dict[str, tuple[int, int]]()
            for grain, names in ((group.grain, group.names) for group in self._groups):
                if not grain.needs_whole:
                    continue
                units = grain.pool({name: masks[name].float() for name in names}).values()
                kept, size = counts.get(grain.units, (0, 0))
                kept += sum(int((each > 0).sum()) for each in units)
                counts[grain.units] = kept, size + sum(each.numel() for each in units)
            self._left = counts
        return self._left

    def row(self) -> dict[str, int]:
        """The same for a logged row: how many are left."""
        return {name: kept for name, (kept, _) in self.left().items()}

    def planned(self, steps: int) -> list[float]:
        """The sparsity that is asked for after each of so many steps, of all weights together."""
        sizes = [group.size for group in self._groups]
        whole = [group.schedule(self.schedule).sparsities(steps) for group in self._groups]
        if len(whole) == 1:
            return whole[0]
        return [float(np.average(each, weights=sizes)) for each in zip(*whole, strict=True)]


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
