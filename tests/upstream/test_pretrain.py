"""Upstream runs, end to end on a tiny model and one process."""

import json
import math
import os
import shutil
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import TINY_BERT, break_off, dense_labels, pretrain_recipe
from deepspeed.accelerator import get_accelerator
from torch.nn import functional
from transformers import AutoConfig, BertForPreTraining, BertModel

from opfa.compression.selection import num_zeros
from opfa.data.order import Order
from opfa.errors import DataError, ModelError, RecipeError, RunError
from opfa.models.configs import load_tokenizer
from opfa.models.encoders import write_model
from opfa.models.pretraining import FAMILIES, load_pretraining_model, new_pretraining_model
from opfa.sparsity.masks import load
from opfa.storage import seal
from opfa.training import checkpoint
from opfa.training.distributed import Stopped
from opfa.training.engine import Engine
from opfa.training.run import Run
from opfa.upstream import pretrain as module
from opfa.upstream.batches import Prepared, masker, training_steps
from opfa.upstream.objective import Teacher
from opfa.upstream.pretrain import pretrain
from opfa.upstream.recipe import PretrainRecipe
from opfa.upstream.student import load_teacher
from opfa.weights.inspection import inspect

SCHEDULE = {"start": 1, "end": 4, "hold_until": 6, "every": 1, "target": 0.9}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training_rows(run: Path) -> list[dict[str, Any]]:
    ignored = {"tokens_per_second"}
    return [{k: v for k, v in r.items() if k not in ignored} for r in rows(run) if "eval" not in r]


