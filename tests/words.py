"""Seventeen words, and the tasks and models that know no others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from opfa.models.encoders import HEADS
from opfa.tasks.recipe import Task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "who", "won"]
WORDS += ["?", "rome", "beat", "paris", ".", "in", "may"]

Models = Mapping[str, tuple[str, dict[str, Any]]]  # by name: head ("": none), configuration
MODELS: Models = {
    "classes": ("SequenceClassification", {"id2label": {0: "bad", 1: "good"}}),
    "number": ("SequenceClassification", {"num_labels": 1}),
    "answers": ("QuestionAnswering", {}),
    "tags": ("TokenClassification", {"id2label": {0: "O", 1: "B-X"}}),
    "choices": ("MultipleChoice", {}),
}
AND_BARE: Models = {**MODELS, "bare": ("", {"initializer_range": 0.02})}


def task_of(**values: Any) -> Task:
    """A task of tiny sequences."""
    values.setdefault("sequence_tokens", 16)
    return Task(**values)


def tiny(**values: Any) -> BertConfig:
    """The configuration of a model of one layer."""
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        **values,
    )


def write_models(directory: Path, models: Models = AND_BARE) -> Path:
    """A random model of each kind, by default with large weights so that it has opinions."""
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer.from_pretrained(directory)
    for name, (head, values) in models.items():
        torch.manual_seed(0)
        config = tiny(**{"initializer_range": 1.0, **values})
        model = HEADS[head].from_config(config) if head else BertModel(config)
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory
