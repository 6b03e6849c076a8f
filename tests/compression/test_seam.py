"""The seam of pruning: scores and grains that only this file knows, on one process, and on two
ranks at every ZeRO stage, whose program this file is too.
"""

import inspect
import json
import math
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import Launch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Size, Tensor, nn
from torch.nn import functional

from opfa.compression.calibration import Calibration, Text
from opfa.compression.grains import Grain
from opfa.compression.measured import Curvature, Fisher
from opfa.compression.movement import Movement
from opfa.compression.pattern import Pattern
from opfa.compression.pruner import FILE, Pruner
from opfa.compression.schedules import Gradual
from opfa.compression.scores import Magnitude, Part, Score, State
from opfa.compression.selection import keep
from opfa.errors import ModelError, RunError
from opfa.sparsity.layers import set_masks
from opfa.sparsity.masks import fingerprint
from opfa.training.engine import Engine, start_distributed
from opfa.training.zero import DeepSpeedFile

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
        seconds = {n.replace("first", "second"): units for n, units in kept.items()}
        return {**rows, **{n: units.expand(shapes[n]) for n, units in seconds.items()}}


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
        self.embedding = nn.Linear(8, 8)  # stage 3 needs a gradient of each block's input
        self.layer = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.embedding(x.to(self.embedding.weight.dtype))
        for block in self.layer:
            x = block(x)
        return (x.float() - y).square().sum() / ROWS


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 8, generator=random), torch.randn(ROWS, 8, generator=random)


def sequences(count: int) -> Iterator[dict[str, Tensor]]:
    """What text is here: its outputs are losses."""
    for step in range(count):
        yield dict(zip("xy", batch(step), strict=True))


def made(
    score: Score | None = None, grain: Grain | None = None, **choice: Any
) -> tuple[Net, Pruner]:
    """A model of which half of all weights are pruned at step 0, and again after every step."""
    start = int(isinstance(score, Movement))  # which has learnt nothing before
    ramp = {"start": start, "end": start, "hold_until": STEPS, "every": 1, "target": 0.5}
    model, schedule = Net(), Gradual(**ramp)
    text = Calibration(model, Text(sequences, lambda call, inputs: [call(**inputs)]))
    pattern = Pattern(**choice)
    return model, Pruner(model, schedule, pattern, score=score, grain=grain, calibration=text)


def pruned(*parts: Any, **choice: Any) -> Pruner:
    return made(*parts, **choice)[1]


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
        weight = pruner.layers[name].weight
        worth = weight.abs().unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum((1, 3))
        assert worth[sizes == 0].max() < worth[sizes == 4].min()


def test_a_grain_may_span_several_weights() -> None:
    pruner = pruned(grain=Neurons())
    pruner.after_step(0)
    masks = list(pruner.masks().values())
    for first, second in (masks[:2], masks[2:]):
        dead = ~first.any(1)
        assert dead.sum() == 6
        assert torch.equal(first, ~dead[:, None].expand_as(first))
        assert torch.equal(second, ~dead.expand_as(second))


def test_monotone_units_stay_pruned() -> None:
    for is_monotone in (False, True):
        pruner = pruned(grain=Blocks(), monotone=is_monotone)
        pruner.after_step(0)
        first = {name: mask.clone() for name, mask in pruner.masks().items()}
        with torch.no_grad():
            for name, layer in pruner.layers.items():
                layer.weight[first[name]] *= 1e-3
        pruner.after_step(1)
        revived = sum(int((mask & ~first[name]).sum()) for name, mask in pruner.masks().items())
        assert (revived == 0) == is_monotone
        assert list(zeros(pruner).values()) == [48] * 4


def test_candidates_are_kept_first() -> None:
    scores = {"a": torch.tensor([-3.0, 9.0, -1.0, 2.0]), "b": torch.tensor([8.0, -2.0])}
    alive = {"a": torch.tensor([True, False, True, True]), "b": torch.tensor([False, True])}
    expected = {
        1: "1 1 1 1 0 1",
        2: "1 0 1 1 0 1",
        3: "0 0 1 1 0 1",
        5: "0 0 0 1 0 0",
        6: "0 0 0 0 0 0",
    }
    for k, marks in expected.items():
        masks = keep(scores, k, candidates=alive)
        assert " ".join(str(int(m)) for mask in masks.values() for m in mask) == marks


def test_scores_may_be_negative_and_their_ties_go_to_the_lower_index() -> None:
    score = torch.tensor([0.0, -1.0, -0.0, -1.0, -2.5, 1e-45, -1e-45])
    order = [4, 3, 1, 6, 2, 0, 5]  # the first to go comes first
    for k in range(8):
        (mask,) = keep({"": score}, k).values()
        assert {i for i, is_kept in enumerate(mask.tolist()) if not is_kept} == set(order[:k])


