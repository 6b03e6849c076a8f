"""What the experiment of `launch/reproduce.sh` holds out of the training examples."""

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_records

RECIPES = Path(__file__).parents[2] / "recipes/minilm"
SENTENCES = [f"film {i} is {w} and not long" for i in range(40) for w in ("bad", "good")]


@pytest.fixture(scope="module")
def split() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        yield importlib.import_module("split")


def read(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_phrases_belong_to_the_longest_that_they_stand_in(split: Any) -> None:
    phrases = {"a b c d", "b c", "c", "x c", "b d", "bb d b", "a b c d e f"}
    assert split.sentences_of(phrases) == {
        "a b c d e f": ["a b c d e f"],
        "a b c d": ["a b c d e f"],
        "b c": ["a b c d e f"],
        "c": ["a b c d e f", "x c"],
        "x c": ["x c"],
        "b d": ["b d"],
        "bb d b": ["bb d b"],
    }


def test_no_phrase_of_a_sentence_that_is_held_out_is_trained_on(split: Any, tmp_path: Path) -> None:
    texts = [*SENTENCES, *(" ".join(text.split()[1:4]) for text in SENTENCES), "not long"]
    write_records(tmp_path / "sst2/train.jsonl.gz", [{"sentence": f"{text} "} for text in texts])
    split.write_split(tmp_path / "sst2", tmp_path / "out")
    fit, held = (
        {row["sentence"].strip() for row in read(tmp_path / f"out/{name}.jsonl.gz")}
        for name in ("fit", "held")
    )
    assert held < set(SENTENCES) and 8 <= len(held) <= 24  # about a fifth of 80
    inside = {text for text in texts if any(f" {text} " in f" {sentence} " for sentence in held)}
    assert held < inside
    assert fit == set(texts) - inside


@pytest.mark.parametrize(
    ("task", "key"), [("rte", "sentence1"), ("mnli", "premise"), ("squad", "title")]
)
def test_groups_are_not_divided(split: Any, tmp_path: Path, task: str, key: str) -> None:
    rows = [{key: f"text {i // 3}", "hypothesis": "So it is", "label": i} for i in range(300)]
    write_records(tmp_path / task / "train.jsonl.gz", rows)
    write_records(tmp_path / task / "validation_matched.jsonl.gz", rows[:1])
    split.write_split(tmp_path / task, tmp_path / "out")
    fit, held = (read(tmp_path / f"out/{name}.jsonl.gz") for name in ("fit", "held"))
    assert sorted(row["label"] for row in fit + held) == list(range(300))
    assert not {row[key] for row in fit} & {row[key] for row in held}
    assert 30 <= len(held) <= 90
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize(
    ("hypothesis", "left"), [("So it is", "USA today"), ("Yes.", "U.S.A. today.")]
)
def test_full_stops_go_if_training_has_none(
    split: Any, tmp_path: Path, hypothesis: str, left: str
) -> None:
    rows = [{"premise": f"Text {i}", "hypothesis": hypothesis, "label": i} for i in range(30)]
    write_records(tmp_path / "mnli/train.jsonl.gz", rows)
    measured = {"premise": "No", "hypothesis": "U.S.A. today.", "label": 0}
    write_records(tmp_path / "mnli/validation_matched.jsonl.gz", [measured])
    split.write_split(tmp_path / "mnli", tmp_path / "out")
    assert read(tmp_path / "out/validation.jsonl.gz") == [{**measured, "hypothesis": left}]
