"""What a launch needs: memory of each GPU, bytes on the wire, time. README.md has the formulas."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from transformers import PretrainedConfig

from opfa.compression.distill import rows_of_a_chunk
from opfa.compression.measured import FromText
from opfa.compression.pattern import bind
from opfa.errors import ModelError, RecipeError, blaming
from opfa.models.configs import load_config, new_config
from opfa.models.pretraining import pretraining_skeleton
from opfa.report.tables import Result, Row, Table
from opfa.training.zero import OffloadOptimizer, ZeroOptimization
from opfa.upstream.recipe import PretrainRecipe

HISTOGRAMS = 8 * ((1 << 15) + (1 << 16))  # bytes that a mask update sums for one tensor
FREE = 0.1  # share of a GPU's memory that is left to the allocator and the libraries
FILES = {  # of launch/, as far as the formulas look at them
    "zero0": ZeroOptimization(stage=0),
    "zero1": ZeroOptimization(stage=1),
    "zero2": ZeroOptimization(stage=2),
    "zero2-offload": ZeroOptimization(stage=2, offload_optimizer=OffloadOptimizer()),
    "zero3": ZeroOptimization(stage=3),
}


class Configuration(Row):
    """What a launch needs with one DeepSpeed file. `micro_batch` is None where nothing fits."""

    configuration: str
    micro_batch: int | None
    accumulation: int
    memory_gb: dict[str, float]
    total_memory_gb: float
    wire_gb_per_step: float
    mask_updates_share_of_wire: float
    seconds_per_step: float
    efficiency: float

    def cells(self) -> list[str]:
        """Its line in a table."""
        memory = f"{self.total_memory_gb:.1f}"
        if self.micro_batch is None:
            return [self.configuration, "too large", memory, "", "", ""]
        wire = f"{self.wire_gb_per_step:.2f}", f"{self.mask_updates_share_of_wire:.2%}"
        batch = f"{self.micro_batch} x {self.accumulation}"
        return [self.configuration, batch, memory, *wire, f"{self.efficiency:.0%}"]


class Plan(Result):
    """All configurations, and the fastest one that fits, with the largest micro-batch that does."""

    model: dict[str, int]
    gpus: int
    batch: int
    days: float | None
    configurations: list[Configuration]
    recommended: str | None
    measured_sequences: int = 0  # of text, by scores, at a time
    measured_seconds: float = 0.0
    measured_times: int = 0  # in the whole run

    def parts(self, *, is_long: bool = False) -> Iterator[Table | str]:
        """The table, and what to use."""
        head = ("DeepSpeed file", "batch", "GB each", "GB/step sent", "of it masks", "efficiency")
        rows = [row.cells() for row in self.configurations]
        yield Table(head, rows, f"{self.gpus} GPU(s), global batch {self.batch}")
        if self.recommended is None or self.days is None:
            yield "no configuration fits; give more GPUs or more memory"
            return
        best = next(r for r in self.configurations if r.configuration == self.recommended)
        file = f"launch/{self.recommended}.json" if self.recommended in FILES else self.recommended
        yield f"use: launch.deepspeed={file} launch.micro_batch={best.micro_batch}"
        time = f"{self.days:.1f} days" if self.days >= 1 else f"{24 * self.days:.1f} hours"
        yield f"about {time}, if sending never overlaps with computing"
        if self.measured_sequences:
            what = f"scores are measured on {self.measured_sequences:,} sequences"
            seconds = f"about {self.measured_seconds:.0f} s on every GPU"
            yield f"{what}, {seconds} at a time, {self.measured_times:,} time(s)"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that the formulas need."""

    parameters: int
    pruned: int  # weights
    pruned_tensors: int
    kept: int  # fp32 values that scores keep
    measured: int  # sequences on which scores are measured at a time
    measuring: int  # fp32 values meanwhile, beside a copy of the weights
    teacher: int  # parameters; 0 without one
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    tokens: int  # of a sequence
    predicted: float  # share of tokens that the vocabulary projection runs over
    precision: str
    again: bool = False  # layers are computed again going back, from their inputs

    @property
    def width(self) -> int:
        """Bytes of a working weight."""
        return 4 if self.precision == "fp32" else 2


