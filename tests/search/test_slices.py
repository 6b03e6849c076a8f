"""Slices against models whose units are zero, and fits against least squares of numpy."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONFIGS, model_of
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import opfa  # noqa: F401 - uneven models are read after it
from opfa.models.refit import RIDGE
from opfa.models.removal import groups_of
from opfa.models.stepping import inputs_of
from opfa.search.costs import Prices
from opfa.search.recipe import Search
from opfa.search.recipe import Space as Settings
from opfa.search.shapes import Shape, Space
from opfa.search.slices import Slices, in_order, write_fits
from opfa.tasks.recipe import Task

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")
TOKENS = torch.randint(5, 27, (6, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
MASK[1, 7:] = 0
BATCH = {"input_ids": TOKENS, "attention_mask": MASK, "labels": torch.zeros(6, dtype=torch.long)}
TASK = Task(train="a", validation="b", sequence_tokens=12)
SETTINGS = Settings(neuron_steps=4)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS, attention_mask=MASK).logits


def space_of(model: PreTrainedModel) -> Space:
    return Space.of(model, SETTINGS, [1.0, 3.0, 2.0])


def drawn(space: Space, seed: int) -> Shape:
    generator = np.random.default_rng(seed)
    return space.shape({n: int(generator.integers(len(s))) for n, s in space.steps.items()})


@pytest.mark.parametrize("family", CONFIGS)
def test_the_order_of_units_changes_no_answer(family: str) -> None:
    model = model_of(family)
    expected, before = logits(model), [u.out.weight.clone() for u in groups_of(model)]
    orders = [torch.randperm(units.count) for units in groups_of(model)]
    in_order(model, orders)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for units, order, old in zip(groups_of(model), orders, before, strict=True):
        last = int(order[-1])  # goes last, so it comes first
        columns = old[:, last * units.size : (last + 1) * units.size]
        assert torch.equal(units.columns()[:, 0], columns)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_slice_answers_as_the_model_whose_units_are_zero(family: str) -> None:
    model = model_of(family)
    space = space_of(model)
    slices = Slices(model, space)
    for seed in range(4):
        shape = drawn(space, seed).model_copy(update={"layers": (True, True, True)})
        zeroed = copy.deepcopy(model)
        for units, count in zip(groups_of(zeroed), shape.groups, strict=True):
            is_gone = torch.arange(units.count) >= count
            with torch.no_grad():
                units.erase(is_gone)
        small = slices.cut(shape)
        assert [units.count for units in groups_of(small)] == shape.groups
        torch.testing.assert_close(logits(small), logits(zeroed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_a_slice_is_saved_and_read_again_with_layers_gone(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    space = space_of(model)
    shape = drawn(space, 1).model_copy(update={"layers": (True, True, False)})
    small = Slices(model, space).cut(space.clean(shape.heads, shape.neurons, shape.layers))
    small.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(again), logits(small))


@pytest.mark.parametrize("family", CONFIGS)
def test_the_whole_model_is_left_as_it_was(family: str) -> None:
    model = model_of(family)
    before = copy.deepcopy(model.state_dict())
    space = space_of(model)
    Slices(model, space).cut(space.least)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    torch.testing.assert_close(logits(Slices(model, space).cut(space.whole)), logits(model))


@pytest.mark.parametrize("family", ["bert", "modernbert"])  # with a bias, and without
def test_fits_are_ridge_regression_on_the_whole_models_inputs(family: str, tmp_path: Path) -> None:
    model = model_of(family).requires_grad_(False)
    space = space_of(model)
    write_fits(model, TASK, [BATCH], space, tmp_path / "fits")
    small = Slices(model, space, tmp_path / "fits").cut(
        Shape(heads=(3, 2, 4), neurons=(5, 0, 20), layers=(True, True, True))
    )
    for number, count in ((0, 3), (1, 5), (2, 2), (3, 0)):
        units, found = groups_of(model)[number], groups_of(small)[number]
        with inputs_of(units.out) as given:
            logits(model)
        inputs = given[0][MASK.bool()].double().numpy()
        width = count * units.size
        weight = units.out.weight.double().numpy()
        kept, missing = inputs[:, :width], inputs[:, width:] @ weight[:, width:].T
        has_bias = units.out.bias is not None
        ones = np.ones((len(kept), int(has_bias)))
        ridge = np.sqrt(RIDGE * (kept**2).sum(0).mean()) if width else 0.0
        penalty = np.hstack([ridge * np.eye(width), np.zeros((width, int(has_bias)))])
        rows = np.vstack([np.hstack([kept, ones]), penalty])
        wanted = np.vstack([missing, np.zeros((width, missing.shape[1]))])
        change = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        expected = weight[:, :width] + change[:width].T
        np.testing.assert_allclose(found.out.weight.numpy(), expected, atol=1e-3)
        if has_bias:
            bias = units.out.bias.double().numpy() + change[-1]
            np.testing.assert_allclose(found.out.bias.numpy(), bias, atol=1e-3)


def test_fitted_slices_are_nearer_to_the_whole_model(tmp_path: Path) -> None:
    model = model_of("bert").requires_grad_(False)
    space = space_of(model)
    write_fits(model, TASK, [BATCH], space, tmp_path / "fits")
    shape = Shape(heads=(2, 2, 2), neurons=(10, 10, 10), layers=(True, True, True))
    far = (logits(Slices(model, space).cut(shape)) - logits(model)).square().mean()
    near = (logits(Slices(model, space, tmp_path / "fits").cut(shape)) - logits(model)).square()
    assert near.mean() < 0.7 * far


@pytest.mark.parametrize("family", CONFIGS)
def test_predicted_bytes_and_multiply_adds_are_those_of_the_slice(family: str) -> None:
    from opfa.models import costs

    model = model_of(family)
    space, search = space_of(model), Search(batch=2, tokens=10)
    prices = Prices.measured(model, search, 12)
    for seed in range(4):
        shape = drawn(space, seed)
        small, found = Slices(model, space).cut(shape), prices.of(shape)
        assert found["bytes"] == 4 * sum(each.numel() for each in small.parameters())
        assert found["macs"] == costs.macs(small, 2, 10).whole
    values = prices.values()
    for each in values.values():
        del each["forms"]  # as searches had them before
    again = Prices.read(values)
    assert all(again.of(drawn(space, s)) == prices.of(drawn(space, s)) for s in range(4))
