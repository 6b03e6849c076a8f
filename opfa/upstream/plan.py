"""What a launch will need, on paper: memory of each GPU, bytes on the wire, and how much of the
time goes into waiting for them.

Formulas and where they are from; P parameters, N GPUs, W bytes of a working weight (2, in fp32 4):

    state       W P weights, 4 P gradients (summed in fp32), 12 P master and Adam's two moments;
                stage 1 divides the last by N, stage 2 the last two, stage 3 all three
                (ZeRO, Rajbhandari et al. 2020, section 5)
    masks       1 byte and a masked copy of W bytes for each pruned weight, on every GPU
    teacher     W bytes for each of its parameters, on every GPU
    activations tokens x layers x (18 hidden + 4 intermediate) bytes in 16 bits, twice that in fp32
                (Korthikanti et al. 2022, equation 1, without the attention scores, which fused
                attention doesn't keep), and five fp32 chunks of logits
    wire        of one GPU in one step, rings of (N - 1) / N; gradients in fp32, reduced once a step
                (stages 0 and 1) or after every micro-batch (2 and 3); weights gathered once a step
                (1, 2) or twice a micro-batch (3); a mask update sums 768 KiB of histograms a tensor
                and one byte a pruned weight
    compute     6 operations for each weight in a product and token, 2 for the teacher's

Time on the wire is counted as if nothing overlapped, so the efficiency is a floor.
"""

from dataclasses import dataclass
from typing import Any

from opfa.compression.distill import rows_of_a_chunk
from opfa.errors import ModelError, RecipeError
from opfa.models.configs import load_config, new_config
from opfa.models.pretraining import pretraining_skeleton
from opfa.upstream.recipe import PretrainRecipe

