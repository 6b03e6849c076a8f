"""Embeddings end to end on a tiny model: trained, resumed, in 8 bits, exported, released; and the
same vectors in sentence-transformers.
"""

import contextlib
import csv
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import break_off, finetune_recipe, sentences
from onnxruntime import InferenceSession
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from snippets import run_snippets, snippets
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel

import opfa
from opfa.commands import app as cli
from opfa.downstream.calibrate import calibrate
from opfa.downstream.evaluate import evaluate_model, predict
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.sweep import sweep
from opfa.downstream.teacher import Teacher
from opfa.errors import ModelError, RecipeError
from opfa.inference import onnx_graph
from opfa.inference.export import export
from opfa.models.configs import load_config, load_tokenizer
from opfa.releases.release import release, unpack
from opfa.storage.seal import read_json
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


FORMS: dict[str, dict[str, Any]] = {
    "graded": {"task": {}, "training": {"epochs": 3.0, "learning_rate": 5e-3}},
    "first": {
        "task": {"loss": "cosine", "highest_grade": 5.0, "pooling": "first", "normalize": False}
    },
    "pairs": {"task": {"loss": "ranking", "metrics": ["mrr@10", "recall@1"]}},
    "teacher": {
        "task": {"loss": "teacher", "train_text": "alone"},
        "quantization": {"start": 0.3},
    },
}
Finished = Callable[[str], tuple[Path, FinetuneRecipe]]


