"""Seventeen words, and the tasks and models that know no others."""

from typing import Any

from transformers import BertConfig

from opfa.tasks.recipe import Task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "who", "won"]
WORDS += ["?", "rome", "beat", "paris", ".", "in", "may"]


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
