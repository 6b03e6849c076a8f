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
from opfa.compression.pattern import Bound, Pattern, bind
from opfa.compression.runs import HERE, Weights
from opfa.compression.schedules import Gradual
from opfa.compression.scores import Ask, Part, Score, State
from opfa.compression.selection import ALONE, select
from opfa.compression.thresholds import keep_above
from opfa.errors import RecipeError, RunError
from opfa.sparsity.chosen import Chosen
from opfa.sparsity.layers import MaskedLinear, mask_layers, masks_of, set_masks
from opfa.sparsity.masks import Masks, fingerprint

FILE = "scores.safetensors"  # in a resume point: what a score has gathered


@dataclass(frozen=True)
class Group:
    """Weights that are pruned in one way: in one competition, or each tensor for itself."""

    pattern: Pattern
    score: Score
    grain: Grain
    names: Sequence[str]  # of weights
    size: int  # of them together


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

        Raises `RecipeError`, with the model as it was, where they don't fit it or the schedule.
        """
        self.schedule = schedule
        patterns = [pattern] if isinstance(pattern, Pattern) else pattern
        for each in patterns:
            try:
                (score or each.score).check(each.schedule(schedule))
            except ValueError as error:
                raise RecipeError(str(error)) from None
        bound = bind(model, patterns, grain)
        layers = mask_layers(model, [name for each in bound for name in each.layers])
        self._model, self.layers = model, {f"{name}.weight": m for name, m in layers.items()}
        self._groups = [self._group(one, score or one.pattern.score) for one in bound]
        self._group_of = {name: group for group in self._groups for name in group.names}
        self.has_thresholds = any(g.score.threshold_at(1.0) is not None for g in self._groups)
        self._states: dict[str, State] = {}
        self._calibration = calibration
        self._left: dict[str, tuple[int, int]] | None = None
        self._keep_gradients(0, 1)

    def _group(self, bound: Bound, score: Score) -> Group:
        names = [name for name in self.layers if name.removesuffix(".weight") in bound.layers]
        size = sum(layer.weight.numel() for layer in bound.layers.values())
        return Group(bound.pattern, score, bound.grain, names, size)

    @torch.no_grad()
    def after_backward(self, step: int, weights: Weights = HERE, pace: float = 1.0) -> None:
        """Let the score observe the gradient before the optimizer's step number `step`, at `pace`,
        that step's share of the highest learning rate.

        A gradient that overflowed fp16 is left out, as the optimizer leaves out its step.
        """
        observed = {n: m for n, m in self.layers.items() if self._observes(n, step)}
        if not observed:
            return
        gradients = {name: weights.read_gradient(m) for name, m in observed.items()}
        num_bad = sum(not bool(gradient.isfinite().all()) for gradient in gradients.values())
        if not weights.ranks.total(np.array([num_bad])).any():
            for name, gradient in gradients.items():
                part = self._part(name, step, weights, pace)
                self._states[name] = self._group_of[name].score.observe(part, gradient)

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
        for name, layer in self.layers.items():
            ask = self._group_of[name].score.asks(self._part(name, step, weights))
            if ask is not None:
                asking.setdefault(ask, {})[name] = layer
        for ask, layers in asking.items():
            if self._calibration is None:
                raise RunError(f"a score by {ask.quantity}: needs text, from which it is measured")
            for name, found in self._calibration.measure(ask, layers, weights).items():
                part = self._part(name, step, weights)
                self._states[name] = self._group_of[name].score.calibrate(part, part.cut(found))

    def _correct(self, masks: Masks, weights: Weights) -> None:
        """Let what is kept make up for what goes, where Fisher information was measured now."""
        while self._calibration is not None and self._calibration.blocks:
            blocks = self._calibration.blocks.pop()
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
        schedule, scope, pooled = self._schedule_of(group), group.pattern.scope, grain.pool(scores)
        threshold = group.score.threshold_at(schedule.ramp_at(step))
        if threshold is None:
            kept = select(pooled, schedule.sparsity_at(step), scope, ranks, candidates)
        else:  # a unit of n weights has n times the threshold of one
            least = grain.pool({n: torch.full_like(s, threshold) for n, s in scores.items()})
            kept = keep_above(least, pooled, schedule.target, scope, ranks, candidates)
        masks = grain.spread(kept, {name: layer.mask.shape for name, layer in layers.items()})
        if has_whole:
            return masks
        return {name: weights.join(layers[name].weight, run) for name, run in masks.items()}

    def _schedule_of(self, group: Group) -> Gradual:
        return group.pattern.schedule(self.schedule)

    def _part(self, name: str, step: int, weights: Weights, pace: float = 1.0) -> Part:
        layer = self.layers[name]
        return Part(
            step=step,
            update=self.schedule.updates_before(step),
            name=name,
            weight=weights.read(layer.weight),
            state=self._states.get(name, {}),
            shape=layer.mask.shape,
            cut=lambda whole: weights.cut(layer.weight, whole),
            matrices=len(self._group_of[name].names),
            ramp=self.schedule.ramp_at(step - 1),
            pace=pace,
        )

    def _observes(self, name: str, step: int) -> bool:
        return step <= self.schedule.last_update and self._group_of[name].score.observes(step)

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

    def chosen_by(self) -> list[Chosen]:
        """The scores that choose the zeros, one for each pattern."""
        return [group.score.facts() for group in self._groups]

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

    def row(self) -> dict[str, float]:
        """For a logged row: how many are left, and the sparsity where thresholds decide it."""
        found: dict[str, float] = {name: kept for name, (kept, _) in self.left().items()}
        return {"sparsity": self.sparsity(), **found} if self.has_thresholds else found

    def planned(self, steps: int) -> list[float]:
        """The sparsity that is asked for after each of so many steps, of all weights together;
        empty where thresholds decide it.
        """
        if self.has_thresholds:
            return []
        sizes = [group.size for group in self._groups]
        whole = [self._schedule_of(group).sparsities(steps) for group in self._groups]
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
