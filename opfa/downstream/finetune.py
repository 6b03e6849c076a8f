"""Fine-tuning with the zeros held (Prune Once for All, section 3.3), on one device."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from opfa.compression import quant
from opfa.compression.pruner import Pruner
from opfa.compression.schedules import in_steps
from opfa.data.order import Order
from opfa.downstream.evaluate import evaluate, evaluate_splits
from opfa.downstream.examples import calibration_of
from opfa.downstream.recipe import FinetuneRecipe, Model
from opfa.downstream.results import FILE as RESULTS
from opfa.downstream.results import FinetuneResult, Results
from opfa.downstream.selection import Best, Choosing
from opfa.downstream.student import Quantizing, hold_zeros, prepare_8_bits
from opfa.downstream.teacher import FILE, Remembering, Teacher
from opfa.errors import DivergedError, RecipeError, RunError, blaming
from opfa.models.configs import load_config, load_tokenizer
from opfa.models.encoders import checkpoint_layers, choose_accelerator
from opfa.models.pretraining import decay_groups
from opfa.runtime.training import use_kernels
from opfa.sparsity.layers import masked_layers
from opfa.storage import seal
from opfa.storage.files import write_json
from opfa.tasks import kinds as tasks
from opfa.tasks.embeddings import settled
from opfa.tasks.features import Split
from opfa.training import began, finished, launch, points
from opfa.training.checkpoint import model_digest, point_name, problem_of, write_finished
from opfa.training.concerns import Evaluating, Pruning
from opfa.training.loop import Concern, Losses, Progress
from opfa.training.metrics import HELD_OUT, VALIDATION, Row
from opfa.training.reporting import write_report
from opfa.training.session import run_to_end
from opfa.training.solo import UNCHANGED, SoloEngine


class Examples(NamedTuple):
    """A micro-batch, and the places of its features in the training split."""

    tensors: tasks.Batch
    indices: list[int]


class Counts(NamedTuple):
    """What a step's whole batch holds: targets of the task, and tokens."""

    targets: int
    tokens: int


def finetune(
    recipe: FinetuneRecipe,
    output: Path,
    resume: bool = False,
    *,
    within: Path | None = None,
    title: str = "",
    concerns: Sequence[Concern] = (),
) -> FinetuneResult:
    """Run a recipe to its end, write RUN/model and RUN/results.json, and return the results.

    `within` and `title` are for one of several runs: the directory of all, whose `stop` counts
    too, and what the bar and the log call it.
    """
    if recipe.sweep is not None:
        raise RecipeError("sweep: several runs are a matter of opfa.downstream.sweep")
    launch.refuse_several("opfa finetune")
    run_to_end(
        recipe,
        output,
        lambda _: Trainer(recipe),
        resume=resume,
        timeout_seconds=math.inf,  # nothing to wait for: one process
        concerns=concerns,
        within=within,
        title=title,
    )
    return FinetuneResult.read(output)


