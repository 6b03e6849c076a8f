"""Gradient checkpointing: the same run bit for bit, with fewer activations kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_BERT, break_off, finetune_recipe, pretrain_recipe
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from opfa.downstream.finetune import finetune
from opfa.errors import ModelError, RecipeError
from opfa.models import encoders
from opfa.models.encoders import checkpoint_layers
from opfa.sparsity.layers import lock
from opfa.training.checkpoint import model_digest
from opfa.upstream.pretrain import pretrain

RAMP = {"start": 1, "end": 4, "hold_until": 6, "every": 1, "target": 0.9}
CURVATURE = {"kind": "curvature", "sequences": 8, "every": 3}
DOWNSTREAM: dict[str, dict[str, Any]] = {
    "dropout": {"training": {"dropout": 0.2}},
    "sparse kernels": {"training": {"dropout": 0.2, "sparse_kernels": True}},
    "bf16, accumulated": {"training": {"precision": "bf16", "micro_batch": 2}},
    "pruned by movement": {
        "model": {"zeros": "free"},
        "pruning": {
            "schedule": {"start": 1, "end": 6, "target": 0.5},
            "pattern": {"score": "movement"},
        },
    },
}
UPSTREAM: dict[str, dict[str, Any]] = {
    "hidden states": {"distillation": {"hidden_weight": 10.0}},
    "curvature": {"pruning": {"schedule": RAMP, "pattern": {"score": CURVATURE}}},
}


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that are computed with checkpoints."""
    found: list[Any] = []

    def note(layer: Any, *inputs: Any, **options: Any) -> Any:
        found.append(layer)
        return checkpoint(layer, *inputs, **options)

    monkeypatch.setattr(encoders, "checkpoint", note)
    return found


def with_and_without(sections: dict[str, Any]) -> list[dict[str, Any]]:
    training = sections.get("training", {})
    extra: list[dict[str, Any]] = [{"gradient_checkpointing": True}, {}]
    return [{**sections, "training": {**training, **more}} for more in extra]


@pytest.mark.parametrize("variant", DOWNSTREAM)
def test_a_fine_tuning_is_the_same_bit_for_bit(
    sparse: Path, examples: Path, tmp_path: Path, again: list[Any], variant: str
) -> None:
    digests = set()
    for index, sections in enumerate(with_and_without(DOWNSTREAM[variant])):
        finetune(finetune_recipe(sparse, examples, **sections), tmp_path / str(index))
        digests.add(model_digest(tmp_path / str(index) / "model"))
    assert again and len(digests) == 1


@pytest.mark.parametrize("variant", UPSTREAM)
def test_a_student_is_the_same_bit_for_bit(
    prepared: Path, sparse: Path, tmp_path: Path, again: list[Any], variant: str
) -> None:
    sections = UPSTREAM[variant]
    if "distillation" in sections:
        sections = {"distillation": {**sections["distillation"], "teacher": str(sparse)}}
    digests = set()
    for index, each in enumerate(with_and_without({**sections, "training": {"dropout": 0.1}})):
        pretrain(pretrain_recipe(prepared, **each), tmp_path / str(index))
        digests.add(model_digest(tmp_path / str(index) / "model"))
    assert again and len(digests) == 1


def test_a_resumed_run_equals_an_unbroken_one(
    prepared: Path, tmp_path: Path, again: list[Any]
) -> None:
    training = {"dropout": 0.1, "gradient_checkpointing": True}
    recipe = pretrain_recipe(prepared, training=training)
    pretrain(recipe, tmp_path / "unbroken")
    break_off(3, pretrain, recipe, tmp_path / "broken")
    pretrain(recipe, tmp_path / "broken", resume=True)
    digests = {model_digest(tmp_path / run / "model") for run in ("unbroken", "broken")}
    assert again and len(digests) == 1


def kept_bytes(model: Any, ids: torch.Tensor) -> int:
    """Of all tensors that a pass keeps for the way back, each storage once."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(ids)
    return sum(kept.values())


def test_a_pass_keeps_a_fraction() -> None:
    config = BertConfig(vocab_size=40, **{**TINY_BERT, "num_hidden_layers": 6})
    model: Any = BertModel(config, add_pooling_layer=False).train()
    for layer in model.encoder.layer:
        weight = layer.intermediate.dense.weight
        weight.data.mul_(torch.rand_like(weight) > 0.9)
    lock(model)
    ids = torch.randint(40, (16, 32))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    whole = kept_bytes(model, ids)
    checkpoint_layers(model)
    assert kept_bytes(model, ids) - weights < 0.3 * (whole - weights)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ModelError, match=r"gradient_checkpointing = true: .* has none"):
        checkpoint_layers(nn.Linear(2, 2))


def test_8_bits_are_refused(sparse: Path, examples: Path) -> None:
    with pytest.raises(RecipeError, match=r"gradient_checkpointing = true: 8 bits follow"):
        finetune_recipe(
            sparse, examples, training={"gradient_checkpointing": True}, quantization={"start": 0.3}
        )
