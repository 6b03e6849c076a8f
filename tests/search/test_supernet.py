"""A super-network: gates against slices, and slices that are better after it."""

from pathlib import Path

import pytest
import torch
from families import CONFIGS, model_of
from searching import search_recipe
from test_slices import BATCH, TASK, drawn, logits, space_of
from torch.nn.functional import cross_entropy, kl_div

from opfa.search.material import Material
from opfa.search.shapes import Space
from opfa.search.slices import Slices
from opfa.search.supernet import Masked, _add_gradients, train_supernet

pytest_plugins = ["searching"]
pytestmark = pytest.mark.usefixtures("nothing_stays_registered")


@pytest.mark.parametrize("family", CONFIGS)
def test_behind_gates_a_model_answers_as_its_slice(family: str) -> None:
    model = model_of(family)
    space, before = space_of(model), logits(model)
    for seed in range(3):
        shape = drawn(space, seed)
        with Masked(model, shape):
            found = logits(model)
        expected = logits(Slices(model, space).cut(shape))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), before)  # the gates are gone


def test_the_largest_learns_the_task_and_slices_learn_its_answers() -> None:
    """Gradients against plain torch on the slice itself."""
    model = model_of("bert").requires_grad_(True)
    space = space_of(model)
    shape = drawn(space, 1)
    _add_gradients(model, TASK, BATCH, [shape])
    found = {name: each.grad for name, each in model.named_parameters()}
    again = model_of("bert").requires_grad_(True)
    inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    answers = again(**inputs).logits
    loss = cross_entropy(answers, BATCH["labels"])
    with Masked(again, shape):
        ours = again(**inputs).logits.log_softmax(1)
    theirs = answers.detach().log_softmax(1)
    (loss + kl_div(ours, theirs, log_target=True, reduction="batchmean")).backward()
    for name, parameter in again.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_slices_are_nearer_to_the_whole_model_after_it(tuned: Path, questions: Path) -> None:
    supernet = {"epochs": 4.0, "learning_rate": 3e-3, "random": 2}
    recipe = search_recipe(tuned, questions, supernet=supernet)
    material = Material(recipe, str(tuned))
    model = material.load(material.held_out.classes)
    space = Space.of(model, recipe.search.space, [1.0, 2.0])
    rows = [material.held_out.features[i] for i in range(60)]
    batch = material.held_out.collate(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def distance() -> float:
        slices = Slices(model, space)
        with torch.no_grad():
            whole = model(**inputs).logits.log_softmax(1)
            found = [slices.cut(drawn(space, seed))(**inputs).logits for seed in range(6)]
        losses = [
            kl_div(each.log_softmax(1), whole, log_target=True, reduction="batchmean")
            for each in found
        ]
        return float(torch.stack(losses).mean())

    before = distance()
    train_supernet(model, material.task, material.everything(), space, recipe)
    assert distance() < 0.7 * before
    assert not any(parameter.requires_grad for parameter in model.parameters())
