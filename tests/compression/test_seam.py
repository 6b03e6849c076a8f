"""The seam of pruning: scores and grains that are known to this file alone, on one process and, with
this file as the program of each rank, on two at every ZeRO stage.
"""

import copy
import inspect
import itertools
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import outside
from safetensors.torch import load_file
from torch import Size, Tensor, nn
from torch.nn import functional

from opfa.compression.grains import Grain
from opfa.compression.pattern import Pattern
from opfa.compression.pruner import FILE, OneProcess, Pruner, Weights
from opfa.compression.schedules import Gradual
from opfa.compression.scores import Part, Score, State
from opfa.errors import ModelError, RecipeError, RunError
from opfa.sparsity.masks import fingerprint

ROOT = Path(__file__).parents[2]
CASES = [("fp32", stage) for stage in range(4)] + [("bf16", stage) for stage in (1, 2, 3)]
ROWS, MICRO_BATCH, STEPS = 16, 4, 3


class Random(Score):
    """The same on every rank and at every world size."""

    def of(self, part: Part) -> Tensor:
        seed = torch.Generator().manual_seed(zlib.crc32(part.name.encode()) + part.step)
        return part.cut(torch.randn(part.shape, generator=seed))


class Saliency(Score):
    """The sum of |w * dL/dw| over steps, in which pruned weights go on scoring."""

    def observes(self, step: int) -> bool:
        return step > 0

    def observe(self, part: Part, gradient: Tensor) -> State:
        found = (part.weight * gradient).abs()
        return {"sum": part.state.get("sum", 0) + found, "last": gradient}

    def of(self, part: Part) -> Tensor:
        return part.state["sum"] if part.state else part.weight.abs()


class Blocks(Grain):
    """2 x 2 weights."""

    def pool(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        halves = {n: s.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)) for n, s in scores.items()}
        return {name: blocks.sum((1, 3)) for name, blocks in halves.items()}

    def spread(self, kept: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> dict[str, Tensor]:
        rows = {name: units.repeat_interleave(2, 0) for name, units in kept.items()}
        return {name: units.repeat_interleave(2, 1) for name, units in rows.items()}


class Neurons(Grain):
    """A row of each block's first matrix and the column of its second."""

    def pool(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        firsts = [name for name in scores if name.endswith("first.weight")]
        seconds = {name: name.replace("first", "second") for name in firsts}
        return {n: scores[n].sum(1) + scores[second].sum(0) for n, second in seconds.items()}

    def spread(self, kept: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> dict[str, Tensor]:
        rows = {n: units[:, None].expand(shapes[n]) for n, units in kept.items()}
        columns = {n.replace("first", "second"): units.expand(*shapes[n][::-1]) for n, units in kept.items()}
        return {**rows, **columns}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.gelu(self.first(x)))


class Net(nn.Module):
    """Two blocks and the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.layer:
            x = block(x.to(next(block.parameters()).dtype))
        return (x.float() - y).square().sum() / ROWS


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 8, generator=random), torch.randn(ROWS, 8, generator=random)


def pruned(score: Score | None = None, grain: Grain | None = None, **choice: Any) -> Pruner:
    """Half of all weights are pruned at step 0, and again at the end of each other step."""
    model, schedule = Net(), Gradual(end=0, hold_until=STEPS, every=1, target=0.5)
    return Pruner(model, schedule, Pattern(**choice), score=score, grain=grain)


def zeros(pruner: Pruner) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in pruner.masks().items()}


# scores and grains on one process


@pytest.mark.parametrize("made", [Random, Saliency, Blocks, Neurons])
def test_a_new_score_or_grain_is_small(made: type) -> None:
    assert len(inspect.getsource(made).splitlines()) <= 30


def test_a_new_score_prunes_exactly() -> None:
    pruner = pruned(Random())
    pruner.after_step(0)
    assert list(zeros(pruner).values()) == [48] * 4
    first = fingerprint(pruner.masks())
    pruner.after_step(1)
    assert fingerprint(pruner.masks()) != first  # another draw, also of negative scores


def test_a_new_grain_prunes_whole_units_exactly() -> None:
    pruner = pruned(grain=Blocks())
    pruner.after_step(0)
    for name, mask in pruner.masks().items():
        sizes = mask.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum((1, 3))
        assert sorted(sizes.flatten().tolist()) == [0] * 12 + [4] * 12
        weight = dict(pruner.layers)[name.removesuffix(".weight")].weight
        worth = weight.abs().unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum((1, 3))
        assert worth[sizes == 0].max() < worth[sizes == 4].min()


def test_a_grain_may_span_several_weights() -> None:
    pruner = pruned(grain=Neurons())
    pruner.after_step(0)
    masks = list(pruner.masks().values())
    for first, second in itertools.batched(masks, 2) if hasattr(itertools, "batched") else [masks[:2], masks[2:]]:
        dead = ~first.any(1)
        assert dead.sum() == 6
        assert torch.equal(first, ~dead[:, None].expand_as(first))
        assert torch.equal(second, ~dead.expand_as(second))
