"""What `opfa bench` trains when no recipe is given: BERT-base, random weights, random text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opfa.extras import importing
from opfa.models.configs import new_config, wordpiece_tokenizer
from opfa.models.encoders import write_model
from opfa.models.pretraining import new_pretraining_model
from opfa.upstream.corpus import measure, write_summary
from opfa.upstream.prepared import SPLITS
from opfa.upstream.recipe import PretrainRecipe
from opfa.upstream.segments import EXAMPLE

with importing("opfa bench train", "opfa[pretrain]"):
    from datasets import Dataset, disable_progress_bars

ENDLESS = 10**6  # steps, more than will be measured
NUM_EXAMPLES = 4096
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
STANDARD: dict[str, Any] = {
    "name": "bench",
    "corpus": {"documents": ["random"], "objective": "mlm", "tokenizer": "random"},
    "model": {"config": {"model_type": "bert", "vocab_size": 30_522}},
    "training": {"steps": ENDLESS, "batch": 8, "learning_rate": 1e-5},
    "pruning": {"schedule": {"end": 50_000, "hold_until": 80_000, "every": 1_000, "target": 0.9}},
    "distillation": {"teacher": "random"},
}


def standard(directory: Path, overrides: Sequence[str]) -> PretrainRecipe:
    """A recipe whose student, teacher and examples are written into a directory."""
    file = directory / "recipe.toml"
    file.write_text(PretrainRecipe.check(STANDARD).to_toml())
    recipe = PretrainRecipe.read(file, overrides)
    assert recipe.model.config is not None
    torch.manual_seed(recipe.seed)
    size, tokens = new_config(recipe.model.config).vocab_size, recipe.corpus.sequence_tokens
    tokenizer = wordpiece_tokenizer(vocabulary(size), lowercase=True, tokens=tokens)
    model = new_pretraining_model(recipe.model.config, recipe.corpus.objective, tokenizer)
    write_model(model, tokenizer, directory / "model")
    disable_progress_bars()
    choose = np.random.default_rng(recipe.seed)
    ids = choose.integers(len(SPECIAL), size, (NUM_EXAMPLES, tokens), dtype=np.int32)
    columns = {
        "input_ids": list(ids),
        "second_segment": [tokens] * NUM_EXAMPLES,
        "next_sentence_label": [-100] * NUM_EXAMPLES,
    }
    examples = Dataset.from_dict(columns, features=EXAMPLE)
    for split in SPLITS:
        examples.save_to_disk(directory / "prepared" / split)
    tokenizer.save_pretrained(directory / "prepared/tokenizer")
    splits: dict[str, Any] = dict.fromkeys(SPLITS, measure(examples))
    write_summary(directory / "prepared", recipe.corpus, splits, tokenizer)
    path = str(directory / "model")
    values = recipe.model_dump(mode="json", exclude_none=True)
    values |= {"data": str(directory / "prepared"), "model": {"init": path}}
    if recipe.distillation is not None:
        values["distillation"]["teacher"] = path
    return PretrainRecipe.check(values)


def vocabulary(size: int) -> dict[str, int]:
    """The special tokens, then word5, word6, ..."""
    words = (*SPECIAL, *(f"word{index}" for index in range(len(SPECIAL), size)))
    return {word: index for index, word in enumerate(words)}
