"""Part of each task's training examples, held out to choose learning rates and ablations by.

No group is divided, so that what is held out is as new to a model as the validation split: premises
of RTE and MNLI, first sentences of STS-B, articles of SQuAD, and sentences of SST-2, whose training
examples are all phrases of its sentences. Which group is held out hangs on the hash of its text
alone.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from opfa.data.records import read_records
from opfa.storage.files import new_directory

HELD_PERCENT = 20  # of the groups
VALIDATION = {"mnli": "validation_matched"}  # the split's name, where it is another
GROUPED_BY = {"rte": "sentence1", "stsb": "sentence1", "mnli": "premise", "squad": "title"}
Record = dict[str, Any]


def write_split(data: Path, output: Path) -> None:
    """`fit.jsonl.gz` and `held.jsonl.gz` of `data/train.jsonl.gz`, under the name of its task. Of
    MNLI also its validation split, without full stops if its training examples have none.
    """
    records = [record for _, record in read_records(data / "train.jsonl.gz")]
    fit, held = phrases(records) if data.name == "sst2" else groups(records, GROUPED_BY[data.name])
    with new_directory(output) as aside:
        if data.name == "mnli":
            file = data / f"{VALIDATION['mnli']}.jsonl.gz"
            matched = [record for _, record in read_records(file)]
            if not any("." in record["premise"] + record["hypothesis"] for record in records):
                matched = [_without_stops(record) for record in matched]
            _write(aside / "validation.jsonl.gz", matched)
        _write(aside / "fit.jsonl.gz", fit)
        _write(aside / "held.jsonl.gz", held)


def groups(records: Sequence[Record], key: str) -> tuple[list[Record], list[Record]]:
    """To fit, and held out: whole groups of records with the same value."""
    fit = [record for record in records if not _is_held(record[key])]
    return fit, [record for record in records if _is_held(record[key])]


def phrases(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """To fit: phrases that stand in no sentence which is held out. Held out: those sentences, the
    phrases that stand in no longer one.
    """
    inside = sentences_of({record["sentence"].strip() for record in records})
    fit, held = [], []
    for record in records:
        phrase = record["sentence"].strip()
        if phrase in inside[phrase] and _is_held(phrase):
            held.append(record)
        elif not any(map(_is_held, inside[phrase])):
            fit.append(record)
    return fit, held


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
