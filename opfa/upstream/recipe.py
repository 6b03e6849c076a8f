"""What an upstream recipe can say: corpus, model, training, and a student's teacher and pruning."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from opfa.compression.schedules import Gradual, Interval, LearningRate, Moment, in_steps
from opfa.errors import RecipeError
from opfa.extras import require
from opfa.recipe import Batch, Count, Fraction, Name, Positive, Recipe, Section, Seed, Steps, Weight
from opfa.training.sections import Pruning, Saving, Teacher, check_rates, learning_rate
from opfa.training.zero import DeepSpeedFile

TOKENIZERS = {"tokenizer", "train_tokenizer"}
LAYERS = ("num_hidden_layers", "n_layers")  # as a transformers configuration says it
MOST_LAYERS = 1_000  # each is made, also where a model is only planned


class TokenizerTraining(Section):
    """A WordPiece tokenizer trained on the corpus."""

    vocabulary: int = Field(default=30_522, ge=100, le=1 << 24)
    """Entries of the vocabulary."""
    lowercase: bool = True
    """Make all text lower case and strip accents."""
    min_frequency: Count = 2
    """How often a piece must occur to become an entry."""


class Corpus(Section):
    """Documents, and the examples that `opfa prepare` makes of them. Give either `documents` or
    `hub`, and at most one of `tokenizer` and `train_tokenizer`.
    """

    documents: tuple[str, ...] = ()
    """Files or glob patterns (.jsonl, .json, .csv, .tsv, .txt, .parquet; also .gz, .zst)."""
    hub: str | None = None
    """A data set of the Hub, in place of `documents`."""
    hub_config: str | None = None
    """The data set's configuration."""
    hub_split: str = "train"
    """The data set's split."""
    text_column: str = "text"
    """The column that holds the text; in a .txt file documents are parted by empty lines."""
    objective: Literal["mlm+nsp", "mlm"] = "mlm+nsp"
    """Masked tokens with next-sentence pairs as in BERT, or masked tokens in packed sequences."""
    sequence_tokens: int = Field(default=128, ge=8, le=1 << 20)
    """Length of an example in tokens, special ones included."""
    short_sequences: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of documents whose pairs are cut shorter, as in BERT."""
    validation: float = Field(default=0.005, gt=0.0, lt=0.5)
    """Share of documents held out."""
    tokenizer: str | None = None
    """A tokenizer: a directory or a Hub name; by default that of `model.init`."""
    train_tokenizer: TokenizerTraining | None = None
    """Train a tokenizer instead."""
    bad_records: Literal["stop", "skip"] = "stop"
    """Stop at a bad record, or skip it and list it in DIR/skipped.txt."""
    seed: Seed = 42
    """Decides pairs and the held-out documents."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.documents) == bool(self.hub):
            raise ValueError("documents, hub: give exactly one of the two")
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError("tokenizer, train_tokenizer: give exactly one of the two")
        return self


class Model(Section):
    """Where training starts. Give either `init` or `config`."""

    init: str | None = None
    """A pre-trained model: a directory or a Hub name."""
    config: dict[str, str | int | float | bool] | None = None
    """A transformers configuration, to train from scratch; must name its `model_type`."""

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
    """Dynamic masking: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay."""

    probability: Fraction = 0.15
    """Share of tokens to predict; 0 is clean text, for students that learn hidden states alone."""
    whole_word: bool = False
    """Choose whole words."""


class Training(Section):
    """Optimization: AdamW, linear warm-up and decay, no weight decay for biases and norms."""

    steps: Steps
    """Optimizer steps."""
    batch: Batch
    """Sequences per step, over all micro-batches and ranks."""
    learning_rate: Positive
    """The highest learning rate."""
    lowest_learning_rate: Positive | None = None
    """Where the decay of the learning rate ends; by default at zero."""
    warmup_steps: Moment = 0
    """Steps of linear warm-up, or their share of the run."""
    rewind_learning_rate: bool = False
    """Set the decay back to its beginning at each mask update of the ramp."""
    # Its default is not written, so that recipes without it keep their digests.
    cyclic_learning_rate: bool = Field(default=False, exclude_if=lambda is_cyclic: not is_cyclic)
    """Go down to the lowest rate before each mask update of the ramp, and begin anew there."""
    weight_decay: Weight = 0.01
    """AdamW's weight decay."""
    beta1: Fraction = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: Fraction = 0.999
    """AdamW's decay of the mean squared gradient."""
    epsilon: Positive = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped at this norm."""
    dropout: Fraction | None = None
    """Dropout while training; by default the model's own."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Numbers of the forward and backward pass; the optimizer keeps fp32 weights."""
    sparse_kernels: Literal["auto"] | bool | None = None
    """Compute live weights only, on a CPU: "auto" where that is faster; by default no."""
    gradient_checkpointing: bool = Field(default=False, exclude_if=lambda is_on: not is_on)
    """Compute layers again going back instead of keeping them: less memory, more time."""

    @field_validator("sparse_kernels")
    @classmethod
    def _shortest(cls, value: bool | str | None) -> bool | str | None:
        return value or None  # so that recipes of before this key keep their digest


