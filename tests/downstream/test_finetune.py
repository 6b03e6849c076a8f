"""Fine-tuning with held zeros, end to end on a tiny model."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AfterStep, break_off, finetune_recipe, pretrain_recipe
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import opfa
from opfa.compression import quant
from opfa.compression.selection import num_zeros
from opfa.downstream import evaluate as evaluation
from opfa.downstream import finetune as module
from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.finetune import finetune
from opfa.errors import DivergedError, ModelError, RecipeError, RunError
from opfa.models.configs import load_config
from opfa.training.checkpoint import model_digest
from opfa.training.distributed import Stopped
from opfa.training.loop import Concern, Progress
from opfa.training.run import Run
from opfa.upstream.pretrain import pretrain
from opfa.weights.inspection import check_stated, inspect


@pytest.fixture(scope="module")
def dense(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dense") / "run"
    pretrain(pretrain_recipe(prepared, training={"steps": 3}), output)
    return output / "model"


def fingerprint(model: Path) -> str:
    return inspect(model)["fingerprint"]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"training": {"precision": "bf16"}},
    "accumulated": {"training": {"micro_batch": 2, "weight_decay": 0.1}},
    "grouped": {"training": {"group_by_length": True}},
    "quantized": {"quantization": {"start": 0.3}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_zeros_after_fine_tuning(
    sparse: Path, examples: Path, tmp_path: Path, variant: str
) -> None:
    results = finetune(finetune_recipe(sparse, examples, **VARIANTS[variant]), tmp_path / "run")
    assert fingerprint(tmp_path / "run/model") == fingerprint(sparse)
    assert inspect(tmp_path / "run/model")["stated"] == "matches"
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    assert opfa.inspect(plain)["fingerprint"] == fingerprint(sparse)
    assert results.sparsity == pytest.approx(0.9, abs=1e-3)
    before, after = (load_file(d / "model.safetensors") for d in (sparse, tmp_path / "run/model"))
    name = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.equal(before[name], after[name])  # it did learn


def test_what_is_reported_is_measured_on_the_written_model_whatever_the_precision(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def predict(*arguments: Any, **options: Any) -> Any:
        seen.append(before(*arguments, **options)[0])
        return (seen[-1],)

    before = evaluation.predict
    monkeypatch.setattr(evaluation, "predict", predict)
    recipe = finetune_recipe(sparse, examples, training={"precision": "bf16"})
    results = finetune(recipe, tmp_path / "run")
    again = evaluate_model(str(tmp_path / "run/model"), recipe)
    assert torch.equal(seen[-2], seen[-1])
    assert results.metrics == again.metrics


def test_results_say_what_ran(sparse: Path, examples: Path, tmp_path: Path) -> None:
    recipe = finetune_recipe(sparse, examples)
    finetune(recipe, tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert list(results) == [
        "task",
        "metrics",
        "seed",
        "sparsity",
        "quantized",
        "recipe_sha256",
        "model_sha256",
        "model_files_sha256",
    ]
    assert results["recipe_sha256"] == recipe.sha256()
    assert results["model_sha256"] == model_digest(tmp_path / "run/model")
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "other"}
    assert {p.name for p in (tmp_path / "run/report").iterdir()} == {
        "loss.png",
        "learning_rate.png",
        "sparsity.png",
        "index.html",
    }


@pytest.mark.parametrize("variant", ["plain", "quantized"])
def test_evaluating_a_finished_model_gives_the_results_of_its_run(
    sparse: Path, examples: Path, tmp_path: Path, variant: str
) -> None:
    recipe = finetune_recipe(sparse, examples, **VARIANTS[variant], seed=3)
    results = finetune(recipe, tmp_path / "run")
    again = evaluate_model(str(tmp_path / "run/model"), recipe, tmp_path / "answers.jsonl")
    assert again.metrics == results.metrics
    assert again.quantized == results.quantized == (variant == "quantized")
    rows = list(map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()))
    assert {row["label"] for row in rows} == {"cat", "other"}
    right = [row["prediction"] == row["label"] for row in rows]
    assert sum(right) / len(right) == again.metrics["accuracy"]


def test_eight_bits_keep_every_zero(sparse: Path, examples: Path, tmp_path: Path) -> None:
    finetune(finetune_recipe(sparse, examples, **VARIANTS["quantized"]), tmp_path / "run")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    zeros = {
        n: m.weight == 0 for n, m in model.named_modules() if n.endswith("dense") and ".layer." in n
    }
    quant.load(model, tmp_path / "run/model" / quant.FILE)
    layers = quant.quant_layers(model)
    assert len(layers) == 12
    for name, zero in zeros.items():
        weight, _ = quant.int8_weight(layers[name])
        assert weight.dtype == torch.int8
        assert not weight[zero].any()
        assert not layers[name].effective_weight()[zero].any()


@pytest.mark.parametrize("variant", ["plain", "grouped", "quantized"])
def test_a_resumed_run_equals_an_unbroken_one(
    sparse: Path, examples: Path, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = finetune_recipe(sparse, examples, **VARIANTS[variant])
    finetune(recipe, tmp_path / "unbroken")

    break_off(6, finetune, recipe, tmp_path / "broken")
    resumed: list[int] = []
    monkeypatch.setattr(Run, "go_back", lambda self, step, _: resumed.append(step))
    finetune(recipe, tmp_path / "broken", resume=True)
    assert resumed == [4]
    assert model_digest(tmp_path / "broken/model") == model_digest(tmp_path / "unbroken/model")


def test_grouping_by_length_pads_less(sparse: Path, examples: Path, tmp_path: Path) -> None:
    rows = [{"text": "the cat " * (1 + i % 10), "label": i % 2} for i in range(320)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    padded = {}
    for is_grouped in (False, True):
        training = {"group_by_length": is_grouped}
        task = {"train": str(file), "validation": str(file)}
        trainer = module.Trainer(finetune_recipe(sparse, examples, task=task, training=training))
        lengths = trainer.data.train.lengths()
        assert lengths[:3].tolist() == [4, 6, 8]  # and [CLS] and [SEP]
        batches = [trainer.order.step(step)[0] for step in range(trainer.schedule.steps)]
        places = [[index for _, index in batch] for batch in batches]
        assert sorted(sum(places, [])) == list(range(320))
        padded[is_grouped] = sum(int((lengths[p].max() - lengths[p]).sum()) for p in places)
    assert padded[True] < padded[False] / 4


@pytest.mark.parametrize("split", ["train", "validation", "mismatched"])
def test_a_resume_with_other_examples_is_refused(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    shutil.copytree(examples, tmp_path / "examples")
    more = tmp_path / "examples/mismatched.jsonl"
    shutil.copy(examples / "validation.jsonl", more)
    task = {"more_validation": {"mismatched": str(more)}}
    recipe = finetune_recipe(sparse, tmp_path / "examples", task=task)

    class StoppedError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(module.Trainer, "finish", stop)
        with pytest.raises(StoppedError):
            finetune(recipe, tmp_path / "run")
    path = tmp_path / f"examples/{split}.jsonl"
    path.write_text(path.read_text().replace("captain", "colonel"))
    with pytest.raises(RunError, match=f"the {split} examples have changed meanwhile"):
        finetune(recipe, tmp_path / "run", resume=True)


QUANTIZED: dict[str, dict[str, Any]] = {
    "tensor": {"weights": "tensor"},
    "percentile": {"ranges": "percentile", "percentile": 99.0},
    "embeddings": {"embeddings": True},
    "frozen": {"start": 0.2, "freeze": 0.5},
}


@pytest.mark.parametrize("variant", QUANTIZED)
def test_every_way_to_quantize_resumes_and_reloads_exactly(
    sparse: Path, examples: Path, tmp_path: Path, variant: str
) -> None:
    recipe = finetune_recipe(sparse, examples, quantization=QUANTIZED[variant])
    results = finetune(recipe, tmp_path / "unbroken")
    break_off(9, finetune, recipe, tmp_path / "broken")
    finetune(recipe, tmp_path / "broken", resume=True)
    assert model_digest(tmp_path / "broken/model") == model_digest(tmp_path / "unbroken/model")
    again = evaluate_model(str(tmp_path / "unbroken/model"), recipe)
    assert again.metrics == results.metrics
    assert fingerprint(tmp_path / "unbroken/model") == fingerprint(sparse)


def test_ranges_stay_where_they_are_after_the_freeze(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    ranges = []
    for freeze, epochs in ((1.0, 0.5), (0.5, 1.0), (1.0, 1.0)):  # 5 steps, 5 of 10, 10
        run = tmp_path / f"{freeze}-{epochs}"
        options = {"training": {"epochs": epochs, "learning_rate": 1e-30, "warmup": 0.0}}
        recipe = finetune_recipe(sparse, examples, quantization={"freeze": freeze}, **options)
        finetune(recipe, run)
        found = load_file(run / "model" / quant.FILE)
        ranges.append({name: x for name, x in found.items() if "input" in name})
    assert all(torch.equal(ranges[0][name], ranges[1][name]) for name in ranges[0])
    assert not all(torch.equal(ranges[0][name], ranges[2][name]) for name in ranges[0])


def test_one_shot_pruning_is_a_schedule_without_a_ramp(
    dense: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(
        dense, examples, model={"zeros": "free"}, pruning={"schedule": {"end": 0, "target": 0.85}}
    )
    assert finetune(recipe, tmp_path / "run").sparsity == pytest.approx(0.85, abs=2e-3)
    for tensor in inspect(tmp_path / "run/model")["tensors"].values():
        assert tensor["zeros"] == num_zeros(0.85, tensor["shape"][0] * tensor["shape"][1])


def test_a_dense_model_is_quantized_in_the_same_layers(
    dense: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(
        dense, examples, model={"zeros": "free"}, quantization={"momentum": 0.1}
    )
    results = finetune(recipe, tmp_path / "run")
    assert results.quantized and results.sparsity == 0.0
    assert len([n for n in load_file(tmp_path / "run/model" / quant.FILE) if "scale" in n]) == 12


def test_distillation_pulls_towards_the_teacher(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    finetune(finetune_recipe(sparse, examples, training={"epochs": 3.0}), tmp_path / "teacher")
    teacher = str(tmp_path / "teacher/model")
    recipe = finetune_recipe(
        Path(teacher), examples, distillation={"teacher": teacher, "hard_weight": 0.0}
    )
    finetune(recipe, tmp_path / "student")
    rows = [json.loads(x) for x in (tmp_path / "student/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] < 0.05  # only dropout stands between a model and its own copy
    assert fingerprint(tmp_path / "student/model") == fingerprint(sparse)


def test_a_model_without_zeros_is_refused_before_anything_is_written(
    dense: Path, examples: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="nothing to lock: .* have 0 zeros"):
        finetune(finetune_recipe(dense, examples), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tampered_model_is_refused(sparse: Path, examples: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(sparse, tmp_path / "tampered")
    tensors = load_file(tmp_path / "tampered/model.safetensors")
    weight = tensors["bert.encoder.layer.0.output.dense.weight"]
    weight.view(-1)[(weight.view(-1) == 0).nonzero()[0]] = 1.0
    save_file(tensors, tmp_path / "tampered/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not where its sparsity.json says"):
        finetune(finetune_recipe(tmp_path / "tampered", examples), tmp_path / "run")


@pytest.mark.parametrize("key", ["tensors", "total"])
def test_a_tampered_report_is_refused(
    sparse: Path, examples: Path, tmp_path: Path, key: str
) -> None:
    shutil.copytree(sparse, tmp_path / "tampered")
    path = tmp_path / "tampered/sparsity.json"
    report = json.loads(path.read_text())
    counts = report["total"] if key == "total" else next(iter(report["tensors"].values()))
    counts["zeros"] -= 1
    path.write_text(json.dumps(report))
    assert inspect(tmp_path / "tampered")["stated"] == "differs"
    with pytest.raises(ModelError, match="not where its sparsity.json says"):
        finetune(finetune_recipe(tmp_path / "tampered", examples), tmp_path / "run")
    with pytest.raises(ModelError, match="not what its sparsity.json says"):
        check_stated(str(tmp_path / "tampered"))


def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(sparse, examples)
    finetune(recipe, tmp_path / "unbroken")
    told = AfterStep(3, (tmp_path / "run/stop").touch)
    with pytest.raises(Stopped, match="stopped at step 3, which is saved"):
        finetune(recipe, tmp_path / "run", concerns=[told])
    assert (tmp_path / "run/stopped").exists()
    finetune(recipe, tmp_path / "run", resume=True)
    assert model_digest(tmp_path / "run/model") == model_digest(tmp_path / "unbroken/model")


def test_ctrl_c_saves_first(sparse: Path, examples: Path, tmp_path: Path) -> None:
    interrupted = AfterStep(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="stopped at step 2"):
        finetune(finetune_recipe(sparse, examples), tmp_path / "run", concerns=[interrupted])
    assert (tmp_path / "run/checkpoints/step-00000002").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    class Breaking(Concern):
        def after_backward(self, at: Progress) -> None:
            gradient = next(p.grad for p in at.model.parameters() if p.grad is not None)
            gradient.view(-1)[0] = torch.inf

    with pytest.raises(DivergedError, match="step 1: the gradient norm is inf; nothing was"):
        finetune(finetune_recipe(sparse, examples), tmp_path / "run", concerns=[Breaking()])


def test_an_output_that_cannot_be_made_is_refused(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="file is a file"):
        finetune(finetune_recipe(sparse, examples), tmp_path / "file/run")


def test_one_step_is_too_short_for_8_bits(sparse: Path, examples: Path, tmp_path: Path) -> None:
    recipe = finetune_recipe(sparse, examples, training={"epochs": 0.1}, quantization={})
    with pytest.raises(RecipeError, match="quantization: needs 2 steps or more"):
        finetune(recipe, tmp_path / "run")


def test_an_output_with_other_files_is_refused(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(RunError, match="holds another run or other files"):
        finetune(finetune_recipe(sparse, examples), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_loss_that_is_not_finite_stops_the_run(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module.tasks, "task_loss", lambda *_: torch.tensor(torch.inf, requires_grad=True)
    )
    with pytest.raises(RunError, match="step 1: the loss is inf"):
        finetune(finetune_recipe(sparse, examples), tmp_path / "run")


Task = Callable[[Path, Path], dict[str, Any]]


def test_questions_are_answered_with_held_zeros(sparse: Path, tmp_path: Path) -> None:
    row = {
        "question": "who sees the sea?",
        "context": "the captain sees the sea. a dog hears a song.",
        "answers": {"text": ["the captain"], "answer_start": [0]},
    }
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8)
    task = {
        "kind": "question-answering",
        "text": "question",
        "text_pair": "context",
        "label": "answers",
        "metrics": ["exact_match", "squad_f1"],
        "sequence_tokens": 30,
        "stride_tokens": 4,
    }
    training = {"epochs": 60.0, "learning_rate": 1e-2}
    recipe = finetune_recipe(sparse, tmp_path, task=task, training=training)
    results = finetune(recipe, tmp_path / "run")
    assert results.metrics == {"exact_match": 100.0, "squad_f1": 100.0}
    assert fingerprint(tmp_path / "run/model") == fingerprint(sparse)


def test_numbers_are_predicted_with_held_zeros(sparse: Path, tmp_path: Path) -> None:
    lines = [f'{{"text": "the cat sees a song.", "label": {i % 5}}}\n' for i in range(16)]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    task = {"kind": "regression", "metrics": ["pearson", "spearman"]}
    recipe = finetune_recipe(sparse, tmp_path, task=task)
    results = finetune(recipe, tmp_path / "run")
    assert set(results.metrics) == {"pearson", "spearman"}
    assert fingerprint(tmp_path / "run/model") == fingerprint(sparse)
    evaluate_model(str(tmp_path / "run/model"), recipe, tmp_path / "answers.jsonl")
    rows = list(map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()))
    assert [row["label"] for row in rows] == [i % 5 for i in range(16)]
    assert all(isinstance(row["prediction"], float) for row in rows)


def test_a_model_without_the_tasks_head_is_not_evaluated(sparse: Path, examples: Path) -> None:
    with pytest.raises(ModelError, match="BertForPreTraining has no head for classification"):
        evaluate_model(str(sparse), finetune_recipe(sparse, examples))


def test_dropout_is_the_recipe_s_and_the_saved_model_keeps_its_own(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    own, first = load_config(str(sparse)).hidden_dropout_prob, set()
    for probability in (None, 0.0, 0.5):
        training = {"dropout": probability}
        finetune(finetune_recipe(sparse, examples, training=training), tmp_path / str(probability))
        lines = (tmp_path / str(probability) / "metrics.jsonl").read_text().splitlines()
        first.add(json.loads(lines[0])["loss"])
        saved = load_config(str(tmp_path / str(probability) / "model"))
        assert saved.hidden_dropout_prob == saved.attention_probs_dropout_prob == own == 0.1
    assert len(first) == 3
