"""Training loops that are not ours: the examples of recipes/loops, the guard, and LoRA."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import outside
from launching import Launch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import opfa
from opfa.errors import ModelError
from opfa.integrations.guard import SparsityGuard
from opfa.integrations.lora import MaskedLora, masked_lora

LOOPS = Path(__file__).parents[2] / "recipes/loops"
ON_ONE_PROCESS = sorted(set(LOOPS.glob("*.py")) - {LOOPS / "trainer_deepspeed.py"})
DATA: Any = [{"input_ids": [2, 7 + i % 5, 3], "labels": i % 2} for i in range(32)]


def load(sparse: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(sparse, num_labels=2)


@pytest.mark.parametrize("path", ON_ONE_PROCESS, ids=lambda path: path.stem)
def test_an_example_trains_and_keeps_every_zero(
    path: Path, sparse: Path, examples: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(path), str(sparse), str(examples / "train.jsonl"), "out"],
        env=outside(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained_with_the_same_zeros(tmp_path / "out", sparse)


# transformers' Trainer


@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_resumes_in_the_middle_as_if_never_stopped(
    sparse: Path, tmp_path: Path, bf16: bool
) -> None:
    for name, checkpoint in (("unbroken", None), ("resumed", tmp_path / "unbroken/checkpoint-2")):
        model = load(sparse)
        opfa.lock(model)
        loop = trainer(model, tmp_path / name, SparsityGuard(every_steps=1), bf16=bf16)
        loop.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        opfa.fuse(model)
        loop.save_model(str(tmp_path / name / "model"))
        assert_trained_with_the_same_zeros(tmp_path / name / "checkpoint-4", sparse)
        assert_trained_with_the_same_zeros(tmp_path / name / "model", sparse)
    assert_resumed_as_if_never_stopped(tmp_path)


@pytest.fixture(scope="module")
def zero(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/trainer_ranks.py leaves: the Trainer on two ranks, at ZeRO 2 and 3."""
    output = tmp_path_factory.mktemp("zero")
    with Launch("trainer_ranks", [sparse, examples / "train.jsonl", output], output, 2) as started:
        assert started.wait(300) == [0, 0], started.said(0)[-4000:]
    return output


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_example_trains_and_keeps_every_zero(
    zero: Path, sparse: Path, stage: int
) -> None:
    assert_trained_with_the_same_zeros(zero / f"{stage}", sparse)
    assert list((zero / f"{stage}/checkpoints").glob("checkpoint-*/global_step*"))  # DeepSpeed's


@pytest.mark.parametrize("run", ["2-fp32", "2-bf16", "3-fp32", "3-bf16", "3-loaded-partitioned"])
def test_zeros_are_held_at_every_zero_stage_and_in_its_checkpoints(
    zero: Path, sparse: Path, run: str
) -> None:
    for directory in ("unbroken/checkpoint-2", "unbroken/checkpoint-4", "unbroken/model"):
        assert_trained_with_the_same_zeros(zero / run / directory, sparse)


@pytest.mark.parametrize("run", ["2-fp32", "2-bf16", "3-fp32", "3-bf16"])
def test_a_zero_stage_resumes_in_the_middle_as_if_never_stopped(zero: Path, run: str) -> None:
    assert_resumed_as_if_never_stopped(zero / run)


def assert_trained_with_the_same_zeros(directory: Path, sparse: Path) -> None:
    assert opfa.inspect(directory)["fingerprint"] == opfa.inspect(sparse)["fingerprint"]
    before, after = (load_file(path / "model.safetensors") for path in (sparse, directory))
    assert not [name for name in after if "mask" in name]
    weight = after["bert.encoder.layer.0.output.dense.weight"]
    assert (weight != before["bert.encoder.layer.0.output.dense.weight"].to(weight.dtype)).any()


def assert_resumed_as_if_never_stopped(root: Path) -> None:
    assert not (root / "resumed/checkpoint-2").exists()  # it began behind it
    files = [root / run / "model/model.safetensors" for run in ("unbroken", "resumed")]
    unbroken, resumed = map(load_file, files)
    assert unbroken.keys() == resumed.keys()
    for name, value in unbroken.items():
        assert torch.equal(value, resumed[name]), name


# the guard


