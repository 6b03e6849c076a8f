"""Hidden states of the runtime against torch, on real text of every length.

python tests/runtime/same_states.py DATA [TEXTS [FAMILY ...]]

Each family gets an encoder of six layers with random weights, 90 % of them zero. TEXTS pieces of
real text (500) have lengths from 1 token to the limit of the family, 512 or more.
"""

import copy
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import sparse
from tokenizers import BertWordPieceTokenizer
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    PretrainedConfig,
    RobertaConfig,
)

from opfa.runtime.encoder import with_kernels
from opfa.runtime.library import level

LAYERS, HIDDEN, HEADS, MIDDLE, VOCABULARY = 6, 384, 12, 1536, 30522
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": MIDDLE,
}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPECIAL |= {"cls_token_id": 1, "sep_token_id": 2}  # its own lie beyond the vocabulary
FAMILIES: dict[str, tuple[PretrainedConfig, int]] = {  # and the longest text
    "bert": (BertConfig(**SIZES), 512),
    "roberta": (RobertaConfig(**SIZES, max_position_embeddings=514), 512),
    "distilbert": (
        DistilBertConfig(
            vocab_size=VOCABULARY, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=MIDDLE
        ),
        512,
    ),
    "modernbert": (ModernBertConfig(**SIZES, **SPECIAL, max_position_embeddings=1024), 1024),
}


def tokens_of(data: Path, number: int) -> list[int]:
    """The first tokens of the text, without special ones."""
    vocabulary = next((data / "vocab").glob("*.txt"))
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    found: list[int] = []
    with gzip.open(data / "pretrain/validation.jsonl.gz", "rt") as lines:
        for line in lines:
            found += tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            if len(found) >= number:
                return found
    raise SystemExit("too little text")


def main() -> None:
    """Print the largest difference by family."""
    data, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 500
    for family in sys.argv[3:] or FAMILIES:
        config, longest = FAMILIES[family]
        model = sparse(AutoModel, config)
        for dtype in ("fp32", "bf16"):
            found = with_kernels(copy.deepcopy(model), 2, dtype)
            lengths = np.linspace(1, longest, number).round().astype(int)
            tokens, begin, worst, largest = tokens_of(data, int(lengths.sum())), 0, 0.0, 0.0
            for length in lengths:
                ids = torch.tensor([tokens[begin : begin + length]])
                begin += length
                with torch.no_grad():
                    expected, states = (each(input_ids=ids)[0] for each in (model, found))
                worst = max(worst, float((expected - states).abs().max()))
                largest = max(largest, float(expected.abs().max()))
            print(
                family, dtype, level(), f"{number} texts: {worst:.1e}, of {largest:.1f}", flush=True
            )


if __name__ == "__main__":
    main()
