"""A release: verified, told truthfully, and usable by others."""

import base64
import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import as_older, finetune_recipe, pretrain_recipe
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from snippets import run_snippets, snippets
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import opfa
from opfa.commands import app as cli
from opfa.compression import quant
from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.sweep import sweep
from opfa.errors import ModelError, RecipeError, RunError
from opfa.hub import manifest
from opfa.models.encoders import load_finetuned_model
from opfa.models.removal import groups_of, matrices_of
from opfa.releases import rounding
from opfa.releases.release import push, release, unpack
from opfa.releases.rounding import write_weights
from opfa.report import pictures
from opfa.storage import seal
from opfa.training import finished
from opfa.training.checkpoint import model_digest
from opfa.upstream.pretrain import pretrain
from opfa.weights import compact
from opfa.weights.inspection import inspect

SPARSITY = "89.94%"  # of the tiny model: exact counts of small matrices


@pytest.fixture(scope="module")
def run(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning of a sparse model."""
    output = tmp_path_factory.mktemp("runs") / "plain"
    finetune(finetune_recipe(sparse, examples), output)
    return output


@pytest.fixture(scope="module")
def quantized(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning to 8 bits, embeddings too."""
    output = tmp_path_factory.mktemp("runs") / "quantized"
    quantization = {"bits": 8, "embeddings": True, "weights": "tensor"}
    finetune(finetune_recipe(sparse, examples, quantization=quantization), output)
    return output


def weights(directory: Path) -> dict[str, Tensor]:
    (path,) = directory.glob("model*.safetensors")
    return dict(compact.tensors(path))


def logits(directory: Path) -> Tensor:
    model = load_finetuned_model(str(directory))
    if (directory / quant.FILE).is_file():
        quant.load(model, directory / quant.FILE)
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 17).view(2, 6)).logits


def test_a_dense_release_is_the_model_of_the_run_with_everything_to_check_it(
    run: Path, tmp_path: Path
) -> None:
    facts = release(run, tmp_path / "out")
    released = tmp_path / "out"
    assert set(manifest.check(released).files) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "recipe.toml",
        "sparsity.json",
        "sparsity.png",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name, tensor in load_file(run / "model" / "model.safetensors").items():
        assert torch.equal(weights(released)[name], tensor)
    for name in ("config.json", "sparsity.json", "tokenizer.json"):
        one, other = ((d / name).read_text() for d in (released, run / "model"))
        assert json.loads(one) == json.loads(other)
    results = json.loads((run / "results.json").read_text())
    assert facts.metrics == results["metrics"]
    assert facts.fingerprint == inspect(released)["fingerprint"]
    assert manifest.read(released).facts == facts.values()


def test_a_compact_release_answers_as_the_run(run: Path, tmp_path: Path) -> None:
    release(run, tmp_path / "out", form="compact")
    assert torch.equal(logits(tmp_path / "out"), logits(run / "model"))
    assert inspect(tmp_path / "out")["stated"] == "matches"


def test_8_bits_of_a_quantized_model_are_the_same_8_bits(quantized: Path, tmp_path: Path) -> None:
    facts = release(quantized, tmp_path / "out", form="compact-int8", dtype="fp32")
    answers = logits(tmp_path / "out"), logits(quantized / "model")
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-6)
    stored = compact.CompactFile(tmp_path / "out" / compact.FILE)
    kinds = {form.dtype for name, form in stored.forms.items() if ".layer." in name}
    assert kinds == {torch.int8}
    assert facts.quantized
    written = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(written) == 2  # the ranges too
    assert facts.bytes == sum(written)


