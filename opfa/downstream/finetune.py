"""Fine-tuning with the zeros held (Prune Once for All, section 3.3), optionally under a teacher and
to 8 bits.

    batch, forward, loss, backward, step, prune, log, save

A plain torch loop on one device. Held zeros are a fixed mask in the forward pass, so gradients,
clipping and moments see only live weights; a baseline that prunes while it fine-tunes runs through
the same loop with a schedule.
"""

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opfa.compression import quant
from opfa.compression.pruner import Pruner
from opfa.data.order import Order, Place
from opfa.downstream.evaluate import evaluate, evaluate_splits
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.selection import Best
from opfa.downstream.student import hold_zeros, prepare_8_bits
from opfa.downstream.teacher import Teacher
from opfa.errors import DivergedError, RecipeError, RunError
from opfa.models.configs import load_config, load_tokenizer
from opfa.models.pretraining import decay_groups
from opfa.report import pictures as report
from opfa.sparsity import masks as mask_files
from opfa.sparsity.layers import masks_of, set_masks
from opfa.storage import seal
from opfa.storage.files import write_json
from opfa.tasks import kinds as tasks
from opfa.tasks.features import Split
from opfa.training import began, finished, launch
from opfa.training.checkpoint import (
    facts_of,
    model_digest,
    newest_point,
    point_name,
    problem_of,
    save_point,
    seed_step,
    write_finished,
)
from opfa.training.distributed import Stopped, Supervisor
from opfa.training.engine import choose_accelerator
from opfa.training.run import Run, check_output

UNCHANGED = "nothing was changed by this step; a lower learning rate may help"
TEACHER = "teacher.safetensors"  # its logits, while the run lasts
log = logging.getLogger(__name__)


def finetune(
    recipe: FinetuneRecipe, output: Path, resume: bool = False, *, within: Path | None = None
) -> dict[str, Any]:
    """Run a recipe to its end, write RUN/model and RUN/results.json, and return the results.

    `within` is the directory of several runs that this is one of.
    """
    if recipe.sweep is not None:
        raise RecipeError("sweep: several runs are a matter of opfa.downstream.sweep")
    launch.refuse_several("opfa finetune")
    check_output(output, recipe, resume)
    with Supervisor(math.inf) as supervisor:  # nothing to wait for: one process
        trainer = Trainer(recipe, supervisor)
        with Run(output, recipe, steps=trainer.schedule.steps, within=within) as run:
            if run.is_done:
                found = finished.results(output)
                log.info("%s: is finished already", output)
                return found
            facts = trainer.facts()
            began.check(output, facts)
            run.describe(facts)
            start = trainer.resume(run) if resume else 0
            run.start_wandb(recipe.logging.wandb, recipe.logging.wandb_project, recipe.name)
            trainer.train(run, start)
            return trainer.finish(run)