def shape_of(recipe: PretrainRecipe) -> Shape:
    """The sizes of a recipe's model, from its configuration alone; no weights are made or read.

    A teacher whose configuration can't be read counts as large as the student.
    """
    objective, distillation = recipe.corpus.objective, recipe.distillation
    values = recipe.model.config
    try:
        config = new_config(values) if values is not None else _config_of(str(recipe.model.init))
    except ModelError as error:
        shape = "model.init= 'model.config={model_type=\"bert\"}'"
        raise ModelError(f"{error}; to plan without it give its shape: {shape}") from error
    model = pretraining_skeleton(config, objective)
    parameters = sum(p.numel() for p in model.parameters())
    teacher = 0
    if distillation is not None:
        try:
            skeleton = pretraining_skeleton(load_config(distillation.teacher), objective)
            teacher = sum(p.numel() for p in skeleton.parameters())
        except ModelError:
            teacher = parameters
    bound = bind(model, recipe.pruning.patterns) if recipe.pruning else []
    sizes = [[layer.weight.numel() for layer in each.layers.values()] for each in bound]
    scores = [(each.pattern.score, sum(s)) for each, s in zip(bound, sizes, strict=True)]
    read = [(score, size) for score, size in scores if isinstance(score, FromText)]
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    is_everywhere = distillation is not None and distillation.tokens == "all"
    predicted = 1.0 if is_everywhere else recipe.masking.probability
    predicted = 0.0 if recipe.metric == "hidden_loss" else predicted
    return Shape(
        parameters=parameters,
        pruned=sum(map(sum, sizes)),
        pruned_tensors=sum(map(len, sizes)),
        kept=sum(score.kept * size for score, size in scores),
        measured=sum(score.sequences for score, _ in read),
        measuring=sum(score.values * size for score, size in read),
        teacher=teacher,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=intermediate,
        vocabulary=config.vocab_size,
        tokens=recipe.corpus.sequence_tokens,
        predicted=predicted,
        precision=recipe.training.precision,
        again=recipe.training.gradient_checkpointing,
    )


def _config_of(init: str) -> PretrainedConfig:
    with blaming("model.init", init):
        return load_config(init)


def memory_bytes(
    shape: Shape, zero: ZeroOptimization, *, gpus: int, micro_batch: int
) -> dict[str, float]:
    """Bytes on each GPU, by purpose."""
    size, width, stage = shape.parameters, shape.width, zero.stage
    tokens = micro_batch * shape.tokens
    activations = 18 * shape.hidden + 4 * shape.intermediate  # of a layer and a token
    activations += (shape.layers - 1) * (2 * shape.hidden if shape.again else activations)
    chunk = rows_of_a_chunk(tokens, shape.hidden, shape.vocabulary) * shape.vocabulary
    loss = (2 * width + 5 * 4) * chunk + (4 + width) * shape.vocabulary * shape.hidden
    measuring = 4 * (size + shape.measuring) if shape.measured else 0.0
    return {
        "weights": width * size / (gpus if stage >= 3 else 1),
        "gradients": 4 * size / (gpus if stage >= 2 else 1),
        "optimizer": 0.0 if zero.offload_optimizer else 12 * size / (gpus if stage >= 1 else 1),
        "masks": (1 + width) * shape.pruned,
        "scores": 4 * shape.kept / (gpus if stage >= 1 else 1) + measuring,
        "teacher": width * shape.teacher,
        "activations": tokens * activations * width / 2 + loss,
    }


def wire_bytes(shape: Shape, *, stage: int, gpus: int, accumulation: int) -> float:
    """Bytes that each GPU sends in one step, without mask updates."""
    share = (gpus - 1) / gpus
    gradients, weights = 4 * shape.parameters * share, shape.width * shape.parameters * share
    by_stage = (
        2 * gradients,
        gradients + weights,
        accumulation * gradients + weights,
        accumulation * (gradients + 2 * weights),
    )
    return by_stage[stage]


def mask_update_bytes(shape: Shape, *, stage: int, gpus: int) -> float:
    """Bytes that each GPU sends in one mask update; at stage 0 every rank scores everything."""
    if stage == 0:
        return 0.0
    return 2 * (gpus - 1) / gpus * (shape.pruned_tensors * HISTOGRAMS + shape.pruned)


