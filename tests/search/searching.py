"""A tiny fine-tuned model to search in, and its recipe."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_BERT, finetune_recipe
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from opfa.downstream.finetune import finetune
from opfa.search.recipe import SearchRecipe


@pytest.fixture(scope="session")
def tuned(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of 2 layers, 2 heads and 32 neurons that knows its task."""
    place = tmp_path_factory.mktemp("tuned")
    tokenizer = AutoTokenizer.from_pretrained(sparse)
    torch.manual_seed(0)
    values: dict[str, Any] = {k: v for k, v in TINY_BERT.items() if k != "model_type"}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=2, **values)
    BertForSequenceClassification(config).save_pretrained(place / "init")
    tokenizer.save_pretrained(place / "init")
    training = {"epochs": 10.0, "learning_rate": 3e-3, "batch": 8}
    recipe = finetune_recipe(
        place / "init", examples, model={"zeros": "free"}, training=training, logging={}
    )
    finetune(recipe, place / "run")
    return place / "run/model"


def search_recipe(model: Path, examples: Path, **search: Any) -> SearchRecipe:
    """A small search in it."""
    sizes = {"evaluations": 12, "population": 6, "seeds": 3, "examples": 24}
    parts = {"held_out": 30, "fresh": 20}
    values = finetune_recipe(
        model, examples, model={"zeros": "free"}, training={"epochs": 0.5}
    ).model_dump(mode="json", exclude_none=True)
    return SearchRecipe.check({**values, "search": {**sizes, **parts, **search}})