def trainer(
    model: PreTrainedModel, directory: Path, guard: SparsityGuard, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(
        str(directory),
        **{"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, **settings},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=DATA, callbacks=[guard])


def test_a_variant_of_lora_is_refused(sparse: Path) -> None:
    from peft import KasaConfig

    model = load(sparse)
    opfa.lock(model)
    config = LoraConfig(target_modules=["query"], kasa_config=KasaConfig())
    adapted = get_peft_model(model, masked_lora(config))
    with pytest.raises(ModelError, match="is a variant of LoRA that can't be masked"):
        adapted(input_ids=torch.tensor([[2, 7, 3]]))


def test_the_guard_lets_a_locked_model_pass(sparse: Path, tmp_path: Path) -> None:
    model = load(sparse)
    opfa.lock(model)
    trainer(model, tmp_path, SparsityGuard(every_steps=1)).train()


def test_the_guard_stops_a_training_that_fills_zeros(sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layer\.0\.\S+weight: \d+ of its \d+ zeros were lost by"):
        trainer(load(sparse), tmp_path, SparsityGuard(every_steps=2)).train()


@pytest.mark.parametrize(
    ("save", "when"), [("steps", "step 2"), ("epoch", "step 4"), ("no", r"the end \(step 4\)")]
)
def test_the_guard_looks_before_a_checkpoint_and_at_the_end(
    sparse: Path, tmp_path: Path, save: str, when: str
) -> None:
    guard = SparsityGuard(every_steps=1000)
    settings = {"save_strategy": save, "max_steps": -1, "num_train_epochs": 1}
    with pytest.raises(ModelError, match=f"lost by {when}"):
        trainer(load(sparse), tmp_path, guard, **settings).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_guard_notices_a_mask_that_was_changed(sparse: Path) -> None:
    model, guard = load(sparse), SparsityGuard()
    opfa.lock(model)
    guard.on_train_begin(None, None, None, model=model)
    guard.check(model)
    layer: Any = model.get_submodule("bert.encoder.layer.0.output.dense")
    layer.mask.fill_(True)
    with pytest.raises(ModelError, match="zeros were lost by now"):
        guard.check(model)


def test_the_guard_needs_zeros(sparse: Path) -> None:
    model = load(sparse)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    with pytest.raises(ModelError, match="no zeros to look after"):
        SparsityGuard().on_train_begin(None, None, None, model=model)


@pytest.mark.parametrize("is_locked", [True, False])
def test_the_guard_says_at_the_end_what_it_held(
    sparse: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_locked: bool
) -> None:
    """Of each call of `train` alone, and as a warning where only luck held them."""
    model = load(sparse)
    if is_locked:
        opfa.lock(model)
    guard, num_zeros = SparsityGuard(), opfa.inspect(model)["total"]["zeros"]
    for num_steps in (4, 2):
        rate = 1e-2 if is_locked else 0.0
        caplog.clear()
        with caplog.at_level(logging.INFO):
            settings = {"max_steps": num_steps, "learning_rate": rate, "save_strategy": "no"}
            trainer(model, tmp_path, guard, **settings).train()
        (line,) = [record for record in caplog.records if record.name == "opfa.integrations.guard"]
        what = f"{num_zeros:,} zeros in 12 tensors over {num_steps} steps"
        if is_locked:
            assert line.getMessage() == f"SparsityGuard: held {what}"
        else:
            assert line.getMessage().startswith(f"SparsityGuard: kept {what}, though nothing held")
            assert line.levelno == logging.WARNING


def test_the_guard_looks_after_a_matrix_of_zeros(sparse: Path, tmp_path: Path) -> None:
    model = load(sparse)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(0.0 if name.endswith("layer.0.output.dense.weight") else 0.5)
    with pytest.raises(ModelError, match=r"layer\.0\.output\.dense\.weight: \d+ of its 512 zeros"):
        guard = SparsityGuard()
        guard.on_train_begin(None, None, None, model=model)
        model.get_parameter("bert.encoder.layer.0.output.dense.weight").data.add_(1)
        guard.check(model)


# LoRA


def test_a_matrix_of_zeros_is_locked_beside_new_matrices_of_lora(sparse: Path) -> None:
    model = load(sparse)
    name = "bert.encoder.layer.0.attention.self.query"
    torch.nn.init.zeros_(model.get_parameter(f"{name}.weight"))
    model: Any = get_peft_model(model, LoraConfig(target_modules=["query"]))
    tensors = opfa.lock(model)["tensors"]
    assert tensors[f"base_model.model.{name}.base_layer.weight"]["sparsity"] == 1.0
    assert len(tensors) == 12 and not [n for n in tensors if "lora" in n]


def adapted(sparse: Path) -> Any:  # Any: PEFT's model, with the methods of the wrapped one
    model = load(sparse)
    targets = [name.removesuffix(".weight") for name in opfa.lock(model)["tensors"]]
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets)
    return get_peft_model(model, masked_lora(config))


def train(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.arange(48).view(8, 6) % 40 + 5
    model.train()
    for _ in range(5):
        model(input_ids=ids, labels=torch.arange(8) % 2).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(30).view(5, 6) % 40 + 5).logits


def test_a_merge_keeps_the_zeros_and_every_answer(sparse: Path) -> None:
    adapter = adapted(sparse)
    assert sum(isinstance(module, MaskedLora) for module in adapter.modules()) == 12
    untrained = answers(adapter)
    train(adapter)
    trained = answers(adapter)
    assert not torch.allclose(trained, untrained, atol=1e-3)
    merged = adapter.merge_and_unload()
    torch.testing.assert_close(answers(merged), trained, rtol=1e-4, atol=1e-5)
    assert opfa.fuse(merged)["fingerprint"] == opfa.inspect(sparse)["fingerprint"]
    torch.testing.assert_close(answers(merged), trained, rtol=1e-4, atol=1e-5)


def test_merging_and_unmerging_gives_the_locked_model_back(sparse: Path) -> None:
    adapter = adapted(sparse)
    train(adapter)
    trained = answers(adapter)
    adapter.merge_adapter()
    torch.testing.assert_close(answers(adapter), trained, rtol=1e-4, atol=1e-5)
    adapter.unmerge_adapter()
    with adapter.disable_adapter():
        without = answers(adapter)
    assert not torch.allclose(without, trained, atol=1e-3)


def test_a_saved_adapter_is_loaded_masked(sparse: Path, tmp_path: Path) -> None:
    adapter = adapted(sparse)
    train(adapter)
    adapter.save_pretrained(str(tmp_path))
    again = load(sparse)
    opfa.lock(again)
    saved: Any = LoraConfig.from_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(again, tmp_path, config=masked_lora(saved)).eval()
    torch.testing.assert_close(answers(loaded), answers(adapter))


def test_variants_whose_update_is_not_masked_are_refused() -> None:
    for config in (LoraConfig(use_dora=True), LoraConfig(lora_bias=True)):
        with pytest.raises(ModelError, match="= True: not with masked updates"):
            masked_lora(config)
