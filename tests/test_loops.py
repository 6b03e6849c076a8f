"""Training loops that are not ours: the examples of recipes/loops, the guard, and LoRA."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import outside
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import opfa
from opfa.guard import SparsityGuard
from opfa.lora import MaskedLora, masked_lora
from opfa.recipe import ModelError

LOOPS = Path(__file__).parent.parent / "recipes/loops"


def load(sparse: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(sparse, num_labels=2)


@pytest.mark.parametrize("path", sorted(LOOPS.glob("*.py")), ids=lambda path: path.stem)
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
    found = opfa.inspect(tmp_path / "out")
    assert found["fingerprint"] == opfa.inspect(sparse)["fingerprint"]
    name = "bert.encoder.layer.0.output.dense.weight"
    before, after = load(sparse).state_dict()[name], load(tmp_path / "out").state_dict()[name]
    assert not torch.equal(before, after)


# the guard


def trainer(model: PreTrainedModel, directory: Path, guard: SparsityGuard) -> Trainer:
    data: Any = [{"input_ids": [2, 7 + i % 5, 3], "labels": i % 2} for i in range(32)]
    arguments = TrainingArguments(
        str(directory), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True
    )
    return Trainer(model, arguments, train_dataset=data, callbacks=[guard])


def test_the_guard_lets_a_locked_model_pass(sparse: Path, tmp_path: Path) -> None:
    model = load(sparse)
    opfa.lock(model)
    trainer(model, tmp_path, SparsityGuard(every_steps=1)).train()


def test_the_guard_stops_a_training_that_fills_zeros(sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layer\.0\.\S+weight: \d+ of its \d+ zeros were lost by"):
        trainer(load(sparse), tmp_path, SparsityGuard(every_steps=2)).train()


def test_the_guard_looks_at_the_end_too(sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lost by the end \(step 4\)"):
        trainer(load(sparse), tmp_path, SparsityGuard(every_steps=1000)).train()


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


# LoRA


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
