"""The space of shapes: every one has its steps, and its size is the number of different ones."""

import itertools

import pytest
from families import model_of

from opfa.search.recipe import Space as Settings
from opfa.search.shapes import Form, Shape, Space

SPACE = Space((2, 1), (5, 4), 1, Settings(neuron_steps=2))


def all_params(space: Space) -> list[dict[str, int]]:
    steps = [range(len(each)) for each in space.steps.values()]
    return [dict(zip(space.steps, chosen, strict=True)) for chosen in itertools.product(*steps)]


def test_steps_go_from_nothing_to_everything() -> None:
    assert SPACE.steps == {
        "layers.0": [0, 1],
        "heads.0": [0, 1, 2],
        "neurons.0": [0, 3, 5],
        "heads.1": [0, 1],
        "neurons.1": [0, 2, 4],
    }  # layer 1 always stays
    assert SPACE.whole == Shape(heads=(2, 1), neurons=(5, 4), layers=(True, True))
    assert SPACE.least == Shape(heads=(0, 0), neurons=(0, 0), layers=(False, True))


def test_each_shape_has_steps_that_stand_for_it() -> None:
    shapes = {SPACE.shape(params) for params in all_params(SPACE)}
    assert len(shapes) == SPACE.size == (3 * 3 + 1) * (2 * 3)
    assert all(SPACE.shape(SPACE.params(shape)) == shape for shape in shapes)
    gone = [shape for shape in shapes if not shape.layers[0]]
    assert all(shape.heads[0] == shape.neurons[0] == 0 for shape in gone)
    steps = [SPACE.params(shape) for shape in gone]  # it comes back with all of its units
    assert all((each["heads.0"], each["neurons.0"]) == (2, 2) for each in steps)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"heads": False}, {"layers", "neurons"}),
        ({"neuron_steps": 0}, {"layers", "heads"}),
        ({"layers": False}, {"heads", "neurons"}),
    ],
)
def test_what_is_off_stays_whole(settings: dict, names: set[str]) -> None:
    space = Space((2, 1), (5, 4), 1, Settings(**settings))
    assert {name.partition(".")[0] for name in space.steps} == names
    assert len({space.shape(params) for params in all_params(space)}) == space.size
    least = space.least
    assert (least.heads[1] == 1) == ("heads" not in names)
    assert (least.neurons[1] == 4) == ("neurons" not in names)
    assert all(least.layers) == ("layers" not in names)


def test_the_layer_that_is_worth_most_stays_and_the_first_one_of_modernbert() -> None:
    assert Space.of(model_of("bert"), Settings(), [1.0, 3.0, 2.0]).kept == 1
    space = Space.of(model_of("modernbert"), Settings(), [1.0, 3.0, 2.0])
    assert space.kept == 0 and "layers.0" not in space.steps and "layers.1" in space.steps


def test_a_shape_reads_as_one_line() -> None:
    assert str(SPACE.shape({"layers.0": 0, "heads.1": 0})) == "- 0+4"


def test_even_shapes_have_the_same_share_of_everything() -> None:
    space = Space((8, 8), (64, 64), 1, Settings(neuron_steps=8))
    assert [shape.heads for shape in space.even] == [(n, n) for n in range(1, 8)]
    assert [shape.neurons for shape in space.even] == [(8 * n, 8 * n) for n in range(1, 8)]
    assert all(all(shape.layers) for shape in space.even)
    assert 1 <= len(SPACE.even) < 7  # each one once


def test_forms_are_steps_too_and_zeros_go_with_their_units() -> None:
    space = Space((2,), (4,), 0, Settings(neuron_steps=2, zeros=(0.9, 0.5), eight_bits=True))
    assert space.steps["zeros.heads"] == space.steps["zeros.neurons"] == [0.9, 0.5, 0.0]
    assert space.steps["bits"] == [8, 32]
    assert [str(form) for form in space.forms] == [
        "0/32",
        "0.5/32",
        "0.9/32",
        "0/8",
        "0.5/8",
        "0.9/8",
    ]
    assert [Form.read(str(form)) for form in space.forms] == space.forms
    shapes = {space.shape(params) for params in all_params(space)}
    assert all(space.shape(space.params(shape)) == shape for shape in shapes)
    assert len(shapes) == 2 * (1 + 2 * 3) * (1 + 2 * 3) < space.size  # zeros of nothing are none
    assert all(shape.zeros[0] == 0 for shape in shapes if shape.heads == (0,))
    assert (space.whole.zeros, space.whole.bits) == ((0, 0), 32)
    assert (space.least.zeros, space.least.bits) == ((0, 0), 8)  # without any unit
    assert all(shape == shape.dense for shape in space.even)
    both = space.shape({"zeros.heads": 1, "zeros.neurons": 0, "bits": 0})
    assert str(both) == "2+4, 50 % + 90 % zeros, 8 bits"
    assert both.forms == (Form(0.5, 8), Form(0.9, 8)) and both.dense == space.whole