class Distillation(Teacher):
    """A frozen teacher; loss = hard_weight * CE + soft_weight * T^2 * KL(teacher || student) +
    hidden_weight * MSE of hidden states.
    """

    tokens: Literal["all", "masked"] = "all"
    """Distil at all real tokens, or only at masked ones."""

    @property
    def is_of_states_alone(self) -> bool:
        """Whether only hidden states are learnt, and nothing that a head says."""
        return self.hidden_weight > 0 and self.hard_weight + self.soft_weight == 0


class Launch(Section):
    """Matters of the machine, which change the result by rounding at most. Shipped recipes leave
    them out.
    """

    micro_batch: Count | None = None
    """Sequences per rank and pass; by default all at once."""
    deepspeed: str | None = None
    """A DeepSpeed configuration, such as launch/zero3.json; default: ZeRO 2, alone ZeRO 1."""
    compile: bool = False
    """Run the models through torch.compile; slower on CPUs."""
    workers: int = Field(default=0, ge=0, le=1_024)
    """Processes that load data ahead; 0: a thread does it."""
    timeout_seconds: float = Field(default=300.0, gt=0.0, le=1e7)
    """A rank that hangs longer ends the job."""


class Evaluating(Section):
    """How often something is logged and evaluated."""

    every_steps: Interval = 100
    """Steps between logged rows, or their share of the run."""
    evaluate_steps: Interval = 5_000
    """Steps between evaluations of the held-out loss, or their share of the run."""
    evaluate_examples: Count = 512
    """Held-out examples that are evaluated."""


class Logging(Saving, Evaluating):  # keys of the last come first in digests
    """How often something is logged, evaluated and saved, and where else metrics go."""


class PretrainRecipe(Recipe):
    """One upstream run. Without [pruning] it prepares a teacher."""

    name: Name
    """The run's name."""
    seed: Seed = 42
    """Decides data order, masking, dropout and new weights."""
    data: str = "prepared"
    """The directory that `opfa prepare` wrote."""
    corpus: Corpus
    model: Model
    masking: Masking = Masking()
    training: Training
    pruning: Pruning | None = None
    distillation: Distillation | None = None
    launch: Launch = Launch()
    logging: Logging = Logging()

    @classmethod
    def check(cls, values: Mapping[str, Any], where: str = "recipe") -> Self:
        """Make a recipe from plain values. The tokenizer is that of `model.init` unless it says."""
        corpus, model = values.get("corpus"), values.get("model")
        init = model.get("init") if isinstance(model, Mapping) else None
        if isinstance(corpus, Mapping) and init and not corpus.keys() & TOKENIZERS:
            values = {**values, "corpus": {**corpus, "tokenizer": init}}
        return super().check(values, where)

    @model_validator(mode="after")
    def _check(self) -> Self:
        steps, ramp = self.training.steps, self.ramp()
        check_rates(self.training, self.pruning)
        warmup = self.training.warmup_steps
        if in_steps(warmup, steps) >= steps:
            raise ValueError(f"training.warmup_steps = {warmup}: must be below steps = {steps}")
        if ramp is not None and ramp.last_update > steps:
            raise ValueError(
                f"pruning.schedule: the last mask update, {ramp.last_update}, "
                f"must not come after training.steps = {steps}"
            )
        if self.masking.probability == 0 and self.metric != "hidden_loss":
            raise ValueError(_masks_nothing(self.distillation))
        return self

    def check_packages(self) -> None:
        """Raise `RunError` if a package is missing that this run needs."""
        require("pre-training", "opfa[pretrain]", "deepspeed", "datasets", "nupunkt")
        self.logging.check_packages()

    def deepspeed_file(self, processes: int) -> DeepSpeedFile:
        """Read the DeepSpeed file and check that it suits this recipe; raises `RecipeError`."""
        file = DeepSpeedFile.load(self.launch.deepspeed, processes)
        where = f"launch.deepspeed = {self.launch.deepspeed!r}"
        if self.training.precision != "fp32" and file.stage == 0:
            raise RecipeError(
                f"{where}: stage 0 not with {self.training.precision}, where DeepSpeed's fp32 "
                "masters can't be read and it steps the optimizer before any training; use 1, 2 "
                "or 3"
            )
        if self.launch.compile and file.stage == 3:
            raise RecipeError(
                f"launch.compile = true: not with stage 3 ({where}), which gathers weights in the "
                "middle of the model"
            )
        return file

    @property
    def metric(self) -> Literal["mlm_loss", "hidden_loss"]:
        """The loss to judge a run by: masked tokens', unless only hidden states are learnt."""
        settings = self.distillation
        return "hidden_loss" if settings and settings.is_of_states_alone else "mlm_loss"

    def ramp(self) -> Gradual | None:
        """The schedule of [pruning] in steps; None without that section."""
        return self.pruning.ramp(self.training.steps) if self.pruning else None

    def learning_rate(self) -> LearningRate:
        """The schedule that the training section describes."""
        steps = self.training.steps
        warmup = in_steps(self.training.warmup_steps, steps)
        return learning_rate(self.training, self.pruning, steps=steps, warmup_steps=warmup)


def _masks_nothing(found: Distillation | None) -> str:
    keys = ("hard_weight", "soft_weight", "hidden_weight") if found else ()
    given = ", ".join(f"distillation.{key} = {getattr(found, key)}" for key in keys)
    given = given or "there is no [distillation]"
    return (
        "masking.probability = 0: no token is masked, so only hidden states can be learnt: "
        f"distillation.hard_weight = 0, soft_weight = 0 and hidden_weight above 0; here {given}"
    )
