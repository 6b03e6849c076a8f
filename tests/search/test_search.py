"""A whole search on a tiny model: what it writes, what interrupts it, what it refuses."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from searching import search_recipe
from transformers import AutoModelForSequenceClassification

import opfa
from opfa.commands import app as cli
from opfa.compression import quant
from opfa.errors import OpfaError, RunError
from opfa.models.removal import groups_of
from opfa.search.front import dominates
from opfa.search.material import Material
from opfa.search.recipe import Point, SearchRecipe
from opfa.search.results import SearchResult
from opfa.search.study import JOURNAL
from opfa.weights.inspection import inspect

pytest_plugins = ["searching"]
pytestmark = pytest.mark.usefixtures("nothing_stays_registered")
FOUND_OUT = ("recipe.toml", "environment.json", "prepared")


@pytest.fixture(scope="module")
def output(tuned: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search, for accuracy against multiply-adds."""
    output = tmp_path_factory.mktemp("search") / "out"
    opfa.search_models(search_recipe(tuned, questions, aims=["macs"]), output, workers=1)
    return output


@pytest.fixture
def found(output: Path) -> SearchResult:
    values = json.loads((output / "results.json").read_text())
    return SearchResult.model_validate({"directory": output, **values})


def begun(output: Path, other: Path) -> Path:
    """The same search as it was before its first evaluation."""
    other.mkdir()
    for name in FOUND_OUT:
        source = output / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, other / name)
    return other


def test_the_front_is_what_no_judged_model_dominates(output: Path, found: SearchResult) -> None:
    lines = (output / JOURNAL).read_text().splitlines()
    told = [json.loads(line).get("values") for line in lines]
    values = [tuple(each) for each in told if each]
    assert len(values) == found.evaluations == 12
    points = [(point.costs["macs"], -point.held_out) for point in found.front]
    assert not any(dominates(value, point) for value in values for point in points)
    assert set(points) == {v for v in values if not any(dominates(w, v) for w in values)}
    assert found.front[0].held_out == max(-loss for _, loss in values)


