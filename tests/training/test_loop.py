"""The loop, and what a concern from outside can do."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AfterStep, break_off, finetune_recipe, pretrain_recipe
from safetensors.torch import load_file
from torch import Tensor

from opfa.downstream.finetune import finetune
from opfa.errors import RunError
from opfa.recipe import Recipe
from opfa.storage.files import write_text
from opfa.training import loop
from opfa.training.checkpoint import model_digest, save_point
from opfa.training.distributed import Stopped
from opfa.training.loop import Concern, Progress
from opfa.training.state import Piece, Pieces, save_pieces
from opfa.upstream.pretrain import pretrain

DECAY = 0.5
FILE = "ema.safetensors"  # one rank; with several, a name for each


class Averaging(Concern):
    """An exponential moving average of the fp32 weights, which survives a resume."""

    def begin(self, at: Progress) -> None:
        if at.step == 0:
            self.mean = {n: at.engine.read(p).clone() for n, p in at.model.named_parameters()}

    def after_step(self, at: Progress) -> None:
        for name, parameter in at.model.named_parameters():
            self.mean[name].view(-1).lerp_(at.engine.read(parameter).view(-1), 1 - DECAY)

    def end(self, at: Progress) -> None:
        self.save(at, at.run.directory)

    def save(self, at: Progress, directory: Path) -> None:
        save_pieces(directory / FILE, (Piece(n, 0, mean) for n, mean in self.mean.items()), {})

    def load(self, at: Progress, directory: Path) -> None:
        saved, parameters = Pieces(directory, FILE), dict(at.model.named_parameters())
        self.mean = {n: saved.whole(n, at.engine.read(p).numel()) for n, p in parameters.items()}


Train = Callable[..., Any]


@pytest.fixture(params=["upstream", "downstream"])
def side(
    request: pytest.FixtureRequest, prepared: Path, sparse: Path, examples: Path
) -> tuple[Train, Recipe]:
    if request.param == "upstream":
        return pretrain, pretrain_recipe(prepared)
    return finetune, finetune_recipe(sparse, examples)


def test_an_average_of_weights_is_a_concern_from_outside(
    side: tuple[Train, Recipe], tmp_path: Path
) -> None:
    train, recipe = side
    history: list[dict[str, Tensor]] = []

    class Watching(Concern):
        def begin(self, at: Progress) -> None:
            self.after_step(at)

        def after_step(self, at: Progress) -> None:
            parameters = at.model.named_parameters()
            history.append({n: at.engine.read(p).flatten().clone() for n, p in parameters})

    train(recipe, tmp_path / "whole", concerns=[Averaging(), Watching()])
    found = load_file(tmp_path / "whole" / FILE)
    assert len(history) in (9, 11) and len(found) == len(history[0])
    for name, mean in history[0].items():
        average = mean
        for weights in history[1:]:
            average = DECAY * average + (1 - DECAY) * weights[name]
        torch.testing.assert_close(found[f"{name}@0"], average)
    assert any(not torch.equal(found[f"{n}@0"], last) for n, last in history[-1].items())


def test_it_survives_a_resume_and_changes_nothing(
    side: tuple[Train, Recipe], tmp_path: Path
) -> None:
    train, recipe = side
    train(recipe, tmp_path / "plain")
    train(recipe, tmp_path / "whole", concerns=[Averaging()])
    told = AfterStep(5, (tmp_path / "broken/stop").touch)
    with pytest.raises(Stopped, match="stopped at step 5, which is saved"):
        train(recipe, tmp_path / "broken", concerns=[Averaging(), told])
    train(recipe, tmp_path / "broken", resume=True, concerns=[Averaging()])
    means = [load_file(tmp_path / name / FILE) for name in ("whole", "broken")]
    assert all(torch.equal(mean, means[1][name]) for name, mean in means[0].items())
    digests = {model_digest(tmp_path / n / "model") for n in ("plain", "whole", "broken")}
    assert len(digests) == 1


def test_hooks_are_called_in_this_order(side: tuple[Train, Recipe], tmp_path: Path) -> None:
    train, recipe = side
    calls: list[tuple[str, int]] = []

    class Recording(Concern):
        def begin(self, at: Progress) -> None:
            calls.append(("begin", at.step))

        def before_step(self, at: Progress) -> None:
            assert all(p.grad is None or not p.grad.any() for p in at.model.parameters())
            calls.append(("before_step", at.step))

        def after_backward(self, at: Progress) -> None:
            calls.append(("after_backward", at.step))

        def after_step(self, at: Progress) -> None:
            calls.append(("after_step", at.step))
            at.is_over = at.step == 2

        def end(self, at: Progress) -> None:
            calls.append(("end", at.step))

    train(recipe, tmp_path / "run", concerns=[Recording()])
    step = ("before_step", "after_backward", "after_step")
    assert [name for name, _ in calls] == ["begin", *step, *step, "end"]
    assert [number for _, number in calls] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_gradient_is_seen_before_the_weights_change(
    side: tuple[Train, Recipe], tmp_path: Path
) -> None:
    train, recipe = side
    seen: list[dict[str, Tensor]] = []

    class Watching(Concern):
        def before_step(self, at: Progress) -> None:
            parameters = at.model.named_parameters()
            seen.append({n: at.engine.read(p).flatten().clone() for n, p in parameters})

        def after_backward(self, at: Progress) -> None:
            self.before_step(at)

        def after_step(self, at: Progress) -> None:
            self.before_step(at)
            at.is_over = at.step == 2  # the first step's rate may be 0

    train(recipe, tmp_path / "run", concerns=[Watching()])
    before, between, after = seen[-3:]
    assert len(seen) == 6
    assert all(torch.equal(weights, between[name]) for name, weights in before.items())
    assert any(not torch.equal(weights, after[name]) for name, weights in between.items())


def test_a_resume_point_of_an_older_version_is_refused(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(sparse, examples)
    break_off(6, finetune, recipe, tmp_path / "run")
    root = tmp_path / "run/checkpoints"
    save_point(root, 5, lambda to: write_text(to / "state.pt", "a pickle"), {}, keep=1)
    with pytest.raises(RunError, match="step-00000005: an older version wrote this resume point"):
        finetune(recipe, tmp_path / "run", resume=True)


def test_the_loop_is_short_and_knows_no_concern() -> None:
    source = inspect.getsource(loop.train) + inspect.getsource(loop.accumulate)
    assert len(source.splitlines()) <= 45
    for word in ("log", "save", "prune", "mask", "quant", "evaluate", "signal"):
        assert word not in source