def test_8_bits_without_training_keep_the_zeros_and_are_measured_anew(
    run: Path, tmp_path: Path
) -> None:
    facts = release(run, tmp_path / "out", form="compact-int8")
    assert inspect(tmp_path / "out")["stated"] == "matches"
    recipe = FinetuneRecipe.read(run / "recipe.toml")
    assert facts.metrics == evaluate_model(str(tmp_path / "out"), recipe).metrics
    card = (tmp_path / "out" / "README.md").read_text()
    assert "matrices of the layers and embeddings in 8 bits, others in fp16" in card
    before = json.loads((run / "results.json").read_text())["metrics"]["accuracy"]
    assert f"| before it was rounded | {SPARSITY} | 1 | {before:.4f} |" in card


def test_rounded_weights_are_measured_on_every_split_of_the_run(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    more = str(examples / "train.jsonl")
    recipe = finetune_recipe(sparse, examples, task={"more_validation": {"mismatched": more}})
    before = finetune(recipe, tmp_path / "run").metrics
    facts = release(tmp_path / "run", tmp_path / "out", form="compact-int8")
    assert list(facts.metrics) == ["accuracy", "mismatched_accuracy"]
    task = recipe.task.model_copy(update={"validation": more})
    swapped = recipe.model_copy(update={"task": task})
    found = evaluate_model(str(tmp_path / "out"), swapped).metrics["accuracy"]
    assert facts.metrics["mismatched_accuracy"] == found
    cells = " | ".join(f"{before[name]:.4f}" for name in facts.metrics)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| before it was rounded | {SPARSITY} | 1 | {cells} |" in card


def test_rounded_weights_are_measured_on_the_same_data_wherever_they_are_now(
    run: Path, examples: Path, tmp_path: Path
) -> None:
    shutil.copy(examples / "validation.jsonl", tmp_path / "moved.jsonl")
    override = f"task.validation={tmp_path / 'moved.jsonl'}"
    facts = release(run, tmp_path / "out", form="compact-int8", overrides=[override])
    assert facts.metrics_of == "these files"
    other = f"task.validation={examples / 'train.jsonl'}"
    with pytest.raises(
        RunError, match=r"train\.jsonl': is other data than the run was evaluated on"
    ):
        release(run, tmp_path / "other", form="compact-int8", overrides=[other])
    assert not (tmp_path / "other").exists()


def test_what_has_no_use_is_refused(run: Path, sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="task.validation=x: nothing is measured again here"):
        release(run, tmp_path / "out", overrides=["task.validation=x"])
    with pytest.raises(RunError, match="nothing is measured again here"):
        release(sparse.parent, tmp_path / "out", form="compact-int8", overrides=["seed=1"])
    with pytest.raises(RecipeError, match="bogus"):
        release(run, tmp_path / "out", form="compact-int8", overrides=["bogus.key=1"])
    with pytest.raises(RunError, match="--embeddings is for compact-int8, and this is compact"):
        release(run, tmp_path / "out", form="compact", embeddings=False)
    assert not list(tmp_path.iterdir())


def test_a_pretrained_model_in_8_bits_says_that_its_loss_is_not_of_these_files(
    sparse: Path, tmp_path: Path
) -> None:
    facts = release(sparse.parent, tmp_path / "out", form="compact-int8")
    assert facts.metrics_of == "the weights before rounding"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "that of the weights before they were rounded" in text


def dense_model(sparse: Path, output: Path) -> Path:
    """The sparse model with something in place of its zeros."""
    dense = AutoModelForSequenceClassification.from_pretrained(sparse)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    dense.save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sparse / name, output)
    return output


def test_a_dense_model_in_8_bits_has_its_layers_in_8_bits(
    examples: Path, sparse: Path, tmp_path: Path
) -> None:
    init = dense_model(sparse, tmp_path / "model")
    finetune(finetune_recipe(init, examples, model={"zeros": "free"}), tmp_path / "run")
    release(tmp_path / "run", tmp_path / "out", form="compact-int8")
    forms = compact.CompactFile(tmp_path / "out" / compact.FILE).forms
    assert {form.dtype for name, form in forms.items() if ".layer." in name} == {torch.int8}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A dense encoder" in card
    assert "sparse" not in card


