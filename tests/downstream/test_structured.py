"""Structured pruning without training: what goes, what it costs, and what is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import finetune_recipe
from transformers import AutoModelForSequenceClassification

import opfa
from opfa.commands import app as cli
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.results import StructuredResult
from opfa.errors import OpfaError, RunError
from opfa.models.costs import macs
from opfa.models.removal import find_dead, groups_of
from opfa.models.trained import load
from opfa.sparsity.units import NEURONS

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")


@pytest.fixture(scope="module")
def run(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: 2 layers, 2 heads, 32 neurons, and zeros."""
    output = tmp_path_factory.mktemp("run") / "run"
    finetune(finetune_recipe(sparse, examples), output)
    return output


@pytest.fixture(scope="module")
def half(run: Path, tmp_path_factory: pytest.TempPathFactory) -> StructuredResult:
    return opfa.prune_structured(run, tmp_path_factory.mktemp("half") / "half", keep=0.5)


def test_it_keeps_what_the_budget_allows_and_says_so(run: Path, half: StructuredResult) -> None:
    tokens = FinetuneRecipe.read(run / "recipe.toml").task.sequence_tokens
    counts = macs(load(run), 1, tokens)
    assert half.cost == counts.whole and 0.4 * half.cost < half.left <= 0.5 * half.cost
    kept = [number for layer in half.layers for number in (layer.heads, layer.neurons)]
    assert counts.of(kept) == half.left
    dead = find_dead(load(half.directory))
    found = [int((~each.dead[kind]).sum()) for each in dead for kind in each.dead]
    assert all(
        alive <= num for alive, num in zip(found, kept, strict=True)
    )  # some were dead before
    assert 0 in found or sum(found) < 2 * (2 + 32)
    assert opfa.evaluate(half.directory, run / "recipe.toml").metrics == half.after
    assert opfa.evaluate(run).metrics == half.before
    assert opfa.inspect(half.directory)["stated"] == "matches"


def test_what_it_left_shrinks_and_is_the_same(
    run: Path, half: StructuredResult, tmp_path: Path
) -> None:
    small = opfa.shrink(half.directory, tmp_path / "small")
    assert small.parameters < small.of_parameters
    recipe = run / "recipe.toml"
    assert opfa.evaluate(tmp_path / "small", recipe).metrics == half.after
    again = opfa.prune_structured(tmp_path / "small", tmp_path / "again", recipe, keep=0.5)
    assert again.cost <= half.left and again.left <= 0.5 * half.left
    assert [kept.of_heads for kept in again.layers] == [kept.heads for kept in small.layers]


def test_it_is_the_same_each_time(run: Path, half: StructuredResult, tmp_path: Path) -> None:
    again = opfa.prune_structured(run, tmp_path / "again", keep=0.5)
    assert again.layers == half.layers
    for one, other in zip(
        load(half.directory).parameters(), load(again.directory).parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_the_zeros_of_a_sparse_model_stay(run: Path, half: StructuredResult) -> None:
    for before, after in zip(groups_of(load(run)), groups_of(load(half.directory)), strict=True):
        assert (before.out.weight == 0).any()
        assert not ((before.out.weight == 0) & (after.out.weight != 0)).any()


def test_parameters_are_a_cost(run: Path, tmp_path: Path) -> None:
    found = opfa.prune_structured(run, tmp_path / "found", keep=0.7, of="parameters", examples=9)
    assert found.left <= 0.7 * found.cost and found.examples == 9


def test_milliseconds_are_a_cost(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a unit takes one, a layer without any two, and all the rest four."""

    def times(tasks: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
        for name, execute in tasks.items():
            execute()
            assert name == "model" or name[2] <= name[0][name[1] == NEURONS]
        heads, neurons = next(name for name in tasks if name != "model")[0]
        widths = {name: name[2] for name in tasks if name != "model"}
        return {"model": 4.0 + 2 * (2 + heads + neurons), **{n: 2.0 + w for n, w in widths.items()}}

    monkeypatch.setattr("opfa.models.costs.medians", times)
    found = opfa.prune_structured(run, tmp_path / "found", keep=0.5, of="milliseconds")
    assert found.cost == 4 + 2 * (2 + 34)
    kept = sum(kept.heads + kept.neurons for kept in found.layers)
    assert 8 + kept <= found.left <= 38
    with pytest.raises(RunError, match=r"keep = 0\.1: must be at least 0\.105; so many"):
        opfa.prune_structured(run, tmp_path / "less", keep=0.1, of="milliseconds")
    assert not (tmp_path / "less").exists()


def test_magnitudes_choose_others(run: Path, tmp_path: Path) -> None:
    found = opfa.prune_structured(run, tmp_path / "found", keep=0.5, score="magnitude")
    assert found.left <= 0.5 * found.cost
    groups = groups_of(load(run))
    for units, after in zip(groups, groups_of(load(found.directory)), strict=True):
        worth, is_kept = units.squares(), after.squares() > 0
        if is_kept.any() and not is_kept.all():
            assert worth[is_kept].min() >= worth[~is_kept].max()


def test_the_command_says_what_it_did(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found"
    assert cli.run(["prune", str(run), "--keep", "0.5", "--output", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["of"] == "macs" and found["left"] <= found["cost"] / 2
    assert len(found["layers"]) == 2 and found["directory"] == str(output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep: Input should be greater than 0 \(got 0"),
        ({"keep": 1.0}, r"keep: Input should be less than 1 \(got 1"),
        (
            {"keep": 0.5, "of": "flops"},
            "of: Input should be 'macs', 'milliseconds' or",
        ),
        ({"keep": 0.5, "tokens": 99}, "tokens = 99: this model has only 32 positions"),
        ({"keep": 0.5, "examples": 0}, "examples: Input should be greater than or equal to 1"),
    ],
)
def test_bad_budgets_are_refused(
    run: Path, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(OpfaError, match=message):
        opfa.prune_structured(run, tmp_path / "found", **options)  # pyright: ignore[reportArgumentType]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--sparsity, --keep, --layers: give one"),
        (["--sparsity", "0.5", "--keep", "0.5"], "--sparsity, --keep, --layers: give one"),
        (["--sparsity", "0.5", "--of", "macs"], "--of: has no meaning with --sparsity"),
        (["--layers", "1", "--of", "macs"], "--of: has no meaning with --layers"),
        (["--keep", "0.5", "--scope", "global"], "--scope: has no meaning with --keep"),
        (["--sparsity", "0.5", "a.b=1"], "[section.key=value]: has no meaning with --sparsity"),
    ],
)
def test_options_of_the_other_way_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "found")]
    assert cli.run(["prune", "./nowhere", *options, *output]) == 2
    assert message in capsys.readouterr().err


def test_layers_that_the_loss_needs_stay(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "one"
    assert cli.run(["prune", str(run), "--layers", "1", "--output", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["kept"]) == 1 and found["of_layers"] == 2 and found["examples"] == 80
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.num_hidden_layers == 1
    kept = groups_of(load(run))[2 * found["kept"][0]]
    assert torch.equal(groups_of(model)[0].out.weight, kept.out.weight)
    assert opfa.evaluate(output, run / "recipe.toml").metrics == found["after"]
    assert opfa.inspect(output)["stated"] == "matches"
    for layers in (0, 2):
        with pytest.raises(RunError, match=f"layers = {layers}: must be from 1 to 1, since this"):
            opfa.prune_layers(run, tmp_path / "other", layers=layers)
    assert not (tmp_path / "other").exists()
