"""The sizes of a recipe's model, and what they ask for: memory, bytes on the wire, operations.

README.md has the formulas.
"""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from opfa.compression.distill import rows_of_a_chunk
from opfa.compression.measured import FromText
from opfa.compression.pattern import bind
from opfa.errors import ModelError, blaming
from opfa.models.configs import load_config, new_config
from opfa.models.pretraining import pretraining_skeleton
from opfa.training.zero import ZeroOptimization
from opfa.upstream.recipe import PretrainRecipe

HISTOGRAMS = 8 * ((1 << 15) + (1 << 16))  # bytes that a mask update sums for one tensor


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
    own = (8 if shape.again else 6) * products(shape.parameters)
    return batch * shape.tokens * (own + 2 * teacher)


def measuring_operations(shape: Shape) -> float:
    """Floating-point operations on each rank when scores are measured on text."""
    return operations(replace(shape, teacher=0, predicted=0.0, again=False), shape.measured)