@pytest.fixture(scope="module")
def teacher(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher") / "run"
    pretrain(pretrain_recipe(prepared), output)
    return output


def student_recipe(prepared: Path, teacher: Path, **sections: Any) -> Any:
    return pretrain_recipe(
        prepared,
        model={"init": str(teacher / "model")},
        pruning=sections.pop("pruning", {"schedule": SCHEDULE}),
        distillation=sections.pop("distillation", {"teacher": str(teacher / "model")}),
        **sections,
    )


@pytest.fixture(scope="module")
def student(prepared: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("student") / "run"
    pretrain(student_recipe(prepared, teacher), output)
    return output


def test_losses_equal_a_plain_loop(prepared: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(prepared, training={"weight_decay": 0.1, "dropout": 0.0})
    pretrain(recipe, tmp_path / "run")
    data = Prepared.open(prepared, recipe.corpus)
    torch.manual_seed(recipe.seed)
    assert recipe.model.config is not None
    model = new_pretraining_model(recipe.model.config, "mlm+nsp", data.tokenizer, dropout=0.0)
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    )
    lengths = data.lengths()
    order = Order(
        seed=42,
        num_examples=len(lengths),
        lengths=lengths,
        batch=8,
        micro_batch=8,
        rank=0,
        world_size=1,
    )
    mask = masker(data.tokenizer, recipe.masking, recipe.seed)
    batches = training_steps(data, mask, order, steps=range(8), workers=0)
    rates = [0.5e-3, 1e-3, 1e-3, *(1e-3 * (8 - step) / 6 for step in range(3, 8))]
    for step, (batch,) in enumerate(batches):
        outputs = model(
            **batch.inputs, labels=dense_labels(batch), next_sentence_label=batch.next_sentence
        )
        outputs.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
        optimizer.zero_grad()
        row = training_rows(tmp_path / "run")[step]
        assert row["learning_rate"] == pytest.approx(rates[step])
        assert row["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_accumulation_gives_the_losses_of_one_pass(prepared: Path, tmp_path: Path) -> None:
    for name, micro_batch in (("whole", 8), ("parts", 2)):
        launch = {"micro_batch": micro_batch}
        pretrain(
            pretrain_recipe(prepared, launch=launch, training={"dropout": 0.0}), tmp_path / name
        )
    whole, parts = training_rows(tmp_path / "whole"), training_rows(tmp_path / "parts")
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_the_finished_model_has_exact_zeros(student: Path) -> None:
    model = BertForPreTraining.from_pretrained(student / "model")
    pruned = {n: p for n, p in model.named_parameters() if ".layer." in n and p.ndim == 2}
    assert len(pruned) == 12
    for parameter in pruned.values():
        assert int((parameter == 0).sum()) == num_zeros(0.9, parameter.numel())
    assert not any(
        (p == 0).any()
        for n, p in model.named_parameters()
        if "dense.weight" in n and n not in pruned
    )


def test_the_report_says_what_plain_transformers_loads(student: Path) -> None:
    stated = json.loads((student / "model/sparsity.json").read_text())
    assert inspect(student / "model")["stated"] == "matches"
    assert (
        inspect(BertModel.from_pretrained(student / "model"))["fingerprint"]
        == stated["fingerprint"]
    )
    assert list(stated) == ["format", "total", "tensors", "fingerprint", "chosen_by"]


@pytest.mark.parametrize("target", [0.85, 0.9])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_are_exact_at_every_update(
    prepared: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: float,
    scope: str,
) -> None:
    seen = []
    update = module.Pruner.after_step

    def watched(self: module.Pruner, step: int, *others: Any) -> bool:
        is_update = update(self, step, *others)
        if is_update:
            wanted = self.schedule.sparsity_at(step)
            masks = list(self.masks().values())
            zeros = [m.numel() - int(m.sum()) for m in masks]
            if scope == "layer":
                assert zeros == [num_zeros(wanted, m.numel()) for m in masks]
            assert scope == "layer" or sum(zeros) == num_zeros(
                wanted, sum(m.numel() for m in masks)
            )
            seen.append(step)
        return is_update

    monkeypatch.setattr(module.Pruner, "after_step", watched)
    pruning = {"schedule": {**SCHEDULE, "target": target}, "pattern": {"scope": scope}}
    pretrain(student_recipe(prepared, teacher, pruning=pruning), tmp_path / "run")
    assert seen == [1, 2, 3, 4, 5, 6]
    assert inspect(tmp_path / "run/model")["total"]["sparsity"] == pytest.approx(target, abs=1e-3)


def test_sparsity_is_logged_as_it_was_in_the_step(student: Path) -> None:
    logged = [row["sparsity"] for row in training_rows(student)]
    ramp = [0.0, 0.6333, 0.8667, 0.9, 0.9, 0.9, 0.9, 0.9]
    assert logged == pytest.approx(ramp, abs=2e-3)


def test_a_kept_weight_may_differ_from_the_teachers_and_a_pruned_one_is_zero(
    student: Path, teacher: Path
) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    ours = BertForPreTraining.from_pretrained(student / "model").state_dict()[name]
    theirs = BertForPreTraining.from_pretrained(teacher / "model").state_dict()[name]
    assert not torch.equal(ours[ours != 0], theirs[ours != 0])
    assert (theirs[ours == 0] != 0).any()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_equals_an_unbroken_one(
    prepared: Path, teacher: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = student_recipe(prepared, teacher, training={"precision": precision})
    if precision == "fp16":  # as if this processor could; its first steps overflow and are skipped
        accelerator: Any = get_accelerator()
        monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: False)
        with pytest.raises(RunError, match="'fp16': not on this machine"):
            pretrain(recipe, tmp_path / "refused")
        monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: True)
        make = Engine.__init__

        def with_a_large_scale(self: Engine, *args: Any, **options: Any) -> None:
            make(self, *args, **options)
            self._engine.optimizer.loss_scaler.cur_scale = 2.0**21

        monkeypatch.setattr(Engine, "__init__", with_a_large_scale)
    pretrain(recipe, tmp_path / "unbroken")
    norms = [row["grad_norm"] for row in training_rows(tmp_path / "unbroken")]
    assert (None in norms) == (precision == "fp16")

    break_off(5, pretrain, recipe, tmp_path / "broken")
    assert not (tmp_path / "broken/model").exists()
    pretrain(recipe, tmp_path / "broken", resume=True)
    assert training_rows(tmp_path / "broken") == training_rows(tmp_path / "unbroken")
    digests = [
        checkpoint.model_digest(tmp_path / name / "model") for name in ("broken", "unbroken")
    ]
    assert digests[0] == digests[1]


def test_resume_passes_over_a_damaged_point(
    prepared: Path, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = student_recipe(prepared, teacher)
    pretrain(recipe, tmp_path / "run")
    whole = checkpoint.model_digest(tmp_path / "run/model")
    for path in ("done.json", "model", "report"):
        target = tmp_path / "run" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    masks = tmp_path / "run/checkpoints/step-00000006/masks.safetensors"
    masks.write_bytes(masks.read_bytes()[:-1] + b"\0\0")
    pretrain(recipe, tmp_path / "run", resume=True)
    assert "step-00000006: passed over, masks.safetensors is damaged" in caplog.text
    assert checkpoint.model_digest(tmp_path / "run/model") == whole


def test_a_run_stopped_between_its_model_and_its_mark_is_finished_by_a_resume(
    prepared: Path, teacher: Path, tmp_path: Path
) -> None:
    recipe = student_recipe(prepared, teacher)
    pretrain(recipe, tmp_path / "run")
    whole = checkpoint.model_digest(tmp_path / "run/model")
    (tmp_path / "run/done.json").unlink()
    (tmp_path / "run/model/model.safetensors").write_bytes(b"from before")
    pretrain(recipe, tmp_path / "run", resume=True)
    assert checkpoint.model_digest(tmp_path / "run/model") == whole
    assert (tmp_path / "run/done.json").exists()


def test_resume_points_hold_the_masks_in_force(student: Path) -> None:
    stated = json.loads((student / "model/sparsity.json").read_text())
    masks = load(student / "checkpoints/step-00000006/masks.safetensors")
    assert {n: m.numel() - int(m.sum()) for n, m in masks.items()} == {
        n: t["zeros"] for n, t in stated["tensors"].items()
    }
    assert sorted(p.name for p in (student / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
    ]


def test_resume_with_another_recipe_is_refused_key_by_key(prepared: Path, teacher: Path) -> None:
    with pytest.raises(RunError, match="training.batch was 8 and is 4; training.learning_rate was"):
        recipe = pretrain_recipe(prepared, training={"batch": 4, "learning_rate": 1.0})
        pretrain(recipe, teacher, resume=True)


def test_an_output_with_another_run_is_refused(prepared: Path, teacher: Path) -> None:
    before = sorted(teacher.rglob("*"))
    with pytest.raises(RunError, match="holds another run"):
        pretrain(pretrain_recipe(prepared), teacher)
    assert sorted(teacher.rglob("*")) == before


def test_a_loss_that_is_not_finite_stops_before_the_step(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entropy = functional.cross_entropy
    monkeypatch.setattr(
        functional, "cross_entropy", lambda *a, **k: entropy(*a, **k) * float("nan")
    )
    with pytest.raises(RunError, match=r"step 1: the loss is not finite on rank \[0\]"):
        pretrain(pretrain_recipe(prepared), tmp_path / "run")
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": "masked"},
        {"tokens": "all", "hidden_weight": 1.0},
        {"hard_weight": 0.0, "soft_weight": 1.0},
    ],
)
def test_a_student_that_is_its_teacher_has_no_distance_to_it(
    prepared: Path, teacher: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    recipe = student_recipe(
        prepared,
        teacher,
        pruning=None,
        distillation={"teacher": str(teacher / "model"), **settings},
        training={"dropout": 0.0},
    )
    pretrain(recipe, tmp_path / "run")
    first = training_rows(tmp_path / "run")[0]
    assert first["distill_loss"] == pytest.approx(0.0, abs=1e-5)
    assert first["hidden_loss"] == pytest.approx(0.0, abs=1e-9)
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert (last.get("hidden_loss", 0.0) > 0) == ("hidden_weight" in settings)  # it has moved away
    hard = settings.get("hard_weight", 0.5)
    assert first["loss"] == pytest.approx(hard * (first["mlm_loss"] + first["nsp_loss"]), abs=1e-5)


def test_pictures_and_environment_are_written(student: Path) -> None:
    names = {path.name for path in (student / "report").iterdir()}
    assert names == {"loss.png", "learning_rate.png", "sparsity.png", "index.html"}
    environment = json.loads((student / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert len(environment["data"]["splits"]["train"]["sha256"]) == 64
    assert environment["versions"]["torch"] == version("torch")


@pytest.mark.parametrize(
    ("precision", "changed", "is_warned"),
    [
        ("bf16", {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ("bf16", {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
        ("fp32", {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
    ],
)
def test_a_processor_without_bf16_is_told_of(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    changed: dict[str, Any],
    is_warned: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: changed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = pretrain_recipe(prepared, training={"precision": precision})
    with Run(tmp_path / "run", recipe, steps=1) as run:
        run.describe({})
    assert ("this CPU multiplies fp32 faster" in caplog.text) == is_warned


def test_a_sequence_longer_than_the_positions_is_refused(prepared: Path, tmp_path: Path) -> None:
    config = {
        **pretrain_recipe(prepared).model.model_dump()["config"],
        "max_position_embeddings": 16,
    }
    with pytest.raises(
        ModelError, match="^corpus.sequence_tokens = 24: this model has only 16 positions"
    ):
        pretrain(pretrain_recipe(prepared, model={"config": config}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_does_not_fit_is_refused(prepared: Path, tmp_path: Path) -> None:
    config = {**pretrain_recipe(prepared).model.model_dump()["config"], "vocab_size": 50}
    with pytest.raises(ModelError, match="embedding only 50"):
        pretrain(pretrain_recipe(prepared, model={"config": config}), tmp_path / "run")


def test_a_missing_corpus_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="opfa prepare RECIPE --output DIR"):
        pretrain(pretrain_recipe(tmp_path / "nowhere"), tmp_path / "run")


def test_a_resume_continues_the_run_of_wandb(prepared: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(prepared, logging={"wandb": "offline"})
    pretrain(recipe, tmp_path / "run")
    (tmp_path / "run/done.json").unlink()
    id_path = tmp_path / "run/wandb/id"
    before = id_path.read_text()
    pretrain(recipe, tmp_path / "run", resume=True)
    pretrain(recipe, tmp_path / "other")
    assert id_path.read_text() == before != (tmp_path / "other/wandb/id").read_text()
    assert list((tmp_path / "run/wandb").glob(f"offline-run-*/run-{before}.wandb"))


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("distilbert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}),
        (
            "roberta",
            {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
            },
        ),
        (
            "modernbert",
            {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
            },
        ),
    ],
)
def test_other_families_are_pruned_under_a_teacher(
    mlm_corpus: Path, tmp_path: Path, kind: str, extra: dict[str, Any]
) -> None:
    config = {"model_type": kind, "max_position_embeddings": 32, **extra}
    corpus, training = {"objective": "mlm"}, {"steps": 2, "warmup_steps": 0}
    pretrain(
        pretrain_recipe(mlm_corpus, corpus=corpus, model={"config": config}, training=training),
        tmp_path / "teacher",
    )
    init = str(tmp_path / "teacher/model")
    recipe = pretrain_recipe(
        mlm_corpus,
        corpus=corpus,
        model={"init": init},
        training=training,
        pruning={"schedule": {"end": 1, "target": 0.85}},
        distillation={"teacher": init},
    )
    pretrain(recipe, tmp_path / "student")
    assert AutoConfig.from_pretrained(init).pad_token_id == 0  # the tokenizer's
    report = inspect(tmp_path / "student/model")
    assert len(report["tensors"]) == {"distilbert": 12, "roberta": 12, "modernbert": 8}[kind]
    assert all(
        t["zeros"] == num_zeros(0.85, t["shape"][0] * t["shape"][1])
        for t in report["tensors"].values()
    )


@pytest.fixture(scope="module")
def mlm_corpus(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from opfa.upstream.corpus import prepare

    directory = tmp_path_factory.mktemp("mlm")
    shutil.copy(prepared.parent / "documents.jsonl", directory)
    recipe = pretrain_recipe(directory / "prepared", corpus={"objective": "mlm"})
    prepare(recipe.corpus, directory / "prepared")
    return directory / "prepared"


def test_dropout_works_in_a_model_that_was_loaded(
    prepared: Path, teacher: Path, tmp_path: Path
) -> None:
    model, first = {"init": str(teacher / "model")}, []
    for probability in (0.0, 0.5):
        training = {"dropout": probability, "steps": 1, "warmup_steps": 0}
        output = tmp_path / str(probability)
        pretrain(pretrain_recipe(prepared, model=model, training=training), output)
        first.append(training_rows(output)[0]["loss"])
    assert abs(first[0] - first[1]) > 1e-3


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "modernbert"])
def test_how_a_run_drops_out_is_not_left_to_the_next_one(
    mlm_corpus: Path, tmp_path: Path, family: str
) -> None:
    tokenizer = load_tokenizer(str(mlm_corpus / "tokenizer"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = FAMILIES[family].dropouts
    for own, other in ((0.0, 0.5), (0.5, 0.0)):
        values = {"model_type": family, **sizes, **dict.fromkeys(names, own)}
        values |= {} if family == "distilbert" else {"intermediate_size": 32}
        made = new_pretraining_model(values, "mlm", tokenizer, other)
        write_model(made, tokenizer, tmp_path / str(own))
        loaded = load_pretraining_model(str(tmp_path / str(own)), "mlm", other)
        for model in (made, loaded):
            assert {getattr(model.config, name) for name in names} == {own}
            ids = torch.arange(8)[None]
            once, twice = (model.train()(input_ids=ids).logits for _ in range(2))
            assert torch.equal(once, twice) == (other == 0.0)


def test_a_teacher_without_a_head_has_no_soft_targets(
    prepared: Path, teacher: Path, tmp_path: Path
) -> None:
    encoder = tmp_path / "encoder"
    BertModel.from_pretrained(teacher / "model").save_pretrained(encoder)
    with pytest.raises(ModelError, match=r"encoder.*\d+ tensors are missing, first cls\."):
        pretrain(
            student_recipe(prepared, teacher, distillation={"teacher": str(encoder)}),
            tmp_path / "run",
        )


def test_a_model_that_lacks_a_layer_is_not_filled_in(
    prepared: Path, teacher: Path, tmp_path: Path
) -> None:
    model = BertModel.from_pretrained(teacher / "model")
    model.encoder.layer = model.encoder.layer[:1]
    model.save_pretrained(tmp_path / "cut")
    config = json.loads((teacher / "model/config.json").read_text())
    (tmp_path / "cut/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"tensors are missing, first bert\.encoder\.layer\.1\."):
        pretrain(pretrain_recipe(prepared, model={"init": str(tmp_path / "cut")}), tmp_path / "run")


def test_a_teacher_in_16_bits_keeps_its_buffers(mlm_corpus: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "modernbert", "intermediate_size": 32, **sizes}
    corpus, training = {"objective": "mlm"}, {"steps": 3, "precision": "bf16"}
    options = {"corpus": corpus, "training": training}
    pretrain(pretrain_recipe(mlm_corpus, model={"config": config}, **options), tmp_path / "teacher")
    init = str(tmp_path / "teacher/model")
    seen = {}

    def watched(*loaded: Any) -> Teacher | None:
        teacher = load_teacher(*loaded)
        assert teacher is not None
        tensors = teacher.model.state_dict() | dict(teacher.model.named_buffers())
        seen.update({name: tensor.dtype for name, tensor in tensors.items()})
        return teacher

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_teacher", watched)
        recipe = pretrain_recipe(
            mlm_corpus, model={"init": init}, distillation={"teacher": init}, **options
        )
        pretrain(recipe, tmp_path / "student")
    kept = {name for name, dtype in seen.items() if dtype == torch.float32}
    assert kept == {name for name in seen if name.endswith("inv_freq")} != set()


def test_a_resume_with_other_data_is_refused(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    recipe = pretrain_recipe(tmp_path / "data")
    pretrain(recipe, tmp_path / "run")
    (tmp_path / "run/done.json").unlink()
    summary = json.loads((tmp_path / "data/corpus.json").read_text())
    summary["splits"]["train"]["sha256"] = "0" * 64
    seal.write_sealed(tmp_path / "data/corpus.json", summary)
    with pytest.raises(RunError, match="run: the train examples have changed meanwhile"):
        pretrain(recipe, tmp_path / "run", resume=True)


def test_a_sign_to_stop_that_comes_early_is_not_lost(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").touch()
    with pytest.raises(Stopped):
        pretrain(pretrain_recipe(prepared), tmp_path / "run")
    assert (tmp_path / "run/stopped").exists()


def test_a_sparse_model_is_not_filled_in_silence(
    prepared: Path, student: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ModelError, match=r"\d+.\d% of its pruned weights are zero, and a run without"
    ):
        pretrain(
            pretrain_recipe(prepared, model={"init": str(student / "model")}), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["predictions.decoder", "predictions.transform.dense"])
def test_a_pattern_that_matches_a_head_is_refused(
    prepared: Path, tmp_path: Path, name: str
) -> None:
    pruning = {"schedule": SCHEDULE, "pattern": {"include": [r"encoder\.layer", name]}}
    recipe = pretrain_recipe(prepared, pruning=pruning)
    with pytest.raises(RecipeError, match=f"pruning.pattern: matches cls.{name}, which belongs"):
        pretrain(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_equals_an_unbroken_run_across_an_evaluation_in_the_middle(
    prepared: Path, teacher: Path, tmp_path: Path
) -> None:
    recipe = student_recipe(prepared, teacher, logging={"evaluate_steps": 2})
    pretrain(recipe, tmp_path / "run")
    whole = checkpoint.model_digest(tmp_path / "run/model")
    (tmp_path / "run/done.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    pretrain(recipe, tmp_path / "run", resume=True)
    assert checkpoint.model_digest(tmp_path / "run/model") == whole


@pytest.mark.parametrize("name", ["zero0", "zero2"])
def test_a_gradient_that_is_not_finite_stops_the_run_with_its_weights_as_they_were(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    backward = Engine.backward
    calls: list[float] = []

    def poisoned(self: Engine, loss: torch.Tensor, is_last: bool) -> None:
        calls.append(float(loss.detach()))
        if len(calls) == 3:
            loss = (loss * 1e30) * 1e30  # finite when it was looked at, and no more
        backward(self, loss, is_last)

    monkeypatch.setattr(Engine, "backward", poisoned)
    launch = {"deepspeed": f"launch/{name}.json"}
    recipe = pretrain_recipe(prepared, launch=launch, logging={"checkpoint_steps": 1})
    with pytest.raises(RunError, match="step 3: the gradient is not finite"):
        pretrain(recipe, tmp_path / "run")
    assert not (tmp_path / "run/model").exists()
    monkeypatch.setattr(Engine, "backward", backward)
    pretrain(recipe, tmp_path / "run", resume=True)
    monkeypatch.undo()
    pretrain(recipe, tmp_path / "whole")
    assert training_rows(tmp_path / "run") == training_rows(tmp_path / "whole")


def test_an_infinite_loss_whose_gradient_is_finite_stops_the_run_too(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Engine.backward
    monkeypatch.setattr(
        Engine, "backward", lambda self, loss, last: backward(self, loss + math.inf, last)
    )
    with pytest.raises(RunError, match="step 1: the gradient is not finite"):
        pretrain(pretrain_recipe(prepared), tmp_path / "run")
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offloading_at_stage_1_alone_trains_as_without(
    prepared: Path, tmp_path: Path, precision: str
) -> None:
    file = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "offload.json").write_text(json.dumps(file))
    rows = []
    for name in ("launch/zero1.json", str(tmp_path / "offload.json")):
        output = tmp_path / Path(name).stem
        training = {"precision": precision, "steps": 4}
        pretrain(pretrain_recipe(prepared, training=training, launch={"deepspeed": name}), output)
        rows.append(training_rows(output))
    for key in ("loss", "grad_norm"):
        plain, offloaded = ([row[key] for row in found] for found in rows)
        assert len(plain) == 4 and min(plain) > 0
        assert offloaded == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize(("first", "then"), [("zero1", "zero0"), ("zero3", "zero1")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_at_another_stage(
    prepared: Path, teacher: Path, tmp_path: Path, first: str, then: str, precision: str
) -> None:
    if precision == "bf16":
        then = "zero1" if then == "zero0" else then
    whole = student_recipe(prepared, teacher, training={"precision": precision})
    pretrain(whole, tmp_path / "whole")

    def at(name: str) -> Any:
        launch = {"deepspeed": f"launch/{name}.json"}
        return student_recipe(prepared, teacher, training={"precision": precision}, launch=launch)

    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()  # what a run leaves that was killed at once
    pretrain(at(first), tmp_path / "run")
    for path in ("done.json", "model", "report"):
        target = tmp_path / "run" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    pretrain(at(then), tmp_path / "run", resume=True)
    ours, theirs = training_rows(tmp_path / "run"), training_rows(tmp_path / "whole")
    assert [row["loss"] for row in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    fingerprints = [inspect(tmp_path / n / "model")["fingerprint"] for n in ("run", "whole")]
    assert fingerprints[0] == fingerprints[1]


def test_loader_processes_ignore_signals_to_the_group(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = module.Trainer.counts

    def signalled(self: module.Trainer, batches: Any) -> Any:
        if not self.supervisor.signal:
            for child in psutil.Process().children(recursive=True):
                child.terminate()
            os.kill(os.getpid(), signal.SIGTERM)
        return counts(self, batches)

    monkeypatch.setattr(module.Trainer, "counts", signalled)
    recipe = pretrain_recipe(prepared, launch={"workers": 2})
    with pytest.raises(Stopped, match="stopped at step 1, which is saved"):
        pretrain(recipe, tmp_path / "run")


# torch.compile


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_models_give_the_same_masks(prepared: Path, teacher: Path, tmp_path: Path) -> None:
    values = student_recipe(prepared, teacher, training={"dropout": 0.0}).model_dump(mode="json")
    values["model"] = {"config": {**TINY_BERT, "num_hidden_layers": 1}}  # each kernel is compiled
    for name, is_compiled in (("plain", False), ("compiled", True)):
        values["launch"]["compile"] = is_compiled
        pretrain(PretrainRecipe.check(values), tmp_path / name)
    plain, compiled = training_rows(tmp_path / "plain"), training_rows(tmp_path / "compiled")
    for one, other in zip(plain, compiled, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    reports = [
        json.loads((tmp_path / name / "model/sparsity.json").read_text())
        for name in ("plain", "compiled")
    ]
    assert reports[0]["fingerprint"] == reports[1]["fingerprint"]
    assert reports[0]["total"] == reports[1]["total"]


def test_compiling_where_torch_can_not_is_one_error(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    recipe = pretrain_recipe(prepared, launch={"compile": True})
    with pytest.raises(RunError, match="launch.compile = true: torch can't compile here: no comp"):
        pretrain(recipe, tmp_path / "run")
