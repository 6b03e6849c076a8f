"""Zeros and 8 bits inside slices: which ones, what they cost, and that the whole model stays."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import finetune_recipe
from families import CONFIGS, model_of
from test_slices import BATCH, MASK, TASK, logits

from opfa.compression import quant
from opfa.downstream.calibrate import observe
from opfa.downstream.student import prepare_8_bits
from opfa.errors import RecipeError
from opfa.models import costs
from opfa.models.removal import groups_of, layers_of
from opfa.models.stepping import inputs_of
from opfa.runtime.build import why_not
from opfa.runtime.encoder import with_kernels
from opfa.search import inside, taken
from opfa.search.costs import Prices
from opfa.search.recipe import Search, SearchRecipe
from opfa.search.recipe import Space as Settings
from opfa.search.seeds import Worth, greedy_front
from opfa.search.shapes import Form, Shape, Space
from opfa.search.slices import Slices, write_fits
from opfa.sparsity.layers import mask_layers

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")
SETTINGS = Settings(neuron_steps=4, zeros=(0.5, 0.8), eight_bits=True)
PARTS = {"heads": (3, 2, 4), "neurons": (5, 20, 20), "layers": (True, True, True)}


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def slices(family: str, tmp_path: Path) -> Slices:
    model = model_of(family).requires_grad_(False)
    space = Space.of(model, SETTINGS, [1.0, 3.0, 2.0])
    write_fits(model, TASK, [BATCH], space, tmp_path / "fits")
    return Slices(model, space, tmp_path / "fits")


def test_zeros_are_where_weights_times_inputs_are_least(family: str, slices: Slices) -> None:
    dense = slices.cut(Shape(**PARTS))
    sparse = slices.cut(Shape(**PARTS, zeros=(0.5, 0.8)))
    whole = model_of(family)
    for number, (before, after) in enumerate(zip(groups_of(dense), groups_of(sparse), strict=True)):
        of_whole = groups_of(whole)[number]
        for old, new, watched in zip(
            before.linears(), after.linears(), of_whole.linears(), strict=True
        ):
            with inputs_of(watched) as given:
                logits(whole)
            norm = given[0][MASK.bool()].double().square().sum(0).sqrt().numpy()
            weight = old.weight.detach().numpy()
            worth = np.abs(weight) * norm[: weight.shape[1]]
            num = round((0.5, 0.8)[number % 2] * weight.size)
            gone = np.argsort(worth, axis=None)[:num]
            expected = weight.copy()
            expected.flat[gone] = 0
            np.testing.assert_array_equal(new.weight.detach().numpy(), expected)
    assert not any((linear.weight == 0).any() for u in groups_of(dense) for linear in u.linears())


def test_8_bits_have_the_ranges_that_calibration_finds(family: str, slices: Slices) -> None:
    model = model_of(family)
    shape = slices.cut(Shape(heads=(4, 4, 4), neurons=(20, 20, 20), layers=(True,) * 3, bits=8))
    prepare_8_bits(model, inside.SETTINGS)
    observe(TASK, model, [BATCH], torch.device("cpu"))
    quant.start(model)
    quant.freeze(model)
    torch.testing.assert_close(logits(shape), logits(model.eval()), rtol=1e-5, atol=1e-5)
    assert quant.ranges(shape).keys() == quant.ranges(model).keys()


def test_matrices_of_nothing_have_no_zeros_and_no_8_bits(slices: Slices) -> None:
    least = slices.cut(
        Shape(heads=(0, 2, 0), neurons=(5, 0, 0), layers=(True,) * 3, zeros=(0.8, 0.8), bits=8)
    )
    assert torch.isfinite(logits(least)).all()


def test_the_whole_model_stays_as_it_was(slices: Slices) -> None:
    model = slices._model
    before, types = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    slices.cut(Shape(**PARTS, zeros=(0.8, 0.5), bits=8))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert [type(module) for module in model.modules()] == types


def test_multiply_adds_and_bytes_are_those_of_live_weights(family: str, slices: Slices) -> None:
    search = Search(batch=2, tokens=10, aims=("macs",), space=SETTINGS)
    prices = Prices.measured(slices._model, search, 12)
    assert Prices.read(prices.values()).values() == prices.values()
    for zeros, bits in (((0.5, 0.8), 32), ((0.0, 0.5), 8), ((0.0, 0.0), 8)):
        shape = Shape(**PARTS, zeros=zeros, bits=bits)
        small, found, dense = slices.cut(shape), prices.of(shape), prices.of(shape.dense)
        matrices = [linear.weight for units in groups_of(small) for linear in units.linears()]
        gone = sum(int((weight == 0).sum()) for weight in matrices)
        rounding = len(matrices)  # a share of a matrix needn't be a whole number of weights
        assert dense["macs"] - found["macs"] == pytest.approx(20 * gone, abs=20 * rounding)
        total = sum(weight.numel() for weight in matrices)
        live = bits / 8 * (total - gone)
        masks = sum(
            linear.weight.numel() / 8
            for units, form in zip(groups_of(small), 3 * shape.forms, strict=True)
            for linear in units.linears()
            if form.zeros
        )
        saved = 4 * total - live - masks
        assert dense["bytes"] - found["bytes"] == pytest.approx(saved, abs=4 * rounding)


@pytest.mark.skipif(why_not() is not None, reason="the kernels can't be compiled here")
def test_the_runtimes_table_has_every_form_and_costs_grow_with_units(
    family: str, slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is what a counter says here: a unit of time for each live weight of a layer."""

    def counted(tasks: dict) -> dict:
        return {name: weights_of[id(call.func)] for name, call in tasks.items()}

    weights_of: dict[int, float] = {}
    keep = []

    def noted(model, threads, dtype):  # noqa: ANN001, ANN202
        live = sum(
            int(linear.weight.count_nonzero()) for u in groups_of(model) for linear in u.linears()
        )
        layers = len(list(layers_of(model)))
        found = with_kernels(model, threads, dtype)
        assert found.base_model.computes_in == dtype
        weights_of[id(found.base_model)] = (
            100 + 10 * layers + live * (0.5 if dtype == "int8" else 1)
        )
        keep.append(found)
        return found

    monkeypatch.setattr("opfa.search.timing.with_kernels", noted)
    monkeypatch.setattr("opfa.search.timing.medians", counted)
    search = Search(batch=1, tokens=8, engine="runtime", space=SETTINGS)
    prices = Prices.measured(slices._model, search, 12)
    assert prices.forms["milliseconds"].keys() == set(slices._space.forms) - {Form()}
    for zeros, bits in (((0.0, 0.0), 32), ((0.5, 0.8), 32), ((0.8, 0.0), 8)):
        shape = Shape(
            heads=(4, 2, 0),
            neurons=(10, 20, 20),
            layers=(True, True, False),
            zeros=zeros,
            bits=bits,
        )
        shape = slices._space.clean(shape.heads, shape.neurons, shape.layers, zeros, bits)
        small = slices.cut(shape)
        live = sum(
            int(linear.weight.count_nonzero()) for u in groups_of(small) for linear in u.linears()
        )
        expected = 120 + live * (0.5 if bits == 8 else 1)
        assert prices.of(shape)["milliseconds"] == pytest.approx(expected, rel=0.01)


