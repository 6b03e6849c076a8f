"""Part of SST-2's training examples, held out to choose learning rates and ablations by; and MNLI's
validation split.

SST-2's training examples are all phrases of its sentences. No sentence is divided, so that what is
held out is as new to a model as the validation split. Which sentence is held out hangs on the hash
of its text alone.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from opfa.checkpoint import new_directory
from opfa.records import read_records

HELD_PERCENT = 20  # of the sentences
VALIDATION = {"mnli": "validation_matched"}  # the split's name, where it is another
Record = dict[str, Any]


def write_held_out(data: Path, output: Path) -> None:
    """`fit.jsonl.gz`, SST-2's phrases that stand in no sentence which is held out, and
    `held.jsonl.gz`, those sentences: the phrases that stand in no longer one.
    """
    records = [record for _, record in read_records(data / "train.jsonl.gz")]
    inside = sentences_of({record["sentence"].strip() for record in records})
    fit, held = [], []
    for record in records:
        phrase = record["sentence"].strip()
        if phrase in inside[phrase] and _is_held(phrase):
            held.append(record)
        elif not any(map(_is_held, inside[phrase])):
            fit.append(record)
    with new_directory(output) as aside:
        _write(aside / "fit.jsonl.gz", fit)
        _write(aside / "held.jsonl.gz", held)


def write_validation(data: Path, output: Path) -> None:
    """MNLI's `validation.jsonl.gz`, without full stops if its training examples have none."""
    matched = [record for _, record in read_records(data / f"{VALIDATION['mnli']}.jsonl.gz")]
    train = read_records(data / "train.jsonl.gz")
    if not any("." in record["premise"] + record["hypothesis"] for _, record in train):
        matched = [_without_stops(record) for record in matched]
    with new_directory(output) as aside:
        _write(aside / "validation.jsonl.gz", matched)


def sentences_of(phrases: set[str]) -> dict[str, list[str]]:
    """For each phrase the longest ones that it stands in, itself if there is no longer one."""
    with_word: dict[str, set[str]] = defaultdict(set)
    found = {}
    for phrase in sorted(phrases, key=lambda phrase: (-len(phrase.split()), phrase)):
        words = set(phrase.split())
        common = set.intersection(*(with_word[word] for word in words))
        found[phrase] = sorted(one for one in common if f" {phrase} " in f" {one} ") or [phrase]
        if found[phrase] == [phrase]:
            for word in words:
                with_word[word].add(phrase)
    return found


def _is_held(text: str) -> bool:
    return int(sha256(text.encode()).hexdigest(), 16) % 100 < HELD_PERCENT


def _without_stops(record: Record) -> Record:
    texts = {key: record[key].replace(".", "") for key in ("premise", "hypothesis")}
    return {**record, **texts}


def _write(path: Path, records: Iterable[Record]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
