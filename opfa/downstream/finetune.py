"""Fine-tuning with the zeros held (Prune Once for All, section 3.3), optionally under a teacher and
to 8 bits.

    batch, forward, loss, backward, step, prune, log, save

A plain torch loop on one device. Held zeros are a fixed mask in the forward pass, so gradients,
clipping and moments see only live weights; a baseline that prunes while it fine-tunes runs through
the same loop with a schedule.
"""

import contextlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from opfa import quant, report
from opfa.checkpoint import (
    facts_of,
    model_digest,
    newest_point,
    save_point,
    seed_step,
    write_finished,
)
from opfa.distill import soft_loss
from opfa.downstream import tasks
from opfa.downstream.evaluate import evaluate
from opfa.downstream.recipe import FinetuneRecipe, Quantization
from opfa.engine import choose_accelerator
from opfa.inspection import stated_report
from opfa.models import decay_groups, load_config, load_tokenizer
from opfa.order import Order, Place
from opfa.pruner import Pruner
from opfa.recipe import ModelError, RecipeError, RunError
from opfa.run import Run, check_output, write_json
from opfa.schedules import LearningRate
from opfa.sparsity import masks as mask_files
from opfa.sparsity.layers import lock, mask_layers, masks_of, set_masks
from opfa.sparsity.masks import fingerprint
from opfa.sparsity.pattern import Pattern

log = logging.getLogger(__name__)


def finetune(recipe: FinetuneRecipe, output: Path, resume: bool = False) -> dict[str, Any]:
    """Run a recipe to its end, write RUN/model and RUN/results.json, and return the results."""
    check_output(output, recipe, resume)
    trainer = Trainer(recipe)
    with Run(output, recipe, steps=trainer.schedule.steps) as run:
        if run.is_done:
            log.info("%s: is finished already", output)
            return json.loads((output / "results.json").read_text())
        start = trainer.resume(run) if resume else 0
        if start == 0:
            data = {"train": trainer.training, "validation": trainer.validation}
            digests = {name: split.examples.sha256() for name, split in data.items()}
            run.describe({"world_size": 1, "data": digests})
        run.start_wandb(recipe.logging.wandb, recipe.logging.wandb_project, recipe.name)
        trainer.train(run, start)
        return trainer.finish(run)


