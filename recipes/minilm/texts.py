"""Texts from which a sparse sentence encoder learns the vectors of the dense one.

python recipes/minilm/texts.py DATA TEXTS.jsonl [TEXTS]

DATA is that of launch/reproduce.sh, with STS-B. No validation or test file is read, and no label.
"""

import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from opfa.data.records import read_records
from opfa.upstream.sentences import sentences_of

COLUMNS = {  # of the tasks' training files
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "squad": ("question", "context"),
}
SHORTEST = 20  # characters of a sentence of a document; shorter ones are mostly names and noise


def of_tasks(data: Path) -> Iterator[str]:
    """The texts of the tasks: short sentences, questions and the paragraphs that answer them."""
    for task, columns in COLUMNS.items():
        for _, record in read_records(data / task / "train.jsonl.gz"):
            yield from (record[column].strip() for column in columns)


def of_documents(data: Path) -> Iterator[str]:
    """All sentences of the documents of pre-training."""
    for file in sorted((data / "pretrain").glob("train-*.jsonl.gz")):
        for _, record in read_records(file):
            yield from (s for s in sentences_of(record["text"]) if len(s) >= SHORTEST)


def main(data: str, output: str, most: str = "200000") -> None:
    """Write each text once, in random order: all of the tasks', then sentences of documents."""
    texts = list(dict.fromkeys(text for text in of_tasks(Path(data)) if text))
    order = random.Random(0)
    order.shuffle(others := list(dict.fromkeys(of_documents(Path(data)))))
    texts = list(dict.fromkeys([*texts, *others]))[: int(most)]
    order.shuffle(texts)
    opened = gzip.open if output.endswith(".gz") else open
    with opened(output, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


if __name__ == "__main__":
    main(*sys.argv[1:])