def test_points_are_measured_on_examples_that_the_search_never_saw(
    output: Path, found: SearchResult, tuned: Path, questions: Path
) -> None:
    """The parts are disjoint, and the whole model has by plain torch what the table says."""
    material = Material(search_recipe(tuned, questions), str(tuned))
    parts = [material.training, material.held_out, material.fresh]
    texts = [text for part in parts for text in part.examples.texts]
    assert [len(part.examples.texts) for part in parts] == [60, 100, 100]
    assert len(set(texts)) == 260
    model = AutoModelForSequenceClassification.from_pretrained(output / "prepared/model").eval()
    for part, stated in (
        (material.held_out, found.whole.held_out),
        (material.fresh, found.whole.fresh),
    ):
        batch = material.tokenizer(part.examples.texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            answers = model(**batch).logits.argmax(1)
        labels = torch.tensor(part.features["labels"])
        assert float((answers == labels).double().mean()) == pytest.approx(stated)


def test_it_writes_recipes_a_table_a_picture_and_a_page(output: Path, found: SearchResult) -> None:
    names = {f"{point.number:04}.toml" for point in found.front}
    assert {path.name for path in (output / "front").iterdir()} == names
    front = json.loads((output / "front.json").read_text())["front"]
    assert [point["number"] for point in front] == [point.number for point in found.front]
    assert (output / "table.md").read_text() == found.table().markdown() + "\n"
    page = (output / "report/index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert (output / "report/front.png").exists()
    assert 1 <= len(found.even) <= 7
    assert all(len(set(point.shape.heads)) == 1 for point in found.even)


def test_two_workers_that_are_killed_and_resumed_find_the_same_front(
    output: Path, tmp_path: Path
) -> None:
    other = begun(output, tmp_path / "other")
    words = ["search", str(other / "recipe.toml"), "--output", str(other), "--resume"]
    program = [sys.executable, "-m", "opfa", *words, "--workers", "2"]
    process = subprocess.Popen(program, start_new_session=True, stderr=subprocess.DEVNULL)
    journal = other / JOURNAL
    while not (journal.exists() and journal.read_text().count('"values":[') >= 4):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (other / "front.json").exists()
    found = opfa.search_models(other / "recipe.toml", other, workers=1, resume=True)
    assert found.evaluations == 12
    assert (other / "front.json").read_bytes() == (output / "front.json").read_bytes()


def test_a_finished_search_goes_on_with_more_evaluations(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "more")
    changes = ["search.evaluations=15"]
    words = (tmp_path / "more/recipe.toml", tmp_path / "more", changes)
    found = opfa.search_models(*words, workers=1, resume=True)
    assert found.evaluations == 15
    with pytest.raises(RunError, match="search.population was 6 and is 7"):
        opfa.search_models(*words[:2], ["search.population=7"], workers=1, resume=True)


def test_a_point_is_shrunk_trained_on_and_measured(
    output: Path, found: SearchResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(output, tmp_path / "out")
    words = ["search", str(tmp_path / "out/recipe.toml"), "--output", str(tmp_path / "out")]
    assert cli.run([*words, "--resume", "--take", "1", "--workers", "1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    (taken,) = values["taken"]
    assert taken["number"] == found.front[0].number
    run = tmp_path / "out" / taken["run"]
    assert opfa.evaluate(run).metrics == taken["metrics"]
    shape = found.front[0].shape
    model = opfa.load(run)
    kept = [
        count for count, stays in zip(shape.groups, repeated(shape.layers), strict=True) if stays
    ]
    assert [units.count for units in groups_of(model)] == kept
    assert cli.run([*words, "--resume", "--take", "1", "--workers", "1"]) == 0  # already there
    assert f"{taken['number']:04} trained on: validation accuracy" in capsys.readouterr().out


def repeated(layers: tuple[bool, ...]) -> list[bool]:
    return [stays for stays in layers for _ in range(2)]


def test_a_points_recipe_makes_its_model(output: Path, found: SearchResult, tmp_path: Path) -> None:
    point = found.front[-1]
    recipe = output / "front" / f"{point.number:04}.toml"
    again = opfa.search_models(recipe, tmp_path / "point", workers=1)
    assert again.front[0].shape == point.shape and again.hypervolume is None
    assert (again.front[0].held_out, again.front[0].fresh) == (point.held_out, point.fresh)
    assert (tmp_path / "point" / again.taken[0].run / "model/config.json").exists()


def test_forms_are_searched_and_a_point_is_trained_into_its_form(
    tuned: Path, questions: Path, tmp_path: Path
) -> None:
    space = {"neuron_steps": 4, "zeros": [0.5, 0.8], "eight_bits": True}
    search = {"space": space, "engine": "runtime", "evaluations": 12}
    recipe = search_recipe(tuned, questions, aims=["bytes"], **search)
    found = opfa.search_models(recipe, tmp_path / "out", workers=1)
    assert any(point.shape.inside for point in found.front)
    assert found.table().head[-1] == "inside" and "8 bits" in found.table().markdown()
    other = begun(tmp_path / "out", tmp_path / "other")
    opfa.search_models(other / "recipe.toml", other, workers=2, resume=True)
    fronts = [(tmp_path / name / "front.json").read_bytes() for name in ("out", "other")]
    assert fronts[0] == fronts[1]
    page = (tmp_path / "out/report/index.html").read_text()
    (point,) = [each for each in found.front if each.shape.inside][:1]
    assert f'"inside":"{point.shape.inside}"' in page.replace('": ', '":')
    again = SearchRecipe.read(tmp_path / f"out/front/{point.number:04}.toml")
    assert again.search.point == Point.model_validate_json(point.shape.model_dump_json())
    whole = {"heads": [2, 1], "neurons": [32, 8], "layers": [True, True]}
    of_point = {**search, "point": {**whole, "zeros": [0.5, 0.8], "bits": 8}}
    recipe = search_recipe(tuned, questions, **of_point)
    begun(tmp_path / "out", tmp_path / "made")  # with the same times
    (tmp_path / "made/recipe.toml").write_text(recipe.to_toml())
    made = opfa.search_models(recipe, tmp_path / "made", workers=1, resume=True)
    run = tmp_path / "made" / made.taken[0].run
    assert set(made.front[0].costs) == {"milliseconds", "macs", "bytes"}
    report = inspect(run / "model")["tensors"]
    for name, tensor in report.items():
        share = 0.5 if "attention" in name else 0.8
        assert tensor["zeros"] == round(share * math.prod(tensor["shape"])), name
    assert len(report) == 12
    assert quant.quant_layers(opfa.load(run))


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"limits": {"bytes": 10.0}},
            r"search.limits.bytes = 10: the cheapest model of this space has \d+",
        ),
        (
            {"limits": {"metric": 1.5}},
            r"search.limits.metric = 1.5: accuracy: the whole model has only \d\.\d+",
        ),
        (
            {"limits": {"macs": 40_000.0, "metric": 0.9}, "seeds": 0},
            r"search.limits.\w+ = [\d.e+]+: none of 12 models keeps to all limits; the nearest has",
        ),
        ({"held_out": 270}, r"270 held-out and 100 fresh examples don't fit into the 280 of"),
        (
            {"point": {"heads": [3, 1], "neurons": [8, 8], "layers": [True, True]}},
            r"search.point.heads.0 = 3: layer 0 of the model has only 2",
        ),
        (
            {"point": {"heads": [2, 1], "neurons": [8, 8], "layers": [True, True], "bits": 8}},
            "search.point.bits = 8: needs search.space.eight_bits = true",
        ),
        (
            {
                "point": {"heads": [2, 1], "neurons": [8, 8], "layers": [True, True]}
                | {"zeros": [0.7, 0.0]},
                "space": {"zeros": [0.5]},
                "engine": "runtime",
            },
            r"search.point.zeros = \[0.7, 0.0\]: 0.7 is none of 0 and search.space.zeros",
        ),
        ({"tokens": 99}, r"search.tokens = 99: this model has only 32 positions"),
    ],
)
def test_a_search_that_can_find_nothing_is_one_message(
    tuned: Path, questions: Path, tmp_path: Path, search: dict[str, Any], message: str
) -> None:
    recipe = search_recipe(tuned, questions, aims=["macs"], **search)
    with pytest.raises(OpfaError, match=message):
        opfa.search_models(recipe, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists() or (tmp_path / "out" / JOURNAL).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search.aims": []}, "aims = []: give one or two of them"),
        ({"search.aims": ["macs", "macs"]}, "give one or two of them"),
        ({"search.aims": ["latency"]}, "search.aims.0: Input should be 'milliseconds', 'macs' or"),
        (
            {"search.space": {"heads": False, "layers": False, "neuron_steps": 0}},
            "nothing may differ",
        ),
        ({"sweep.learning_rate": [1e-3]}, "sweep: a search has no place for it"),
        ({"search": None}, "search: missing; this key is required"),
        (
            {"search.point": {"heads": [1], "neurons": [1, 2], "layers": [True]}},
            "heads, neurons and layers must be as many",
        ),
    ],
)
def test_a_wrong_recipe_is_refused(
    tuned: Path, questions: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = search_recipe(tuned, questions)
    with pytest.raises(OpfaError, match=re.escape(message)):
        opfa.search_models(recipe, tmp_path / "out", changes)
    assert not (tmp_path / "out").exists()


def test_another_kind_of_recipe_is_refused_and_check_knows_this_one(
    tuned: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = search_recipe(tuned, questions)
    (tmp_path / "search.toml").write_text(recipe.to_toml())
    with pytest.raises(OpfaError, match=r"has \[search\], so it is for opfa search"):
        opfa.finetune(tmp_path / "search.toml", tmp_path / "out")
    assert cli.run(["check", str(tmp_path / "search.toml")]) == 0
    assert "# accepted, for opfa search" in capsys.readouterr().out