@pytest.fixture(scope="module")
def ran(sparse: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Finished runs with their recipes, each trained once."""

    @functools.cache
    def finished_run(form: str) -> tuple[Path, FinetuneRecipe]:
        sections = dict(FORMS[form])
        if form == "teacher":
            teacher = str(finished_run("graded")[0] / "model")
            sections["distillation"] = {"teacher": teacher, "hard_weight": 0.0}
        recipe, output = (
            recipe_of(sparse, pairs, **sections),
            tmp_path_factory.mktemp("run") / "run",
        )
        finetune(recipe, output)
        return output, recipe

    return finished_run


@pytest.fixture
def run(ran: Finished) -> Path:
    return ran("graded")[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_finished_model_is_sparse_and_the_same_in_sentence_transformers(
    sparse: Path, ran: Finished, pairs: Path, form: str
) -> None:
    directory, recipe = ran(form)
    model = directory / "model"
    assert inspect(model)["fingerprint"] == inspect(sparse)["fingerprint"]
    assert inspect(model)["stated"] == "matches"
    again, results = evaluate_model(str(model), recipe), read_json(directory / "results.json")
    assert again.metrics == results["metrics"]
    assert list(again.metrics) == list(recipe.task.metrics)
    assert not finished.changed_model(model)
    found = vectors(model, recipe)
    torch.testing.assert_close(found, encoded(model, pairs), atol=1e-5, rtol=0)
    assert torch.allclose(found.norm(dim=-1), torch.ones(())) == (form != "first")


LONG = [*TEXTS[:9], " ".join(TEXTS[:9])]  # the last one is cut


def predicted(model: Path, **options: Any) -> Tensor:
    """What `opfa.predict` says of `LONG` [N, H]."""
    return torch.tensor([each.prediction for each in opfa.predict(model, LONG, **options)])


@pytest.mark.parametrize("form", ["graded", "first"])
@pytest.mark.parametrize("has_recipe", [True, False])
def test_predictions_are_the_vectors_of_sentence_transformers(
    ran: Finished, tmp_path: Path, form: str, has_recipe: bool
) -> None:
    model = ran(form)[0] / "model"
    if not has_recipe:
        model = shutil.copytree(model, tmp_path / "alone")
        path = model / "sentence_bert_config.json"
        path.write_text(path.read_text().replace("24", "9"))
    expected = SentenceTransformer(str(model), device="cpu").encode(LONG)
    found = predicted(model, batch=4)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_file_gets_a_vector_a_row_and_of_two_columns_their_cosine(
    run: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = pairs / "validation.jsonl"
    words = ["predict", str(run), str(asked), "--text", "b", "--output"]
    assert cli.run([*words, str(tmp_path / "a.jsonl"), "--prefix", "b_"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert list(rows[0]) == ["a", "b", "grade", "alone", "b_prediction"]
    expected = encoded(run / "model", pairs)
    found = torch.tensor([row["b_prediction"] for row in rows])
    torch.testing.assert_close(found, expected[:, 1], atol=1e-5, rtol=0)
    assert cli.run([*words, str(tmp_path / "a.csv")]) == 0
    with (tmp_path / "a.csv").open(newline="") as file:
        cells = [json.loads(row["prediction"]) for row in csv.DictReader(file)]
    assert cells == found.tolist()
    both = opfa.predict(run, asked, text="a", text_pair="b")
    cosines = (expected[:, 0] * expected[:, 1]).sum(-1)  # their length is 1
    torch.testing.assert_close(torch.tensor([b.prediction for b in both]), cosines)
    capsys.readouterr()


def test_a_sentence_encoder_loads_as_the_encoder(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(path.read_text().replace('"BertModel"', '"BertForMaskedLM"'))
    for model in (run, tmp_path / "model"):  # many on the Hub name the class they began as
        assert type(opfa.load(model)) is BertModel
    torch.testing.assert_close(predicted(tmp_path / "model"), predicted(run))


def test_it_learns_what_people_say(sparse: Path, ran: Finished) -> None:
    directory, recipe = ran("graded")
    before = evaluate_model(str(sparse), recipe).metrics["spearman"]
    assert read_json(directory / "results.json")["metrics"]["spearman"] > before + 0.1


def test_a_run_that_is_broken_off_and_resumed_is_the_same(ran: Finished, tmp_path: Path) -> None:
    directory, recipe = ran("pairs")
    break_off(5, finetune, recipe, tmp_path / "run")
    finetune(recipe, tmp_path / "run", resume=True)
    assert model_digest(tmp_path / "run/model") == model_digest(directory / "model")


def test_a_model_is_trained_on_as_its_files_say(ran: Finished, pairs: Path, tmp_path: Path) -> None:
    """Chosen on training examples held out."""
    sections = {"sweep": {"learning_rate": [5e-3]}, "selection": {"holdout": 0.25}}
    sweep(recipe_of(ran("first")[0] / "model", pairs, {}, **sections), tmp_path / "sweep")
    best = tmp_path / "sweep" / read_json(tmp_path / "sweep/results.json")["best_run"] / "model"
    values = read_json(best / "1_Pooling/config.json")
    assert values["pooling_mode_cls_token"] and not values["pooling_mode_mean_tokens"]
    kinds = [module["type"] for module in json.loads((best / "modules.json").read_text())]
    assert [kind.rpartition(".")[2] for kind in kinds] == ["Transformer", "Pooling"]


@pytest.fixture(scope="module")
def _one_trace() -> Iterator[None]:
    """Both exports are of the same weights, and tracing takes seconds."""
    traced: list[bytes] = []

    def trace(*arguments: Any) -> onnx.ModelProto:
        if not traced:
            traced.append(before(*arguments).SerializeToString())
        return onnx.load_model_from_string(traced[0])

    before = onnx_graph.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "trace", trace)
        yield


def onnx_vectors(path: Path, model: Path) -> tuple[np.ndarray, np.ndarray]:
    session = InferenceSession(path)
    assert [o.name for o in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    batch = load_tokenizer(str(model))(TEXTS[:5], padding=True, return_tensors="np")
    inputs = {o.name: batch[o.name] for o in session.get_inputs()}
    states, result = (np.asarray(each) for each in session.run(None, inputs))
    assert states.shape == (*batch["input_ids"].shape, 16)
    return result, SentenceTransformer(str(model), device="cpu").encode(TEXTS[:5])


@pytest.mark.usefixtures("_one_trace")
def test_an_exported_file_gives_hidden_states_and_the_vectors(
    ran: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, recipe = ran("graded")
    output = tmp_path / "onnx/model.onnx"
    found = export(str(directory / "model"), output, task=recipe.task)
    assert found.parity is not None and found.parity.max_difference < 1e-5
    assert found.zeros.onnx == found.zeros.model
    result, expected = onnx_vectors(output, directory / "model")
    assert np.abs(result - expected).max() < 1e-5
    torch.testing.assert_close(predicted(output), predicted(directory), atol=1e-5, rtol=0)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/search").symlink_to(directory)
    Path("search").symlink_to("onnx")
    named = run_snippets("opfa/inference/README.md", "sentence_embedding")
    assert np.abs(named["vectors"] - named["same"]).max() < 1e-5
    named = run_snippets("recipes/downstream/README.md", "SentenceTransformer")
    assert named["vectors"].shape == (2, 16)
    names = {"modules.json", "sentence_bert_config.json", "1_Pooling"}
    assert names <= {path.name for path in output.parent.iterdir()}


@pytest.mark.usefixtures("_one_trace")
def test_zeros_of_a_pooler_are_not_missed_in_a_file_without_one(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    (tmp_path / "model/sparsity.json").unlink()
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["pooler.dense.weight"][:8] = 0
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    assert "pooler.dense.weight" in inspect(tmp_path / "model")["tensors"]
    found = export(str(tmp_path / "model"), tmp_path / "onnx/model.onnx")
    assert found.zeros.model == inspect(run / "model")["total"]["zeros"]


def test_what_is_no_sentence_encoder_is_not_compared_as_one(
    sparse: Path, ran: Finished, tmp_path: Path
) -> None:
    BertForSequenceClassification.from_pretrained(sparse).save_pretrained(tmp_path / "model")
    load_tokenizer(str(sparse)).save_pretrained(tmp_path / "model")
    (tmp_path / "model/modules.json").write_text("[]")  # cross-encoders have one too
    with pytest.raises(ModelError, match="task.kind = 'embedding': .*model is no sentence encoder"):
        export(str(tmp_path / "model"), tmp_path / "a.onnx", task=ran("graded")[1].task)


@pytest.mark.usefixtures("_one_trace")
def test_it_is_calibrated_to_8_bits_and_exported(ran: Finished, tmp_path: Path) -> None:
    directory, recipe = ran("graded")
    found = calibrate(str(directory / "model"), recipe, tmp_path / "eight", num_examples=20)
    assert found.fp32 == read_json(directory / "results.json")["metrics"]
    assert evaluate_model(str(tmp_path / "eight"), recipe).metrics == found.int8
    output = tmp_path / "onnx/model.onnx"
    assert export(str(tmp_path / "eight"), output, task=recipe.task).precision == "int8"
    result, expected = onnx_vectors(output, directory / "model")
    assert 1e-5 < np.abs(result - expected).max() < 0.1
    assert 1e-5 < (predicted(tmp_path / "eight") - predicted(directory)).abs().max() < 0.1


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_a_release_gives_the_same_vectors(
    run: Path, pairs: Path, tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = release(run, tmp_path / "release", form=form, name="me/mine")
    (tmp_path / "me").mkdir()
    (tmp_path / "me/mine").symlink_to(tmp_path / "release")
    monkeypatch.chdir(tmp_path)
    for code in snippets((tmp_path / "release/README.md").read_text())[:2]:
        exec(code, {})
    assert opfa.__name__  # a compact file needs it
    expected = encoded(run / "model", pairs)
    torch.testing.assert_close(encoded(tmp_path / "release", pairs), expected, atol=1e-5, rtol=0)
    card = (tmp_path / "release/README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card
    assert 'SentenceTransformer("me/mine")' in card
    assert facts.kind == "embedding"
    ours = predicted(run)
    torch.testing.assert_close(predicted(tmp_path / "release"), ours, atol=1e-5, rtol=0)
    if form == "compact":
        unpack(tmp_path / "release", tmp_path / "plain")
        found = encoded(tmp_path / "plain", pairs)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_changed_pooling_is_noticed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/model/1_Pooling/config.json"
    path.write_text(path.read_text().replace("16", "17"))
    assert "1_Pooling/config.json has changed" in finished.changed_model(tmp_path / "run/model")


@pytest.mark.parametrize("is_kept", [True, False])
def test_the_soft_loss_is_the_mean_squared_error_of_vectors(
    sparse: Path, run: Path, pairs: Path, tmp_path: Path, is_kept: bool
) -> None:
    distillation = {"teacher": (teacher := str(run / "model")), "hard_weight": 0.0}
    recipe = recipe_of(sparse, pairs, {"loss": "teacher"}, distillation=distillation)
    task, tokenizer = settled(recipe.task, str(sparse)), load_tokenizer(str(sparse))
    split = tasks.load(task, tokenizer, load_config(str(sparse))).train
    student = tasks.load_model(task, str(sparse), ()).eval()
    assert recipe.distillation is not None
    learning = Teacher(recipe.distillation, task, (), student, tokenizer=tokenizer)
    if is_kept:
        learning.remember(split, tmp_path / "kept", contextlib.nullcontext)
    indices = [5, 3, 60]
    batch = split.collate([split.features[i] for i in indices])
    outputs = tasks.call(task, student, batch)
    soft, _ = learning.losses(outputs, batch, indices)
    encoder = SentenceTransformer(teacher, device="cpu")
    columns = (split.examples.texts, split.examples.pairs or [])
    goal = [torch.tensor(encoder.encode([c[i] for i in indices])) for c in columns]
    ours = outputs["sentence_embedding"]
    torch.testing.assert_close(soft, (ours - torch.stack(goal, dim=1)).square().mean())


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
