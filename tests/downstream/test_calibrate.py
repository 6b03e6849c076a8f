"""8 bits without training: what is observed, what is written, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import finetune_recipe, pretrain_recipe
from safetensors.torch import load_file

from opfa.commands import app as cli
from opfa.compression import quant
from opfa.data.order import generator
from opfa.downstream.calibrate import calibrate
from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import ModelError, RunError
from opfa.models.configs import load_tokenizer
from opfa.tasks import kinds as tasks
from opfa.upstream.pretrain import pretrain
from opfa.weights.inspection import inspect


@pytest.fixture(scope="module")
def run(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in fp32."""
    output = tmp_path_factory.mktemp("run") / "run"
    finetune(finetune_recipe(sparse, examples), output)
    return output


def recipe_of(run: Path, *overrides: str) -> FinetuneRecipe:
    return FinetuneRecipe.read(run / "recipe.toml", overrides)


def test_the_command_writes_a_model_that_evaluates_as_it_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, recipe = tmp_path / "eight", str(run / "recipe.toml")
    arguments = ["--recipe", recipe, "--output", str(output), "--examples", "20", "--json"]
    assert cli.run(["calibrate", str(run / "model"), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    results = json.loads((run / "results.json").read_text())
    assert result["fp32"] == results["metrics"]
    assert result["examples"] == 20
    again = evaluate_model(str(output), recipe_of(run))
    assert again.quantized and again.metrics == result["int8"]
    assert inspect(output)["stated"] == "matches"
    assert inspect(output)["fingerprint"] == inspect(run / "model")["fingerprint"]
    before, after = (load_file(d / "model.safetensors") for d in (run / "model", output))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ranges_are_the_mean_over_batches_of_the_first_shuffled_examples(
    run: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(run)  # batches of 8
    calibrate(str(run / "model"), recipe, tmp_path / "eight", num_examples=20)
    model = tasks.load_model(recipe.task, str(run / "model"), ("cat", "other")).eval()
    seen: list[tuple[float, float]] = []
    layer = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    layer.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].min().item(), inputs[0].max().item()))
    )
    split = tasks.load(recipe.task, load_tokenizer(str(run / "model")), model.config).train
    order = generator(recipe.seed).permutation(80)[:20].tolist()
    for part in (order[:8], order[8:16], order[16:]):
        with torch.no_grad():
            model(**tasks.inputs_of(split.collate([split.features[index] for index in part])))
    found = load_file(tmp_path / "eight" / quant.FILE)
    for index, end in enumerate(("low", "high")):
        mean = sum(extremes[index] for extremes in seen) / 3
        name = f"bert.encoder.layer.0.intermediate.dense.input_{end}"
        assert found[name].item() == pytest.approx(mean, rel=1e-5)


def test_only_the_examples_that_are_seen_are_tokenized(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    split = tasks._split

    def counting(*arguments: Any, **options: Any) -> tasks.Split:
        found = split(*arguments, **options)
        sizes.append(len(found.features))
        return found

    monkeypatch.setattr(tasks, "_split", counting)
    calibrate(str(run / "model"), recipe_of(run), tmp_path / "eight", num_examples=20)
    assert sizes[1:] == [20]


def test_the_recipe_says_how(run: Path, tmp_path: Path) -> None:
    options = ("quantization.weights=tensor", "quantization.embeddings=true")
    calibrate(str(run / "model"), recipe_of(run, *options), tmp_path / "eight")
    found = load_file(tmp_path / "eight" / quant.FILE)
    scales = {name: x.ndim for name, x in found.items() if name.endswith("scale")}
    assert set(scales.values()) == {0}
    assert "bert.embeddings.word_embeddings.weight_scale" in scales


def test_more_examples_than_there_are_means_all(run: Path, tmp_path: Path) -> None:
    result = calibrate(str(run / "model"), recipe_of(run), tmp_path / "eight", num_examples=512)
    assert result.examples == 80


def test_a_dense_model_is_calibrated_in_its_encoder(
    prepared: Path, examples: Path, tmp_path: Path
) -> None:
    pretrain(pretrain_recipe(prepared, training={"steps": 3}), tmp_path / "dense")
    recipe = finetune_recipe(tmp_path / "dense/model", examples, model={"zeros": "free"})
    finetune(recipe, tmp_path / "task")
    result = calibrate(str(tmp_path / "task/model"), recipe, tmp_path / "eight")
    assert result.sparsity == 0.0
    found = load_file(tmp_path / "eight" / quant.FILE)
    assert len([name for name in found if name.endswith("scale")]) == 12


def test_a_quantized_model_is_refused(run: Path, tmp_path: Path) -> None:
    calibrate(str(run / "model"), recipe_of(run), tmp_path / "eight", num_examples=1)
    with pytest.raises(ModelError, match="eight: is in 8 bits already; give the model that"):
        calibrate(str(tmp_path / "eight"), recipe_of(run), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_output_that_exists_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="exists already; give a new directory"):
        calibrate(str(run / "model"), recipe_of(run), tmp_path)


def test_a_model_without_the_head_is_refused(sparse: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no head for classification"):
        calibrate(str(sparse), recipe_of(run), tmp_path / "eight")


def test_a_tampered_model_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    stated = json.loads((tmp_path / "model/sparsity.json").read_text())
    (tmp_path / "model/sparsity.json").write_text(json.dumps(stated | {"fingerprint": "0"}))
    with pytest.raises(ModelError, match="not where its sparsity.json says"):
        calibrate(str(tmp_path / "model"), recipe_of(run), tmp_path / "eight")
    assert not (tmp_path / "eight").exists()
