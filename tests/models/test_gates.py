"""Gradients of gates against differences, costs against counted ones, and least squares."""

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, model_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from opfa.models.costs import macs, milliseconds, parameters
from opfa.models.depth import drop_layers, first_stays
from opfa.models.gates import LayerGates, UnitGates
from opfa.models.refit import refit
from opfa.models.removal import groups_of, layers_of
from opfa.models.stepping import inputs_of

TOKENS = torch.randint(5, 27, (4, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
MASK[1, 7:] = 0
LABELS = torch.tensor([0, 1, 1, 0])


def losses(model: PreTrainedModel) -> Tensor:
    logits = model(input_ids=TOKENS, attention_mask=MASK).logits
    return torch.nn.functional.cross_entropy(logits, LABELS, reduction="none")


@torch.no_grad()
def scaled(model: PreTrainedModel, group: int, unit: int, factor: float) -> Tensor:
    """Losses with one unit's columns multiplied: what its gate does."""
    changed = copy.deepcopy(model)
    groups_of(changed)[group].columns()[:, unit] *= factor
    return losses(changed)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_gate_has_the_gradient_of_each_sequence(family: str) -> None:
    model = model_of(family).double().requires_grad_(False)
    groups = groups_of(model)
    with UnitGates(groups) as gates:
        found = gates.gradients(losses(model).sum())
    assert [each.shape for each in found] == [(4, units.count) for units in groups]
    for group, unit in ((0, 1), (1, 7), (2, 3), (5, 19)):
        more, less = (scaled(model, group, unit, 1 + step) for step in (1e-4, -1e-4))
        assert torch.allclose(found[group][:, unit], (more - less) / 2e-4, atol=1e-3)
    assert not losses(model).requires_grad  # the gates are gone


def cut(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    small = copy.deepcopy(model)
    for units, num in zip(groups_of(small), kept, strict=True):
        units.keep(torch.arange(num))
    return small


@pytest.mark.parametrize("family", CONFIGS)
def test_costs_are_what_is_counted(family: str) -> None:
    model = model_of(family)
    kept = [2, 5, 1, 20, 4, 0]
    small, counts = cut(model, kept), parameters(model)
    assert counts.of(kept) - counts.whole == small.num_parameters() - model.num_parameters()
    counts = macs(model, 3, 12)
    flops = []
    for each in (model, small):
        each.set_attn_implementation("eager")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            each(input_ids=TOKENS[:3])
        flops.append(counter.get_total_flops())
    assert 2 * (counts.whole - counts.of(kept)) == flops[0] - flops[1]


@pytest.mark.parametrize("family", CONFIGS)
def test_time_of_a_model_is_that_of_its_units_and_the_rest(family: str) -> None:
    found = milliseconds(model_of(family), 2, 8)
    assert [len(curve) for curve in found.curves] == [5, 21] * 3
    assert all((curve[1:] >= curve[:-1]).all() and curve[0] == 0 for curve in found.curves)
    assert found.whole > 0


def runs() -> list[tuple[Tensor, Any]]:
    batches = torch.randint(5, 27, (12, 4, 12), generator=torch.Generator().manual_seed(1))

    def run(ids: Tensor) -> Any:
        return lambda model: model(input_ids=ids, attention_mask=MASK)

    return [(MASK, run(ids)) for ids in batches]


def states(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.base_model(input_ids=TOKENS, attention_mask=MASK)[0][MASK.bool()]


def twins(family: str) -> tuple[PreTrainedModel, list[Tensor]]:
    """A model in which some units are others' doubles, and which these are."""
    model = model_of(family)
    doubles = []
    for units in groups_of(model):
        half = units.count // 2
        with torch.no_grad():
            for number, row in enumerate(units.rows):
                units.weight(number)[half:] = units.weight(number)[:half]
                if units.layer.get_submodule(row.path).bias is not None:
                    units.bias(number)[half:] = units.bias(number)[:half]
        doubles.append(torch.arange(units.count) >= half)
    return model, doubles


@pytest.mark.parametrize("family", CONFIGS)
def test_what_went_is_made_up_for_where_others_know_it(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opfa.models.refit.RIDGE", 1e-9)
    model, doubles = twins(family)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for units, is_gone in zip(groups_of(pruned), doubles, strict=True):
            units.erase(is_gone)
    far = (states(pruned) - states(model)).abs().max()
    assert list(refit(pruned, model, runs())) == [0, 1, 2]
    assert (states(pruned) - states(model)).abs().max() < far / 50
    for units, is_gone in zip(groups_of(pruned), doubles, strict=True):
        assert not units.squares()[is_gone].any() and units.squares()[~is_gone].all()


def passed(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor]:
    """Of a BERT's layer, what comes into the feed-forward's output matrix, with a one behind it,
    and what comes into the norm after it: of all tokens of `runs`.
    """
    output = model.base_model.get_submodule(f"encoder.layer.{layer}.output")
    paths = ("dense", "LayerNorm")
    with ExitStack() as watching, torch.no_grad():
        given, stream = (watching.enter_context(inputs_of(output.get_submodule(p))) for p in paths)
        for _, run in runs():
            run(model)
    inputs = torch.cat([states[MASK.bool()] for states in given]).double()
    ones = inputs.new_ones(len(inputs), 1)
    return torch.cat([inputs, ones], 1), torch.cat([each[MASK.bool()] for each in stream]).double()


def test_what_is_still_missing_can_not_be_made_of_what_comes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The normal equations of the residual stream, over real tokens, in each layer."""
    monkeypatch.setattr("opfa.models.refit.RIDGE", 1e-9)
    model = model_of("bert")
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for units in groups_of(pruned):
            units.erase(torch.arange(units.count) % 3 == 0)

    def correlation(layer: int) -> float:
        inputs, found = passed(pruned, layer)
        missing = passed(model, layer)[1] - found
        return float((inputs.T @ missing).norm() / (inputs.norm() * missing.norm()))

    assert min(map(correlation, range(3))) > 1e-2
    list(refit(pruned, model, runs()))
    assert max(map(correlation, range(3))) < 1e-3


def test_nothing_changes_where_nothing_went() -> None:
    model = model_of("bert")
    again = copy.deepcopy(model)
    list(refit(again, model, runs()))
    assert (states(again) - states(model)).abs().max() < 1e-5


@torch.no_grad()
def test_a_sparse_matrix_keeps_its_zeros() -> None:
    model, doubles = twins("bert")
    for units in groups_of(model):
        half, columns = units.count // 2, units.columns()
        columns[torch.rand(columns.shape, generator=torch.Generator().manual_seed(2)) < 0.5] = 0
        columns[:, half:] = columns[:, :half] * 1.5
    pruned = copy.deepcopy(model)
    for units, is_gone in zip(groups_of(pruned), doubles, strict=True):
        units.erase(is_gone)
    zeros = [units.out.weight == 0 for units in groups_of(pruned)]
    before = (states(pruned) - states(model)).square().mean()
    list(refit(pruned, model, runs()))
    for units, was_zero in zip(groups_of(pruned), zeros, strict=True):
        assert torch.equal(units.out.weight == 0, was_zero)
    assert (states(pruned) - states(model)).square().mean() < before / 10


@pytest.mark.parametrize("family", CONFIGS)
def test_a_gate_of_a_layer_has_the_gradient_of_each_sequence(family: str) -> None:
    model = model_of(family).requires_grad_(False)
    with LayerGates([layer for layer, _ in layers_of(model)]) as gates:
        (found,), (again,) = (gates.gradients(losses(model).sum()) for _ in range(2))
    assert torch.equal(again, found)
    assert found.shape == (4, 3)

    def without(layer: nn.Module, step: float) -> Tensor:
        def scale(_: nn.Module, args: Any, states: Any) -> Any:
            after = states[0] if isinstance(states, tuple) else states
            scaled = args[0] + (1 + step) * (after - args[0])
            return (scaled, *states[1:]) if isinstance(states, tuple) else scaled

        handle = layer.register_forward_hook(scale)
        with torch.no_grad():
            changed = losses(model)
        handle.remove()
        return changed

    for number, (layer, _) in enumerate(layers_of(model)):
        difference = (without(layer, 1e-2) - without(layer, -1e-2)) / 2e-2
        assert torch.allclose(found[:, number], difference, rtol=0.02, atol=1e-2)
    assert not losses(model).requires_grad


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_with_fewer_layers_is_a_plain_one(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    assert first_stays(model) == family.startswith("modernbert")
    drop_layers(model, [0, 2])
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 2
    assert torch.allclose(losses(again), losses(model), atol=1e-6)


def test_layers_keep_their_own_numbers_of_units(tmp_path: Path) -> None:
    model = cut(model_of("bert"), [4, 20, 4, 20, 4, 7])
    model.config.per_layer_config = {2: {"intermediate_size": 7}}
    drop_layers(model, [1, 2])
    assert model.config.to_dict()["per_layer_config"] == {"1": {"intermediate_size": 7}}
    drop_layers(model, [0])
    assert not model.config.is_heterogeneous
