"""What a fine-tuning recipe can say: model, task, training, and optionally how the best model is
chosen, a sweep, a teacher, pruning and 8 bits.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from opfa.compression.pattern import Pattern
from opfa.compression.schedules import Gradual, LearningRate
from opfa.recipe import Batch, Name, Recipe, Section, Seed
from opfa.tasks.recipe import Task


class Model(Section):
    """Where fine-tuning starts: a directory or a Hub name, and whether its zeros are held.

    `zeros = "held"` refuses a model that has none; `"free"` is for dense models.
    """

    init: str
    tokenizer: str | None = None  # default: the model's own
    zeros: Literal["held", "free"] = "held"


class Training(Section):
    """Optimization: AdamW, linear warm-up and decay, no weight decay for biases and norms.

    `rewind_learning_rate` sets the decay back to its beginning at each mask update of the ramp.
    """

    epochs: float = Field(default=3.0, gt=0.0, le=1e6)
    batch: Batch = 32
    micro_batch: int | None = Field(default=None, ge=1)  # default: the whole batch in one pass
    learning_rate: float = Field(gt=0.0)
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)  # fraction of all steps
    rewind_learning_rate: bool | None = None  # default: no
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)  # default: the model's own
    precision: Literal["fp32", "bf16"] = "fp32"
    group_by_length: bool = False  # examples of similar length together: less padding, less random

    @field_validator("rewind_learning_rate")
    @classmethod
    def _shortest(cls, value: bool | None) -> bool | None:
        return value or None  # so that recipes of before this key keep their digest

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch = {self.micro_batch}: must divide batch = {self.batch}")
        return self


class Selection(Section):
    """Keep the best model, not the last one, and stop early.

    Chosen by the task's first metric, on the validation split or, with `holdout`, on that fraction
    of the training examples, so that the validation split is looked at only once. Evaluations
    before the last mask update or before the start of quantization don't count.
    """

    holdout: float = Field(default=0.0, ge=0.0, lt=1.0)
    every_steps: int | None = Field(default=None, ge=1)  # default: once an epoch
    patience: int | None = Field(default=None, ge=1)  # stop after so many without a new best


class Sweep(Section):
    """Fine-tune once for each value, and compare."""

    learning_rate: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.learning_rate)) < len(self.learning_rate):
            raise ValueError(f"learning_rate = {list(self.learning_rate)}: a value stands twice")
        return self


class Distillation(Section):
    """A fine-tuned dense teacher; loss = hard_weight * task + soft_weight * T^2 * KL(teacher ||
    student) + hidden_weight * squared distance of hidden states.

    The teacher's logits are computed once and kept (`cache`), unless its hidden states are wanted
    too, which are too many.
    """

    teacher: str
    hard_weight: float = Field(default=0.5, ge=0.0)
    soft_weight: float = Field(default=0.5, ge=0.0)
    hidden_weight: float = Field(default=0.0, ge=0.0)
    temperature: float = Field(default=2.0, gt=0.0)
    cache: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.soft_weight or self.hidden_weight):
            raise ValueError("soft_weight and hidden_weight are both 0: nothing is distilled")
        return self


class Pruning(Section):
    """Pruning during fine-tuning, as a baseline for sparse upstream models.

    `start == end` is one-shot; `initial` is the sparsity of a ramp's first update. After
    `hold_until`, or else after `end`, the masks stay as they are.
    """

    schedule: Gradual
    pattern: Pattern = Pattern()


class Quantization(Section):
    """8-bit quantization-aware training of all linear layers of the encoder, sparse or dense, and
    of what else is masked.

    Activations: `ranges = "moving-average"` follows the minimum and maximum of each batch,
    `"percentile"` cuts off what lies beyond `percentile` on either side. The first `start` fraction
    of all steps only observes; after the `freeze` fraction ranges no longer move. Weights have one
    scale for each output channel or one for the tensor (as in Q8BERT); `embeddings` rounds the
    embedding tables too, one scale each.
    """

    bits: Literal[8] = 8
    start: float = Field(default=0.0, ge=0.0, lt=1.0)
    freeze: float = Field(default=1.0, gt=0.0, le=1.0)  # 1: never
    momentum: float = Field(default=0.05, gt=0.0, le=1.0)  # how much a new micro-batch counts
    ranges: Literal["moving-average", "percentile"] = "moving-average"
    percentile: float | None = Field(default=None, gt=50.0, lt=100.0)  # such as 99.99
    weights: Literal["channel", "tensor"] = "channel"
    embeddings: bool = False

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


class Logging(Section):
    """How often a row is logged and a resume point saved, and where else metrics go."""

    every_steps: int = Field(default=50, ge=1)
    checkpoint_steps: int = Field(default=1_000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "opfa"


class FinetuneRecipe(Recipe):
    """One fine-tuning run."""

    name: Name
    seed: Seed = 42
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
        if self.training.rewind_learning_rate and self.pruning is None:
            raise ValueError(
                "training.rewind_learning_rate: needs [pruning], whose updates it follows"
            )
        if self.quantization is not None and self.training.precision != "fp32":
            raise ValueError(
                f"training.precision = {self.training.precision!r}: 8 bits are trained in fp32; "
                "16-bit numbers can't tell their steps apart (opfa calibrate trains nothing: give "
                "it training.precision=fp32)"
            )
        return self

    def learning_rate(self, steps: int) -> LearningRate:
        """The schedule that the training section describes for so many steps."""
        training, pruning = self.training, self.pruning
        rewinds = pruning is not None and training.rewind_learning_rate
        return LearningRate(
            peak=training.learning_rate,
            warmup_steps=int(training.warmup * steps),
            steps=steps,
            rewind_at=pruning.schedule if rewinds and pruning else None,
        )