class Trainer:
    """The state of one fine-tuning run: student, teacher, optimizer, masks, position."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        """Load everything and check that it fits together, before any work is done."""
        self.recipe = recipe
        task, training, init = recipe.task, recipe.training, recipe.model.init
        self.device = torch.device(choose_accelerator())
        self.tokenizer = load_tokenizer(recipe.model.tokenizer or init)
        config = load_config(init)
        self.training, self.validation = tasks.load(task, self.tokenizer, config)
        torch.manual_seed(recipe.seed)  # the new head
        self.student = tasks.load_model(task, init, self.training.classes)
        if recipe.model.zeros == "held":
            hold_zeros(self.student, init)
        self.pruner = self._pruner()
        self.quantized = self._quantized()
        nn.Module.to(self.student, self.device)
        self.teacher = self._load_teacher()
        self.order = Order(
            seed=recipe.seed,
            num_examples=len(self.training.features),
            batch=training.batch,
            micro_batch=training.micro_batch or training.batch,
            rank=0,
            world_size=1,
        )
        self.steps_per_epoch = math.ceil(self.order.num_examples / training.batch)
        steps = max(1, round(training.epochs * self.order.num_examples / training.batch))
        if recipe.pruning is not None and recipe.pruning.schedule.last_update > steps:
            raise RecipeError(
                f"pruning.schedule: the last mask update, {recipe.pruning.schedule.last_update}, "
                f"must not come after the end of training (step {steps})"
            )
        self.schedule = LearningRate(
            peak=training.learning_rate, warmup_steps=int(training.warmup * steps), steps=steps
        )
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.student, training.weight_decay), lr=0.0, fused=True
        )

    def _pruner(self) -> Pruner | None:
        pruning = self.recipe.pruning
        return Pruner(self.student, pruning.schedule, pruning.pattern) if pruning else None

    def _quantized(self) -> dict[str, quant.QuantLinear]:
        settings = self.recipe.quantization
        return prepare_8_bits(self.student, settings) if settings else {}

    def _load_teacher(self) -> PreTrainedModel | None:
        settings = self.recipe.distillation
        if settings is None:
            return None
        teacher = tasks.load_model(
            self.recipe.task, settings.teacher, self.training.classes, is_trained=True
        )
        ours, theirs = self.student.config.vocab_size, teacher.config.vocab_size
        if ours != theirs:
            raise ModelError(
                f"distillation.teacher = {settings.teacher!r}: its vocabulary has {theirs} "
                f"entries, the student's {ours}"
            )
        nn.Module.to(teacher, self.device)
        return teacher.eval().requires_grad_(False)

    def train(self, run: Run, start: int) -> None:
        """The steps from `start` to the end."""
        settings = self.recipe.logging
        self.student.train()
        if start == 0:
            self.prune(0)
        for step in range(start, self.schedule.steps):
            self._start_quantizing(step)
            seed_step(self.recipe.seed, step)
            micro_batches = self.order.step(step)
            loss = sum(self._backward(places) for places in micro_batches)
            if not math.isfinite(loss):
                raise RunError(
                    f"step {step + 1}: the loss is {loss}; nothing was changed by this step"
                )
            grad_norm = nn.utils.clip_grad_norm_(
                self.student.parameters(), self.recipe.training.max_grad_norm
            )
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.at(step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            done = step + 1
            self.prune(done)
            run.advance(done)
            is_end = done == self.schedule.steps
            if done % settings.every_steps == 0 or is_end:
                rates = {"learning_rate": self.schedule.at(step), "grad_norm": float(grad_norm)}
                run.log({"step": done, "loss": loss, **rates})
            if done % self.steps_per_epoch == 0 and not is_end:
                run.log({"step": done, "eval": True, **self.evaluate()})
            if done % settings.checkpoint_steps == 0 and not is_end:
                self.save(run, done)

    def _backward(self, places: list[Place]) -> float:
        features = self.training.features
        rows = [features[index] for _, index in places]
        batch = {
            name: tensor.to(self.device) for name, tensor in self.training.collate(rows).items()
        }
        with self._precision():
            outputs = self.student(**tasks.inputs_of(batch))
            loss = self._loss(outputs, batch) / self.order.accumulation
        loss.backward()
        return loss.item()

    def _loss(self, outputs: Any, batch: tasks.Batch) -> Tensor:  # Any: a transformers ModelOutput
        task, settings = self.recipe.task, self.recipe.distillation
        hard = tasks.task_loss(task, outputs, batch)
        if settings is None or self.teacher is None:
            return hard
        with torch.no_grad():
            targets = tasks.logits_of(task, self.teacher(**tasks.inputs_of(batch)))
        pairs = list(zip(tasks.logits_of(task, outputs), targets, strict=True))
        if task.kind == "regression":  # one number has no distribution: match the number itself
            soft = functional.mse_loss(pairs[0][0].float(), pairs[0][1].float())
        else:
            losses = [soft_loss(ours, theirs, settings.temperature) for ours, theirs in pairs]
            soft = torch.stack(losses).mean() / len(pairs[0][0])
        return settings.hard_weight * hard + settings.soft_weight * soft

    def _precision(self) -> contextlib.AbstractContextManager:
        is_bf16 = self.recipe.training.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)

    def _start_quantizing(self, step: int) -> None:
        settings, steps = self.recipe.quantization, self.schedule.steps
        if settings is None:
            return
        if step >= max(1, int(settings.start * steps)):
            quant.start(self.student)
        if step >= max(1, int(settings.freeze * steps)):
            quant.freeze(self.student)

    def _write_ranges(self, directory: Path) -> None:
        if self.quantized:
            quant.save(self.student, directory / quant.FILE)

    def prune(self, step: int) -> None:
        """Update the masks when the recipe has a schedule and it says so."""
        if self.pruner is not None:
            self.pruner.after_step(step)

    def evaluate(self) -> dict[str, float]:
        """The metrics on the validation split."""
        with self._precision():
            return evaluate(
                self.student, self.recipe.task, self.validation, batch=64, device=self.device
            )

    def save(self, run: Run, step: int) -> None:
        """Save a resume point."""

        def write(directory: Path) -> None:
            state = {
                "model": self.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ranges": quant.ranges(self.student),
            }
            torch.save(state, directory / "state.pt")
            mask_files.save(masks_of(self.student), directory / "masks.safetensors")

        keep = self.recipe.logging.keep_checkpoints
        save_point(run.directory / "checkpoints", step, write, {}, keep=keep)

    def resume(self, run: Run) -> int:
        """Go back to the newest resume point; the step to continue from."""
        point = newest_point(run.directory / "checkpoints")
        if point is None:
            log.warning("%s: no resume point; starting anew", run.directory)
            run.forget_after(0)
            return 0
        step = facts_of(point)["step"]
        state = torch.load(point / "state.pt", map_location=self.device, weights_only=True)
        self.student.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        quant.set_ranges(self.student, state["ranges"])
        set_masks(self.student, mask_files.load(point / "masks.safetensors"))
        run.forget_after(step)
        log.info("%s: resumed at step %d", run.directory, step)
        return step

    def finish(self, run: Run) -> dict[str, Any]:
        """Evaluate, write the finished model, the results and the pictures."""
        metrics = self.evaluate()
        run.log({"step": self.schedule.steps, "eval": True, **metrics})
        directory = run.directory / "model"
        result = write_finished(self.student, self.tokenizer, directory, self._write_ranges)
        results = {
            "task": self.recipe.name,
            "metrics": metrics,
            "seed": self.recipe.seed,
            "sparsity": result["total"]["sparsity"],
            "quantized": bool(self.quantized),
            "recipe_sha256": self.recipe.sha256(),
            "model_sha256": model_digest(directory),
        }
        write_json(run.directory / "results.json", results)
        report.finetuning_pictures(run.rows(), result, run.directory / "report")
        run.finish({"step": self.schedule.steps})
        return results


def prepare_8_bits(model: nn.Module, settings: Quantization) -> dict[str, quant.QuantLinear]:
    """Make the masked layers, or those of a dense model that would be pruned, observe."""
    if not masks_of(model):
        mask_layers(model, Pattern().layers(model))
    return quant.prepare(
        model,
        settings.momentum,
        weights=settings.weights,
        percentile=settings.percentile,
        embeddings=settings.embeddings,
    )


def hold_zeros(model: PreTrainedModel, init: str) -> None:
    """Lock a model's zeros: those that its sparsity.json names, if it has one, and then exactly
    those.
    """
    stated = stated_report(Path(init))
    if stated is None or not stated["tensors"]:
        report = _lock(model, init, None)
        log.info(
            "locked %d zeros, sparsity %.4f", report["total"]["zeros"], report["total"]["sparsity"]
        )
        return
    prefix = f"{model.base_model_prefix}."  # a bare encoder's tensors are named without it
    _lock(model, init, [prefix + name.removeprefix(prefix) for name in stated["tensors"]])
    if fingerprint(masks_of(model)) != stated["fingerprint"]:
        raise ModelError(
            f"{init}: its zeros are not where its sparsity.json says; "
            "was it changed after it was written?"
        )


def _lock(model: PreTrainedModel, init: str, names: list[str] | None) -> dict[str, Any]:
    try:
        return lock(model, names)
    except ModelError as error:
        raise ModelError(
            f"model.init = {init!r}: {error} For a dense one: model.zeros=free"
        ) from None


def evaluate_model(name: str, recipe: FinetuneRecipe) -> dict[str, Any]:
    """The metrics of a finished model, in 8 bits if it was trained so, on the recipe's validation
    split.
    """
    tokenizer, config = load_tokenizer(name), load_config(name)
    tasks.check_head(recipe.task, config)
    split = tasks.load_validation(recipe.task, tokenizer, config)
    model = tasks.load_model(recipe.task, name, split.classes, is_trained=True)
    ranges = Path(name) / quant.FILE
    if ranges.is_file():
        quant.load(model, ranges)
    device = torch.device(choose_accelerator())
    nn.Module.to(model, device)
    metrics = evaluate(model, recipe.task, split, batch=64, device=device)
    return {
        "task": recipe.name,
        "metrics": metrics,
        "quantized": ranges.is_file(),
        "examples_sha256": split.examples.sha256(),
    }
