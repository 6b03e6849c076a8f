"""A callback for transformers' Trainer that prunes along a ramp while it trains.

    trainer = Trainer(model, arguments, callbacks=[opfa.PruningCallback(0.9, end=0.5)], ...)
    trainer.train()  # afterwards the model is plain, with exactly round(0.9 * size) zeros a matrix

Sparsity follows Zhu & Gupta (2017), as in recipes. Pruned weights take no part in a pass, keep
their values while masks move, and may come back; from the last mask update on they are zero.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback

from opfa.compression.grains import Grain
from opfa.compression.oneshot import OneShot
from opfa.compression.pattern import ENCODER_LAYER
from opfa.compression.pruner import Pruner
from opfa.compression.schedules import Ramp
from opfa.compression.scores import Score
from opfa.errors import ModelError, RecipeError, opening
from opfa.recipe import Recipe
from opfa.sparsity import masks
from opfa.sparsity.layers import fuse, masked_layers, set_masks, whole_weight
from opfa.storage.files import new_file, write_json

MASKS = "opfa-masks.safetensors"  # both in the Trainer's checkpoints
FACTS = "opfa-pruning.json"
WHAT = "PruningCallback"
log = logging.getLogger(__name__)


class Schedule(Recipe, Ramp):
    """A ramp whose problems are told like those of a recipe."""


@dataclass(frozen=True)
class MaskUpdate:
    """The masks after `step` optimizer steps: what the schedule asked for (what came out, where a
    threshold decides), and what was counted.
    """

    step: int
    sparsity: float
    zeros: int
    size: int


class PruningCallback(TrainerCallback):
    """Prunes the model of a Trainer along a cubic ramp, and leaves it plain, with exact zeros.

    Works with gradient accumulation and mixed precision, and a run that is resumed from one of the
    Trainer's checkpoints gets the masks of the unbroken one. Of `load_best_model_at_end` only
    evaluations count that come after the last mask update. Not for a model that ZeRO 3 or FSDP
    parts. `updates` lists every mask update with its exact count.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        start: int | float = 0,
        end: int | float = 0.5,
        every: int | float = 10,
        hold_until: int | float | None = None,
        initial: float = 0.0,
        scope: Literal["layer", "global"] = "layer",
        score: Literal["magnitude", "movement"] | Score = "magnitude",
        grain: str | Grain = "weight",
        include: Sequence[str] = (ENCODER_LAYER,),
        exclude: Sequence[str] = (),
        resume_from: str | Path | None = None,
    ) -> None:
        """Ramp from `initial` at `start` to `sparsity` at `end`, with an update `every` so many
        optimizer steps; until `hold_until` (`end`) masks may exchange weights.

        A whole number is a step, and a float from 0 to 1 a share of the run, as in
        TrainingArguments. The others are as in `opfa.prune`. `resume_from` is the checkpoint that
        a run goes on from, where it isn't in the arguments' own output_dir.
        Raises `RecipeError` for what can't be.
        """
        named = {} if isinstance(score, Score) else {"score": score}
        named |= {} if isinstance(grain, Grain) else {"grain": grain}
        rules = {"include": [*include], "exclude": [*exclude], "scope": scope}
        self._pattern = OneShot.check({**rules, **named, "sparsity": sparsity}, WHAT)
        self._score = score if isinstance(score, Score) else None
        self._grain = grain if isinstance(grain, Grain) else None
        moments = {"start": start, "end": end, "hold_until": hold_until, "every": every}
        self._ramp = Schedule.check({**moments, "initial": initial, "target": sparsity}, WHAT)
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._pruner: Pruner | None = None
        self.updates: list[MaskUpdate] = []

    # what a Trainer calls

    def on_train_begin(
        self, args: Any, state: Any, _: Any, *__: Any, model: nn.Module, **___: Any
    ) -> None:
        """Mask the layers; the first update, or the masks of a checkpoint."""
        try:
            schedule = self._ramp.over(state.max_steps)
        except ValueError as error:
            raise RecipeError(f"{WHAT}: {error}") from None
        if schedule.last_update > state.max_steps:
            what = f"the last mask update, {schedule.last_update}, is after the end of training"
            raise RecipeError(f"{WHAT}: {what} (step {state.max_steps})")
        if masked_layers(model):
            raise ModelError(f"{WHAT}: this model is locked; prune it before, or fuse it first")
        for name, layer in self._pattern.layers(model).items():
            whole_weight(name, layer)
        score = self._score or self._pattern.score
        if args.world_size > 1 and any(map(score.observes, range(schedule.last_update + 1))):
            raise ModelError(f"{WHAT}: a score of gradients works in one process only")
        own = {"score": self._score, "grain": self._grain}
        self._pruner, self.updates = Pruner(model, schedule, self._pattern, **own), []
        if state.global_step:
            self._resume(_checkpoint(args, state, self._resume_from), state.global_step, model)
        else:
            self._update(self._pruner, state)

    def on_pre_optimizer_step(
        self, _: Any, state: Any, *__: Any, optimizer: Any, **___: Any
    ) -> None:
        """A score may observe gradients."""
        if self._pruner is not None:
            rates = optimizer.param_groups[0]
            highest = rates.get("initial_lr", rates["lr"])  # a scheduler of torch notes it
            pace = rates["lr"] / highest if highest else 1.0
            self._pruner.after_backward(state.global_step + 1, pace=pace)

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Update the masks when it is time."""
        if self._pruner is not None:
            self._update(self._pruner, state)

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Write masks, and what a score has gathered, into the checkpoint that was just written."""
        directory = _checkpoint(args, state, None)
        if self._pruner is None or not state.is_world_process_zero or not directory.is_dir():
            return
        with new_file(directory / MASKS) as work:
            masks.save(self._pruner.masks(), work)
        self._pruner.save(directory)
        write_json(directory / FACTS, self._facts(self._pruner))

    def on_train_end(self, _: Any, state: Any, *__: Any, model: nn.Module, **___: Any) -> None:
        """Make the model plain, with its zeros."""
        if self._pruner is None:
            return
        last = self._pruner.schedule.last_update
        self._pruner, total = None, fuse(model)["total"]
        if state.global_step < last:
            log.warning("%s: ended at step %d, before its last update", WHAT, state.global_step)
        log.info("%s: %s of %s weights are zero", WHAT, f"{total['zeros']:,}", f"{total['size']:,}")

    # masks

    def _update(self, pruner: Pruner, state: Any) -> None:
        step, schedule = state.global_step, pruner.schedule
        is_update = pruner.after_step(step)
        if step >= schedule.last_update:
            _settle(pruner)
        if not is_update:
            return
        found = pruner.masks().values()
        size = sum(mask.numel() for mask in found)
        zeros = size - sum(int(mask.sum()) for mask in found)
        asked = zeros / size if pruner.has_thresholds else schedule.sparsity_at(step)
        self.updates.append(MaskUpdate(step, asked, zeros, size))
        log.info("%s: step %d: %s of %s weights are zero", WHAT, step, f"{zeros:,}", f"{size:,}")
        if step == schedule.last_update:
            # the best model of before is another's: less sparse, or pruned elsewhere
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _facts(self, pruner: Pruner) -> dict[str, Any]:
        return {
            "schedule": pruner.schedule.model_dump(mode="json"),
            "pattern": self._pattern.model_dump(mode="json"),
            "updates": [asdict(update) for update in self.updates],
        }

    def _resume(self, directory: Path, step: int, model: nn.Module) -> None:
        assert self._pruner is not None
        if not (directory / MASKS).is_file() or not (directory / FACTS).is_file():
            what = f"a run resumed at step {step}, and {directory} has no {MASKS}"
            raise ModelError(f"{WHAT}: {what}; give the checkpoint as resume_from")
        with opening(directory / FACTS):
            facts = json.loads((directory / FACTS).read_bytes())
            self.updates = [MaskUpdate(**update) for update in facts["updates"]]
        now = self._facts(self._pruner)
        for key in ("schedule", "pattern"):
            if changed := [k for k, value in now[key].items() if facts[key].get(k) != value]:
                was, is_now = (each[key].get(changed[0]) for each in (facts, now))
                what = f"{changed[0]} was {was!r} when {directory} was written, and is {is_now!r}"
                raise RecipeError(f"{WHAT}: {what}; resume with the same settings and steps")
        with opening(directory / MASKS):
            found = masks.load(directory / MASKS)
        set_masks(model, found)
        self._pruner.load(directory, step)


def _checkpoint(args: Any, state: Any, given: Path | None) -> Path:
    """Where the Trainer's checkpoint of this step is."""
    return given or Path(args.output_dir) / f"checkpoint-{state.global_step}"


@torch.no_grad()
def _settle(pruner: Pruner) -> None:
    """Zero the pruned weights, which an optimizer's fading momentum still moves. They take no part
    in anything, so nothing else changes by it; but what is saved from now on is sparse and plain.
    """
    for layer in pruner.layers.values():
        layer.weight.masked_fill_(~layer.mask, 0.0)
