"""Exact removal of dead heads and neurons, and the forms in which a smaller model is written."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import finetune_recipe, outside
from families import CONFIGS, model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.monkey_patching import clear_patch_mapping
from words import WORDS

import opfa
from opfa import runtime
from opfa.downstream.finetune import finetune
from opfa.errors import ModelError, RunError
from opfa.inference import shrink as shrinking
from opfa.models.configs import load_tokenizer, wordpiece_tokenizer
from opfa.models.encoders import write_model
from opfa.models.removal import find_dead, fold, layers_of, remove
from opfa.sparsity.units import HEADS, NEURONS
from opfa.tasks.predictions import ClassPrediction

KILLED = {HEADS: ("columns", "values"), NEURONS: ("columns", "rows")}


pytestmark = pytest.mark.usefixtures("nothing_stays_registered")


@torch.no_grad()
def kill(model: PreTrainedModel, deaths: dict[tuple[int, str, int], str]) -> None:
    """Make units dead, (layer, kind, number), in one of the ways of `KILLED`."""
    layers = [units for _, units in layers_of(model)]
    for (number, kind, unit), how in deaths.items():
        units = layers[number][kind]
        if how == "columns":
            units.columns()[:, unit] = 0
        elif kind == HEADS:
            units.weight(2)[unit] = 0
        else:
            for row in range(len(units.rows)):
                units.weight(row)[unit] = 0


def logits(model: PreTrainedModel, entries: int = 27) -> Tensor:
    ids = torch.randint(4, entries, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 1:] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def written(model: PreTrainedModel, path: Path) -> Path:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    write_model(model, wordpiece_tokenizer(vocabulary, lowercase=True, tokens=32), path)
    return path


def some_deaths() -> dict[tuple[int, str, int], str]:
    """Layer 0 loses some, layer 1 all, layer 2 other numbers."""
    return {
        (0, HEADS, 1): "values",
        (0, HEADS, 2): "columns",
        **{(0, NEURONS, n): "rows" if n % 2 else "columns" for n in range(5)},
        **{(1, HEADS, n): "values" for n in range(4)},
        **{(1, NEURONS, n): "rows" for n in range(20)},
        **{(2, NEURONS, n): "columns" for n in range(7, 20)},
    }


deaths = st.dictionaries(
    st.tuples(st.integers(0, 2), st.just(HEADS), st.integers(0, 3))
    | st.tuples(st.integers(0, 2), st.just(NEURONS), st.integers(0, 19)),
    st.integers(0, 1),
    max_size=60,
)


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=12, deadline=None)
@given(deaths)
def test_what_is_left_computes_the_same(family: str, chosen: dict[Any, int]) -> None:
    model = model_of(family)
    kill(model, {unit: KILLED[unit[1]][how] for unit, how in chosen.items()})
    expected = logits(model)
    found = find_dead(model)
    num_dead = sum(int(dead.sum()) for each in found for dead in each.dead.values())
    assert num_dead == len(chosen)
    fold(found)
    assert (logits(model) - expected).abs().max() < 1e-5
    remove(found)
    assert (logits(model) - expected).abs().max() < 1e-5
    assert sum(units[k].count for _, units in layers_of(model) for k in units) == 72 - num_dead


@pytest.mark.parametrize("family", CONFIGS)
def test_a_head_that_averages_its_values_stays_and_the_rest_goes(family: str) -> None:
    model = model_of(family)
    kill(model, {(0, HEADS, 3): "columns", (2, NEURONS, 5): "columns"})
    with torch.no_grad():
        next(layers_of(model))[1][HEADS].weight(1)[2] = 0  # keys
    expected, found = logits(model), find_dead(model)
    assert [each.averaging.nonzero().flatten().tolist() for each in found] == [[2], [], []]
    fold(found)
    remove(found)
    assert (logits(model) - expected).abs().max() < 1e-5
    counts = [[units[kind].count for kind in (HEADS, NEURONS)] for _, units in layers_of(model)]
    assert counts == [[3, 20], [4, 20], [4, 19]]


@pytest.mark.parametrize("family", CONFIGS)
def test_an_uneven_model_loads_in_transformers_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    kill(model, some_deaths())
    expected = logits(model)
    found = opfa.shrink(written(model, tmp_path / "dead"), tmp_path / "small")
    assert [(kept.heads, kept.neurons) for kept in found.layers] == [(2, 15), (0, 0), (4, 7)]
    assert found.encoder < found.of_encoder and found.parameters < found.of_parameters
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    assert (logits(small) - expected).abs().max() < 1e-5
    assert sum(p.numel() for p in small.parameters()) == found.parameters
    small.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(small))
    again.set_attn_implementation("eager")
    assert (logits(again) - expected).abs().max() < 1e-5
    in_kernels = runtime.load(tmp_path / "small", threads=1)
    assert (logits(in_kernels) - expected).abs().max() < 1e-4
    opfa.pack(tmp_path / "small", tmp_path / "packed")
    assert torch.equal(logits(runtime.load(tmp_path / "packed", threads=1)), logits(in_kernels))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_model_of_few_positions_is_compared_on_as_many_tokens(
    family: str, tmp_path: Path
) -> None:
    positions = {"bert": 8, "roberta": 10}[family]  # RoBERTa's begin behind two
    config = copy.deepcopy(CONFIGS[family])
    config.max_position_embeddings = positions
    model = AutoModelForSequenceClassification.from_config(config).eval()
    kill(model, {(1, HEADS, 1): "values"})
    path = written(model, tmp_path / "dead")
    with mock.patch.object(shrinking, "_states", wraps=shrinking._states) as states:
        opfa.shrink(path, tmp_path / "small")
    assert [call.args[1]["input_ids"].shape for call in states.call_args_list] == [(2, 8)] * 2


def test_a_model_without_neurons_is_even_too(tmp_path: Path) -> None:
    model = model_of("bert")
    kill(model, {(layer, NEURONS, n): "rows" for layer in range(3) for n in range(20)})
    kill(model, {(1, HEADS, 1): "values"})
    opfa.shrink(written(model, tmp_path / "dead"), tmp_path / "even", form="even")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "even").eval()
    assert found.config.intermediate_size == 0 and not found.config.is_heterogeneous
    assert (logits(found) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_hidden_states_are_recorded_of_uneven_models_and_of_others(
    family: str, tmp_path: Path
) -> None:
    """Of those that were made before any was registered, too."""
    plain = model_of(family)
    dead = model_of(family)
    kill(dead, some_deaths())
    opfa.shrink(written(dead, tmp_path / "dead"), tmp_path / "small")
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    clear_patch_mapping()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        for model in (plain, small, model_of(family)):
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
            assert len(states) == 4 and not states[1].equal(states[0])


@pytest.mark.parametrize("family", CONFIGS)
def test_even_models_and_those_of_the_same_shape_compute_the_same(
    family: str, tmp_path: Path
) -> None:
    model = model_of(family)
    kill(model, some_deaths())
    written(model, tmp_path / "dead")
    sizes = []
    for form in ("even", "same-shape"):
        opfa.shrink(tmp_path / "dead", tmp_path / form, form=form)
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / form).eval()
        assert (logits(found) - logits(model)).abs().max() < 1e-5
        assert not any(list(layers_of(found))[1][1][HEADS].weight(row).any() for row in range(3))
        sizes.append(found.num_parameters())
    assert sizes[0] < sizes[1] == model.num_parameters()


def test_transformers_alone_loads_even_models_and_refuses_uneven_ones(tmp_path: Path) -> None:
    for family in CONFIGS:
        model = model_of(family)
        kill(model, some_deaths())
        written(model, tmp_path / family)
        for form in ("even", "uneven"):
            opfa.shrink(tmp_path / family, tmp_path / f"{family}-{form}", form=form)
    program = f"""
