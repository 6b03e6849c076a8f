"""Upstream training: prepare a teacher, or prune a student under one (Prune Once for All, section
3).

    batch, two forwards, loss, backward, step, prune, log, save

Without [pruning] and [distillation] this is ordinary pre-training and gives the losses of a plain
loop, step by step.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from opfa.compression.pattern import Pattern
from opfa.compression.pruner import Pruner
from opfa.data.order import Order
from opfa.errors import ModelError, RecipeError, RunError
from opfa.models.encoders import (
    compile_models,
    decay_groups,
    load_pretraining_model,
    new_pretraining_model,
)
from opfa.models.fit import check_fit
from opfa.report import pictures as report
from opfa.sparsity import masks as mask_files
from opfa.sparsity.layers import SPARSE_FROM, hold_weights, mask_layers, set_masks, zero_masks
from opfa.training import began, distributed, finished, launch
from opfa.training.checkpoint import (
    facts_of,
    model_digest,
    newest_point,
    save_point,
    seed_step,
    write_finished,
)
from opfa.training.clock import Clock
from opfa.training.distributed import Stopped, Supervisor
from opfa.training.engine import Engine, start_distributed
from opfa.training.run import Run, check_output
from opfa.training.zero import DeepSpeedFile
from opfa.upstream.batches import Batch, masker, training_steps, validation_batches
from opfa.upstream.objective import Counts, Losses, Objective, Targets, Teacher
from opfa.upstream.prepared import Prepared, open_together
from opfa.upstream.progress import Meter, global_losses, mean_losses
from opfa.upstream.recipe import PretrainRecipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
log = logging.getLogger(__name__)


def pretrain(
    recipe: PretrainRecipe, output: Path, resume: bool = False, *, trust_data: bool = False
) -> None:
    """Run a recipe to its end and write RUN/model. Collective.

    The files of the examples are read once before, and compared with their digests, unless
    `trust_data`. Raises `Stopped` when SIGTERM or Ctrl-C ended it after a resume point was saved,
    and `LostContactError` when another process of the launch is gone.
    """
    launch.check_rendezvous()
    check_output(output, recipe, resume)
    file = recipe.deepspeed_file(launch.place().world_size)
    timeout, steps = recipe.launch.timeout_seconds, recipe.training.steps
    with distributed.Supervisor(timeout) as supervisor:
        device = start_distributed(timeout)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        prepared = open_together(
            Path(recipe.data), recipe.corpus, trust_data=trust_data, beat=supervisor.beat
        )
        supervisor.beat("loading the models")
        order = order_of(recipe, prepared.lengths(), rank, world_size)
        trainer = Trainer(recipe, prepared, order, device, supervisor, file)
        with Run(output, recipe, steps=steps, is_writer=rank == 0) as run:
            # Rank 0 decides: machines may look at the run directory at different times.
            if distributed.on_first_rank(lambda: run.is_done):
                distributed.on_first_rank(lambda: finished.check(output))
                log.info("%s: is finished already", output)
                return
            resumes = distributed.on_first_rank(lambda: resume)
            if not distributed.eventually((output / "recipe.toml").exists):
                raise RunError(
                    f"{output}: rank 0 made this directory, and rank {rank} can't see it; "
                    "RUN must be in a directory that all machines share"
                )
            facts = distributed.on_first_rank(lambda: _facts(recipe, prepared, world_size))
            if resumes:
                distributed.on_first_rank(lambda: began.check(output, facts))
            start = trainer.resume(run) if resumes else 0
            this = {
                "from_step": start,
                "world_size": world_size,
                "deepspeed": file.values(),
            }
            run.describe(facts, this)
            settings = recipe.logging
            run.start_wandb(settings.wandb, settings.wandb_project, recipe.name)
            trainer.train(run, start)
            trainer.finish(run)


class Trainer:
    """The state of one upstream run: student, teacher, engine, pruner, position."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        prepared: Prepared,
        order: Order,
        device: torch.device,
        supervisor: Supervisor,
        file: DeepSpeedFile,
        clock: Clock | None = None,
    ) -> None:
        """Load everything and check that it fits together, before any work is done. Collective."""
        self.recipe, self.prepared, self.order, self.device = recipe, prepared, order, device
        self.supervisor, self.clock = supervisor, clock or Clock()
        torch.manual_seed(recipe.seed)  # new heads and models from scratch
        student = _student(recipe, prepared)
        check_fit(student.config, prepared.tokenizer, recipe.corpus.sequence_tokens)
        self.teacher = self._load_teacher(student)
        pruning = recipe.pruning
        if pruning is None:
            _refuse_sparse(student, recipe.model.init)
        else:
            _refuse_heads(student, pruning.pattern)
        self.pruner = Pruner(student, pruning.schedule, pruning.pattern) if pruning else None
        self.config = student.config
        self.model_class = type(student)
        if recipe.launch.compile:
            compile_models(student, *([self.teacher.model] if self.teacher else []))
        training = recipe.training
        self.engine = Engine(
            Objective(student, recipe.distillation, self.clock, recipe.launch.compile),
            decay_groups(student, training.weight_decay),
            betas=(training.beta1, training.beta2),
            epsilon=training.epsilon,
            max_grad_norm=training.max_grad_norm,
            micro_batch=order.micro_batch,
            accumulation=order.accumulation,
            precision=training.precision,
            file=file,
        )
        self.student = student
        self.mask = masker(prepared.tokenizer, recipe.masking, recipe.seed)

    def _load_teacher(self, student: PreTrainedModel) -> Teacher | None:
        settings = self.recipe.distillation
        if settings is None:
            return None
        objective = self.recipe.corpus.objective
        model = load_pretraining_model(
            settings.teacher, objective, needs_head=settings.soft_weight > 0
        )
        teacher = Teacher(model, student, settings)
        nn.Module.to(model, self.device)
        for parameter in model.parameters():  # and no buffer: rotary frequencies stay in fp32
            parameter.data = parameter.data.to(DTYPES[self.recipe.training.precision])
        return teacher

    def train(self, run: Run, start: int) -> None:
        """The steps from `start` to the end."""
        schedule, settings = self.recipe.learning_rate(), self.recipe.logging
        meter = Meter()
        self.supervisor.save_on_signals()
        self.engine.module.train()  # a model that was loaded is in evaluation mode
        if start == 0 and self.pruner is not None:
            self.prune(0)
        for step, micro_batches in enumerate(self.batches(start), start):
            self.supervisor.beat(f"training step {step + 1}")
            seed_step(self.recipe.seed, step, self.order.rank)
            counts, is_stopping = self._counts(run, micro_batches)
            losses = self.accumulate(micro_batches, counts)
            learning_rate = schedule.at(step)
            grad_norm = self.optimize(step, learning_rate, losses)
            meter.add(counts)
            done = step + 1
            if self.pruner is not None:
                self.prune(done)
            run.advance(done)
            if done % settings.every_steps == 0 or done == schedule.steps:
                sparsity = self.pruner.sparsity() if self.pruner else 0.0
                rates = {
                    "learning_rate": learning_rate,
                    "sparsity": sparsity,
                    "grad_norm": None if grad_norm is None else float(grad_norm),
                }
                alone = self.recipe.metric == "hidden_loss"
                loss = global_losses(losses, step, is_of_states_alone=alone)
                run.log({"step": done, **loss, **rates, **meter.rates()})
            if done % settings.evaluate_steps == 0 or done == schedule.steps:
                run.log({"step": done, "eval": True, **self.evaluate()})
            if (done % settings.checkpoint_steps == 0 or is_stopping) and done < schedule.steps:
                self.save(run, done)
                if is_stopping:
                    run.stopped()
                    raise Stopped(
                        f"{run.directory}: stopped at step {done}, which is saved; continue with "
                        "the same command, and --resume unless a script of launch/ adds it"
                    )

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every step from `start` on, where they are computed with."""
        steps = range(start, self.recipe.training.steps)
        workers = self.recipe.launch.workers
        found = training_steps(self.prepared, self.mask, self.order, steps=steps, workers=workers)
        while True:
            with self.clock.part("data"):
                step = next(found, None)
                if step is None:
                    return
                batches = [batch.to(self.device) for batch in step]
            yield batches

    def _counts(self, run: Run, micro_batches: list[Batch]) -> tuple[Counts, bool]:
        """Of the global batch; and whether some rank was told to stop. Collective."""
        local = [sum(column) for column in zip(*(b.counts() for b in micro_batches), strict=True)]
        stops = bool(self.supervisor.signal) or (self.order.rank == 0 and run.is_told_to_stop)
        *counts, num_stopping = distributed.sum_over_ranks([*local, stops])
        return Counts(*(max(1.0, count) for count in counts)), num_stopping > 0

    def accumulate(self, micro_batches: list[Batch], counts: Counts) -> list[Losses]:
        """Forward and backward passes of one step, which leave the loss where it was computed."""
        last, losses = len(micro_batches) - 1, []
        with self._held_weights(len(micro_batches)):
            for index, batch in enumerate(micro_batches):
                with self.clock.part("teacher forward"):
                    targets: Targets | None = self.teacher(batch) if self.teacher else None
                found: Losses = self.engine(batch, targets, counts)
                with self.clock.part("backward"):
                    self.engine.backward(found.total, index == last)
                losses.append(Losses(*(part.detach() for part in found)))
        return losses

    def _held_weights(self, num_passes: int) -> contextlib.AbstractContextManager[None]:
        if num_passes > 1 and self.engine.has_whole_weights and not self.recipe.launch.compile:
            return hold_weights(self.student)
        return contextlib.nullcontext()

    def optimize(self, step: int, learning_rate: float, losses: list[Losses]) -> Tensor | None:
        """The optimizer's step; raises `RunError` when the loss or a gradient is not finite."""
        try:
            with self.clock.part("optimizer"):
                grad_norm = self.engine.step(learning_rate)
        except RunError as error:
            global_losses(losses, step)  # it may say more
            raise RunError(f"step {step + 1}: {error}") from None
        if grad_norm is None:
            global_losses(losses, step)
        return grad_norm

    def prune(self, step: int) -> None:
        """Update the masks when the schedule says so. Collective."""
        assert self.pruner is not None
        with self.clock.part("mask update"):
            self.pruner.after_step(step, self.engine)

    def evaluate(self) -> dict[str, float]:
        """The student's mean losses on held-out examples, and its distance from a teacher whose
        hidden states it learns. Every rank computes the same.
        """
        self.supervisor.beat("evaluating")
        batches = validation_batches(
            self.prepared,
            self.mask,
            batch=self.order.micro_batch,
            num_examples=self.recipe.logging.evaluate_examples,
        )
        settings = self.recipe.distillation
        teacher = self.teacher if settings and settings.hidden_weight else None
        with self._held_weights(self.recipe.logging.evaluate_examples):
            found = (batch.to(self.device) for batch in batches)
            alone = self.recipe.metric == "hidden_loss"
            return mean_losses(self.engine.module, found, teacher, is_of_states_alone=alone)

    def save(self, run: Run, step: int) -> None:
        """Save a resume point. Collective."""
        self.supervisor.beat(f"saving step {step}")

        def write(directory: Path) -> None:
            self.engine.save(directory)
            if self.pruner is not None and self.order.rank == 0:
                mask_files.save(self.pruner.masks(), directory / "masks.safetensors")
            distributed.barrier()
            wanted = self.engine.num_files
            if self.order.rank == 0 and not distributed.eventually(
                lambda: len(list(directory.glob("state-*"))) == wanted
            ):
                raise RunError(
                    f"{directory}: not the state of all {wanted} ranks is here; RUN must be in a "
                    "directory that all machines share"
                )

        save_point(
            run.directory / "checkpoints",
            step,
            write,
            {"world_size": self.order.world_size, **(run.state() if run.is_writer else {})},
            keep=self.recipe.logging.keep_checkpoints,
            is_writer=self.order.rank == 0,
            barrier=distributed.barrier,
        )

    def resume(self, run: Run) -> int:
        """Go back to the newest resume point; the step to continue from. Collective."""
        name = distributed.on_first_rank(
            lambda: str(newest_point(run.directory / "checkpoints") or "")
        )
        if not name:
            log.warning("%s: no resume point; starting anew", run.directory)
            run.go_back(0)
            return 0
        point, facts = Path(name), facts_of(Path(name))
        self.engine.load(point)
        if self.pruner is not None:
            self.pruner.restore(mask_files.load(point / "masks.safetensors"))
        distributed.on_first_rank(lambda: run.go_back(facts["step"], facts))
        log.info("%s: resumed at step %d", run.directory, facts["step"])
        return facts["step"]

    def finish(self, run: Run) -> None:
        """Write the finished model and the pictures. Collective."""
        self.supervisor.beat("writing the finished model")
        state = {}
        for name, parameter in self.student.named_parameters():
            value = self.engine.whole(parameter)
            if run.is_writer:
                state[name] = value.cpu()
        if not run.is_writer:
            return distributed.barrier()
        model = self.model_class(self.config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(state[name])
        if self.pruner is not None:
            mask_layers(model, self.pruner.layers)
            set_masks(model, self.pruner.masks())
        result = write_finished(model, self.prepared.tokenizer, run.directory / "model")
        directory = run.directory / "report"
        report.pretraining_pictures(run.rows(), self.recipe.metric, result, directory)
        digest = model_digest(run.directory / "model")
        sparsity = result["total"]["sparsity"]
        steps = self.recipe.training.steps
        run.finish({"step": steps, "sparsity": sparsity, "model_sha256": digest})
        return distributed.barrier()


def order_of(recipe: PretrainRecipe, lengths: np.ndarray, rank: int, world_size: int) -> Order:
    """The data order of a recipe on so many ranks, over examples of these lengths [N]."""
    batch = recipe.training.batch
    micro_batch = recipe.launch.micro_batch or batch // world_size
    if batch % world_size:
        raise RecipeError(
            f"training.batch = {batch}: can't be shared out evenly over {world_size} processes"
        )
    if batch % (micro_batch * world_size):
        raise RecipeError(
            f"training.batch = {batch}: is not a multiple of launch.micro_batch x processes = "
            f"{micro_batch} x {world_size}"
        )
    return Order(
        seed=recipe.seed,
        num_examples=len(lengths),
        lengths=lengths,
        batch=batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
    )


def _refuse_heads(model: PreTrainedModel, pattern: Pattern) -> None:
    """Fine-tuning drops them, and the loss knows the vocabulary projection without its mask."""
    encoder = f"{model.base_model_prefix}."
    heads = [name for name in pattern.layers(model) if not name.startswith(encoder)]
    if heads:
        raise RecipeError(
            f"pruning.pattern: matches {heads[0]}, which belongs to the head of pre-training; only "
            "the encoder can be pruned"
        )


def _facts(recipe: PretrainRecipe, prepared: Prepared, world_size: int) -> dict[str, Any]:
    """What a run begins with."""
    teacher = recipe.distillation.teacher if recipe.distillation else None
    read = {"model.init": recipe.model.init, "distillation.teacher": teacher}
    return {"world_size": world_size, "data": prepared.summary, **began.models(read)}


def _refuse_sparse(model: PreTrainedModel, init: str | None) -> None:
    sparsity = mask_files.report(zero_masks(model))["total"]["sparsity"]
    if sparsity >= SPARSE_FROM:
        raise ModelError(
            f"model.init = {init!r}: {sparsity:.1%} of its pruned weights are zero, and a run "
            "without [pruning] would fill them; start from a dense model, or prune"
        )


def _student(recipe: PretrainRecipe, prepared: Prepared) -> PreTrainedModel:
    objective, dropout = recipe.corpus.objective, recipe.training.dropout
    if recipe.model.init is not None:
        return load_pretraining_model(recipe.model.init, objective, dropout)
    assert recipe.model.config is not None
    return new_pretraining_model(recipe.model.config, objective, prepared.tokenizer, dropout)