def test_the_card_of_a_dense_model_that_was_quantized_calls_it_dense(
    examples: Path, sparse: Path, tmp_path: Path
) -> None:
    """Its sparsity.json lists the quantized matrices, with no zero in any."""
    init = dense_model(sparse, tmp_path / "model")
    recipe = finetune_recipe(init, examples, model={"zeros": "free"}, quantization={"bits": 8})
    finetune(recipe, tmp_path / "run")
    release(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A dense encoder, fine-tuned for classification, quantized to 8 bits" in card
    assert "None: no matrix has zeros." in card
    assert "parse" not in card
    assert not (tmp_path / "out" / "sparsity.png").exists()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_16_bits_are_rounded_once_and_kept_bit_for_bit(
    run: Path, tmp_path: Path, dtype: Any
) -> None:
    for form in ("dense", "compact"):
        release(run, tmp_path / form, form=form, dtype=dtype)
    plain, packed = weights(tmp_path / "dense"), weights(tmp_path / "compact")
    assert {tensor.dtype for tensor in plain.values()} <= {torch.float16, torch.bfloat16}
    for name, tensor in plain.items():
        assert torch.equal(packed[name], tensor), name
    assert inspect(tmp_path / "dense")["fingerprint"] == inspect(run / "model")["fingerprint"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact")
    assert loaded.dtype == torch.float32


def test_a_live_weight_that_16_bits_round_to_zero_stays_live(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.tensor([[1e-30, 0.0], [1.0, 0.0]]),
        "a.bias": torch.tensor([1e-30]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    write_weights(tmp_path, tmp_path / "out", {"a.weight"}, form="dense", dtype="fp16")
    found = weights(tmp_path / "out")
    assert (found["a.weight"] != 0).tolist() == [[True, False], [True, False]]
    assert found["a.bias"].tolist() == [0.0]


def test_a_weight_too_large_for_fp16_is_named(tmp_path: Path) -> None:
    save_file({"a.weight": torch.full((2, 2), 1e6)}, tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"a\.weight: has values that torch\.float16 can't hold"):
        write_weights(tmp_path, tmp_path / "out", set(), form="dense", dtype="fp16")


def test_embeddings_stay_when_asked(run: Path, tmp_path: Path) -> None:
    release(run, tmp_path / "out", form="compact-int8", dtype="fp32", embeddings=False)
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(weights(tmp_path / "out")[name], weights(run / "model")[name])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "matrices of the layers in 8 bits, others in fp32" in card


def test_embeddings_that_were_trained_in_8_bits_can_not_stay(
    quantized: Path, tmp_path: Path
) -> None:
    message = "--embeddings same: this model was trained with its embeddings in 8 bits"
    with pytest.raises(RunError, match=message):
        release(quantized, tmp_path / "out", form="compact-int8", embeddings=False)
    assert not list(tmp_path.iterdir())


def changed(run: Path, to: Path, name: str, value: float) -> Path:
    """A copy of a run that wrote another weight than its sparsity.json says."""
    shutil.copytree(run, to)
    path = to / "model" / "model.safetensors"
    tensors = load_file(path)
    flat = tensors[name].view(-1)
    place = int((flat == 0).nonzero()[0] if value else (flat != 0).nonzero()[0])
    flat[place] = value
    save_file(tensors, path, {"format": "pt"})
    done = json.loads((to / "done.json").read_text())
    finished.write(to, {**done, "model_sha256": model_digest(to / "model")})
    return to


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_zero_too_many_or_too_few_is_refused(run: Path, tmp_path: Path, value: float) -> None:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    wrong = changed(run, tmp_path / "run", name, value)
    with pytest.raises(ModelError, match=r"not what its sparsity\.json says"):
        release(wrong, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_model_that_is_not_the_evaluated_one_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.bias"] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="not those that the run wrote and evaluated"):
        release(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pretrained_model_that_was_changed_is_refused(sparse: Path, tmp_path: Path) -> None:
    """Its zeros are where they were, and no results.json tells."""
    shutil.copytree(sparse.parent, tmp_path / "run")
    path = tmp_path / "run" / "model" / "model.safetensors"
    save_file({name: 3 * t for name, t in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ModelError, match="not those that the run wrote and evaluated"):
        release(tmp_path / "run", tmp_path / "out")


def test_a_run_whose_first_model_was_made_anew_is_refused(
    run: Path, sparse: Path, tmp_path: Path
) -> None:
    """Its card would tell how another model was made."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(sparse.parent, first)
    shutil.copytree(run, second)
    recipe = second / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(sparse), str(first / "model")))
    as_older(second)  # else it would notice that it was changed
    release(second, tmp_path / "good")
    done = json.loads((first / "done.json").read_text())
    seal.write_sealed(first / "done.json", {**done, "model_sha256": "0" * 64})
    with pytest.raises(RunError, match="began with another model than .*first/model is now"):
        release(second, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_what_can_not_be_released_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run, it has no recipe.toml"):
        release(run / "model", tmp_path / "out")
    with pytest.raises(RunError, match="exists already"):
        release(run, tmp_path)
    (tmp_path / "8bit").mkdir()
    for name in ("recipe.toml", quant.FILE):
        (tmp_path / "8bit" / name).touch()
    with pytest.raises(
        RunError, match="opfa calibrate writes, and can't be.*--format compact-int8"
    ):
        release(tmp_path / "8bit", tmp_path / "out")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "done.json").unlink()
    with pytest.raises(RunError, match="not a finished run"):
        release(tmp_path / "run", tmp_path / "out")


def test_a_weight_file_with_other_zeros_than_the_model_is_not_released(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing_one(tensor: Tensor, scheme: quant.Scheme) -> tuple[Tensor, Tensor]:
        values, scale = to_int8(tensor, scheme)
        tensor.view(-1)[int(tensor.view(-1).nonzero()[0])] = 0.0
        return values, scale

    to_int8 = quant.to_int8
    monkeypatch.setattr(quant, "to_int8", losing_one)
    with pytest.raises(ModelError, match=r"its zeros are not what its sparsity\.json says"):
        release(run, tmp_path / "out", form="compact-int8")
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_written_as_it_is_stops_a_release(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(tensors: dict[str, Tensor], *rest: Any) -> None:
        save_file({**tensors, "classifier.bias": tensors["classifier.bias"] + 1}, *rest)

    monkeypatch.setattr(rounding, "save_file", careless)
    with pytest.raises(ModelError, match=r"classifier\.bias was not written as it is"):
        release(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_every_byte_of_a_run_is_hashed_once_and_read_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the file that is written is hashed for the card, and once more at the end."""
    hashed, read = Counter[str](), Counter[str]()
    digest, tensors = seal.digest, compact.tensors

    def counted(path: Path) -> str:
        hashed["run" if run in path.parents else path.name] += 1
        return digest(path)

    def counted_tensors(path: Path, *rest: Any) -> Iterator[tuple[str, Tensor]]:
        read["run" if run in path.parents else path.name] += 1
        return tensors(path, *rest)

    monkeypatch.setattr(seal, "digest", counted)
    monkeypatch.setattr(compact, "tensors", counted_tensors)
    release(run, tmp_path / "out")
    assert read == {"run": 1, "model.safetensors": 1}
    assert hashed["run"] == len(seal.files_of(run / "model")) + len(finished.RECORDS)
    assert hashed["model.safetensors"] == 2


def test_only_what_belongs_to_a_model_is_taken_along(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    torch.save({}, tmp_path / "run" / "model" / "training_args.bin")
    (tmp_path / "run" / "model" / "notes.txt").write_text("private")
    release(tmp_path / "run", tmp_path / "out")
    assert not {"training_args.bin", "notes.txt"} & set(manifest.read(tmp_path / "out").files)


def test_a_link_is_not_followed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "run" / "model" / "tokenizer_more.json").symlink_to(tmp_path / "secret")
    as_older(tmp_path / "run")  # else it would notice that the file is new
    with pytest.raises(ModelError, match=r"tokenizer_more\.json: is a link"):
        release(tmp_path / "run", tmp_path / "out")


def test_files_of_a_run_that_are_missing_or_broken_are_named(run: Path, tmp_path: Path) -> None:
    cases = [("results.json", None), ("results.json", "{"), ("environment.json", None)]
    for number, (file, text) in enumerate(cases):
        broken = tmp_path / str(number)
        shutil.copytree(run, broken)
        (broken / file).unlink()
        if text is not None:
            (broken / file).write_text(text)
        with pytest.raises(RunError, match=f"{file} is missing" if text is None else "has changed"):
            release(broken, tmp_path / "out")
        done = json.loads((run / "done.json").read_text())
        old = {key: value for key, value in done.items() if key not in ("sealed", seal.FILES)}
        (broken / "done.json").write_text(json.dumps(old))  # of an older version
        with pytest.raises(RunError, match=f"{file}: can't be read"):
            release(broken, tmp_path / "out")
    shutil.copytree(run, tmp_path / "no-model")
    shutil.rmtree(tmp_path / "no-model" / "model")
    with pytest.raises(RunError, match="not a finished run"):
        release(tmp_path / "no-model", tmp_path / "out")
    with pytest.raises(RunError, match="/dev/null/out: can't be made"):
        release(run, Path("/dev/null/out"))
    with pytest.raises(RunError, match="not a name that the Hub accepts"):
        release(run, tmp_path / "my model")


def test_a_full_disk_or_a_failed_check_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwritable(*_: Any, **__: Any) -> None:
        raise ModelError("the last check failed")

    monkeypatch.setattr(manifest, "check", unwritable)
    with pytest.raises(ModelError, match="the last check"):
        release(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unpacking_gives_what_the_dense_release_is(run: Path, tmp_path: Path) -> None:
    release(run, tmp_path / "dense")
    release(run, tmp_path / "compact", form="compact")
    unpack(tmp_path / "compact", tmp_path / "plain")
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "dense")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("plain", "dense")]
    assert configs[0] == configs[1]
    assert not (tmp_path / "plain" / manifest.MANIFEST).exists()
    with pytest.raises(ModelError, match="nothing to unpack"):
        unpack(tmp_path / "dense", tmp_path / "again")


def test_a_compact_release_is_a_start_for_fine_tuning(
    run: Path, examples: Path, tmp_path: Path
) -> None:
    release(run, tmp_path / "out", form="compact-int8")
    finetune(finetune_recipe(tmp_path / "out", examples), tmp_path / "next")
    before, after = inspect(tmp_path / "out"), inspect(tmp_path / "next" / "model")
    assert after["fingerprint"] == before["fingerprint"]


# The card


@pytest.mark.parametrize("form", ["dense", "compact-int8"])
def test_the_snippets_of_the_card_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    release(run, tmp_path / "tiny-cats", form=form)
    monkeypatch.chdir(tmp_path)
    found = snippets((tmp_path / "tiny-cats" / "README.md").read_text())
    assert len(found) == 3
    for code in found:
        exec(code, {})
    assert inspect(tmp_path / "mine")["fingerprint"] == inspect(run / "model")["fingerprint"]


@pytest.mark.usefixtures("nothing_stays_registered")
def test_the_card_of_an_uneven_model_says_what_is_left_of_its_shape(
    run: Path, sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opfa.prune_structured(run, tmp_path / "half", keep=0.5)
    opfa.shrink(tmp_path / "half", tmp_path / "small")
    finetune(finetune_recipe(tmp_path / "small", examples), tmp_path / "again")
    facts = release(tmp_path / "again", tmp_path / "tiny-cats").shape
    assert facts is not None and facts["heads"][1] == 4 and facts["neurons"][1] == 64
    model = opfa.load(tmp_path / "again")
    assert facts["neurons"][0] == sum(units.count for units in groups_of(model)[1::2]) < 64
    left = sum(int(linear.weight.count_nonzero()) for linear in matrices_of(model))
    assert facts["weights"] == (left, 2 * (4 * 16 * 16 + 2 * 16 * 32))
    card = (tmp_path / "tiny-cats/README.md").read_text()
    assert f"| heads | {facts['heads'][0]} | 4 | {facts['heads'][0] / 4:.1%} |" in card
    assert (
        f"{facts['speedup']:.2f} times as fast as with all heads and neurons (torch, fp32" in card
    )
    assert card.count("import opfa  # knows layers of different sizes") == 1
    monkeypatch.chdir(tmp_path)
    for code in snippets(card):
        exec(code, {})


def test_the_python_of_the_readme_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    named = run_snippets("README.md", "opfa.lock", trainer=SimpleNamespace(train=list))
    (found,) = named["classify"]("the cat sees the sea.")
    assert found["label"] in ("cat", "other")
    assert inspect(tmp_path / "mine")["fingerprint"] == inspect(run / "model")["fingerprint"]


def test_the_snippets_of_a_pretrained_model_run(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = release(sparse.parent, tmp_path / "tiny-encoder", form="compact")
    monkeypatch.chdir(tmp_path)
    for code in snippets((tmp_path / "tiny-encoder" / "README.md").read_text()):
        exec(code, {})
    lines = (sparse.parent / "metrics.jsonl").read_text().splitlines()
    evaluations = [row for row in map(json.loads, lines) if row.get("eval")]
    assert facts.metrics == {"mlm_loss": evaluations[-1]["mlm_loss"]}


def test_the_card_offers_a_download_only_of_a_name_with_an_owner(run: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("tiny", "org/tiny")):
        release(run, tmp_path / str(number), name=name)
        card = (tmp_path / str(number) / "README.md").read_text()
        assert ("opfa download" in card) == (name == "org/tiny")
        assert "heck that the zeros are those of this card:" in card


def test_the_card_of_a_pretrained_model_says_that_it_has_no_head(
    sparse: Path, tmp_path: Path
) -> None:
    release(sparse.parent, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- It has no head for a task yet: fine-tune it for one first." in card


def test_a_damaged_log_of_a_pretraining_is_named(sparse: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse.parent, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n{"st\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl has changed"):
        release(tmp_path / "run", tmp_path / "out")
    as_older(tmp_path / "run")
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: is damaged"):
        release(tmp_path / "run", tmp_path / "out")


def test_a_model_that_learnt_hidden_states_alone_is_released_as_an_encoder(
    prepared: Path, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"hard_weight": 0.0, "soft_weight": 0.0, "hidden_weight": 1.0}
    recipe = pretrain_recipe(prepared, distillation={"teacher": str(sparse), **weights})
    drawn = []
    monkeypatch.setattr(pictures, "series", lambda rows, key: drawn.append(key) or ([], []))
    pretrain(recipe, tmp_path / "run")
    assert "hidden_loss" in drawn and "mlm_loss" not in drawn
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    facts = release(tmp_path / "run", tmp_path / "tiny")
    assert facts.metrics == {"hidden_loss": last["hidden_loss"]}
    card = (tmp_path / "tiny/README.md").read_text()
    assert "from transformers import AutoModel, AutoTokenizer" in card
    assert "pipeline_tag: feature-extraction" in card
    assert "its head for masked tokens was not trained" in card
    monkeypatch.chdir(tmp_path)
    exec(snippets(card)[0], {})


def test_the_card_says_what_the_files_say(run: Path, quantized: Path, tmp_path: Path) -> None:
    facts = release(
        run,
        tmp_path / "out",
        name="org/tiny-cats",
        licence="apache-2.0",
        base_model="org/base",
        compare={"8 bits": quantized},
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "org/base"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-classification"
    (entry,) = data["model-index"]
    assert entry["name"] == "tiny-cats"
    (metric,) = entry["results"][0]["metrics"]
    assert (metric["type"], metric["value"]) == ("accuracy", facts.metrics["accuracy"])
    total = json.loads((tmp_path / "out" / "sparsity.json").read_text())["total"]
    assert f"{total['zeros']:,} of {total['size']:,}" in card.text
    num_weights = sum(tensor.numel() for tensor in weights(tmp_path / "out").values())
    assert f"are zero, {total['zeros'] / num_weights:.1%} of all its weights" in card.text
    assert facts.fingerprint in card.text
    other = json.loads((quantized / "results.json").read_text())["metrics"]["accuracy"]
    assert f"| 8 bits | {SPARSITY} | 1 | {other:.4f} |" in card.text
    assert facts.recipe_sha256 in card.text
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert f"| `model.safetensors` (SHA-256) | `{sha256(written).hexdigest()}` |" in card.text
    assert card.text.count("That run started from this one:") == 1  # two runs
    assert re.search(r"\nOn `\S+/validation.jsonl`\. The first line is", card.text)
    assert card.content.endswith("\n\napache-2.0\n")


def test_nobodys_directories_are_published(run: Path, sparse: Path, tmp_path: Path) -> None:
    for number, source in enumerate((run, sparse.parent)):
        released = tmp_path / f"release-{number}"
        release(source, released)
        for path in released.glob("*.*"):
            if path.suffix in (".json", ".md", ".toml"):
                assert not re.search(r"[\"'` ]/\w", path.read_text()), path


def test_a_local_model_is_no_base_model_of_the_hub_wherever_the_release_is_made(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sparse, tmp_path / "models" / "encoder")
    monkeypatch.chdir(tmp_path)
    finetune(finetune_recipe(Path("models/encoder"), examples), tmp_path / "run")
    monkeypatch.chdir(tmp_path / "models")
    assert release(tmp_path / "run", tmp_path / "out").base_model is None


def test_runs_on_other_data_are_not_compared(
    run: Path, sparse: Path, examples: Path, tmp_path: Path
) -> None:
    task = {"validation": str(examples / "train.jsonl")}
    finetune(finetune_recipe(sparse, examples, task=task), tmp_path / "other")
    for other in (tmp_path / "other", sparse.parent):
        with pytest.raises(RunError, match="--compare other: was measured on other data"):
            release(run, tmp_path / "out", compare={"other": other})


def test_a_run_of_several_seeds_is_shown_beside_their_mean(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(finetune_recipe(sparse, examples), tmp_path / "runs", num_seeds=2, resume=False)
    with pytest.raises(RunError, match=r"it holds several, the best is .*seed-4[23]"):
        release(tmp_path / "runs", tmp_path / "out")
    release(tmp_path / "runs" / "seed-43", tmp_path / "out", compare={"all": tmp_path / "runs"})
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    mean = f"{results['metrics']['accuracy']:.4f} ± {results['std']['accuracy']:.4f}"
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| its recipe | {SPARSITY} | 2 | {mean} |" in text
    assert f"| all | {SPARSITY} | 2 | {mean} |" in text
    monkeypatch.chdir(tmp_path / "runs")
    release(Path("seed-43"), tmp_path / "relative")
    assert (tmp_path / "relative" / "README.md").read_text().count("| its recipe |") == 1
    shutil.copytree(tmp_path / "runs" / "seed-43", tmp_path / "runs" / "not-of-them")
    release(tmp_path / "runs" / "not-of-them", tmp_path / "alone")
    assert "its recipe" not in (tmp_path / "alone" / "README.md").read_text()


# Uploading


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as one commit needs."""

    commits: list[dict[str, bytes]]
    deleted: list[str]
    there: tuple[str, ...]  # files of earlier commits
    refused: bool

    def do_POST(self) -> None:  # noqa: N802 - http.server's name
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append({v["path"]: base64.b64decode(v["content"]) for v in values})
            gone = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
            self.deleted.extend(gone)
            self.answer(
                {
                    "commitUrl": "https://huggingface.co/org/tiny/commit/1",
                    "commitOid": "1",
                    "hookOutput": "",
                }
            )
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.answer({"files": modes})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []}, 400 if self.refused else 200)
        else:
            self.answer({"url": "https://huggingface.co/org/tiny"})

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        if "/tree/" in self.path:
            rows = [{"type": "file", "path": n, "size": 1, "oid": "0"} for n in self.there]
            self.answer(rows)
        else:
            self.answer({"sha": "0", "id": "org/tiny", "siblings": []})

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    handler = type("OneHub", (Hub,), {"commits": [], "deleted": [], "there": (), "refused": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_push_is_one_commit_of_every_file(
    run: Path, tmp_path: Path, hub: tuple[type[Hub], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    arguments = ["release", str(run), "--output", str(tmp_path / "out"), "--push", "org/tiny"]
    assert cli.run([*arguments, "--endpoint", hub[1]]) == 0
    (commit,) = hub[0].commits
    assert set(commit) == {*manifest.check(tmp_path / "out").files, manifest.MANIFEST}
    for name, content in commit.items():
        assert content == (tmp_path / "out" / name).read_bytes()
    assert 'from_pretrained("org/tiny")' in commit["README.md"].decode()


def test_a_push_leaves_no_older_file_in_the_repository(
    run: Path, tmp_path: Path, hub: tuple[type[Hub], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would load an older model.safetensors instead of a compact file."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    release(run, tmp_path / "out", form="compact")
    hub[0].there = (".gitattributes", "README.md", "model.safetensors", "onnx/model.onnx")
    push(tmp_path / "out", "org/tiny", endpoint=hub[1])
    assert sorted(hub[0].deleted) == ["model.safetensors", "onnx/model.onnx"]
    (commit,) = hub[0].commits
    assert set(commit) == {*manifest.check(tmp_path / "out").files, manifest.MANIFEST}


def test_only_files_of_the_manifest_are_pushed(
    run: Path, tmp_path: Path, hub: tuple[type[Hub], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    release(run, tmp_path / "out")
    for name in (".env", ".gitattributes", ".secret/key.json"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("password")
    push(tmp_path / "out", "org/tiny", endpoint=hub[1])
    (commit,) = hub[0].commits
    assert set(commit) == {*manifest.read(tmp_path / "out").files, manifest.MANIFEST}


def test_nothing_is_pushed_when_a_file_changed_after_the_release(
    run: Path, tmp_path: Path, hub: tuple[type[Hub], str]
) -> None:
    release(run, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json has"):
        push(tmp_path / "out", "org/tiny", endpoint=hub[1])
    assert not hub[0].commits


def test_a_card_that_the_hub_refuses_is_not_pushed(
    run: Path, tmp_path: Path, hub: tuple[type[Hub], str]
) -> None:
    release(run, tmp_path / "out")
    hub[0].refused = True
    with pytest.raises(RunError, match="org/tiny: not uploaded"):
        push(tmp_path / "out", "org/tiny", endpoint=hub[1])
    assert not hub[0].commits


def test_a_hub_that_is_not_there_is_one_message(run: Path, tmp_path: Path) -> None:
    release(run, tmp_path / "out")
    with pytest.raises(RunError, match="org/tiny: not uploaded.*to try again: opfa push"):
        push(tmp_path / "out", "org/tiny", endpoint="http://127.0.0.1:9")
