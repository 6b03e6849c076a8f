"""Upstream training: prepare a teacher, or prune a student under one, in `training.loop`."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from opfa.compression.pruner import Pruner
from opfa.compression.schedules import in_steps
from opfa.data.order import Order
from opfa.errors import RecipeError, RunError
from opfa.models.configs import load_config
from opfa.models.pretraining import compile_models, decay_groups
from opfa.models.sentences import files_of, write_files
from opfa.sparsity.layers import hold_weights
from opfa.training import began, distributed, finished, launch
from opfa.training.checkpoint import model_digest, write_finished
from opfa.training.clock import Clock
from opfa.training.concerns import Evaluating, Pruning
from opfa.training.distributed import Supervisor
from opfa.training.engine import Engine, start_distributed
from opfa.training.loop import Concern, Losses, Progress
from opfa.training.metrics import Row
from opfa.training.reporting import write_report
from opfa.training.session import run_to_end
from opfa.training.zero import DeepSpeedFile
from opfa.upstream import objective
from opfa.upstream.batches import Batch, masker, training_steps, validation_batches
from opfa.upstream.objective import Counts, Objective
from opfa.upstream.prepared import Prepared, open_together
from opfa.upstream.progress import global_losses, mean_losses
from opfa.upstream.recipe import PretrainRecipe
from opfa.upstream.results import PretrainResult
from opfa.upstream.student import load_student, load_teacher
from opfa.upstream.text import calibration_of

log = logging.getLogger(__name__)


def pretrain(
    recipe: PretrainRecipe,
    output: Path,
    resume: bool = False,
    *,
    trust_data: bool = False,
    has_watchdog: bool = True,
    concerns: Sequence[Concern] = (),
) -> PretrainResult:
    """Run a recipe to its end, write RUN/model, and return what came out. Collective.

    The files of the examples are compared with their digests before, unless `trust_data`. The
    watchdog ends a process in which nothing is finished for `launch.timeout_seconds`. Raises
    `Stopped` when a signal ended a run that is saved, `LostContactError` when a process is gone.
    """
    launch.check_rendezvous()
    file = recipe.deepspeed_file(launch.place().world_size)
    timeout = recipe.launch.timeout_seconds

    def load(supervisor: Supervisor) -> Trainer:
        device = start_distributed(timeout)
        data = Path(recipe.data)
        prepared = open_together(data, recipe.corpus, trust_data=trust_data, beat=supervisor.beat)
        supervisor.beat("loading the models")
        return Trainer(recipe, prepared, device, supervisor, file)

    patience = timeout if has_watchdog else math.inf
    run_to_end(recipe, output, load, resume=resume, timeout_seconds=patience, concerns=concerns)
    return distributed.on_first_rank(lambda: PretrainResult.read(output))


class Trainer:
    """Student, teacher and engine of one upstream run; `training.session` runs it."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        prepared: Prepared,
        device: torch.device,
        supervisor: Supervisor,
        file: DeepSpeedFile,
        clock: Clock | None = None,
    ) -> None:
        """Load everything and check that it fits together, before any work is done. Collective."""
        self.recipe, self.prepared, self.device = recipe, prepared, device
        self.supervisor, self.clock = supervisor, clock or Clock()
        self.seed, self.rank, self.schedule = recipe.seed, dist.get_rank(), recipe.learning_rate()
        self.order = order_of(recipe, prepared.lengths(), self.rank, dist.get_world_size())
        _tell_repeated(self.order, recipe.training.steps, prepared)
        self.student = load_student(recipe, prepared)
        init = recipe.model.init  # a sentence encoder stays one
        self.sentence_files = {} if init is None else files_of(init, load_config(init))
        self.teacher = load_teacher(recipe, self.student, device)
        self.mask = masker(prepared.tokenizer, recipe.masking, recipe.seed)
        self.pruner = self._make_pruner()
        training = recipe.training
        if compiles := recipe.launch.compile:
            compile_models(self.student, *([self.teacher.model] if self.teacher else []))
        self.launched = {"world_size": self.order.world_size, "deepspeed": file.values()}
        self.objective = Objective(self.student, recipe.distillation, self.clock, compiles)
        self.engine = Engine(
            self.objective,
            decay_groups(self.student, training.weight_decay),
            betas=(training.beta1, training.beta2),
            epsilon=training.epsilon,
            max_grad_norm=training.max_grad_norm,
            micro_batch=self.order.micro_batch,
            accumulation=self.order.accumulation,
            precision=training.precision,
            file=file,
        )
        self._since, self._num_tokens = time.monotonic(), 0.0  # since the last row
        self._is_of_states_alone = recipe.metric == "hidden_loss"

    def _make_pruner(self) -> Pruner | None:
        """It masks the student."""
        pruning, ramp = self.recipe.pruning, self.recipe.ramp()
        if pruning is None or ramp is None:
            return None
        encoder = self.student.base_model
        text = calibration_of(encoder, self.prepared, self.mask, self.device, self.supervisor.beat)
        return Pruner(self.student, ramp, pruning.patterns, calibration=text)

    def facts(self) -> dict[str, Any]:
        """What the run begins with."""
        settings, size = self.recipe.distillation, self.order.world_size
        teacher = settings.teacher if settings else None
        models = {"model.init": self.recipe.model.init, "distillation.teacher": teacher}
        return {"world_size": size, "data": self.prepared.summary, **began.models(models)}

    def concerns(self) -> tuple[list[Concern], Concern]:
        """Pruning, if the recipe has some; evaluation."""
        pruning: list[Concern] = [Pruning(self.pruner)] if self.pruner else []
        every = in_steps(self.recipe.logging.evaluate_steps, self.schedule.steps, 1)
        return pruning, Evaluating(every, self.evaluate)

    # a step

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

    def counts(self, micro_batches: list[Batch]) -> Counts:
        """What the global batch holds. Collective."""
        local = [sum(column) for column in zip(*(b.counts() for b in micro_batches), strict=True)]
        counts = Counts(*(max(1.0, count) for count in distributed.sum_over_ranks(local)))
        self._num_tokens += counts.real
        return counts

    def holding(self, num_passes: int) -> contextlib.AbstractContextManager[None]:
        """Effective weights are computed once for several passes."""
        if num_passes > 1 and self.engine.has_whole_weights and not self.recipe.launch.compile:
            return hold_weights(self.student)
        return contextlib.nullcontext()

    def losses(self, batch: Batch, counts: Counts) -> objective.Losses:
        """Both forward passes, and this micro-batch's share of the global batch's losses."""
        with self.clock.part("teacher forward"):
            targets = self.teacher(batch) if self.teacher else None
        return self.engine(batch, targets, counts)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients."""
        with self.clock.part("backward"):
            self.engine.backward(loss, is_last)

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

    # what is written

    def row(self, at: Progress) -> Row:
        """Losses of the last step, and rates. Collective."""
        alone, norm = self._is_of_states_alone, at.grad_norm
        found: Row = {
            **global_losses(at.losses, at.step - 1, is_of_states_alone=alone),
            "learning_rate": at.learning_rate,
            "sparsity": self.pruner.sparsity() if self.pruner else 0.0,
            "grad_norm": None if norm is None else float(norm),
        }
        found |= self.pruner.row() if self.pruner else {}
        now = time.monotonic()  # after the GPU was waited for
        found["tokens_per_second"] = round(self._num_tokens / (now - self._since), 1)
        self._since, self._num_tokens = now, 0.0
        return found

    def evaluate(self) -> dict[str, float]:
        """The student's mean losses on held-out examples; the same on every rank."""
        self.supervisor.beat("evaluating")
        num, size = self.recipe.logging.evaluate_examples, self.order.micro_batch
        batches = validation_batches(self.prepared, self.mask, batch=size, num_examples=num)
        settings, alone = self.recipe.distillation, self._is_of_states_alone
        teacher = self.teacher if settings and settings.hidden_weight else None
        with self.holding(num):
            found = (batch.to(self.device) for batch in batches)
            return mean_losses(self.objective, found, teacher, is_of_states_alone=alone)

    def finish(self, at: Progress) -> None:
        """Write the finished model and the pictures. Collective."""
        self.supervisor.beat("writing the finished model")
        for parameter in self.student.parameters():
            value = self.engine.whole(parameter)
            if at.run.is_writer:
                parameter.data = value.cpu()  # nothing is trained any more
        if at.run.is_writer:
            nn.Module.to(self.student, "cpu")
            directory = at.run.directory
            result = write_finished(
                self.student,
                self.prepared.tokenizer,
                directory / "model",
                lambda work: write_files(self.sentence_files, work),
                self.pruner.chosen_by() if self.pruner else (),
            )
            write_report(at.run, self.schedule, self.pruner, result, self.recipe.metric)
            digest, sparsity = model_digest(directory / "model"), result["total"]["sparsity"]
            facts = {"step": at.step, "sparsity": sparsity, "model_sha256": digest}
            finished.write(directory, facts)
        distributed.barrier()


def _tell_repeated(order: Order, steps: int, prepared: Prepared) -> None:
    """Say how often the examples come, where there are fewer than the run takes."""
    split, num_taken = prepared.summary["splits"]["train"], steps * order.batch
    times = num_taken / order.num_examples
    if times > 1 and order.rank == 0:
        tokens = split["tokens"] * times
        what = "%s tokens are prepared and the run takes %s, so each example comes %.1f times"
        log.info(what, f"{split['tokens']:,}", f"{tokens:,.0f}", times)


def order_of(recipe: PretrainRecipe, lengths: np.ndarray, rank: int, world_size: int) -> Order:
    """The data order of a recipe on `world_size` ranks, over examples of these lengths [N]."""
    batch = recipe.training.batch
    micro_batch = recipe.launch.micro_batch or batch // world_size
    if batch % world_size:
        what = f"can't be shared out evenly over {world_size} processes"
        raise RecipeError(f"training.batch = {batch}: {what}")
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