class Trainer:
    """Student, teacher and engine of one fine-tuning run; `training.session` runs it."""

    rank = 0
    launched: dict[str, Any] = {}

    def __init__(self, recipe: FinetuneRecipe) -> None:
        """Load everything and check that it fits together, before any work is done."""
        self.recipe, self.seed = recipe, recipe.seed
        training, init = recipe.training, recipe.model.init
        self.task = task = settled(recipe.task, init)
        self.device = torch.device(choose_accelerator())
        self.tokenizer, config = _loaded(recipe.model)
        holdout = recipe.selection.holdout if recipe.selection else 0.0
        self.data = tasks.load(task, self.tokenizer, config, holdout)
        self.order = _order(recipe, self.data.train)
        steps = max(1, round(training.epochs * self.order.num_examples / training.batch))
        recipe.check_steps(steps)
        self.schedule = recipe.learning_rate(steps)
        torch.manual_seed(recipe.seed)  # the new head
        classes = self.data.train.classes
        with blaming("model.init", init):
            self.student = tasks.load_model(task, init, classes, dropout=training.dropout)
            self.chosen_by = hold_zeros(self.student, init) if recipe.model.zeros == "held" else []
        self._changing = self._make_concerns(steps)
        nn.Module.to(self.student, self.device)
        if training.gradient_checkpointing:
            checkpoint_layers(self.student)
        self._use_kernels()
        self.teacher = None
        if (settings := recipe.distillation) is not None:
            self.teacher = Teacher(settings, task, classes, self.student, tokenizer=self.tokenizer)
        groups = decay_groups(self.student, training.weight_decay)
        self.engine = SoloEngine(self.student, groups, max_grad_norm=training.max_grad_norm)

    def _use_kernels(self) -> None:
        kernels = self.recipe.training.sparse_kernels
        if kernels and self.device.type == "cpu" and masked_layers(self.student):
            use_kernels(self.student, kernels, train_live=self.pruner is None)  # if masks stay

    def _make_concerns(self, steps: int) -> list[Concern]:
        """Those that change the student; its layers are made for them."""
        pruning, settings = self.recipe.pruning, self.recipe.quantization
        found: list[Concern] = []
        self.pruner, first_step = None, 0  # the first model that may be chosen
        if pruning is not None:
            text = calibration_of(self.student, self.task, self.data.train, self.device, self.seed)
            ramp = pruning.ramp(steps)
            self.pruner = Pruner(self.student, ramp, pruning.patterns, calibration=text)
            found.append(Pruning(self.pruner))
            first_step = self.pruner.schedule.last_update
        if settings is not None:
            prepare_8_bits(self.student, settings)
            quantizing = Quantizing(settings, self.student, steps)
            found.append(quantizing)
            first_step = max(first_step, quantizing.first_step + 1)
        selection, metric = self.recipe.selection, self.recipe.task.metrics[0]
        patience = selection.patience if selection else None
        self.best = Best(metric, first_step=first_step, patience=patience)
        return found

    def facts(self) -> dict[str, Any]:
        """What the run begins with."""
        splits = {**self.data.more, "train": self.data.train, "validation": self.data.validation}
        digests = {name: split.examples.sha256() for name, split in splits.items()}
        model, settings = self.recipe.model, self.recipe.distillation
        models = {"model.init": model.init, "model.tokenizer": model.tokenizer}
        models["distillation.teacher"] = settings.teacher if settings else None
        return {"world_size": 1, "data": digests, **began.models(models)}

    def concerns(self) -> tuple[list[Concern], Concern]:
        """The teacher's logits, pruning and 8 bits, as far as the recipe has them; evaluation."""
        found = list(self._changing)
        if self.teacher is not None:
            found.append(Remembering(self.teacher, self.data.train, self.precision))
        every_epoch = math.ceil(self.order.num_examples / self.order.batch)
        selection = self.recipe.selection
        if selection is None:
            return found, Evaluating(every_epoch, self.evaluate, at_end=False)
        every = in_steps(selection.every_steps or every_epoch, self.schedule.steps, 1)
        split = HELD_OUT if selection.holdout else VALIDATION
        return found, Choosing(every, self.evaluate, self.best, split=split)

    # a step

    def batches(self, start: int) -> Iterator[list[Examples]]:
        """The micro-batches of every step from `start` on."""
        train = self.data.train
        for step in range(start, self.schedule.steps):
            found = [[index for _, index in places] for places in self.order.step(step)]
            yield [Examples(train.collate(train.features.__getitems__(p)), p) for p in found]

    def counts(self, micro_batches: list[Examples]) -> Counts:
        """Each micro-batch counts by its targets, and by its tokens."""
        tensors = [batch.tensors for batch in micro_batches]
        tokens = sum(int(batch["attention_mask"].sum()) for batch in tensors)
        return Counts(max(1, sum(map(tasks.num_targets, tensors))), tokens)

    def holding(self, num_passes: int) -> contextlib.AbstractContextManager[None]:
        """Nothing: layers may observe in every pass."""
        return contextlib.nullcontext()

    def losses(self, batch: Examples, counts: Counts) -> Losses:
        """The forward passes of a micro-batch, and its share of the step's loss."""
        share = tasks.num_targets(batch.tensors) / counts.targets
        tensors = {name: tensor.to(self.device) for name, tensor in batch.tensors.items()}
        settings = self.recipe.distillation
        states = {"output_hidden_states": bool(settings.hidden_weight)} if settings else {}
        with self.precision():
            outputs = tasks.call(self.task, self.student, tensors, **states)
            mean, hidden = tasks.task_loss(self.task, outputs, tensors), 0.0
            if settings is not None and self.teacher is not None:
                soft, distance = self.teacher.losses(outputs, tensors, batch.indices)
                mean = settings.hard_weight * mean + settings.soft_weight * soft
                hidden = settings.hidden_weight * distance
            return (mean * share + hidden / counts.tokens,)

    def precision(self) -> contextlib.AbstractContextManager:
        """Forward passes run in the recipe's precision."""
        is_bf16 = self.recipe.training.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients."""
        loss.backward()

    def optimize(self, step: int, learning_rate: float, losses: list[Losses]) -> Tensor:
        """The optimizer's step; raises `DivergedError` when loss or gradient is not finite."""
        loss = _sum(losses)
        if not math.isfinite(loss):
            raise DivergedError(f"step {step + 1}: the loss is {loss}; {UNCHANGED}")
        try:
            return self.engine.step(learning_rate)
        except DivergedError as error:
            raise DivergedError(f"step {step + 1}: {error}") from None

    # what is written

    def row(self, at: Progress) -> Row:
        """Loss of the last step, and rates."""
        assert at.grad_norm is not None, "gradients can't overflow in fp32 and bf16"
        rates = {"learning_rate": at.learning_rate, "grad_norm": float(at.grad_norm)}
        return {"loss": _sum(at.losses), **rates, **(self.pruner.row() if self.pruner else {})}

    def evaluate(self, split: Split | None = None) -> dict[str, float]:
        """The task's metrics in fp32, by default on the split that models are chosen by."""
        split = split or self.data.selection
        return evaluate(self.student, self.task, split, batch=64, device=self.device)

    def finish(self, at: Progress) -> None:
        """Take the best model, evaluate, write the finished model, the results and the pictures."""
        run, best, done = at.run, self.best, at.step
        if best.step is not None:
            point = run.directory / "checkpoints" / point_name(best.step)
            if problem := problem_of(point):
                raise RunError(f"{point}: is the best model and can't be used: {problem}")
            points.restore(at, point)
        with run.doing("evaluating"):
            metrics = evaluate_splits(self.evaluate, self.data.validation, self.data.more)
        run.log({"step": done, "split": VALIDATION, "eval": True, "final": True, **metrics})
        directory = run.directory / "model"
        chosen_by = self.pruner.chosen_by() if self.pruner else self.chosen_by
        args = self.student, self.tokenizer, directory, self._write_more, chosen_by
        result = write_finished(*args)
        results = Results(
            task=self.recipe.name,
            metrics=metrics,
            seed=self.recipe.seed,
            sparsity=result["total"]["sparsity"],
            quantized=self.recipe.quantization is not None,
            recipe_sha256=self.recipe.sha256(),
            model_sha256=model_digest(directory),
            model_files_sha256=seal.one_digest(seal.model_files(directory)),
            **({"selected": best.found()} if best.step is not None else {}),
        )
        write_json(run.directory / RESULTS, results.model_dump(exclude_unset=True))
        write_report(run, self.schedule, self.pruner, result)
        finished.write(run.directory, {"step": done, "model_sha256": results.model_sha256})
        (run.directory / FILE).unlink(missing_ok=True)

    def _write_more(self, directory: Path) -> None:
        tasks.write_more(self.task, self.student, directory)
        if self.recipe.quantization is not None:
            quant.save(self.student, directory / quant.FILE)


def _sum(losses: list[Losses]) -> float:
    return sum(float(total) for (total,) in losses)


def _loaded(model: Model) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Tokenizer and configuration; what can't be loaded is named by its key."""
    with blaming("model.init", model.init):
        config = load_config(model.init)
        if model.tokenizer is None:
            return load_tokenizer(model.init), config
    with blaming("model.tokenizer", model.tokenizer):
        return load_tokenizer(model.tokenizer), config


def _order(recipe: FinetuneRecipe, train: Split) -> Order:
    training = recipe.training
    return Order(
        seed=recipe.seed,
        num_examples=len(train.features),
        lengths=train.lengths() if training.group_by_length else None,
        batch=training.batch,
        micro_batch=training.micro_batch or training.batch,
        rank=0,
        world_size=1,
    )
