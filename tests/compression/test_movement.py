"""Movement scores against a plain model that has them as parameters, and what thresholds prune."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

import opfa
from opfa.compression.grains import Block
from opfa.compression.movement import Movement, SoftMovement
from opfa.compression.pattern import Pattern
from opfa.compression.pruner import FILE, HERE, Pruner, Weights
from opfa.compression.schedules import Gradual, LearningRate
from opfa.compression.scores import Part, Score
from opfa.compression.selection import Ranks
from opfa.errors import RecipeError, RunError
from opfa.sparsity.layers import set_masks
from opfa.training.sections import Pruning

STEPS = 14
SCHEDULE = Gradual(start=2, end=10, hold_until=13, every=1, target=0.75)
LIMIT = SCHEDULE.model_copy(update={"target": 0.995})
RATES = LearningRate(peak=0.3, warmup_steps=4, steps=STEPS)
NAMES = ("layer.0.dense.weight", "layer.1.dense.weight")
SOFT = SoftMovement(learning_rate=0.5, penalty=5.0, threshold=0.2, initial_threshold=0.05)
HARD = Movement(learning_rate=0.5)
CASES = [(HARD, SCHEDULE), (SOFT, LIMIT)]
IDS = ("hard", "soft")


class Net(nn.Module):
    """Two matrices of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        linears = nn.Linear(8, 20), nn.Linear(20, 4)
        self.layer = nn.ModuleList([nn.ModuleDict({"dense": each}) for each in linears])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears()
        return second(first(x).relu())

    def linears(self) -> list[Any]:
        return [block["dense"] for block in self.layer]  # pyright: ignore[reportIndexIssue]


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, generator=random)
    return x, x[:, :4] - 2 * x[:, 4:]


def loss_of(predicted: Tensor, wanted: Tensor) -> Tensor:
    return (predicted - wanted).square().mean()


class Run:
    """A model that is pruned while SGD trains it."""

    def __init__(self, score: Score, schedule: Gradual, **choice: Any) -> None:
        self.model = Net()
        self.pruner = Pruner(self.model, schedule, Pattern(**choice), score=score)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.masks: list[dict[str, Tensor]] = []

    def train(self, steps: range, weights: Weights = HERE) -> "Run":
        for step in steps:
            x, y = batch(step)
            self.optimizer.zero_grad()
            loss_of(self.model(x), y).backward()
            self.pruner.after_backward(step, weights, RATES.at(step - 1) / RATES.peak)
            self.optimizer.step()
            self.pruner.after_step(step, weights)
            self.masks.append({name: mask.clone() for name, mask in self.pruner.masks().items()})
        return self

    def scores(self, directory: Path, weights: Weights = HERE) -> dict[str, Tensor]:
        """What a resume point holds."""
        directory.mkdir()
        self.pruner.save(directory, weights)
        return load_file(directory / FILE)


ALL = range(1, STEPS + 1)


# the formula, by autograd


def hard(score: Tensor, step: int) -> Tensor:
    """All but the k lowest, of equal ones those that come last."""
    flat = score.detach().numpy().reshape(-1)
    order = np.lexsort((-np.arange(flat.size), flat))
    mask = np.ones(flat.size, dtype=np.float32)
    mask[order[: round(SCHEDULE.sparsity_at(step) * flat.size)]] = 0
    return torch.from_numpy(mask).view(score.shape)


def tau(step: int) -> float:
    """As the authors' code has it: from 0.05 to 0.2, cubic."""
    remaining = 1 - min(max(step - 2, 0) / 8, 1)
    return 0.2 + (0.05 - 0.2) * remaining**3


def soft(score: Tensor, step: int) -> Tensor:
    return (torch.sigmoid(score.detach().double()) > tau(step)).float()