HISTOGRAMS = 8 * ((1 << 15) + (1 << 16))  # bytes that a mask update sums for one tensor
FREE = 0.1  # share of a GPU's memory that is left to the allocator and the libraries
CONFIGURATIONS = {"zero0": 0, "zero1": 1, "zero2": 2, "zero2-offload": 2, "zero3": 3}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that the formulas need."""

    parameters: int
    pruned: int  # weights
    pruned_tensors: int
    teacher: int  # parameters; 0 without one
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    tokens: int  # of a sequence
    predicted: float  # share of tokens that the vocabulary projection runs over
    precision: str

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
        config = new_config(values) if values is not None else load_config(str(recipe.model.init))
    except ModelError as error:
        raise ModelError(
            f"{error}; to plan without it give its shape: model.init= "
            "'model.config={model_type=\"bert\"}'"
        ) from error
    model = pretraining_skeleton(config, objective)
    parameters = sum(p.numel() for p in model.parameters())
    teacher = 0
    if distillation is not None:
        try:
            skeleton = pretraining_skeleton(load_config(distillation.teacher), objective)
            teacher = sum(p.numel() for p in skeleton.parameters())
        except ModelError:
            teacher = parameters
    pruned = list(recipe.pruning.pattern.layers(model).values()) if recipe.pruning else []
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    predicted = recipe.masking.probability
    if distillation is not None and distillation.tokens == "all":
        predicted = 1.0
    if recipe.metric == "hidden_loss":
        predicted = 0.0
    return Shape(
        parameters=parameters,
        pruned=sum(layer.weight.numel() for layer in pruned),
        pruned_tensors=len(pruned),
        teacher=teacher,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=intermediate,
        vocabulary=config.vocab_size,
        tokens=recipe.corpus.sequence_tokens,
        predicted=predicted,
        precision=recipe.training.precision,
    )


def memory_bytes(
    shape: Shape, *, stage: int, gpus: int, micro_batch: int, is_offloaded: bool = False
) -> dict[str, float]:
    """Bytes on each GPU, by what they are for."""
    size, width = shape.parameters, shape.width
    optimizer = 0.0 if is_offloaded else 12 * size / (gpus if stage >= 1 else 1)
    tokens = micro_batch * shape.tokens
    activations = tokens * shape.layers * (18 * shape.hidden + 4 * shape.intermediate)
    chunk = rows_of_a_chunk(tokens, shape.hidden, shape.vocabulary) * shape.vocabulary
    loss = (2 * shape.width + 5 * 4) * chunk + (4 + shape.width) * shape.vocabulary * shape.hidden
    return {
        "weights": width * size / (gpus if stage >= 3 else 1),
        "gradients": 4 * size / (gpus if stage >= 2 else 1),
        "optimizer": optimizer,
        "masks": (1 + width) * shape.pruned,
        "teacher": width * shape.teacher,
        "activations": activations * width / 2 + loss,
    }


def wire_bytes(shape: Shape, *, stage: int, gpus: int, accumulation: int) -> float:
    """Bytes that each GPU sends in one step, without mask updates."""
    share = (gpus - 1) / gpus
    gradients, weights = 4 * shape.parameters * share, shape.width * shape.parameters * share
    if stage == 0:
        return 2 * gradients
    if stage == 1:
        return gradients + weights
    if stage == 2:
        return accumulation * gradients + weights
    return accumulation * (gradients + 2 * weights)


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
    return batch * shape.tokens * (6 * products(shape.parameters) + 2 * teacher)


def plan(
    recipe: PretrainRecipe,
    *,
    gpus: int,
    memory_gb: float,
    bandwidth_gbps: float,
    teraflops: float,
) -> dict[str, Any]:
    """Every configuration of launch/ on this many GPUs, and which one to use.

    `bandwidth_gbps` is Gbit/s of each GPU to the others, `teraflops` what a GPU sustains. The
    recommended one is the fastest that fits, with the largest micro-batch that does. Raises
    `RecipeError` for more GPUs than the global batch can feed.
    """
    batch = recipe.training.batch
    if batch % gpus:
        possible = [n for n in range(1, batch + 1) if batch % n == 0]
        near = sorted(possible, key=lambda n: abs(n - gpus))[:2]
        raise RecipeError(
            f"--gpus {gpus}: must divide training.batch = {batch}, which defines the result; near "
            f"are {' and '.join(str(n) for n in sorted(near))}, or take a recipe of another batch"
        )
    shape = shape_of(recipe)
    every = recipe.pruning.schedule.every if recipe.pruning else 0
    rows = []
    for name, stage in CONFIGURATIONS.items():
        if stage == 0 and shape.precision != "fp32":
            continue
        chosen = {"stage": stage, "gpus": gpus}
        micro_batch = _largest_micro_batch(shape, batch // gpus, memory_gb, name, **chosen)
        memory = memory_bytes(
            shape, micro_batch=micro_batch or 1, is_offloaded="offload" in name, **chosen
        )
        accumulation = batch // gpus // (micro_batch or 1)
        wire = wire_bytes(shape, accumulation=accumulation, **chosen)
        masks = mask_update_bytes(shape, **chosen) / every if every else 0.0
        compute = operations(shape, batch) / (gpus * teraflops * 1e12)
        waiting = 8 * (wire + masks) / (bandwidth_gbps * 1e9)
        if "offload" in name:  # gradients to the host and weights back, over PCI Express 4
            waiting += (4 + shape.width) * shape.parameters / gpus / 25e9
        rows.append(
            {
                "configuration": name,
                "micro_batch": micro_batch,
                "accumulation": accumulation,
                "memory_gb": {key: value / 1e9 for key, value in memory.items()},
                "total_memory_gb": sum(memory.values()) / 1e9,
                "wire_gb_per_step": (wire + masks) / 1e9,
                "mask_updates_share_of_wire": masks / (wire + masks) if wire else 0.0,
                "seconds_per_step": compute + waiting,
                "efficiency": compute / (compute + waiting),
            }
        )
    fitting = [row for row in rows if row["micro_batch"]]
    best = min(fitting, key=lambda row: row["seconds_per_step"], default=None)
    return {
        "model": {"parameters": shape.parameters, "pruned": shape.pruned, "teacher": shape.teacher},
        "gpus": gpus,
        "batch": batch,
        "days": best["seconds_per_step"] * recipe.training.steps / 86400 if best else None,
        "configurations": rows,
        "recommended": best["configuration"] if best else None,
    }


def _largest_micro_batch(
    shape: Shape, share: int, memory_gb: float, name: str, *, stage: int, gpus: int
) -> int | None:
    """The largest divisor of a GPU's share of the batch that fits its memory."""
    for micro_batch in range(share, 0, -1):
        memory = memory_bytes(
            shape,
            stage=stage,
            gpus=gpus,
            micro_batch=micro_batch,
            is_offloaded="offload" in name,
        )
        if share % micro_batch == 0 and sum(memory.values()) <= (1 - FREE) * memory_gb * 1e9:
            return micro_batch
    return None
