"""All-MiniLM-L6-v2 with the tokens of SST-2's training sentences alone: sizes, and what changes.

python recipes/minilm/trimmed.py MODEL DATA RESULTS.json

DATA has sst2/train.jsonl.gz and sst2/validation.jsonl.gz, with the column `sentence`.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import opfa
from opfa.data.records import read_records
from opfa.models.configs import load_tokenizer

SIZES = {"tokens": "tokens", "parameters": "parameters", "bytes of weights": "bytes"}


def table(found: Mapping[str, Any]) -> str:
    """Sizes before and after, and the validation sentences, in Markdown."""
    lines = [("all-MiniLM-L6-v2, for the training sentences of SST-2", "before", "after")]
    lines.append(("---", "---:", "---:"))
    for what, key in SIZES.items():
        lines.append((what, f"{found[f'of_{key}']:,}", f"{found[key]:,}"))
    before, after = found["validation_tokens"]
    same, size = found["validation_same"], found["validation_texts"]
    lines.append((f"tokens of {size:,} validation sentences", f"{before:,}", f"{after:,}"))
    lines.append(("of these, split as before", "", f"{same:,} ({same / size:.1%})"))
    lines.append(("of these, with an unknown token", "", f"{found['validation_unknown']:,}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(model: str, data: str, results: str) -> None:
    """Trim, and compare both tokenizers on the validation sentences."""
    sst2 = Path(data, "sst2")
    rows = read_records(sst2 / "validation.jsonl.gz")
    sentences = [row["sentence"] for _, row in rows]
    with tempfile.TemporaryDirectory() as aside:
        output = Path(aside, "model")
        found = opfa.trim(model, sst2 / "train.jsonl.gz", output, columns="sentence")
        tokenizers = load_tokenizer(model), load_tokenizer(str(output))
    before, after = ([each.tokenize(text) for text in sentences] for each in tokenizers)
    unknown = tokenizers[1].unk_token
    values = found.model_dump(mode="json", exclude={"directory"}) | {
        "validation_texts": len(sentences),
        "validation_tokens": [sum(map(len, tokens)) for tokens in (before, after)],
        "validation_same": sum(map(list.__eq__, before, after)),
        "validation_unknown": sum(unknown in tokens for tokens in after),
    }
    Path(results).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
