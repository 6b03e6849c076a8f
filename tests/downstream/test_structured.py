"""Blocks, neurons and heads while fine-tuning, and what follows: shrink, then train on, dense."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import break_off, finetune_recipe, pretrain_recipe
from safetensors.torch import load_file
from transformers.monkey_patching import clear_patch_mapping

import opfa
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.training.checkpoint import model_digest
from opfa.upstream.pretrain import pretrain

ATTENTION = [r"\.query$", r"\.key$", r"\.value$"]
HYBRID: dict[str, Any] = {
    "schedule": {"start": 2, "end": 6, "every": 2, "hold_until": 7, "target": 0.75},
    "parts": [
        {"include": ATTENTION, "grain": "8x4", "target": 0.875, "scope": "global"},
        {"grain": "neurons", "monotone": True},
    ],
}


@pytest.fixture(scope="module")
def teacher(prepared: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of the task."""
    directory = tmp_path_factory.mktemp("teacher")
    pretrain(pretrain_recipe(prepared, training={"steps": 3}), directory / "dense")
    recipe = finetune_recipe(directory / "dense/model", examples, model={"zeros": "free"})
    finetune(recipe, directory / "run")
    return directory / "run/model"


def under(teacher: Path, examples: Path, init: Path, **sections: Any) -> FinetuneRecipe:
    """Trained without holding zeros, under that teacher."""
    settings = {"teacher": str(teacher), "hidden_weight": 1.0}
    return finetune_recipe(
        init, examples, model={"zeros": "free"}, distillation=settings, **sections
    )


@pytest.fixture(scope="module")
def hybrid(teacher: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hybrid") / "run"
    finetune(under(teacher, examples, teacher, pruning=HYBRID), output)
    return output


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_x(hybrid: Path, examples, teacher, tmp_path) -> None:
    print(rows_of(hybrid)[5:])
    print((hybrid / "recipe.toml").read_text())
    print(opfa.inspect(hybrid))
    s = opfa.shrink(hybrid, tmp_path / "small")
    print(s.layers, s.averaging, s.encoder, s.of_encoder)
    r = finetune(under(teacher, examples, tmp_path / "small"), tmp_path / "filled")
    print(r)
    print(opfa.evaluate(tmp_path / "filled"))
    print(opfa.inspect(tmp_path / "filled"))
    assert 0