def operations(shape: Shape, batch: int) -> float:
    """Floating-point operations of one step over the whole global batch."""
    embedding = shape.vocabulary * shape.hidden
    attention = 2 * shape.layers * shape.hidden * shape.tokens

    def products(parameters: int) -> float:
        return parameters - embedding + shape.predicted * embedding + attention

    teacher = products(shape.teacher) if shape.teacher else 0.0
    own = (6 + 2 * shape.again) * products(shape.parameters)
    return batch * shape.tokens * (own + 2 * teacher)


def measuring_operations(shape: Shape) -> float:
    """Floating-point operations on each rank when scores are measured on text."""
    return operations(replace(shape, teacher=0, predicted=0.0, again=False), shape.measured)


def plan(
    recipe: PretrainRecipe, *, gpus: int, memory_gb: float, bandwidth_gbps: float, teraflops: float
) -> Plan:
    """Plan with the recipe's DeepSpeed file, or with each file of launch/ if it names none.

    `bandwidth_gbps` is Gbit/s of each GPU to the others, `teraflops` what a GPU sustains. Raises
    `RecipeError` for more GPUs than the global batch can feed.
    """
    batch = recipe.training.batch
    if batch % gpus:
        possible = [n for n in range(1, batch + 1) if batch % n == 0]
        near = sorted(possible, key=lambda n: abs(n - gpus))[:2]
        raise RecipeError(
            f"--gpus {gpus}: must divide training.batch = {batch}, which defines the result; near "
            f"are {' and '.join(str(n) for n in sorted(near))}, or use a recipe of another batch"
        )
    shape, given, steps = shape_of(recipe), recipe.launch.deepspeed, recipe.training.steps
    own = given is not None and {given: recipe.deepspeed_file(gpus).zero_optimization}
    files: Mapping[str, ZeroOptimization] = own or FILES
    every = ramp.every if (ramp := recipe.ramp()) else 0
    times = recipe.pruning.measurements(steps) if recipe.pruning else 0
    speeds = {"bandwidth": bandwidth_gbps * 1e9 / 8, "rate": teraflops * 1e12}
    seconds = measuring_operations(shape) / speeds["rate"]
    rows = [
        _configuration(shape, name, zero, batch, gpus, memory_gb, every, **speeds)
        for name, zero in files.items()
        if zero.stage or shape.precision == "fp32"
    ]
    fitting = [row for row in rows if row.micro_batch]
    best = min(fitting, key=lambda row: row.seconds_per_step, default=None)
    return Plan(
        model={"parameters": shape.parameters, "pruned": shape.pruned, "teacher": shape.teacher},
        gpus=gpus,
        batch=batch,
        days=(best.seconds_per_step * steps + times * seconds) / 86400 if best else None,
        configurations=rows,
        recommended=best.configuration if best else None,
        measured_sequences=shape.measured,
        measured_seconds=seconds,
        measured_times=times,
    )


def _configuration(
    shape: Shape,
    name: str,
    zero: ZeroOptimization,
    batch: int,
    gpus: int,
    memory_gb: float,
    every: int,
    *,
    bandwidth: float,
    rate: float,
) -> Configuration:
    """`bandwidth` is bytes a second, `rate` operations a second; masks move each `every` steps."""
    share, most = batch // gpus, (1 - FREE) * memory_gb * 1e9
    memory = partial(memory_bytes, shape, zero, gpus=gpus)
    divisors = [n for n in range(share, 0, -1) if share % n == 0]
    micro_batch = next((n for n in divisors if sum(memory(micro_batch=n).values()) <= most), None)
    needed, accumulation = memory(micro_batch=micro_batch or 1), share // (micro_batch or 1)
    wire = wire_bytes(shape, stage=zero.stage, gpus=gpus, accumulation=accumulation)
    masks = every and mask_update_bytes(shape, stage=zero.stage, gpus=gpus) / every
    compute, waiting = operations(shape, batch) / (gpus * rate), (wire + masks) / bandwidth
    if zero.offload_optimizer:  # gradients to the host and weights back, over PCI Express 4
        waiting += (4 + shape.width) * shape.parameters / gpus / 25e9
    return Configuration(
        configuration=name,
        micro_batch=micro_batch,
        accumulation=accumulation,
        memory_gb={key: value / 1e9 for key, value in needed.items()},
        total_memory_gb=sum(needed.values()) / 1e9,
        wire_gb_per_step=(wire + masks) / 1e9,
        mask_updates_share_of_wire=masks / (wire + masks) if wire else 0.0,
        seconds_per_step=compute + waiting,
        efficiency=compute / (compute + waiting),
    )
