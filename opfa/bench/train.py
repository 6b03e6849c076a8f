"""Benchmark of upstream training: a recipe's step by part, and against the same step written
plainly.

    ours        the recipe as it is
    no teacher  without [distillation]
    dense       without [distillation] and [pruning]
    plain       transformers and autocast as one would write them (`opfa.bench.plain`)

Each runs alone in a process, one after the other and then all again. Ratios are of the fastest
steps for their tokens: slower ones tell what else the machine did. Masks are at the target.
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from opfa.bench.costs import Costs, Variant
from opfa.bench.measure import in_a_process, peak_bytes, timed
from opfa.bench.plain import Plain
from opfa.bench.standard import ENDLESS, standard
from opfa.compression.distill import Scales, VocabularyLoss
from opfa.errors import RecipeError
from opfa.models.encoders import choose_accelerator
from opfa.training.clock import Clock
from opfa.training.distributed import Supervisor
from opfa.training.engine import start_distributed
from opfa.training.loop import accumulate
from opfa.training.machine import environment
from opfa.upstream.batches import training_steps
from opfa.upstream.formulas import operations, shape_of
from opfa.upstream.prepared import Prepared
from opfa.upstream.pretrain import Trainer
from opfa.upstream.recipe import PretrainRecipe
from opfa.upstream.student import DTYPES

WARMUP = 3  # steps of each process before those that count
STEPS = {"cpu": 5, "cuda": 50}  # that count
SIDE = {"cpu": 4096, "cuda": 8192}  # of the square matrices whose product is timed
LOSS_SHAPE = (4096, 768, 30_522)  # tokens, hidden, vocabulary: 8 x 512 tokens of BERT-base
LOADER_SECONDS = 1.0
Results = dict[str, Any]
log = logging.getLogger(__name__)


def bench_train(recipe: PretrainRecipe | None, overrides: Sequence[str], rounds: int) -> Costs:
    """Measure all variants of a recipe's step, or of the standard one's with these overrides."""
    if recipe is not None and recipe.model.init is None:
        what = "opfa bench train needs a model that both loops can start from"
        raise RecipeError(f"model.config: {what}; give model.init=DIRECTORY and model.config=")
    with tempfile.TemporaryDirectory() as directory:
        if recipe is None:
            recipe = standard(Path(directory), overrides)
        sparse = ["no teacher"] if recipe.distillation and recipe.pruning else []
        names = ["ours", *sparse, *(["dense"] if recipe.pruning else []), "plain"]
        found: dict[str, list[Results]] = {name: [] for name in names}
        for index in range(rounds):
            for name in names:
                found[name].append(in_a_process(_measured, name, recipe))
                seconds = " ".join(f"{s:.3g}" for s in found[name][-1]["seconds"])
                log.info("round %d of %d, %s: %s s", index + 1, rounds, name, seconds)
        work = operations(shape_of(recipe), recipe.training.batch)
    return _summary(recipe, found, work)


def _summary(recipe: PretrainRecipe, found: dict[str, list[Results]], work: float) -> Costs:
    """Sum up the runs of all variants; `work` is the operations of a step without padding."""
    ours = found["ours"][-1]
    real_tokens = statistics.mean(ours["tokens"])
    variants = {name: _variant(runs, real_tokens) for name, runs in found.items()}
    fastest = variants["ours"].seconds
    rate = max(r for runs in found.values() for run in runs for r in run["rates"])
    work *= real_tokens / (recipe.training.batch * recipe.corpus.sequence_tokens)
    every = ramp.every if (ramp := recipe.ramp()) else 0
    model = recipe.model.model_dump(exclude_none=True)
    if (init := Path(model.get("init", ""))).is_absolute():
        model["init"] = init.name  # where it lies on this machine says nothing
    return Costs(
        machine=environment()["machine"],
        threads=torch.get_num_threads(),
        model=model,
        batch=recipe.training.batch,
        sequence_tokens=recipe.corpus.sequence_tokens,
        real_tokens=real_tokens,
        precision=recipe.training.precision,
        steps=sum(len(run["seconds"]) for run in found["ours"]),
        variants=variants,
        seconds_by_part=ours["parts"],
        tokens_per_second=real_tokens / fastest,
        flops_per_step=work,
        matrix_flops_per_second=rate,
        share_of_matrix_rate=work / fastest / rate,
        mask_update_share=ours["mask_update"] / (every * fastest) if every else None,
        loader_tokens_per_second=ours["loader"],
        loss_bytes=in_a_process(_loss_bytes, recipe.training.precision)["bytes"],
        ratios=_ratios(variants),
    )


def _variant(runs: list[Results], real_tokens: float) -> Variant:
    """Times are for a step with the mean number of tokens."""
    seconds = [
        s * real_tokens / tokens
        for run in runs
        for s, tokens in zip(run["seconds"], run["tokens"], strict=True)
    ]
    return Variant(
        seconds=min(seconds),
        median=statistics.median(seconds),
        slowest=max(seconds),
        peak_bytes=max(run["peak_bytes"] for run in runs),
        library_bytes=runs[-1]["library_bytes"],
    )


def _ratios(variants: Mapping[str, Variant]) -> dict[str, float]:
    ours, plain = variants["ours"], variants["plain"]
    sparse = "no teacher" if "no teacher" in variants else "ours"
    ratios = {
        "ours / plain, time": ours.seconds / plain.seconds,
        "ours / plain, peak memory": ours.peak_bytes / plain.peak_bytes,
    }
    if sparse != "ours":
        ratios["ours / no teacher, time"] = ours.seconds / variants[sparse].seconds
    if "dense" in variants:
        ratios[f"{sparse} / dense, time"] = variants[sparse].seconds / variants["dense"].seconds
    return ratios


def _matrix_rates(device: str, dtype: torch.dtype) -> list[float]:
    """Floating-point operations a second in products of two large square matrices."""
    side = SIDE[device]
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    functional.linear(a, b)
    return [2 * side**3 / timed(lambda: functional.linear(a, b)) for _ in range(3)]


def _measured(name: str, recipe: PretrainRecipe) -> Results:
    """What steps of a variant take, and for ours also by part."""
    library_bytes = peak_bytes()
    variant = Plain(recipe) if name == "plain" else Ours(variant_of(recipe, name))
    for _ in range(WARMUP):
        variant.step()
    num_steps = STEPS[choose_accelerator()]
    tokens: list[int] = []
    seconds = [timed(lambda: tokens.append(variant.step())) for _ in range(num_steps)]
    found = {"seconds": seconds, "tokens": tokens}
    found |= {"peak_bytes": peak_bytes(), "library_bytes": library_bytes}
    if isinstance(variant, Ours) and name == "ours":
        found |= variant.facts(num_steps)
    rates = _matrix_rates(choose_accelerator(), DTYPES[recipe.training.precision])
    return {**found, "rates": rates}


def variant_of(recipe: PretrainRecipe, name: str) -> PretrainRecipe:
    """The recipe of a variant, with masks at the target from the start."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    values["training"] |= {"steps": ENDLESS, "rewind_learning_rate": False}
    values["training"].pop("cyclic_learning_rate", None)
    if name != "ours":
        values.pop("distillation", None)
        if recipe.masking.probability == 0:  # without a teacher something has to be masked
            values.pop("masking")
    if name == "dense":
        values.pop("pruning", None)
    if "pruning" in values:
        target = values["pruning"]["schedule"]["target"]
        values["pruning"]["schedule"] = {"end": 0, "target": target}
    return PretrainRecipe.check(values)


