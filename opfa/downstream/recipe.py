"""What a fine-tuning recipe can say: model, task, training, and whatever else is done meanwhile."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from opfa.compression.schedules import Interval, LearningRate
from opfa.errors import RecipeError
from opfa.hub.place import place_of
from opfa.recipe import (
    Batch,
    Count,
    Fraction,
    Name,
    Positive,
    Recipe,
    Section,
    Seed,
    Weight,
    read_values,
)
from opfa.storage.runs import recipe_beside, shortened
from opfa.tasks.recipe import WHOLE_BATCH, Task
from opfa.training.sections import Pruning, Saving, Teacher, check_rates, learning_rate


class Model(Section):
    """Where fine-tuning starts."""

    init: str
    """The model: a directory or a Hub name."""
    tokenizer: str | None = None
    """A tokenizer; by default the model's own."""
    zeros: Literal["held", "free"] = "held"
    """Hold the model's zeros ("held" refuses a model without any), or train all weights."""


class Training(Section):
    """Optimization: AdamW, linear warm-up and decay, no weight decay for biases and norms."""

    epochs: float = Field(default=3.0, gt=0.0, le=1e6)
    """Passes over the training examples."""
    batch: Batch = 32
    """Examples per optimizer step."""
    micro_batch: Count | None = None
    """Examples per pass, which must divide `batch`; by default all at once."""
    learning_rate: Positive
    """The highest learning rate."""
    lowest_learning_rate: Positive | None = None
    """Where the decay of the learning rate ends; by default at zero."""
    warmup: Fraction = 0.1
    """Share of all steps that are linear warm-up."""
    rewind_learning_rate: bool | None = None
    """Set the decay back to its beginning at each mask update of the ramp; by default no."""
    # Its default is not written, so that recipes without it keep their digests.
    cyclic_learning_rate: bool = Field(default=False, exclude_if=lambda is_cyclic: not is_cyclic)
    """Go down to the lowest rate before each mask update of the ramp, and begin anew there."""
    weight_decay: Weight = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped at this norm."""
    dropout: Fraction | None = None
    """Dropout while training; by default the model's own."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Numbers of the forward and backward pass."""
    group_by_length: bool = False
    """Batch examples of similar length: less padding, less random."""
    sparse_kernels: Literal["auto"] | bool | None = None
    """Compute live weights only, on a CPU: "auto" where that is faster; by default no."""
    gradient_checkpointing: bool = Field(default=False, exclude_if=lambda is_on: not is_on)
    """Compute layers again going back instead of keeping them: less memory, more time."""

    @field_validator("rewind_learning_rate", "sparse_kernels")
    @classmethod
    def _shortest(cls, value: bool | str | None) -> bool | str | None:
        return value or None  # so that recipes of before this key keep their digest

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch = {self.micro_batch}: must divide batch = {self.batch}")
        return self


class Selection(Section):
    """Keep the best model by the task's first metric, and stop early. Evaluations before the last
    mask update or before quantization starts don't count.
    """

    holdout: Fraction = 0.0
    """Choose on this share of the training examples instead of the validation split."""
    every_steps: Interval | None = None
    """Steps between evaluations, or their share of the run; by default one epoch."""
    patience: Count | None = None
    """Stop after this many evaluations without a new best one; by default never."""


class Sweep(Section):
    """Fine-tune once for each value, and compare."""

    learning_rate: tuple[Positive, ...] = Field(min_length=1)
    """The learning rates to compare."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.learning_rate)) < len(self.learning_rate):
            raise ValueError(f"learning_rate = {list(self.learning_rate)}: a value stands twice")
        return self


class Distillation(Teacher):
    """A fine-tuned dense teacher; loss = hard_weight * task + soft_weight * T^2 * KL(teacher ||
    student) + hidden_weight * MSE of hidden states.
    """

    cache: bool = True
    """Compute the teacher's logits once; not with `hidden_weight`, whose states are too many."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.soft_weight or self.hidden_weight):
            raise ValueError("soft_weight and hidden_weight are both 0: nothing is distilled")
        return self


