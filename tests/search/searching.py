"""A tiny fine-tuned model to search in, and its recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OBJECTS, SUBJECTS, TINY_BERT, finetune_recipe, sentences
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from opfa.downstream.finetune import finetune
from opfa.search.recipe import SearchRecipe


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which half of the subjects, and which half of the objects: harder than one word."""
    directory = tmp_path_factory.mktemp("questions")
    rows = []
    for text in sentences():
        subject = next(i for i, each in enumerate(SUBJECTS) if text.startswith(each))
        thing = next(i for i, each in enumerate(OBJECTS) if text.endswith(f"{each}."))
        rows.append({"text": text, "label": "same" if (subject + thing) % 2 else "other"})
    for name, part in (("train", rows[:280]), ("validation", rows[280:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (directory / f"{name}.jsonl").write_text(lines)
    return directory


@pytest.fixture(scope="session")
def tuned(sparse: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of 2 layers, 2 heads and 32 neurons that has learnt it."""
    place = tmp_path_factory.mktemp("tuned")
    tokenizer = AutoTokenizer.from_pretrained(sparse)
    torch.manual_seed(0)
    values: dict[str, Any] = {k: v for k, v in TINY_BERT.items() if k != "model_type"}
    config = BertConfig(vocab_size=len(tokenizer), **values)
    BertForSequenceClassification(config).save_pretrained(place / "init")
    tokenizer.save_pretrained(place / "init")
    training = {"epochs": 20.0, "learning_rate": 5e-3, "batch": 16, "dropout": 0.0}
    rare = {"every_steps": 1.0, "checkpoint_steps": 1.0}
    recipe = finetune_recipe(
        place / "init", questions, model={"zeros": "free"}, training=training, logging=rare
    )
    finetune(recipe, place / "run")
    return place / "run/model"


def search_recipe(model: Path, examples: Path, **search: Any) -> SearchRecipe:
    """A small search in it."""
    sizes = {"evaluations": 12, "population": 6, "seeds": 3, "even": False, "examples": 60}
    parts = {"held_out": 100, "fresh": 100, "space": {"neuron_steps": 8}}
    values = finetune_recipe(
        model, examples, model={"zeros": "free"}, training={"epochs": 0.5}
    ).model_dump(mode="json", exclude_none=True)
    return SearchRecipe.check({**values, "search": {**sizes, **parts, **search}})