def test_a_grain_of_a_wrong_shape_is_refused() -> None:
    class Halves(Blocks):
        def spread(
            self, kept: Mapping[str, Tensor], shapes: Mapping[str, Size]
        ) -> dict[str, Tensor]:
            return dict(kept)

    with pytest.raises(ModelError, match="different names or shapes"):
        pruned(grain=Halves()).after_step(0)


def test_a_score_that_is_not_finite_is_refused() -> None:
    class Bad(Random):
        def of(self, part: Part) -> Tensor:
            return super().of(part) / 0

    with pytest.raises(RunError, match=r"step 0: layer.0.first.weight: holds a non-finite"):
        pruned(Bad()).after_step(0)


# recipes


def test_a_recipe_names_score_and_grain_by_kind_and_does_not_write_the_defaults() -> None:
    named = Pattern.model_validate_json('{"score": "magnitude", "grain": {"kind": "weight"}}')
    assert named == Pattern()
    assert set(named.model_dump(mode="json")) == {"include", "exclude", "scope", "monotone"}


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="score\n  Input tag 'luck' found"):
        Pattern.model_validate_json('{"score": "luck"}')


# gradients


def share(step: int, rank: int = 0, size: int = 1) -> list[tuple[Tensor, Tensor]]:
    """A rank's micro-batches."""
    x, y = batch(step)
    rows = [slice(start, start + MICRO_BATCH) for start in range(0, ROWS, MICRO_BATCH)]
    return [(x[part], y[part]) for part in rows[rank::size]]


def plain_gradients(
    state: dict[str, Tensor], masks: dict[str, Tensor], step: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """By the weights that are computed with, of ordinary modules; micro-batches add up in fp32."""
    model = Net()
    model.load_state_dict(state)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    parameters = [model.to(dtype).get_parameter(name) for name in masks]
    found = [torch.autograd.grad(model(x, y), parameters) for x, y in share(step)]
    gradients = zip(*found, strict=True)
    return {n: torch.stack(g).float().sum(0) for n, g in zip(masks, gradients, strict=True)}


def observed(point: Path) -> dict[str, Tensor]:
    """The gradients that the score saw last, of a resume point."""
    found = load_file(point / FILE)
    return {k.removeprefix("last/"): v for k, v in found.items() if k.startswith("last/")}


def train_alone(model: Net, pruner: Pruner, steps: range, directory: Path) -> list[str]:
    """A plain loop, which compares each gradient with a plain model's; the masks' fingerprints."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = [fingerprint(pruner.masks())] if pruner.after_step(steps[0] - 1) else []
    for step in steps:
        expected = plain_gradients(model.state_dict(), pruner.masks(), step, torch.float32)
        for x, y in share(step):
            model(x, y).backward()
        masks = {name: mask.clone() for name, mask in pruner.masks().items()}
        pruner.after_backward(step)
        for name, mask in masks.items():
            assert not model.get_parameter(name).grad[~mask].any()  # pyright: ignore
        optimizer.step()
        optimizer.zero_grad()
        pruner.after_step(step)
        found.append(fingerprint(pruner.masks()))
        point = directory / str(step)
        point.mkdir(parents=True)
        pruner.save(point)
        for name, gradient in observed(point).items():
            assert bool(expected[name][~masks[name]].any())  # pruned weights have one
            torch.testing.assert_close(gradient, expected[name])
    return found


def test_alone_a_score_observes_the_dense_gradient_and_resumes(tmp_path: Path) -> None:
    model, pruner = made(Saliency())
    whole = train_alone(model, pruner, range(1, STEPS + 1), tmp_path / "whole")
    assert len(set(whole)) == STEPS + 1
    model, pruner = made(Saliency())
    first = train_alone(model, pruner, range(1, STEPS), tmp_path / "first")
    again, resumed = made(Saliency())
    again.load_state_dict(model.state_dict())
    set_masks(again, pruner.masks())
    resumed.load(tmp_path / f"first/{STEPS - 1}", STEPS - 1)
    resumed.schedule = resumed.schedule.model_copy(update={"start": STEPS})  # no update before
    rest = train_alone(again, resumed, range(STEPS, STEPS + 1), tmp_path / "rest")
    assert [*first, *rest] == whole


def test_nothing_is_kept_that_no_score_asked_for() -> None:
    for score, is_kept in ((None, False), (Saliency(), True)):
        model, pruner = made(score)
        model(*batch(0)).backward()
        assert all(layer.keeps_gradient == is_kept for layer in pruner.layers.values())
        assert all((layer._gradient is not None) == is_kept for layer in pruner.layers.values())
        pruner.after_step(STEPS)  # the last update
        assert not any(layer.keeps_gradient for layer in pruner.layers.values())


def test_a_gradient_that_overflowed_is_left_out(tmp_path: Path) -> None:
    model, pruner = made(Saliency())
    (model(*batch(1)) * math.inf).backward()
    pruner.after_backward(1)
    pruner.save(tmp_path)
    assert not (tmp_path / FILE).exists()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `main` left on two ranks."""
    output = tmp_path_factory.mktemp("ranks")
    with Launch("test_seam", [output], output, 2) as started:
        assert started.wait(400) == [0, 0], started.said(0)[-4000:]
    return output


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_on_two_ranks_a_score_observes_the_dense_gradient(
    ranks: Path, precision: str, stage: int
) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model, pruner = made(Saliency())
    model.to(dtype).float()  # DeepSpeed makes its fp32 masters from 16-bit values
    pruner.after_step(0)
    expected = plain_gradients(Net().state_dict(), pruner.masks(), 1, dtype)
    found = observed(ranks / f"{precision}-{stage}-Saliency/1")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "choice", ["Saliency", "Saliency-Blocks", "Curvature", "Fisher", "Movement"]
)
def test_scores_and_grains_make_the_same_masks_at_every_stage(ranks: Path, choice: str) -> None:
    for precision in ("fp32", "bf16"):
        runs = [
            json.loads((ranks / f"{p}-{stage}-{choice}/run.json").read_text())
            for p, stage in CASES
            if p == precision
        ]
        assert len(set(runs[0]["masks"])) == STEPS + 1
        assert all(run["masks"] == runs[0]["masks"] for run in runs)
        for run in runs if choice == "Fisher" else []:  # which changes weights too
            for found, expected in zip(run["weights"], runs[0]["weights"], strict=True):
                assert np.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_the_training_has_the_same_bits_whether_gradients_are_kept(
    ranks: Path, precision: str, stage: int
) -> None:
    kept, plain = (
        json.loads((ranks / f"{precision}-{stage}-{name}/run.json").read_text())
        for name in ("Observer", "Magnitude")
    )
    assert kept == plain