import sys
from transformers import AutoModelForSequenceClassification
for family in {[*CONFIGS]}:
    AutoModelForSequenceClassification.from_pretrained(family + "-even")
    try:
        AutoModelForSequenceClassification.from_pretrained(family + "-uneven")
    except RuntimeError as error:
        assert "per-layer attribute" in str(error)
        print(family)
assert "opfa" not in sys.modules
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tmp_path, env=outside(), capture_output=True, check=False)
    assert run.stdout.decode().splitlines() == [*CONFIGS], run.stderr.decode()


def test_an_uneven_model_becomes_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    onnxruntime = pytest.importorskip("onnxruntime")
    model = model_of("bert")
    kill(model, some_deaths())
    found = opfa.shrink(written(model, tmp_path / "dead"), tmp_path / "onnx", form="onnx")
    assert os.environ["DS_ACCELERATOR"] == "cpu" or torch.cuda.is_available()  # it says nothing
    session = onnxruntime.InferenceSession(found.directory / "model.onnx")
    ids = torch.randint(4, 27, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 1:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    names = {each.name for each in session.get_inputs()}
    answer = session.run(None, {k: v.numpy() for k, v in inputs.items() if k in names})[0]
    assert (torch.from_numpy(answer) - logits(model)).abs().max() < 1e-4


def test_what_is_not_removable_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = model_of("bert")
    written(model, tmp_path / "live")
    with pytest.raises(ModelError, match="no head and no neuron is dead"):
        opfa.shrink(tmp_path / "live", tmp_path / "small")
    with torch.no_grad():
        next(layers_of(model))[1][HEADS].weight(1)[2] = 0  # keys
    written(model, tmp_path / "averages")
    with pytest.raises(ModelError, match="layer 0, head 2: can't be removed"):
        opfa.shrink(tmp_path / "averages", tmp_path / "small")
    kill(model, {(0, HEADS, n): "columns" for n in range(3)})
    opfa.shrink(written(model, tmp_path / "dead"), tmp_path / "uneven")
    again = opfa.load(tmp_path / "uneven")
    kill(again, {(1, NEURONS, 3): "columns"})
    with pytest.raises(ModelError, match="layers have lost different heads, so it can't be even"):
        opfa.shrink(written(again, tmp_path / "again"), tmp_path / "small", form="even")
    with pytest.raises(RunError, match="form = 'flat': must be one of even, uneven, onnx"):
        opfa.shrink(tmp_path / "live", tmp_path / "small", form="flat")  # pyright: ignore[reportArgumentType]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again",
        "averages",
        "dead",
        "live",
        "uneven",
    ]


