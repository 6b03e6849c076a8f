"""Blocks, neurons and heads of every family, and several parts in one pruning."""

import re
from typing import Any

import pytest
import torch
from families import CONFIGS, model_of
from torch import Tensor, nn
from transformers import PreTrainedModel

import opfa
from opfa.compression.grains import Block, Heads, Neurons
from opfa.compression.oneshot import OneShot
from opfa.compression.pattern import Pattern
from opfa.compression.pruner import Pruner
from opfa.compression.schedules import Gradual
from opfa.errors import ModelError, RecipeError
from opfa.models.removal import find_dead, layers_of
from opfa.sparsity.layers import fuse, masked_layers
from opfa.sparsity.units import HEADS, NEURONS
from opfa.training.sections import Pruning

COUNTS = {HEADS: 4, NEURONS: 20}  # of each of three layers
LAYER = "bert.encoder.layer.0"
ATTENTION = r"\.(query|key|value)$"


def pattern(**values: Any) -> Pattern:
    return OneShot.check({**values, "sparsity": 0.5}, "prune")


def parts(*values: dict[str, Any], **schedule: Any) -> Pruning:
    schedule = {"start": 0, "end": 0, "target": 0.5, **schedule}
    return Pruning.model_validate({"schedule": schedule, "parts": tuple(values)}, strict=False)


def pruner_of(model: nn.Module, pruning: Pruning) -> Pruner:
    return Pruner(model, pruning.ramp(10), pruning.patterns)


def worths(model: PreTrainedModel, kind: str) -> Tensor:
    """The sum of magnitudes of each unit, [layers, units]."""
    found = []
    for _, by_kind in layers_of(model):
        units = by_kind[kind]
        rows = [units.weight(number).abs().sum((1, 2)) for number in range(len(units.rows))]
        found.append(sum(rows) + units.columns().abs().sum((0, 2)))
    return torch.stack(found)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_the_lowest_units_die_whole_and_can_be_removed(family: str, kind: str, scope: Any) -> None:
    model = model_of(family)
    with torch.no_grad():  # layers of other magnitudes
        for number, (layer, _) in enumerate(layers_of(model)):
            for parameter in layer.parameters():
                parameter.mul_(1 + number / 50)
    worth, sparsity = worths(model, kind), 0.65
    result = opfa.prune(model, sparsity, scope=scope, grain=kind)
    if scope == "layer":
        lowest = worth.argsort(1).argsort(1) < round(sparsity * COUNTS[kind])
    else:
        lowest = (worth.flatten().argsort().argsort() < round(sparsity * worth.numel())).view(3, -1)
    found = find_dead(model)
    assert torch.equal(torch.stack([each.dead[kind] for each in found]), lowest)
    other = next(name for name in COUNTS if name != kind)
    assert not any(each.dead[other].any() or each.averaging.any() for each in found)
    assert result.zeros / result.size == pytest.approx(float(lowest.float().mean()))
    assert torch.equal(worths(model, kind) == 0, lowest)


def test_blocks_are_exact_and_whole() -> None:
    model = model_of("bert")
    result = opfa.prune(model, 0.3, grain="2x4")
    for name, tensor in result.tensors.items():
        weight = model.get_parameter(name)
        live = weight.unflatten(0, (-1, 2)).unflatten(2, (-1, 4)) != 0
        counts = live.sum((1, 3)).flatten()
        assert set(counts.tolist()) <= {0, 8}
        assert int((counts == 0).sum()) == round(0.3 * len(counts)) == tensor["zeros"] / 8


def test_a_unit_is_summed_finer_than_fp32() -> None:
    score = torch.full((8, 8), 1e-4)
    score[0, 0] = 2048.0  # in fp32 each of the others would vanish beside it
    (pooled,) = Block(rows=8, columns=8).pool({"a": score}).values()
    assert pooled.item() == torch.tensor(2048 + 63e-4, dtype=torch.float64).float().item() > 2048


def test_monotone_heads_stay_pruned() -> None:
    model = model_of("modernbert")
    pruner = Pruner(
        model,
        Gradual(end=0, hold_until=1, target=0.5),
        pattern(grain="heads", monotone=True),
    )
    pruner.after_step(0)
    before = {name: mask.clone() for name, mask in pruner.masks().items()}
    with torch.no_grad():
        for name, mask in before.items():
            model.get_parameter(name)[mask] = 1e-3
    pruner.after_step(1)
    assert all(torch.equal(mask, before[name]) for name, mask in pruner.masks().items())
    assert pruner.left() == {"heads": (6, 12)}


# several parts


def test_each_part_has_its_own_grain_target_and_scope() -> None:
    model = model_of("bert")
    pruning = parts(
        {"include": [ATTENTION], "grain": "6x8", "target": 0.75, "scope": "global"},
        {"grain": "neurons"},
        {"include": [r"attention\.output"]},
    )
    pruner = pruner_of(model, pruning)
    pruner.after_step(0)
    assert pruner.left() == {"blocks": (27, 108), "neurons": (30, 60)}
    masks = pruner.masks()
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert len(zeros) == 18
    assert all(n == 288 for name, n in zeros.items() if "attention.output" in name)
    assert all(n == 240 for name, n in zeros.items() if "attention" not in name)
    blocks = [n for name, n in zeros.items() if ".self." in name]
    assert sum(blocks) == 81 * 48 and len(set(blocks)) > 1
    assert pruner.planned(1) == [pytest.approx(pruner.sparsity())]