class Ours:
    """A recipe's trainer, step by step."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        """Load what the recipe names; this process alone is the run."""
        device = start_distributed(recipe.launch.timeout_seconds)
        prepared = Prepared.open(Path(recipe.data), recipe.corpus)
        self._clock = Clock()
        watch, file = Supervisor(float("inf")), recipe.deepspeed_file(1)
        self.trainer = Trainer(recipe, prepared, device, watch, file, self._clock)
        self.trainer.student.train()
        self._prune()
        self._batches = self.trainer.batches(0)

    def step(self) -> int:
        """One optimizer step; its real tokens."""
        batches = next(self._batches)
        losses = accumulate(self.trainer, batches)
        self.trainer.optimize(0, self.trainer.recipe.training.learning_rate, losses)
        return sum(batch.counts()[1] for batch in batches)

    def _prune(self) -> None:
        if self.trainer.pruner is not None:
            self.trainer.pruner.after_step(0, self.trainer.engine)

    def facts(self, num_steps: int) -> Results:
        """Seconds by part of a step, of a mask update, and the loader's speed alone."""
        self._clock.is_on = True
        for _ in range(num_steps):
            self.step()
        parts = {name: seconds / num_steps for name, seconds in self._clock.seconds.items()}
        updates = [timed(self._prune) for _ in range(3 if self.trainer.pruner else 0)]
        return {
            "parts": parts,
            "mask_update": statistics.median(updates) if updates else None,
            "loader": self._loader_rate(),
        }

    def _loader_rate(self) -> float:
        """Real tokens a second, loaded in this process."""
        trainer = self.trainer
        parts = trainer.prepared, trainer.mask, trainer.order
        steps = training_steps(*parts, steps=range(ENDLESS), workers=0)
        start, tokens = time.perf_counter(), 0
        while time.perf_counter() - start < LOADER_SECONDS:
            tokens += sum(batch.counts()[1] for batch in next(steps))
        return tokens / (time.perf_counter() - start)


def _loss_bytes(precision: str) -> Results:
    """Memory that the loss under a teacher takes at its peak, beside models and features."""
    tokens, hidden, size = LOSS_SHAPE
    device, dtype = choose_accelerator(), DTYPES[precision]
    numbers = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(generator=numbers)

    layers = [nn.Linear(hidden, 1, device=device, dtype=dtype) for _ in range(2)]
    for layer in layers:
        layer.weight, layer.bias = nn.Parameter(random(size, hidden)), nn.Parameter(random(size))
    features = [random(tokens, hidden) for _ in range(2)]
    labels = torch.arange(tokens // 7, device=device)
    weight, bias = layers[0].weight, layers[0].bias
    loss = VocabularyLoss(layers[0])
    for num_tokens in (8, tokens):  # what libraries allocate once comes first
        before = peak_bytes()
        student = features[0][:num_tokens].detach().requires_grad_()
        teacher = features[1][:num_tokens], layers[1]
        scales = Scales(hard=1e-3, soft=1e-3, temperature=2.0)
        loss(student, labels[: num_tokens // 7], scales, teacher).total.backward()
        weight.grad = bias.grad = None
    return {"bytes": peak_bytes() - before}