def reference(make: Callable[[Tensor, int], Tensor], penalty: float) -> tuple[list, list]:
    """Scores and masks after each step, of a model that computes with W * M(S)."""
    model = Net()
    layers = model.linears()
    scores = [torch.zeros_like(layer.weight, requires_grad=True) for layer in layers]
    masks = [torch.ones_like(score) for score in scores]
    learner = torch.optim.AdamW(scores, lr=0.0, weight_decay=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found, made = [], []
    for step in ALL:
        x, y = batch(step)
        straight = [m + s - s.detach() for m, s in zip(masks, scores, strict=True)]
        one, two = (layer.weight * m for layer, m in zip(layers, straight, strict=True))
        hidden = nn.functional.linear(x, one, layers[0].bias).relu()
        loss = loss_of(nn.functional.linear(hidden, two, layers[1].bias), y)
        mean = sum(score.sigmoid().mean() for score in scores) / len(scores)
        (loss + penalty * tau(step - 1) / 0.2 * mean).backward()
        learner.param_groups[0]["lr"] = 0.5 * RATES.at(step - 1) / RATES.peak
        for each in (learner, optimizer):
            each.step()
            each.zero_grad()
        found.append([score.detach().clone() for score in scores])
        if 2 <= step <= 13:
            masks = [make(score, step) for score in scores]
        made.append(masks)
    return found, made


@pytest.mark.parametrize(
    ("case", "make", "penalty"), [(CASES[0], hard, 0.0), (CASES[1], soft, 5.0)], ids=IDS
)
def test_scores_and_masks_are_those_of_scores_that_are_parameters(
    tmp_path: Path, case: tuple[Score, Gradual], make: Callable, penalty: float
) -> None:
    scores, masks = reference(make, penalty)
    run = Run(*case)
    for step in ALL:
        run.train(range(step, step + 1))
        if step <= 13:  # the last update
            found = run.scores(tmp_path / str(step))
            for name, expected in zip(NAMES, scores[step - 1], strict=True):
                torch.testing.assert_close(
                    found[f"score/{name}"], expected, rtol=1e-4, atol=1e-5, msg=f"step {step}"
                )
        for name, expected in zip(NAMES, masks[step - 1], strict=True):
            assert torch.equal(run.masks[-1][name], expected.bool()), step
    returned = [
        int((now[name] & ~before[name]).sum())
        for before, now in zip(run.masks, run.masks[1:], strict=False)
        for name in NAMES
    ]
    assert sum(returned) > 0  # pruned weights score on
    zeros = [sum(int((~m).sum()) for m in each.values()) for each in run.masks]
    assert 0 < zeros[5] < zeros[-1] < 240 and not zeros[0]


def test_the_count_of_hard_movement_is_exact_and_the_model_never_holds_a_score() -> None:
    run = Run(HARD, SCHEDULE).train(ALL)
    for step, masks in zip(range(2, 14), run.masks[1:], strict=False):
        for mask in masks.values():
            assert int((~mask).sum()) == round(SCHEDULE.sparsity_at(step) * mask.numel())
    assert set(run.model.state_dict()) == set(Net().state_dict())


def test_the_first_step_moves_a_score_by_the_rate_and_its_pace(tmp_path: Path) -> None:
    """AdamW's first step is the rate, wherever there is a gradient; a quarter of it in warm-up."""
    found = Run(Movement(), SCHEDULE).train(range(1, 2)).scores(tmp_path / "scores")
    moved = torch.cat([found[f"score/{name}"].view(-1) for name in NAMES])
    assert set((moved.abs() / 1e-2).round(decimals=2).tolist()) <= {0.0, 0.25}
    assert (moved > 0).any() and (moved < 0).any()


def test_scores_that_tie_keep_the_lower_index() -> None:
    run = Run(HARD, SCHEDULE)
    run.pruner.after_step(10)  # no gradient was seen
    for mask in run.pruner.masks().values():
        assert mask.view(-1).tolist() == [True] * (mask.numel() // 4) + [False] * (
            3 * mask.numel() // 4
        )


# thresholds


class Told(Score):
    """0.0, 0.1, 0.2, ... in each matrix, and a threshold."""

    threshold: float

    def of(self, part: Part) -> Tensor:
        return part.cut((torch.arange(part.shape.numel()) / 10).view(part.shape))

    def threshold_at(self, ramp: float) -> float:
        return self.threshold if ramp == 1 else -math.inf


def zeros(threshold: float, target: float = 0.995, **choice: Any) -> list[int]:
    schedule = Gradual(start=1, end=2, target=target)
    run = Run(Told(threshold=threshold), schedule, **choice)
    run.pruner.after_step(1)
    assert run.pruner.sparsity() == 0.0  # nothing is as low as no threshold
    run.pruner.after_step(2)
    return [int((~mask).sum()) for mask in run.pruner.masks().values()]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_is_at_or_below_the_threshold_goes(scope: str) -> None:
    half = float(torch.tensor(50) / 10)
    assert zeros(half, scope=scope) == [51, 51]
    assert zeros(-0.05, scope=scope) == [0, 0]


def test_half_a_percent_stays_of_each_matrix_and_of_all_if_together() -> None:
    assert zeros(1e9) == [159, 79]
    assert zeros(1e9, target=0.5) == [80, 40]
    assert zeros(1e9, target=0.5, scope="global") == [60, 60]  # the lowest 120 of 240
    assert zeros(1e9, scope="global") == [158, 80]


def test_a_unit_is_compared_by_the_mean_of_its_weights() -> None:
    """Of 2 x 4 in rows of 8: means of 0.55, 0.95, 2.15, ..."""
    assert zeros(0.94, grain=Block(rows=2, columns=4))[0] == 8
    assert zeros(0.96, grain=Block(rows=2, columns=4))[0] == 16


@pytest.mark.parametrize("monotone", [False, True])
def test_monotone_what_went_stays_gone_below_a_threshold(monotone: bool) -> None:
    class Turning(Told):
        def of(self, part: Part) -> Tensor:
            return super().of(part) if part.step == 1 else super().of(part).neg() + 100.0

    schedule = Gradual(end=1, hold_until=2, target=0.995)
    run = Run(Turning(threshold=1.05), schedule, monotone=monotone)
    run.pruner.after_step(1)
    first = {name: mask.clone() for name, mask in run.pruner.masks().items()}
    run.pruner.after_step(2)  # all are above
    for name, mask in run.pruner.masks().items():
        assert int((~first[name]).sum()) == 11
        assert torch.equal(mask, first[name] if monotone else torch.ones_like(mask))


def test_half_a_percent_stays_under_any_penalty() -> None:
    score = SoftMovement(penalty=1e6, initial_threshold=0.45, threshold=0.499)
    run = Run(score, LIMIT).train(ALL)
    assert [int(mask.sum()) for mask in run.masks[-1].values()] == [1, 1]
    assert run.pruner.row() == {"sparsity": run.pruner.sparsity()} == {"sparsity": 238 / 240}
    assert run.pruner.planned(STEPS) == []


# ranks, resuming


class Threads(Weights):
    """One of two ranks in threads: each has a copy of the model, and is told a run of each tensor,
    of a third and of two thirds.
    """

    def __init__(self, rank: int, meeting: threading.Barrier, shared: dict[int, Any]) -> None:
        self._rank, self._meeting, self._shared = rank, meeting, shared
        self.ranks = Ranks(rank, 2, lambda counts: np.sum(self._gather(counts), axis=0))

    def _gather(self, value: Any) -> list[Any]:
        self._shared[self._rank] = value
        self._meeting.wait(60)
        found = [self._shared[0], self._shared[1]]
        self._meeting.wait(60)
        return found

    def _own(self, whole: Tensor) -> Tensor:
        at = whole.numel() // 3
        return whole.reshape(-1)[at:] if self._rank else whole.reshape(-1)[:at]

    def read(self, parameter: Tensor) -> Tensor:
        return self._own(super().read(parameter))

    def read_gradient(self, layer: Any) -> Tensor:
        return self._own(super().read_gradient(layer))

    def join(self, parameter: Tensor, run: Tensor) -> Tensor:
        return torch.cat(self._gather(run)).view(parameter.shape)

    def cut(self, parameter: Tensor, whole: Tensor) -> Tensor:
        return self._own(whole)

    def compare(self, text: str) -> list[str]:
        return self._gather(text)


@pytest.mark.parametrize("grain", ["weight", "2x2"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_two_ranks_make_the_masks_and_resume_points_of_one(
    tmp_path: Path, case: tuple[Score, Gradual], grain: str
) -> None:
    choice = Pattern.model_validate_json(f'{{"grain": "{grain}"}}').grain
    alone = Run(*case, grain=choice).train(ALL)
    expected = alone.scores(tmp_path / "alone")
    meeting, shared = threading.Barrier(2), dict[int, Any]()

    def work(rank: int) -> tuple[Run, dict[str, Tensor]]:
        run = runs[rank].train(ALL, threads[rank])
        return run, run.scores(tmp_path / f"{rank}", threads[rank])

    runs = [Run(*case, grain=choice) for _ in range(2)]  # seeds are the process'
    threads = [Threads(rank, meeting, shared) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for run, found in pool.map(work, range(2)):
            for ours, theirs in zip(run.masks, alone.masks, strict=True):
                assert all(torch.equal(ours[name], theirs[name]) for name in NAMES)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found)
    runs[1].pruner.load(tmp_path / "alone", STEPS, threads[1])  # what one process wrote
    for name in NAMES:
        whole = expected[f"score/{name}"].view(-1)
        assert torch.equal(runs[1].pruner._states[name]["score"], whole[len(whole) // 3 :])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(
    tmp_path: Path, case: tuple[Score, Gradual]
) -> None:
    whole = Run(*case).train(ALL)
    expected = whole.scores(tmp_path / "whole")
    Run(*case).train(range(1, 8)).scores(tmp_path / "first")
    before, rest = Run(*case).train(range(1, 8)), Run(*case)
    rest.model.load_state_dict(before.model.state_dict())
    set_masks(rest.model, before.pruner.masks())
    rest.pruner.load(tmp_path / "first", 7)
    rest.train(range(8, STEPS + 1))
    found = rest.scores(tmp_path / "rest")
    assert sorted(found) == sorted(f"{k}/{n}" for k in ("mean", "score", "square") for n in NAMES)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for ours, theirs in zip(rest.masks, whole.masks[7:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in NAMES)


# what is refused


@pytest.mark.parametrize("score", [HARD, SOFT])
def test_a_gradient_that_is_not_finite_is_left_out(tmp_path: Path, score: Score) -> None:
    run = Run(score, LIMIT).train(range(1, 4))
    before = run.scores(tmp_path / "before")
    (loss_of(run.model(batch(4)[0]), batch(4)[1]) * math.inf).backward()
    run.pruner.after_backward(4)
    after = run.scores(tmp_path / "after")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("score", [HARD, SOFT])
def test_scores_that_overflow_stop_the_run_and_name_the_matrix(score: Score) -> None:
    run = Run(score, LIMIT).train(range(1, 2))
    with torch.no_grad():  # two huge weights that cancel out, so that gradients are finite
        run.model.linears()[0].weight[:, :2] = torch.tensor([1e35, -1e35])
    x = batch(2)[0]
    x[:, 1] = x[:, 0]
    (run.model(x).sum() * 1e5).backward()
    run.pruner.after_backward(2)
    with pytest.raises(
        RunError, match=r"step 2: layer.0.dense.weight: holds a non-finite .* score"
    ):
        run.pruner.after_step(2)


def schedule(**changed: float) -> dict[str, Any]:
    return {"schedule": {"start": 0.1, "end": 0.8, "target": 0.9, **changed}}


def of_kind(kind: str, **settings: float) -> dict[str, Any]:
    return {"pattern": {"score": {"kind": kind, **settings}}}


SOFTLY = of_kind("soft_movement", penalty=400.0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (schedule(start=0, end=0) | of_kind("movement"), "schedule.start = 0: score = 'movement'"),
        (schedule(start=0, initial=0.1) | of_kind("movement"), "nothing can go before the first"),
        (schedule(start=0.0, end=0.0) | SOFTLY, "score = 'soft_movement' is learnt while"),
        (schedule(initial=0.1) | SOFTLY, "schedule.initial = 0.1: .* a threshold decides"),
        (schedule(target=0.999) | SOFTLY, "schedule.target = 0.999: .*, and can be 0.995 at most"),
        (
            schedule() | {"parts": [{"target": 0.999, **SOFTLY["pattern"]}]},
            "schedule.target = 0.999: with score = 'soft_movement'",
        ),
        (schedule() | of_kind("soft_movement"), "penalty\n  Field required"),
        (schedule() | of_kind("soft_movement", penalty=-1.0), "greater than or equal to 0"),
        (
            schedule() | of_kind("soft_movement", penalty=1.0, initial_threshold=0.2),
            "initial_threshold = 0.2: must not be above threshold = 0.1",
        ),
        (schedule() | of_kind("movement", learning_rate=0.0), "greater than 0"),
        (schedule() | of_kind("movement", penalty=1.0), "Extra inputs are not permitted"),
    ],
)
def test_nonsense_is_refused_while_a_recipe_is_read(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Pruning.model_validate(values, strict=False)


def test_a_sensible_recipe_is_read() -> None:
    Pruning.model_validate(schedule(start=0) | of_kind("movement"), strict=False)
    Pruning.model_validate(schedule(start=0, target=0.995) | SOFTLY, strict=False)


@pytest.mark.parametrize("score", [HARD, SOFT])
def test_one_shot_pruning_is_refused_with_the_model_as_it_was(score: Score) -> None:
    model = Net()
    with pytest.raises(RecipeError, match="learnt while training"):
        opfa.prune(model, 0.5, score=score)
    assert type(model.linears()[0]) is nn.Linear
