"""What an upstream recipe can say: corpus, model, training, and for a student its teacher and
pruning.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from opfa.compression.pattern import Pattern
from opfa.compression.schedules import Gradual, LearningRate
from opfa.recipe import Batch, Name, Recipe, Section, Seed, Steps
from opfa.training.zero import DeepSpeedFile

LAYERS = ("num_hidden_layers", "n_layers")  # as a transformers configuration says it
MOST_LAYERS = 1_000  # each is made, also where a model is only planned


class TokenizerTraining(Section):
    """A WordPiece tokenizer trained on the corpus."""

    vocabulary: int = Field(default=30_522, ge=100, le=1 << 24)
    lowercase: bool = True
    min_frequency: int = Field(default=2, ge=1)


class Corpus(Section):
    """Documents, and the examples that `opfa prepare` makes of them.

    `documents` are files or glob patterns (.jsonl, .txt, .parquet, also .gz or .zst); a text file
    holds documents parted by empty lines. `hub` names a data set of the Hub instead. Give
    `tokenizer` (directory or Hub name) or train one.
    """

    documents: tuple[str, ...] = ()
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str = "train"
    text_column: str = "text"
    objective: Literal["mlm+nsp", "mlm"] = "mlm+nsp"
    sequence_tokens: int = Field(default=128, ge=8, le=1 << 20)
    short_sequences: float = Field(
        default=0.1, ge=0.0, le=1.0
    )  # share of pairs cut shorter, as in BERT
    validation: float = Field(default=0.005, gt=0.0, lt=0.5)  # share of documents held out
    tokenizer: str | None = None
    train_tokenizer: TokenizerTraining | None = None
    bad_records: Literal["stop", "skip"] = "stop"  # skipped ones are listed in DIR/skipped.txt
    seed: Seed = 42

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.documents) == bool(self.hub):
            raise ValueError("documents, hub: give exactly one of the two")
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError("tokenizer, train_tokenizer: give exactly one of the two")
        return self


class Model(Section):
    """Where training starts: `init` (a directory or Hub name), or from scratch by a transformers
    `config`.
    """

    init: str | None = None
    config: dict[str, str | int | float | bool] | None = None  # must name its model_type

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.init is None) == (self.config is None):
            raise ValueError("init, config: give exactly one of the two")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config: needs model_type, such as 'bert'")
        for key in LAYERS:
            layers = (self.config or {}).get(key, 1)
            if isinstance(layers, int) and layers > MOST_LAYERS:
                raise ValueError(f"config.{key} = {layers}: must be at most {MOST_LAYERS:,}")
        return self


class Masking(Section):
    """Dynamic masking: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    `probability = 0` is clean text, for students that learn hidden states alone.
    """

    probability: float = Field(default=0.15, ge=0.0, lt=1.0)
    whole_word: bool = False


class Training(Section):
    """Optimization: AdamW, linear warm-up and decay, no weight decay for biases and norms."""

    steps: Steps
    batch: Batch  # sequences per optimizer step, over all micro-batches and ranks
    learning_rate: float = Field(gt=0.0)
    warmup_steps: int = Field(default=0, ge=0)
    rewind_learning_rate: bool = False
    weight_decay: float = Field(default=0.01, ge=0.0)
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    epsilon: float = Field(default=1e-8, gt=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)  # default: the model's own
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"


class Pruning(Section):
    """Gradual magnitude pruning: when and how sparse, and where."""

    schedule: Gradual
    pattern: Pattern = Pattern()


class Distillation(Section):
    """A frozen teacher. loss = hard_weight * CE + soft_weight * T^2 * KL(teacher || student) +
    hidden_weight * MSE.

    `tokens`: soft targets at all real tokens, or only at masked ones. `hidden_weight` > 0 also
    matches every hidden state.
    """

    teacher: str
    hard_weight: float = Field(default=0.5, ge=0.0)
    soft_weight: float = Field(default=0.5, ge=0.0)
    hidden_weight: float = Field(default=0.0, ge=0.0)
    temperature: float = Field(default=2.0, gt=0.0)
    tokens: Literal["all", "masked"] = "all"

    @property
    def is_of_states_alone(self) -> bool:
        """Whether only hidden states are learnt, and nothing that a head says."""
        return self.hidden_weight > 0 and self.hard_weight + self.soft_weight == 0


class Launch(Section):
    """Matters of the machine, which don't change the result beyond rounding.

    Shipped recipes leave them out. `deepspeed` is a DeepSpeed configuration file, such as
    launch/zero3.json, which says how state is shared out; without one it is ZeRO 2, and ZeRO 1 for
    one process. `compile` runs the models through torch.compile: slower on CPUs, not tried on GPUs
    yet.
    """

    micro_batch: int | None = Field(
        default=None, ge=1
    )  # sequences per rank and pass; default: all at once
    deepspeed: str | None = None
    compile: bool = False
    workers: int = Field(
        default=0, ge=0, le=1_024
    )  # processes that load data ahead; 0: a thread does
    timeout_seconds: float = Field(
        default=300.0, gt=0.0, le=1e7
    )  # a rank that hangs longer ends the job

    def deepspeed_file(self, processes: int = 1) -> DeepSpeedFile:
        """What the configuration file says; raises `RecipeError`."""
        return DeepSpeedFile.load(self.deepspeed, processes)


class Logging(Section):
    """How often a row is logged, the held-out loss measured, and a resume point saved; where else
    metrics go.
    """

    every_steps: int = Field(default=100, ge=1)
    evaluate_steps: int = Field(default=5_000, ge=1)
    evaluate_examples: int = Field(default=512, ge=1)
    checkpoint_steps: int = Field(default=1_000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "opfa"


class PretrainRecipe(Recipe):
    """One upstream run. Without [pruning] it prepares a teacher."""

    name: Name
    seed: Seed = 42
    data: str = "prepared"  # the directory that `opfa prepare` wrote
    corpus: Corpus
    model: Model
    masking: Masking = Masking()
    training: Training
    pruning: Pruning | None = None
    distillation: Distillation | None = None
    launch: Launch = Launch()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.training.rewind_learning_rate and self.pruning is None:
            raise ValueError(
                "training.rewind_learning_rate: needs [pruning], whose updates it follows"
            )
        if self.training.warmup_steps >= self.training.steps:
            raise ValueError(
                f"training.warmup_steps = {self.training.warmup_steps}: "
                f"must be below steps = {self.training.steps}"
            )
        if self.pruning is not None and self.pruning.schedule.last_update > self.training.steps:
            raise ValueError(
                f"pruning.schedule: the last mask update, {self.pruning.schedule.last_update}, "
                f"must not come after training.steps = {self.training.steps}"
            )
        if self.masking.probability == 0 and self.metric != "hidden_loss":
            raise ValueError(_masks_nothing(self.distillation))
        stage = self.launch.deepspeed_file().stage
        if self.training.precision != "fp32" and stage == 0:
            raise ValueError(
                f"launch.deepspeed = {self.launch.deepspeed!r}: stage 0 not with "
                f"{self.training.precision}, where DeepSpeed's fp32 masters can't be read and it "
                "steps the optimizer before any training; use 1, 2 or 3"
            )
        if self.launch.compile and stage == 3:
            raise ValueError(
                f"launch.compile = true: not with stage 3 (launch.deepspeed = "
                f"{self.launch.deepspeed!r}), which gathers weights in the middle of the model"
            )
        return self

    @property
    def metric(self) -> Literal["mlm_loss", "hidden_loss"]:
        """The loss to judge a run by: masked tokens', unless only hidden states are learnt."""
        settings = self.distillation
        return "hidden_loss" if settings and settings.is_of_states_alone else "mlm_loss"

    def learning_rate(self) -> LearningRate:
        """The schedule that the training section describes."""
        rewinds = self.pruning is not None and self.training.rewind_learning_rate
        return LearningRate(
            peak=self.training.learning_rate,
            warmup_steps=self.training.warmup_steps,
            steps=self.training.steps,
            rewind_at=self.pruning.schedule if rewinds and self.pruning else None,
        )


def _masks_nothing(found: Distillation | None) -> str:
    keys = ("hard_weight", "soft_weight", "hidden_weight")
    given = "there is no [distillation]"
    if found is not None:
        given = ", ".join(f"distillation.{key} = {getattr(found, key)}" for key in keys)
    return (
        "masking.probability = 0: no token is masked, so only hidden states can be learnt: "
        f"distillation.hard_weight = 0, soft_weight = 0 and hidden_weight above 0; here {given}"
    )
