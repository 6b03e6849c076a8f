"""What one rank of a test's launch runs: transformers' Trainer on DeepSpeed's ZeRO 2 and 3.

`trainer_ranks.py MODEL TRAIN.jsonl OUTPUT` leaves in OUTPUT/{stage} what the example
of recipes/loops makes, and in OUTPUT/{stage}-{precision}/{unbroken,resumed} runs of the sparse
MODEL. On the way it sees that partitioned weights are refused where whole ones are needed.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

import opfa
from opfa.errors import ModelError
from opfa.integrations.guard import SparsityGuard
from opfa.training.distributed import barrier

EXAMPLE = Path(__file__).parent.parent / "recipes/loops/trainer_deepspeed.py"
DATA: Any = [{"input_ids": [2, 7 + i % 5, 3], "labels": i % 2} for i in range(64)]
PARTITIONED = r"query\.weight: is partitioned .*inside `with deepspeed.zero.GatheredParameters"
LAYER = "bert.encoder.layer.0.output.dense"


def load(sparse: Path) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(sparse, num_labels=2)


def settings(directory: Path, stage: int, bf16: bool) -> TrainingArguments:
    """Four steps of two micro-batches, a checkpoint in the middle; stage 3 partitions all."""
    return TrainingArguments(
        str(directory),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        },
    )


def train(model: Any, arguments: TrainingArguments, checkpoint: Path | None = None) -> None:
    """Train, fuse and save a locked model; a live weight is set to zero, for fuse to mend."""
    loop = Trainer(model, arguments, train_dataset=DATA, callbacks=[SparsityGuard(every_steps=1)])
    loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if is_deepspeed_zero3_enabled():
        with pytest.raises(ModelError, match=PARTITIONED):
            opfa.fuse(model)
    layer = model.get_submodule(LAYER)
    with deepspeed.zero.GatheredParameters(layer.weight, modifier_rank=0):
        layer.weight.data[layer.mask.nonzero()[0].unbind()] = 0
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        opfa.fuse(model)
    loop.save_model(f"{arguments.output_dir}/model")


def whole(sparse: Path, directory: Path, stage: int, bf16: bool) -> None:
    """The usual way: load, lock, train; once more from the checkpoint in the middle."""
    for name, checkpoint in (("unbroken", None), ("resumed", directory / "unbroken/checkpoint-2")):
        unset_hf_deepspeed_config()
        model = load(sparse)
        opfa.lock(model)
        train(model, settings(directory / name, stage, bf16), checkpoint)


def partitioned(sparse: Path, directory: Path) -> None:
    """A model that ZeRO 3 partitioned while it was loaded is locked when it is gathered."""
    arguments = settings(directory, 3, False)
    model, guard = load(sparse), SparsityGuard()

    def begin(model: nn.Module) -> None:
        guard.on_train_begin(None, None, None, model=model)

    for look in (opfa.lock, opfa.inspect, begin):
        with pytest.raises(ModelError, match=PARTITIONED):
            look(model)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        begin(model)
    with pytest.raises(ModelError, match=PARTITIONED):
        guard.check(model)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        opfa.lock(model)
    guard.check(model)
    train(model, arguments)


def main() -> None:
    """Every run, one after another."""
    sparse, data, output = map(Path, sys.argv[1:])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would need a compiler
    for stage in (2, 3):  # in this order: stage 3 replaces torch's linear function for good
        unset_hf_deepspeed_config()
        sys.argv = [str(EXAMPLE), str(sparse), str(data), str(output / str(stage)), str(stage)]
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        for bf16 in (False, True):
            whole(sparse, output / f"{stage}-{'bf16' if bf16 else 'fp32'}", stage, bf16)
    partitioned(sparse, output / "3-loaded-partitioned/unbroken")
    barrier()