class Observer(Saliency):
    """Looks at gradients, and scores by magnitude all the same."""

    def of(self, part: Part) -> Tensor:
        return part.weight.abs()


def train_on_ranks(
    precision: str, stage: int, score: Score, grain: Grain | None, output: Path
) -> None:
    """The steps of `train_alone` with an engine; the score's state and facts about the run."""
    model, pruner = made(score, grain)
    engine = Engine(
        model,
        [{"params": list(model.parameters())}],
        betas=(0.9, 0.98),
        epsilon=1e-6,
        max_grad_norm=0.05,
        micro_batch=MICRO_BATCH,
        accumulation=ROWS // MICRO_BATCH // dist.get_world_size(),
        precision=precision,
        file=DeepSpeedFile.check({"zero_optimization": {"stage": stage}}),
    )
    is_writer = dist.get_rank() == 0
    pruner.after_step(0, engine)
    masks, norms = [fingerprint(pruner.masks())], []
    for step in range(1, STEPS + 1):
        batches = share(step, dist.get_rank(), dist.get_world_size())
        for index, inputs in enumerate(batches):
            engine.backward(engine(*inputs), index == len(batches) - 1)
        pruner.after_backward(step, engine)
        norms.append(engine.step(0.05).item())  # pyright: ignore - a norm in these precisions
        pruner.after_step(step, engine)
        masks.append(fingerprint(pruner.masks()))
        (output / str(step)).mkdir(parents=True, exist_ok=True)
        pruner.save(output / str(step), engine, is_writer)
    weights = [engine.whole(parameter).tolist() for parameter in model.parameters()]
    if is_writer:
        run = {"masks": masks, "norms": norms, "weights": weights}
        (output / "run.json").write_text(json.dumps(run))


def main() -> None:
    """Every case on this launch's ranks."""
    torch.set_num_threads(1)
    start_distributed(60)
    scores = [Saliency(), Curvature(sequences=2, every=1), Fisher(sequences=20, block=7)]
    choices = [(Saliency(), Blocks()), *((score, None) for score in (*scores, Movement()))]
    for precision, stage in CASES:
        for score, grain in [*choices, (Observer(), None), (Magnitude(), None)]:
            name = "-".join(type(part).__name__ for part in (score, grain) if part is not None)
            output = Path(sys.argv[1]) / f"{precision}-{stage}-{name}"
            train_on_ranks(precision, stage, score, grain, output)
    dist.barrier()
