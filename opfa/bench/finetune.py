"""Benchmark of fine-tuning a sparse encoder on a CPU: a whole step, without a teacher, by part.

    ours            sparse kernels, live weights alone trained
    ours, bf16      the same with tokens in bf16
    ours, again     the same in fp32, and layers are computed again going back (checkpointing)
    no kernels      masked layers in dense products, as on a GPU
    torch, fp32     the dense model
    torch, bf16     the dense model under autocast
    plain loop      the dense model, whose weights are multiplied by masks after each step

Each runs alone in a process, one after the other and then all again. Ratios are of the fastest
steps: slower ones tell what else the machine did. Weights, zeros and tokens are random.
"""

import logging
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opfa.bench.measure import in_a_process, peak_bytes, timed
from opfa.models.configs import new_config
from opfa.models.encoders import HEADS, checkpoint_layers
from opfa.report.tables import Result, Row, Table, column
from opfa.runtime.training import use_kernels
from opfa.sparsity.anatomy import part_of
from opfa.sparsity.layers import lock
from opfa.training.machine import environment
from opfa.training.solo import SoloEngine

SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {"model_type": "bert"},
    "minilm": {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "intermediate_size": 1536,
    },
}
VARIANTS = ("ours", "ours, bf16", "ours, again", "no kernels", "torch, fp32")
VARIANTS = (*VARIANTS, "torch, bf16", "plain loop")
RATIOS = (("ours", "torch, fp32"), ("ours", "torch, bf16"), ("ours, bf16", "torch, bf16"))
RATIOS = (*RATIOS, ("ours, again", "torch, fp32"), ("ours, again", "torch, bf16"))
RATIOS = (*RATIOS, ("ours", "no kernels"), ("ours", "plain loop"))
WARMUP, STEPS = 1, 5  # the first step makes patterns and the optimizer's state
FIRST_ID = 1000  # of tokens that are words
log = logging.getLogger(__name__)


class Step(Row):
    """One way to compute the step: its fastest parts, the fastest whole, the median whole."""

    forward: float = column("forward, s", ".3g")
    backward: float = column("backward", ".3g")
    optimizer: float = column("optimizer", ".3g")
    seconds: float = column("whole step", ".3g")
    median: float = column("median", ".3g")
    peak_bytes: int = column("peak memory, GB", ".2f", 1e-9)
    library_bytes: int = column("of it libraries", ".2f", 1e-9)  # before a model is made


class Finetuning(Result):
    """What `opfa bench finetune` finds."""

    machine: dict[str, Any]  # Any: as a run's environment.json has it
    threads: int
    shape: str
    sparsity: float
    batch: int
    tokens: int
    steps: int
    variants: dict[str, Step]
    ratios: dict[str, float]

    def parts(self, *, is_long: bool = False) -> Iterator[Table | str]:
        """Variants by part, and ratios."""
        what = f"{self.shape}, {self.sparsity:.0%} zeros, {self.batch} x {self.tokens} tokens"
        where = f"{self.machine['processor']}, {self.threads} threads"
        yield f"{what}, {where}; {self.steps} steps each:"
        yield Table.of("step", self.variants)
        rows = [(name, f"{ratio:.2f}") for name, ratio in self.ratios.items()]
        yield Table(("ratio; times are of the fastest steps", ""), rows, numbers_from=1)


def bench_finetune(
    shape: str = "bert-base",
    *,
    sparsity: float = 0.9,
    batch: int = 16,
    tokens: int = 128,
    rounds: int = 2,
) -> Finetuning:
    """Measure a fine-tuning step in all variants, of a shape in `SHAPES`."""
    found: dict[str, list[Step]] = {name: [] for name in VARIANTS}
    for index in range(rounds):
        for name in VARIANTS:
            step = in_a_process(_measured, name, shape, sparsity, (batch, tokens))
            log.info("round %d of %d, %s: %.3g s", index + 1, rounds, name, step.seconds)
            found[name].append(step)
    variants = {name: _best(steps) for name, steps in found.items()}
    ratios = {}
    for ours, other in RATIOS:
        a, b = variants[ours], variants[other]
        ratios[f"{ours} / {other}, time"] = a.seconds / b.seconds
        ratios[f"{ours} / {other}, peak memory"] = a.peak_bytes / b.peak_bytes
    return Finetuning(
        machine=environment()["machine"],
        threads=torch.get_num_threads(),
        shape=shape,
        sparsity=sparsity,
        batch=batch,
        tokens=tokens,
        steps=rounds * STEPS,
        variants=variants,
        ratios=ratios,
    )


def _best(steps: list[Step]) -> Step:
    fastest = ("forward", "backward", "optimizer", "seconds")
    values = {name: min(getattr(step, name) for step in steps) for name in fastest}
    return Step(
        **values,
        median=statistics.median(step.median for step in steps),
        peak_bytes=max(step.peak_bytes for step in steps),
        library_bytes=steps[-1].library_bytes,
    )


def _measured(name: str, shape: str, sparsity: float, size: tuple[int, int]) -> Step:
    library_bytes = peak_bytes()
    step = OneStep(name, shape, sparsity, size)
    times = [step.take() for _ in range(WARMUP + STEPS)][WARMUP:]
    forward, backward, optimizer = (min(part) for part in zip(*times, strict=True))
    wholes = [sum(each) for each in times]
    return Step(
        forward=forward,
        backward=backward,
        optimizer=optimizer,
        seconds=min(wholes),
        median=statistics.median(wholes),
        peak_bytes=peak_bytes(),
        library_bytes=library_bytes,
    )


class OneStep:
    """A classifier with its optimizer, in one of the variants."""

    def __init__(self, name: str, shape: str, sparsity: float, size: tuple[int, int]) -> None:
        """Random weights, whose zeros are at random places of the encoder's matrices."""
        torch.manual_seed(0)
        self.model = HEADS["SequenceClassification"].from_config(new_config(SHAPES[shape]))
        self.model.train()
        masks = _with_zeros(self.model, sparsity) if name != "torch, fp32" else {}
        self._masks = masks if name == "plain loop" else {}
        if name.startswith("ours") or name == "no kernels":
            lock(self.model)
        if name.startswith("ours"):
            use_kernels(self.model, True, train_live=True)
        if name.endswith("again"):
            checkpoint_layers(self.model)
        self._is_bf16 = name.endswith("bf16")
        groups = [{"params": list(self.model.parameters())}]
        self.engine = SoloEngine(self.model, groups, max_grad_norm=1.0)
        ids = torch.randint(FIRST_ID, self.model.config.vocab_size, size)
        self._batch = {"input_ids": ids, "labels": torch.randint(2, size[:1])}
        self._loss = torch.zeros(())

    def take(self) -> tuple[float, float, float]:
        """One step; the seconds of forward pass, backward pass and optimizer."""
        return timed(self._forward), timed(self._loss.backward), timed(self._optimize)

    def _forward(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._is_bf16):
            self._loss = self.model(**self._batch).loss

    @torch.no_grad()
    def _optimize(self) -> None:
        self.engine.step(1e-5)
        for parameter, mask in self._masks.items():
            parameter.mul_(mask)


def _with_zeros(model: nn.Module, sparsity: float) -> dict[nn.Parameter, Tensor]:
    """Make weights of the encoder zero; the masks of the rest."""
    masks = {}
    for name, parameter in model.named_parameters():
        if part_of(name, parameter.shape) == "encoder" and parameter.ndim == 2:
            masks[parameter] = torch.rand_like(parameter) >= sparsity
            parameter.data.mul_(masks[parameter])
    return masks
