"""What a search recipe can say: a fine-tuning recipe, and what is searched for in its model."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from opfa.downstream.recipe import FinetuneRecipe
from opfa.extras import require
from opfa.recipe import Count, Fraction, Positive, Section

Aim = Literal["milliseconds", "macs", "bytes"]


class Space(Section):
    """What may go. Units are ordered by what they are worth, so a number says which stay."""

    heads: bool = True
    """Heads of each layer: all, ..., none."""
    neuron_steps: Annotated[int, Field(ge=0, le=256)] = 16
    """Steps from all neurons of a layer to none; 0: all of them stay."""
    layers: bool = True
    """Whole layers, each there or not."""
    # The defaults of these are not written, so that recipes without them keep their digests.
    zeros: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = Field(
        default=(), exclude_if=lambda zeros: not zeros
    )
    """Shares of zeros inside matrices, one for all of attention and one for all of the neurons."""
    eight_bits: bool = Field(default=False, exclude_if=lambda is_on: not is_on)
    """Whether a model may compute in 8 bits."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.heads or self.neuron_steps or self.layers or self.has_forms):
            what = "heads, neuron_steps, layers, zeros and eight_bits"
            raise ValueError(f"{what} are all off: nothing may differ")
        if len(set(self.zeros)) < len(self.zeros):
            raise ValueError(f"zeros = {list(self.zeros)}: a share stands twice")
        return self

    @property
    def has_forms(self) -> bool:
        """Whether matrices may have zeros or 8 bits."""
        return bool(self.zeros or self.eight_bits)


class Limits(Section):
    """What a model of the front must keep to. Costs are those that are predicted."""

    metric: Positive | None = None
    """At least so much of the first metric, on the examples that candidates are judged by."""
    milliseconds: Positive | None = None
    """At most so much time."""
    macs: Positive | None = None
    """At most so many multiply-adds."""
    bytes: Positive | None = None
    """At most so large a file: in fp32, or what zeros and 8 bits leave of it."""

    def of_costs(self) -> dict[str, float]:
        """The limits that costs have."""
        found = {
            "milliseconds": self.milliseconds,
            "macs": self.macs,
            "bytes": self.bytes,
        }
        return {aim: most for aim, most in found.items() if most is not None}


class Supernet(Section):
    """Fine-tuning of all candidates at once, before the search. Each step trains the largest, the
    smallest and random ones; those learn what the largest answers.
    """

    epochs: Positive = 0.5
    """Passes over the training examples."""
    learning_rate: Positive = 5e-5
    """The highest learning rate."""
    random: Annotated[int, Field(ge=0, le=16)] = 2
    """Random candidates of each step."""


class Point(Section):
    """One model of the space. With it nothing is searched: the model is made and trained on."""

    heads: tuple[Annotated[int, Field(ge=0)], ...]
    """Heads that each layer keeps."""
    neurons: tuple[Annotated[int, Field(ge=0)], ...]
    """Neurons that each layer keeps."""
    layers: tuple[bool, ...]
    """Which layers stay."""
    zeros: tuple[Fraction, Fraction] = Field(default=(0.0, 0.0), exclude_if=lambda z: not any(z))
    """Shares of zeros in the matrices of attention, and in those of neurons."""
    bits: Literal[8, 32] = Field(default=32, exclude_if=lambda bits: bits == 32)
    """In what the model computes: 8 bits, or fp32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({len(self.heads), len(self.neurons), len(self.layers)}) > 1:
            raise ValueError("heads, neurons and layers must be as many, one for each layer")
        if not any(self.layers):
            raise ValueError("layers: one or more must stay")
        return self


class Search(Section):
    """Models are cut out of `model.init`, judged on held-out examples, and bred (NSGA-II)."""

    evaluations: Count = 200
    """Models that are judged. None is judged twice."""
    sampler: Literal["nsga2", "random"] = "nsga2"
    """How the next ones are chosen; "random" is what to compare with."""
    population: Annotated[int, Field(ge=4, le=1000)] = 20
    """Models of a generation."""
    seeds: Annotated[int, Field(ge=0, le=1000)] = 10
    """Models to begin with that Fisher information chooses, under as many budgets."""
    even: bool = True
    """Begin with even models too, which keep 1/8, 2/8, ... of everything in each layer."""
    aims: tuple[Aim, ...] = ("milliseconds",)
    """What should be low while the task's first metric is high; one or two."""
    examples: Count = 2048
    """Training examples that say what units are worth, and that slices are fitted to."""
    held_out: Count = 1000
    """Training examples that candidates are judged by."""
    fresh: Count = 1000
    """More of them, by which only the models of the front are judged, at the end."""
    data: str | None = None
    """A file or split to take `held_out` and `fresh` from; by default the training examples."""
    batch: Count = 1
    """Sequences of the input that costs are of."""
    tokens: Count | None = None
    """Tokens of each; by default `task.sequence_tokens`."""
    threads: Count = 1
    """Threads that milliseconds are of."""
    engine: Literal["torch", "runtime"] = Field(
        default="torch", exclude_if=lambda engine: engine == "torch"
    )
    """What milliseconds are of: torch, or the CPU runtime of opfa, which skips zeros."""
    space: Space = Space()
    limits: Limits = Limits()
    supernet: Supernet | None = None
    point: Point | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 1 <= len(self.aims) <= 2 or len(set(self.aims)) < len(self.aims):
            raise ValueError(f"aims = {list(self.aims)}: give one or two of them")
        is_timed = "milliseconds" in self.aims or self.limits.milliseconds is not None
        if self.space.has_forms and is_timed and self.engine == "torch":
            what = "zeros and 8 bits save no time in torch"
            raise ValueError(f'engine = "torch": {what}; say engine = "runtime", or other aims')
        return self


class SearchRecipe(FinetuneRecipe):
    """A search: `model.init` is a fine-tuned model, and [training] is for what is taken."""

    search: Search

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if self.sweep is not None:
            raise ValueError("sweep: a search has no place for it; sweep what it has taken")
        space = self.search.space
        if space.eight_bits and self.training.precision != "fp32":
            what = f'training.precision = "{self.training.precision}"'
            raise ValueError(f"search.space.eight_bits: {what}: 8 bits are trained in fp32")
        if space.eight_bits and self.training.gradient_checkpointing:
            what = "training.gradient_checkpointing: not with 8 bits"
            raise ValueError(f"search.space.eight_bits: {what}")
        if zeros := space.zeros:
            what = f"search.space.zeros = {list(zeros)}"
            if self.model.zeros == "held":
                raise ValueError(f"{what}: needs model.zeros = 'free'; held zeros never change")
            if self.pruning is not None and self.pruning.parts:
                raise ValueError(f"{what}: makes parts of its own; leave pruning.parts out")
            least = 0.0 if self.pruning is None else self.pruning.schedule.initial
            if min(zeros) < least:
                raise ValueError(
                    f"{what}: pruning.schedule.initial = {least} is more than {min(zeros)}"
                )
        return self

    def check_packages(self) -> None:
        """Raise `RunError` if a package is missing that this search needs."""
        super().check_packages()
        require("opfa search", "opfa[search]", "optuna", "joblib")
