"""Scores that are measured on training examples, while a model is fine-tuned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import break_off, finetune_recipe

from opfa.downstream.examples import calibration_of
from opfa.downstream.finetune import Trainer, finetune
from opfa.errors import DataError
from opfa.training.checkpoint import model_digest
from opfa.weights.inspection import inspect

SCHEDULE = {"start": 2, "end": 6, "every": 2, "hold_until": 7, "initial": 0.5, "target": 0.75}


def recipe(init: Path, examples: Path, score: Any, **sections: Any) -> Any:
    pruning = {"schedule": SCHEDULE, "pattern": {"score": score}}
    return finetune_recipe(init, examples, model={"zeros": "free"}, pruning=pruning, **sections)


@pytest.mark.parametrize("kind", ["curvature", "activation", "fisher"])
def test_a_model_is_pruned_exactly_and_resumed_bit_for_bit(
    kind: str, sparse: Path, examples: Path, tmp_path: Path
) -> None:
    given = recipe(sparse, examples, {"kind": kind, "sequences": 16, "every": 2})
    finetune(given, tmp_path / "whole")
    found = inspect(tmp_path / "whole")["tensors"].values()
    assert all(4 * t["zeros"] == 3 * t["shape"][0] * t["shape"][1] for t in found)
    break_off(5, finetune, given, tmp_path / "broken")
    finetune(given, tmp_path / "broken", resume=True)
    digests = [model_digest(tmp_path / run / "model") for run in ("whole", "broken")]
    assert digests[0] == digests[1]


def test_too_few_examples_are_refused(sparse: Path, examples: Path, tmp_path: Path) -> None:
    given = recipe(sparse, examples, {"kind": "curvature", "sequences": 9_999})
    with pytest.raises(DataError, match=r"score.sequences: .* 9,999 sequences, and \d+ are there"):
        finetune(given, tmp_path / "run")


ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # a row, and what a recipe says of it
    "classification": ({"text": "a b c", "label": 1}, {"metrics": ["accuracy"]}),
    "regression": ({"text": "a b", "label": 0.5}, {"metrics": ["pearson"]}),
    "token-classification": (
        {"text": ["a", "b"], "label": ["O", "B-X"]},
        {"metrics": ["entity_f1"]},
    ),
    "multiple-choice": (
        {"text": "a b", "one": "c", "two": "d e f", "label": 0},
        {"choices": ["one", "two"], "metrics": ["accuracy"]},
    ),
    "question-answering": (
        {
            "id": "1", "text": "who", "context": "a b c",
            "label": {"text": ["b"], "answer_start": [2]},
        },
        {"text_pair": "context", "metrics": ["squad_f1"], "stride_tokens": 4},
    ),
    "embedding": (
        {"text": "a b", "other": "c", "label": 3.0},
        {"text_pair": "other", "metrics": ["spearman"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_of_task_tells_a_curvature_of_every_matrix(
    kind: str, sparse: Path, tmp_path: Path
) -> None:
    row, says = ROWS[kind]
    rows = [row, {**row, "label": 0} if kind == "classification" else row] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    task = {"kind": kind, "label": "label", "train": str(tmp_path / "rows.jsonl"), **says}
    task["validation"] = task["train"]
    training = {"training": {"epochs": 20.0}}
    score = {"kind": "curvature", "sequences": 6}
    trainer = Trainer(recipe(sparse, tmp_path, score, task=task, **training))
    assert trainer.pruner is not None
    trainer.pruner.after_step(2)
    for name, state in trainer.pruner._states.items():
        assert bool((state["text"] > 0).any()), name
    assert trainer.pruner.sparsity() == pytest.approx(0.5, abs=0.01)


def test_the_examples_are_a_sample_that_the_seed_draws(sparse: Path, examples: Path) -> None:
    trainer = Trainer(recipe(sparse, examples, {"kind": "curvature", "sequences": 8}))
    student, task, split = trainer.student, trainer.task, trainer.data.train

    def drawn(seed: int) -> list[list[int]]:
        text = calibration_of(student, task, split, torch.device("cpu"), seed)._text
        return [row for batch in text.batches(8) for row in batch["input_ids"].tolist()]

    assert drawn(1) == drawn(1) != drawn(2)