def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    model = model_of("bert")
    kill(model, some_deaths())
    opfa.shrink(written(model, tmp_path / "dead"), tmp_path / "small")
    path = tmp_path / "small/config.json"
    config = json.loads(path.read_text())
    key = r"per_layer_config\[0\].intermediate_size"
    for wrong, said in [
        (16, r"intermediate.dense.weight is \[15, 24\], its configuration says \[16, 24\]"),
        (21, f"{key} = 21: must be an integer from 0 to 20"),
        (-1, f"{key} = -1: must be"),
    ]:
        config["per_layer_config"]["0"]["intermediate_size"] = wrong
        path.write_text(json.dumps(config))
        with pytest.raises(ModelError, match=said):
            opfa.load(tmp_path / "small")


def probabilities(model: Path) -> list[float]:
    found = opfa.predict(model, ["the cat sat here", "a dog ran"])
    return [each.score for each in found if isinstance(each, ClassPrediction)]


def test_a_shrunk_model_works_everywhere(sparse: Path, examples: Path, tmp_path: Path) -> None:
    """Fine-tuned with its zeros held, released compact, to 8 bits, to ONNX, packed, predicted."""
    model = opfa.load(sparse)
    kill(model, {(0, HEADS, 1): "values", **{(1, NEURONS, n): "rows" for n in range(0, 32, 2)}})
    (tmp_path / "dead").mkdir()
    model.save_pretrained(tmp_path / "dead")
    load_tokenizer(str(sparse)).save_pretrained(tmp_path / "dead")
    shrunk = opfa.shrink(tmp_path / "dead", tmp_path / "small")
    small, layers = shrunk.directory, shrunk.layers
    assert layers[0].heads == 1 and 0 < layers[1].neurons <= 16
    before = opfa.inspect(str(small))
    shapes = {name: row["shape"] for name, row in before["tensors"].items()}
    assert shapes["bert.encoder.layer.1.intermediate.dense.weight"] == [layers[1].neurons, 16]
    recipe = finetune_recipe(small, examples)
    run = tmp_path / "run"
    finetune(recipe, run)
    after = opfa.inspect(str(run))
    kept = {name: row["zeros"] for name, row in after["tensors"].items()}
    assert kept == {name: before["tensors"][name]["zeros"] for name in kept}
    expected = probabilities(run)
    opfa.release(run, tmp_path / "compact", format="compact")
    assert probabilities(tmp_path / "compact") == pytest.approx(expected, abs=1e-5)
    opfa.pack(run, tmp_path / "packed")
    packed = runtime.load(tmp_path / "packed", threads=1)
    assert (logits(packed, 17) - logits(opfa.load(run), 17)).abs().max() < 1e-4
    opfa.calibrate(run, tmp_path / "8bit", examples=20)
    opfa.export(tmp_path / "8bit", tmp_path / "onnx/model.onnx")
    with pytest.raises(ModelError, match="no head and no neuron is dead"):
        opfa.shrink(run, tmp_path / "again")
