"""Blocks and neurons while fine-tuning, and what follows: shrink, then train on, dense."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import break_off, finetune_recipe
from safetensors.torch import load_file
from transformers.monkey_patching import clear_patch_mapping

import opfa
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.report.logged import by_kind
from opfa.training import metrics
from opfa.training.checkpoint import model_digest

ATTENTION = [r"\.query$", r"\.key$", r"\.value$"]
HYBRID: dict[str, Any] = {
    "schedule": {"start": 2, "end": 6, "every": 2, "hold_until": 7, "initial": 0.5, "target": 0.75},
    "parts": [
        {"include": ATTENTION, "grain": "8x4", "target": 0.875, "scope": "global"},
        {"grain": "neurons", "monotone": True},
    ],
}
NEURONS_LEFT = [16, 16, 9, 9, 8, 8, 8, 8, 8]  # of 32 in each layer, after the steps 2 to 10


def under(teacher: Path, examples: Path, init: Path, **sections: Any) -> FinetuneRecipe:
    """No zeros are held; a teacher's logits and hidden states."""
    settings = {"teacher": str(teacher), "hidden_weight": 1.0}
    free = {"zeros": "free"}
    return finetune_recipe(init, examples, model=free, distillation=settings, **sections)


@pytest.fixture(scope="module")
def teacher(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of the task."""
    output = tmp_path_factory.mktemp("teacher") / "run"
    finetune(finetune_recipe(sparse, examples, model={"zeros": "free"}), output)
    return output / "model"


@pytest.fixture(scope="module")
def hybrid(teacher: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hybrid") / "run"
    finetune(under(teacher, examples, teacher, pruning=HYBRID), output)
    return output


def test_blocks_and_neurons_reach_their_own_targets_exactly(hybrid: Path) -> None:
    found = opfa.inspect(hybrid)["tensors"]
    assert len(found) == 10  # the attention's output stays dense
    attention = [t["zeros"] for name, t in found.items() if "attention" in name]
    assert sum(attention) == round(0.875 * 48) * 32 and len(set(attention)) > 1  # global
    assert {t["zeros"] for name, t in found.items() if "attention" not in name} == {24 * 16}


def test_rows_and_the_log_say_how_many_are_left(
    teacher: Path, examples: Path, hybrid: Path
) -> None:
    rows, _ = by_kind(metrics.read(hybrid))
    assert [row["neurons"] for row in rows[1:]] == [2 * left for left in NEURONS_LEFT]
    assert rows[-1]["blocks"] == 6


def test_a_resumed_hybrid_run_equals_an_unbroken_one(
    teacher: Path, examples: Path, hybrid: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = under(teacher, examples, teacher, pruning=HYBRID)
    break_off(5, finetune, recipe, tmp_path / "broken")
    with caplog.at_level(logging.INFO):
        finetune(recipe, tmp_path / "broken", resume=True)
    assert metrics.read(tmp_path / "broken") == metrics.read(hybrid)
    assert model_digest(tmp_path / "broken/model") == model_digest(hybrid / "model")
    assert "step 7: the last masks leave 6 of 48 blocks, 16 of 64 neurons" in caplog.text


def test_a_hybrid_model_is_shrunk_and_trained_on_dense(
    teacher: Path, examples: Path, hybrid: Path, tmp_path: Path
) -> None:
    small = opfa.shrink(hybrid, tmp_path / "small")
    assert [kept.neurons for kept in small.layers] == [8, 8]
    recipe = under(teacher, examples, small.directory)
    result = finetune(recipe, tmp_path / "filled")
    assert (result.sparsity, result.quantized) == (0, False) and result.metrics["accuracy"] > 0
    clear_patch_mapping()  # else each load of any model takes 0.4 s
    before = load_file(small.directory / "model.safetensors")
    after = load_file(tmp_path / "filled/model/model.safetensors")
    zeros = {name: int((weight == 0).sum()) for name, weight in before.items()}
    assert sum(zeros[name] for name in zeros if re.search(r"self\.\w+\.weight", name)) > 0
    for name, weight in after.items():
        assert weight.shape == before[name].shape
        if re.search(r"layer\.\d+\..*weight$", name):
            assert not (weight == 0).any()  # what was zero came to life
    config = json.loads((tmp_path / "filled/model/config.json").read_text())
    assert config["per_layer_config"]