@pytest.mark.skipif(why_not() is not None, reason="the kernels can't be compiled here")
def test_times_too_short_to_be_told_apart_are_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, times = model_of("bert"), iter([1.0, 1.1, *[0.9] * 1000])
    monkeypatch.setattr("opfa.search.timing.medians", lambda tasks: {t: next(times) for t in tasks})
    search = Search(batch=1, tokens=8, engine="runtime", space=SETTINGS)
    prices = Prices.measured(model, search, 12)
    space = Space.of(model, SETTINGS, [1.0, 3.0, 2.0])
    total = [prices.of(shape)["milliseconds"] for shape in (space.whole, space.least)]
    assert total[0] >= total[1] > 0
    curves = prices.costs["milliseconds"].curves
    worth = Worth([np.linspace(1, 0, len(each)) for each in curves], [0, 1, 2, 3], [0, 2, 1])
    assert greedy_front(space, prices.costs["milliseconds"], worth, 5)


def test_a_point_without_units_in_a_layer_is_trained_in_8_bits(family: str) -> None:
    model = model_of(family)
    space = Space.of(model, SETTINGS, [1.0, 3.0, 2.0])
    shape = space.clean([0, 2, 4], [5, 0, 20], [True] * 3, [0.5, 0.5], 8)
    small = copy.deepcopy(Slices(model, space).cut(shape.dense))
    layers = [name for name, m in small.named_modules() if isinstance(m, torch.nn.Linear)]
    mask_layers(small, layers)  # as a pruner does, empty ones too
    prepare_8_bits(small, inside.SETTINGS)
    small.train()
    logits(small)
    quant.start(small)
    assert torch.isfinite(logits(small)).all()
    assert all(layer.weight.numel() for layer in quant.quant_layers(small).values())


