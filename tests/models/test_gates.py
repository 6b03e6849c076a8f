"""Gradients of gates against differences, costs against counted ones, and least squares."""

import copy
from typing import Any

import pytest
import torch
from families import CONFIGS, model_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from opfa.models.costs import macs, milliseconds, parameters
from opfa.models.gates import Gates
from opfa.models.refit import refit
from opfa.models.removal import groups_of

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
    with Gates(groups) as gates:
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