class Quantization(Section):
    """8-bit quantization-aware training of all linear layers of the encoder and of what else is
    masked.
    """

    bits: Literal[8] = 8
    """Bits of weights and activations."""
    start: Fraction = 0.0
    """Share of all steps that only observe ranges, before training is in 8 bits."""
    freeze: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of all steps after which ranges no longer move; 1: never."""
    momentum: float = Field(default=0.05, gt=0.0, le=1.0)
    """How much a new micro-batch counts in the moving average."""
    ranges: Literal["moving-average", "percentile"] = "moving-average"
    """Ranges of activations: each batch's minimum and maximum, or its percentiles."""
    percentile: float | None = Field(default=None, gt=50.0, lt=100.0)
    """Cut off what is beyond it on either side, such as 99.99; only with "percentile"."""
    weights: Literal["channel", "tensor"] = "channel"
    """One scale for each output channel, or one for the tensor, as in Q8BERT."""
    embeddings: bool = False
    """Round the embedding tables too, one scale each."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.freeze < self.start:
            raise ValueError(
                f"freeze = {self.freeze}: must not be less than start = {self.start}; ranges "
                "move until training is in 8 bits"
            )
        if (self.ranges == "percentile") != (self.percentile is not None):
            raise ValueError(
                f"percentile = {self.percentile}: ranges = 'percentile' needs one, such as 99.99, "
                f"and no other does (ranges = {self.ranges!r})"
            )
        return self


class Rows(Section):
    """How often something is logged."""

    every_steps: Interval = 50
    """Steps between logged rows, or their share of the run."""


class Logging(Saving, Rows):  # keys of the last come first in digests
    """How often something is logged and saved, and where else metrics go."""


class FinetuneRecipe(Recipe):
    """One fine-tuning run."""

    name: Name
    """The run's name."""
    seed: Seed = 42
    """Decides data order, dropout and new weights."""
    model: Model
    task: Task
    training: Training
    selection: Selection | None = None
    sweep: Sweep | None = None
    distillation: Distillation | None = None
    pruning: Pruning | None = None
    quantization: Quantization | None = None
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pruning is not None and self.model.zeros == "held":
            raise ValueError("pruning: needs model.zeros = 'free'; held zeros never change")
        if self.training.sparse_kernels is True and not self.pruning and self.model.zeros == "free":
            what = "needs zeros that are held (model.zeros = 'held') or made ([pruning])"
            raise ValueError(f"training.sparse_kernels = true: {what}")
        check_rates(self.training, self.pruning)
        lowest = self.training.lowest_learning_rate
        if self.sweep and lowest and lowest >= (least := min(self.sweep.learning_rate)):
            what = f"must be below each of sweep.learning_rate, such as {least}"
            raise ValueError(f"training.lowest_learning_rate = {lowest}: {what}")
        if self.task.kind == "embedding":
            _check_embedding(self)
        if self.quantization is not None and self.training.gradient_checkpointing:
            what = "8 bits follow the ranges of each pass, and layers would be computed twice"
            raise ValueError(f"training.gradient_checkpointing = true: {what}")
        if self.quantization is not None and self.training.precision != "fp32":
            raise ValueError(
                f"training.precision = {self.training.precision!r}: 8 bits are trained in fp32; "
                "16-bit numbers can't tell their steps apart (opfa calibrate trains nothing: give "
                "it training.precision=fp32)"
            )
        return self

    def to_public_toml(self) -> str:
        """`to_toml` without anyone's directories, for a finished model's own directory."""
        return type(self).check(shortened(self.model_dump(mode="json"))).to_toml()

    def check_packages(self) -> None:
        """Raise `RunError` if a package is missing that this run needs."""
        self.task.check_packages()
        self.logging.check_packages()

    def check_steps(self, steps: int) -> None:
        """Raise `RecipeError` for what doesn't fit into a run of so many steps."""
        try:
            last_update = self.pruning.ramp(steps).last_update if self.pruning else 0
        except ValueError as error:
            raise RecipeError(str(error)) from None
        if last_update > steps:
            what = f"must not come after the end of training (step {steps})"
            raise RecipeError(f"pruning.schedule: the last mask update, {last_update}, {what}")
        if self.quantization is not None and steps < 2:
            raise RecipeError("quantization: needs 2 steps or more; the first one only observes")

    def learning_rate(self, steps: int) -> LearningRate:
        """The schedule that [training] describes, for a run of `steps` steps."""
        warmup = int(self.training.warmup * steps)
        return learning_rate(self.training, self.pruning, steps=steps, warmup_steps=warmup)


def recipe_of(model: str) -> FinetuneRecipe | None:
    """The recipe of fine-tuning that a run, its model or a release has; None without one."""
    path = recipe_beside(place_of(model))
    if path is None or "task" not in read_values(path):  # of pre-training
        return None
    return FinetuneRecipe.read(path)


def _check_embedding(recipe: FinetuneRecipe) -> None:
    """What the loss of embeddings asks of the rest of a recipe."""
    task, training, teacher = recipe.task, recipe.training, recipe.distillation
    loss, micro_batch = task.loss or "cosent", training.micro_batch or training.batch
    if loss in WHOLE_BATCH and micro_batch != training.batch:
        what = f"task.loss = {loss!r} compares all examples of a batch ({training.batch}) at once"
        raise ValueError(f"training.micro_batch = {micro_batch}: {what}; leave it out")
    if loss in WHOLE_BATCH and training.batch < 2:
        what = "compares examples with the others of their batch; give 2 or more"
        raise ValueError(f"training.batch = {training.batch}: task.loss = {loss!r} {what}")
    if loss == "teacher" and (teacher is None or teacher.hard_weight):
        found = "there is none" if teacher is None else f"hard_weight = {teacher.hard_weight}"
        what = "needs [distillation] with hard_weight = 0, as nothing else is learnt"
        raise ValueError(f"task.loss = 'teacher': {what} ({found})")
    has_holdout = recipe.selection is not None and recipe.selection.holdout > 0
    if has_holdout and task.train_form != task.validation_form:
        what = f"training examples are {task.train_form}, and {task.metrics[0]} needs"
        raise ValueError(f"selection.holdout: {what} {task.validation_form}")