def test_every_other_seed_has_zeros_and_8_bits() -> None:
    model = model_of("bert")
    space = Space.of(model, SETTINGS, [1.0, 3.0, 2.0])
    parameters = costs.parameters(model)
    worth = Worth([np.linspace(1, 0, len(c)) ** 2 for c in parameters.curves], [0] * 4, [0, 2, 1])
    seeds = greedy_front(space, parameters, worth, 4)
    assert [seed.bits for seed in seeds] == [32, 8, 32, 8]
    assert seeds[1].zeros == (0.5, 0.5) and seeds[2] == seeds[2].dense


def test_a_point_is_trained_towards_its_zeros_and_bits(tmp_path: Path) -> None:
    model = model_of("bert")
    model.save_pretrained(tmp_path / "slice")
    values = finetune_recipe(Path("m"), Path("d"), model={"zeros": "free"}).model_dump(
        mode="json", exclude_none=True
    )
    space = {"zeros": [0.5, 0.7], "eight_bits": True}
    recipe = SearchRecipe.check({**values, "search": {"space": space, "engine": "runtime"}})
    shape = Shape(**PARTS, zeros=(0.5, 0.7), bits=8)
    found = taken.finetuning(recipe, shape, str(tmp_path / "slice"))
    assert found.quantization is not None and found.pruning is not None
    assert found.pruning.schedule.target == 0.7
    assert [part.target for part in found.pruning.parts] == [0.5, 0.7]
    names = [[*part.layers(model)] for part in found.pruning.parts]
    for kind, of_part in zip((0, 1), names, strict=True):
        linears = {id(m) for units in groups_of(model)[kind::2] for m in units.linears()}
        assert {name for name, m in model.named_modules() if id(m) in linears} == set(of_part)
    plain = taken.finetuning(recipe, shape.dense, str(tmp_path / "slice"))
    assert plain.quantization is None and plain.pruning is None
    one = taken.finetuning(recipe, Shape(**PARTS, zeros=(0.0, 0.5)), str(tmp_path / "slice"))
    assert one.pruning is not None and [part.target for part in one.pruning.parts] == [0.5]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"search": {"space": {"zeros": [0.5]}}},
            'engine = "torch": zeros and 8 bits save no time',
        ),
        ({"search": {"space": {"eight_bits": True}}}, 'engine = "torch": zeros and 8 bits save'),
        (
            {"search": {"space": {"zeros": [1.0]}, "aims": ["bytes"]}},
            "space.zeros.0: .* less than 1",
        ),
        ({"search": {"space": {"zeros": [0.5, 0.5]}, "aims": ["bytes"]}}, "a share stands twice"),
        (
            {
                "search": {"space": {"eight_bits": True}, "aims": ["bytes"]},
                "training": {"precision": "bf16"},
            },
            'eight_bits: training.precision = "bf16": 8 bits are trained in fp32',
        ),
        (
            {"search": {"space": {"zeros": [0.5]}, "aims": ["bytes"]}, "model": {"zeros": "held"}},
            "needs model.zeros = 'free'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict, what: str) -> None:
    values = finetune_recipe(Path("m"), Path("d"), model={"zeros": "free"}).model_dump(
        mode="json", exclude_none=True
    )
    for section in ("model", "training"):
        values[section] |= changes.get(section, {})
    with pytest.raises(RecipeError, match=what):
        SearchRecipe.check({**values, "search": changes["search"]})