def test_parts_are_pruned_as_each_alone() -> None:
    both, alone = model_of("roberta"), model_of("roberta")
    pruner_of(both, parts({"include": [ATTENTION]}, {"grain": "neurons"})).after_step(0)
    fuse(both)
    opfa.prune(alone, 0.5, include=[ATTENTION])
    opfa.prune(alone, 0.5, grain="neurons")
    pairs = zip(both.parameters(), alone.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"pruning.parts.1.include = .*: bert.encoder.layer.0.attention.self.query is pruned "),
        ({"grain": "5x8"}, r"pruning.parts.1.grain.rows = 5: does not divide the 24 rows"),
        ({"include": ["decoder"]}, "pruning.parts.1.include = 'decoder': matches no linear layer"),
    ],
)
def test_parts_that_do_not_fit_are_refused_and_the_model_is_as_it_was(
    values: dict[str, Any], message: str
) -> None:
    model = model_of("bert")
    with pytest.raises(RecipeError, match=message):
        pruner_of(model, parts({"include": [r"\.(query|key)$"]}, values))
    assert not masked_layers(model)


# bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"grain": "24x8"},
            rf"grain.rows = 24: does not divide the 20 rows of {LAYER}.intermediate.dense.weight "
            r"\[20, 24\]; 1, 2, 4, 5, 10, 20 do",
        ),
        ({"grain": "4x5"}, r"grain.columns = 5: does not divide the 24 columns of .* \[24, 24\]"),
        (
            {"grain": "neurons", "exclude": [r"\d\.output"]},
            rf"grain = 'neurons': {LAYER}.output.dense.weight \[24, 20\] is not pruned, and "
            rf"{LAYER}.intermediate.dense.weight is; they share neurons",
        ),
        ({"grain": "heads", "include": ["value"]}, r"query.weight \[24, 24\] is not pruned"),
        (
            {"grain": "heads", "include": ["intermediate"]},
            rf"grain = 'heads': .* have none; include {LAYER}.attention.self.query, ",
        ),
    ],
)
def test_a_grain_that_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    model = model_of("bert")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(RecipeError, match=message):
        opfa.prune(model, 0.5, **values)
    assert type(model.get_submodule(f"{LAYER}.output.dense")) is nn.Linear
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("grain", "message"),
    [
        ("head", "grain.kind: must be one of 'weight', 'block', 'neurons', 'heads' .got 'head'"),
        ("block", "grain.rows: missing; this key is required\n  grain.columns: missing"),
        ({"rows": 2}, "grain.kind: missing"),
        ("0x2", r"grain.rows: .* greater than or equal to 1 \(got 0\)"),
        ({"kind": "block", "row": 2}, "grain.row: unknown key; did you mean 'rows'"),
    ],
)
def test_a_grain_that_is_none_is_refused(grain: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pattern(grain=grain)


def test_heads_of_an_unknown_model_are_refused() -> None:
    model = nn.Sequential()
    model.layer = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
    with pytest.raises(RecipeError, match="grain = 'heads': are known of bert, roberta, distil"):
        opfa.prune(model, 0.5, grain="heads")


def test_zeros_inside_of_kept_units_are_not_lost() -> None:
    model = model_of("bert")
    opfa.prune(model, 0.6)
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(ModelError, match="zeros of 480 in what is kept.*prune units first"):
        opfa.prune(model, 0.5, grain="neurons")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    model = model_of("bert")
    opfa.prune(model, 0.5, grain="neurons")
    dead = worths(model, NEURONS) == 0
    assert opfa.prune(model, 0.6).sparsity == pytest.approx(0.6, abs=1e-3)
    assert bool((worths(model, NEURONS) == 0)[dead].all())


def test_one_shot_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    result = opfa.prune(model_of("bert"), 0.5, grain="heads")
    assert (result.grain, result.left) == ("heads", {"heads": (6, 12)})
    result.show()
    assert re.search(r"heads left +6 of 12", capsys.readouterr().out)
    with pytest.raises(RecipeError, match="grain: Input should be an object .got 3"):
        opfa.prune(model_of("bert"), 0.5, grain=3)  # pyright: ignore[reportArgumentType]


# recipes


def test_a_recipe_without_parts_is_written_as_before_they_were_known() -> None:
    pruning = Pruning.model_validate({"schedule": {"end": 1, "target": 0.5}})
    written = pruning.model_dump(mode="json")
    assert [*written] == ["schedule", "pattern"]
    assert [*written["pattern"]] == ["include", "exclude", "scope", "monotone"]


def test_grains_have_a_short_form() -> None:
    assert pattern(grain="32x16").grain == Block(rows=32, columns=16)
    assert pattern(grain={"kind": "neurons"}).grain == Neurons() == pattern(grain="neurons").grain
    assert pattern(grain="heads").grain == Heads() != Neurons()
