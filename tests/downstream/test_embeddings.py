"""Embeddings end to end on a tiny model: trained, resumed, in 8 bits, exported, released; and the
same vectors in sentence-transformers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import break_off, finetune_recipe, sentences
from onnxruntime import InferenceSession
from sentence_transformers import SentenceTransformer
from torch import Tensor

import opfa
from opfa.downstream.calibrate import calibrate
from opfa.downstream.evaluate import evaluate_model, predict
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.sweep import sweep
from opfa.errors import ModelError, RecipeError
from opfa.models.configs import load_config, load_tokenizer
from opfa.release.release import release, unpack
from opfa.runtimes.export import export
from opfa.tasks import kinds as tasks
from opfa.tasks.embeddings import settled
from opfa.training import finished
from opfa.training.checkpoint import model_digest
from opfa.weights.inspection import inspect

TEXTS = list(sentences())[:96]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences beside others; the grade is the share of words that are the same, from 0 to 5."""
    directory = tmp_path_factory.mktemp("pairs")
    rows = []
    for i, first in enumerate(TEXTS):
        second = TEXTS[i * 5 % len(TEXTS)]
        words = [set(text.split()) for text in (first, second)]
        grade = 5 * len(words[0] & words[1]) / len(words[0] | words[1])
        rows.append({"a": first, "b": second, "grade": grade, "alone": first})
    for name, part in (("train", rows[:64]), ("validation", rows[64:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return directory


def recipe_of(init: Path, pairs: Path, task: dict[str, Any], **sections: Any) -> FinetuneRecipe:
    columns = {"text": "a", "text_pair": "b", "label": "grade", "metrics": ["spearman"]}
    values = {"kind": "embedding", **columns, **task}
    return finetune_recipe(init, pairs, task=values, **sections)


def vectors(model: Path, recipe: FinetuneRecipe) -> Tensor:
    """What opfa computes [N, 2, H]."""
    task = settled(recipe.task, str(model))
    split = tasks.load_validation(task, load_tokenizer(str(model)), load_config(str(model)))
    encoder = tasks.load_model(task, str(model), (), is_trained=True)
    return predict(encoder, task, split, batch=7, device="cpu")[0]


def encoded(model: Path, pairs: Path) -> Tensor:
    """What sentence-transformers computes [N, 2, H]."""
    rows = [json.loads(line) for line in (pairs / "validation.jsonl").read_text().splitlines()]
    encoder = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    return torch.stack([torch.tensor(encoder.encode([r[c] for r in rows])) for c in "ab"], dim=1)


@pytest.fixture(scope="module")
def run(sparse: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "run"
    finetune(recipe_of(sparse, pairs, {}), output)
    return output


FORMS: dict[str, dict[str, Any]] = {
    "graded": {"task": {}},
    "cosine": {"task": {"loss": "cosine", "highest_grade": 5.0, "pooling": "first"}},
    "pairs": {"task": {"loss": "ranking", "metrics": ["mrr@10", "recall@1"], "normalize": False}},
    "8 bits": {"task": {}, "quantization": {"start": 0.3}},
    "teacher": {"task": {"loss": "teacher"}},
    "teacher of single texts": {"task": {"loss": "teacher", "train_text": "alone"}},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_finished_model_is_sparse_and_the_same_in_sentence_transformers(
    sparse: Path, run: Path, pairs: Path, tmp_path: Path, form: str
) -> None:
    sections = dict(FORMS[form])
    if "teacher" in form:
        sections["distillation"] = {"teacher": str(run / "model"), "hard_weight": 0.0}
    recipe = recipe_of(sparse, pairs, **sections)
    results = finetune(recipe, tmp_path / "run")
    model = tmp_path / "run/model"
    assert inspect(model)["fingerprint"] == inspect(sparse)["fingerprint"]
    assert inspect(model)["stated"] == "matches"
    again = evaluate_model(str(model), recipe)
    assert again["metrics"] == results["metrics"] and list(again["metrics"])
    assert not finished.changed_model(model)
    torch.testing.assert_close(vectors(model, recipe), encoded(model, pairs), atol=1e-5, rtol=0)
    lengths = vectors(model, recipe).norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(())) == (form != "pairs")


def test_it_learns_what_people_say(sparse: Path, pairs: Path, run: Path, tmp_path: Path) -> None:
    longer = {"epochs": 12.0, "learning_rate": 5e-3}
    results = finetune(recipe_of(sparse, pairs, {}, training=longer), tmp_path / "run")
    before = evaluate_model(str(sparse), recipe_of(sparse, pairs, {}))["metrics"]
    assert results["metrics"]["spearman"] > before["spearman"] + 0.1


def test_a_run_that_is_broken_off_and_resumed_is_the_same(
    sparse: Path, pairs: Path, run: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(sparse, pairs, {})
    break_off(5, finetune, recipe, tmp_path / "run")
    finetune(recipe, tmp_path / "run", resume=True)
    assert model_digest(tmp_path / "run/model") == model_digest(run / "model")


def test_the_same_is_trained_on_from_its_own_files(run: Path, pairs: Path, tmp_path: Path) -> None:
    recipe = recipe_of(run / "model", pairs, {"pooling": "first", "normalize": False})
    finetune(recipe, tmp_path / "first")
    finetune(recipe_of(tmp_path / "first/model", pairs, {}), tmp_path / "again")
    values = json.loads((tmp_path / "again/model/1_Pooling/config.json").read_text())
    assert values["pooling_mode_cls_token"] and not values["pooling_mode_mean_tokens"]
    kinds = [m["type"] for m in json.loads((tmp_path / "again/model/modules.json").read_text())]
    assert [kind.rpartition(".")[2] for kind in kinds] == ["Transformer", "Pooling"]


def test_seeds_a_sweep_and_held_out_examples(sparse: Path, pairs: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"sweep": {"learning_rate": [1e-3, 5e-3]}}
    sections["selection"] = {"holdout": 0.25}
    result = sweep(recipe_of(sparse, pairs, {}, **sections), tmp_path / "sweep", seeds=[1])
    assert "spearman" in json.dumps(result)


def test_calibrated_to_8_bits_and_exported(run: Path, pairs: Path, tmp_path: Path) -> None:
    recipe = FinetuneRecipe.read(run / "recipe.toml")
    found = calibrate(str(run / "model"), recipe, tmp_path / "eight", num_examples=20)
    assert found["fp32"] == json.loads((run / "results.json").read_text())["metrics"]
    assert evaluate_model(str(tmp_path / "eight"), recipe)["metrics"] == found["int8"]
    export(str(tmp_path / "eight"), tmp_path / "onnx/model.onnx", task=recipe.task)
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "modules.json", "1_Pooling"} <= names
    torch.testing.assert_close(
        encoded(tmp_path / "eight", pairs), encoded(run / "model", pairs), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_an_exported_file_gives_hidden_states_and_the_vectors(
    run: Path, pairs: Path, tmp_path: Path, pooling: str
) -> None:
    model = run / "model"
    if pooling == "first":
        values = {"pooling": "first", "normalize": False}
        finetune(recipe_of(model, pairs, values), tmp_path / "run")
        model = tmp_path / "run/model"
    recipe = recipe_of(model, pairs, {})
    found = export(str(model), tmp_path / "onnx/model.onnx", task=recipe.task)
    assert found["parity"]["max_difference"] < 1e-5
    assert found["zeros"]["onnx"] == found["zeros"]["model"]
    session = InferenceSession(tmp_path / "onnx/model.onnx")
    assert [o.name for o in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    encoder = SentenceTransformer(str(model), device="cpu")
    batch = load_tokenizer(str(model))(TEXTS[:5], padding=True, return_tensors="np")
    inputs = {o.name: batch[o.name] for o in session.get_inputs()}
    states, result = session.run(None, inputs)
    assert np.abs(result - encoder.encode(TEXTS[:5])).max() < 1e-5
    assert states.shape == (*batch["input_ids"].shape, 16)
    names = {"modules.json", "sentence_bert_config.json", "1_Pooling"}
    assert names <= {path.name for path in (tmp_path / "onnx").iterdir()}


@pytest.mark.parametrize("form", ["dense", "compact", "compact-int8"])
def test_a_release_gives_the_same_vectors(
    run: Path, pairs: Path, tmp_path: Path, form: Any
) -> None:
    facts = release(run, tmp_path / "release", form=form, name="me/mine")
    assert opfa.__name__  # a compact file needs it
    expected = encoded(run / "model", pairs)
    rounding = 0.05 if form == "compact-int8" else 1e-5
    torch.testing.assert_close(
        encoded(tmp_path / "release", pairs), expected, atol=rounding, rtol=0
    )
    card = (tmp_path / "release/README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card
    assert 'SentenceTransformer("me/mine")' in card
    assert facts["kind"] == "embedding"
    if form == "compact":
        unpack(tmp_path / "release", tmp_path / "plain")
        found = encoded(tmp_path / "plain", pairs)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_changed_pooling_is_noticed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/model/1_Pooling/config.json"
    path.write_text(path.read_text().replace("16", "17"))
    assert "1_Pooling/config.json has changed" in finished.changed_model(tmp_path / "run/model")


def test_a_teacher_of_another_form_is_refused(
    sparse: Path, run: Path, pairs: Path, tmp_path: Path
) -> None:
    distillation = {"teacher": str(run / "model"), "hard_weight": 0.0}
    task = {"loss": "teacher", "normalize": False}
    recipe = recipe_of(sparse, pairs, task, distillation=distillation)
    with pytest.raises(ModelError, match="normalizes its vectors; task.normalize = true fits"):
        finetune(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("task", "sections", "message"),
    [
        ({}, {"training": {"micro_batch": 4}}, "compares all examples of a batch"),
        ({"loss": "ranking"}, {"training": {"batch": 1}}, "give 2 or more"),
        ({"loss": "teacher"}, {}, "needs .distillation. with hard_weight = 0"),
        ({"loss": "ranking"}, {"selection": {"holdout": 0.1}}, "training examples are pairs"),
    ],
)
def test_what_does_not_go_together_is_refused(
    sparse: Path, pairs: Path, task: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(sparse, pairs, task, **sections)