class Trainer:
    """The state of one fine-tuning run: student, teacher, optimizer, masks, position."""

    def __init__(self, recipe: FinetuneRecipe, supervisor: Supervisor | None = None) -> None:
        """Load everything and check that it fits together, before any work is done."""
        self.recipe = recipe
        self.supervisor = supervisor or Supervisor(math.inf)
        task, training, init = recipe.task, recipe.training, recipe.model.init
        self.device = torch.device(choose_accelerator())
        self.tokenizer = load_tokenizer(recipe.model.tokenizer or init)
        selection = recipe.selection
        holdout = selection.holdout if selection else 0.0
        self.data = tasks.load(task, self.tokenizer, load_config(init), holdout)
        torch.manual_seed(recipe.seed)  # the new head
        classes, dropout = self.data.train.classes, training.dropout
        self.student = tasks.load_model(task, init, classes, dropout=dropout)
        if recipe.model.zeros == "held":
            hold_zeros(self.student, init)
        self.pruner = self._pruner()
        self.quantized = self._quantized()
        nn.Module.to(self.student, self.device)
        self.teacher = self._load_teacher()
        self.order = Order(
            seed=recipe.seed,
            num_examples=len(self.data.train.features),
            lengths=self.data.train.lengths() if training.group_by_length else None,
            batch=training.batch,
            micro_batch=training.micro_batch or training.batch,
            rank=0,
            world_size=1,
        )
        steps = max(1, round(training.epochs * self.order.num_examples / training.batch))
        last_update = recipe.pruning.schedule.last_update if recipe.pruning else 0
        if last_update > steps:
            raise RecipeError(
                f"pruning.schedule: the last mask update, {last_update}, must not come after the "
                f"end of training (step {steps})"
            )
        if recipe.quantization is not None and steps < 2:
            raise RecipeError("quantization: needs 2 steps or more; the first one only observes")
        every_epoch = math.ceil(self.order.num_examples / training.batch)
        self.evaluation_steps = (selection and selection.every_steps) or every_epoch
        self.best = Best(
            task.metrics[0],
            first_step=max(last_update, self._first_quantized(steps) + 1),
            patience=selection.patience if selection else None,
        )
        self.schedule = recipe.learning_rate(steps)
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.student, training.weight_decay), lr=0.0, fused=True
        )

    def _pruner(self) -> Pruner | None:
        pruning = self.recipe.pruning
        return Pruner(self.student, pruning.schedule, pruning.pattern) if pruning else None

    def _quantized(self) -> dict[str, quant.QuantLinear]:
        settings = self.recipe.quantization
        return prepare_8_bits(self.student, settings) if settings else {}

    def _load_teacher(self) -> Teacher | None:
        settings, classes = self.recipe.distillation, self.data.train.classes
        if settings is None:
            return None
        return Teacher(settings, self.recipe.task, classes, self.student, tokenizer=self.tokenizer)

    def train(self, run: Run, start: int) -> None:
        """The steps from `start` to the end, or until patience is over."""
        settings = self.recipe.logging
        self.remember(run.directory)
        self.supervisor.save_on_signals()
        self.student.train()
        self.done = start
        if start == 0:
            self.prune(0)
        for step in range(start, self.schedule.steps):
            if self.best.is_time_to_stop:
                log.info("step %d: no better for %d evaluations", step, self.best.num_since)
                break
            loss, grad_norm = self.step(step)
            done = self.done = step + 1
            self.prune(done)
            run.advance(done)
            is_end = done == self.schedule.steps
            if done % settings.every_steps == 0 or is_end:
                rates = {"learning_rate": self.schedule.at(step), "grad_norm": grad_norm}
                run.log({"step": done, "loss": loss, **rates})
            is_best = self._compare(run, done)
            is_stopping = not is_end and (self.supervisor.signal or run.is_told_to_stop)
            is_due = done % settings.checkpoint_steps == 0 and not is_end
            if is_best or is_due or is_stopping:
                self.save(run, done)
            if is_stopping:
                run.stopped()
                raise Stopped(
                    f"{run.directory}: stopped at step {done}, which is saved; continue with the "
                    "same command and --resume"
                )

    def facts(self) -> dict[str, Any]:
        """What the run begins with."""
        splits = {**self.data.more, "train": self.data.train, "validation": self.data.validation}
        digests = {name: split.examples.sha256() for name, split in splits.items()}
        model, settings = self.recipe.model, self.recipe.distillation
        read = {"model.init": model.init, "model.tokenizer": model.tokenizer}
        read["distillation.teacher"] = settings.teacher if settings else None
        return {"world_size": 1, "data": digests, **began.models(read)}

    def remember(self, directory: Path) -> None:
        """Let the teacher compute its logits of the training examples, or read them."""
        if self.teacher is not None:
            self.teacher.remember(self.data.train, directory / TEACHER, self._precision)

    def step(self, step: int) -> tuple[float, float]:
        """The step that follows `step` finished ones; its loss and gradient norm."""
        self._start_quantizing(step)
        seed_step(self.recipe.seed, step)
        loss = self._backward(self.order.step(step))
        if not math.isfinite(loss):
            raise DivergedError(f"step {step + 1}: the loss is {loss}; {UNCHANGED}")
        grad_norm = nn.utils.clip_grad_norm_(
            self.student.parameters(), self.recipe.training.max_grad_norm
        )
        if not torch.isfinite(grad_norm):
            raise DivergedError(f"step {step + 1}: the gradient norm is {grad_norm}; {UNCHANGED}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, float(grad_norm)

    def _compare(self, run: Run, step: int) -> bool:
        """Evaluate when it is time; whether this is the model to keep."""
        selection, is_end = self.recipe.selection, step == self.schedule.steps
        if (step % self.evaluation_steps and not is_end) or (is_end and selection is None):
            return False
        row = {"step": step, "eval": True, **self.evaluate(self.data.selection)}
        run.log(row)
        return selection is not None and self.best.see(row)

    def _backward(self, micro_batches: list[list[Place]]) -> float:
        """Gradients of one step; each micro-batch counts by its targets, and by its tokens."""
        train = self.data.train
        places = [[index for _, index in micro_batch] for micro_batch in micro_batches]
        batches = [train.collate([train.features[i] for i in indices]) for indices in places]
        targets = sum(tasks.num_targets(batch) for batch in batches)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        total = 0.0
        for batch, indices in zip(batches, places, strict=True):
            share = tasks.num_targets(batch) / max(1, targets)
            tensors = {name: tensor.to(self.device) for name, tensor in batch.items()}
            with self._precision():
                mean, hidden = self._losses(tensors, indices)
                loss = mean * share + hidden / tokens
            loss.backward()
            total += loss.item()
        return total

    def _losses(self, batch: tasks.Batch, indices: list[int]) -> tuple[Tensor, Tensor | float]:
        """Mean loss over targets, and summed loss over tokens."""
        task, settings = self.recipe.task, self.recipe.distillation
        if settings is None or self.teacher is None:
            return tasks.task_loss(task, self.student(**tasks.inputs_of(batch)), batch), 0.0
        wants_states = bool(settings.hidden_weight)
        outputs = self.student(**tasks.inputs_of(batch), output_hidden_states=wants_states)
        hard = tasks.task_loss(task, outputs, batch)
        soft, hidden = self.teacher.losses(outputs, batch, indices)
        mean = settings.hard_weight * hard + settings.soft_weight * soft
        return mean, settings.hidden_weight * hidden

    def _precision(self) -> contextlib.AbstractContextManager:
        is_bf16 = self.recipe.training.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)

    def _start_quantizing(self, step: int) -> None:
        settings, steps = self.recipe.quantization, self.schedule.steps
        if settings is None:
            return
        if step >= self._first_quantized(steps):
            quant.start(self.student)
        if step >= max(1, int(settings.freeze * steps)):
            quant.freeze(self.student)

    def _first_quantized(self, steps: int) -> int:
        settings = self.recipe.quantization
        return max(1, int(settings.start * steps)) if settings else 0

    def _write_ranges(self, directory: Path) -> None:
        if self.quantized:
            quant.save(self.student, directory / quant.FILE)

    def prune(self, step: int) -> None:
        """Update the masks when the recipe has a schedule and it says so."""
        if self.pruner is not None:
            self.pruner.after_step(step)

    def evaluate(self, split: Split) -> dict[str, float]:
        """The task's metrics on a split, in fp32 as in what is written."""
        return evaluate(self.student, self.recipe.task, split, batch=64, device=self.device)

    def save(self, run: Run, step: int) -> None:
        """Save a resume point."""

        def write(directory: Path) -> None:
            state = {
                "model": self.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ranges": quant.ranges(self.student),
            }
            with (directory / "state.pt").open("wb") as file:  # torch's own hides why it fails
                torch.save(state, file)
            mask_files.save(masks_of(self.student), directory / "masks.safetensors")

        keep = self.recipe.logging.keep_checkpoints
        facts = {"best": self.best.step, **run.state()}
        save_point(run.directory / "checkpoints", step, write, facts, keep=keep)

    def resume(self, run: Run) -> int:
        """Go back to the newest resume point; the step to continue from."""
        point = newest_point(run.directory / "checkpoints")
        if point is None:
            log.warning("%s: no resume point; starting anew", run.directory)
            run.go_back(0)
            return 0
        facts = facts_of(point)
        step = facts["step"]
        self._restore(point)
        run.go_back(step, facts)
        if self.recipe.selection is not None:
            self.best.replay(run.rows())
            if self.best.step != facts["best"]:
                raise RunError(f"{run.directory}/metrics.jsonl: has lost evaluations; start anew")
        log.info("%s: resumed at step %d", run.directory, step)
        return step

    def _restore(self, point: Path) -> None:
        state = torch.load(point / "state.pt", map_location=self.device, weights_only=True)
        self.student.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        quant.set_ranges(self.student, state["ranges"])
        set_masks(self.student, mask_files.load(point / "masks.safetensors"))

    def finish(self, run: Run) -> dict[str, Any]:
        """Take the best model, evaluate, write the finished model, the results and the pictures."""
        if self.best.step is not None:
            point = run.directory / "checkpoints" / point_name(self.best.step)
            if problem := problem_of(point):
                raise RunError(f"{point}: is the best model and can't be used: {problem}")
            self._restore(point)
            self._start_quantizing(self.best.step)
        metrics = evaluate_splits(self.evaluate, self.data.validation, self.data.more)
        run.log({"step": self.done, "eval": True, "final": True, **metrics})
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
            "model_files_sha256": seal.one_digest(seal.model_files(directory)),
        }
        if self.best.step is not None:
            results["selected"] = {"step": self.best.step, self.best.metric: self.best.value}
        write_json(run.directory / "results.json", results)
        report.finetuning_pictures(run.rows(), result, run.directory / "report")
        run.finish({"step": self.done, "model_sha256": results["model_sha256"]})
        (run.directory / TEACHER).unlink(missing_ok=True)
        return results
