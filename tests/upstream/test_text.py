"""Scores that are measured on the training text, in an upstream run."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import break_off, pretrain_recipe

from opfa.errors import DataError
from opfa.training.checkpoint import model_digest
from opfa.upstream.batches import masker
from opfa.upstream.prepared import Prepared
from opfa.upstream.pretrain import pretrain
from opfa.upstream.recipe import Masking
from opfa.upstream.text import calibration_of
from opfa.weights.inspection import inspect

SCHEDULE = {"start": 1, "end": 4, "hold_until": 6, "every": 1, "target": 0.9}
SCORE = {"kind": "curvature", "sequences": 8, "every": 3, "decay": 0.5}


def recipe(prepared: Path, **score: Any) -> Any:
    pattern = {"score": {**SCORE, **score}}
    return pretrain_recipe(prepared, pruning={"schedule": SCHEDULE, "pattern": pattern})


def test_a_student_is_pruned_by_curvature_exactly_and_resumed_bit_for_bit(
    prepared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "opfa"):
        pretrain(recipe(prepared), tmp_path / "whole")
    said = [r.getMessage() for r in caplog.records if "sequences: needs" in r.getMessage()]
    assert len(said) == 2  # updates 0 and 3 of six
    whole = inspect(tmp_path / "whole/model")
    for tensor in whole["tensors"].values():
        assert tensor["zeros"] == round(0.9 * tensor["shape"][0] * tensor["shape"][1])
    by_magnitude = pretrain_recipe(prepared, pruning={"schedule": SCHEDULE})
    pretrain(by_magnitude, tmp_path / "magnitude")
    assert inspect(tmp_path / "magnitude/model")["fingerprint"] != whole["fingerprint"]
    break_off(3, pretrain, recipe(prepared), tmp_path / "broken")
    pretrain(recipe(prepared), tmp_path / "broken", resume=True)
    digests = [model_digest(tmp_path / run / "model") for run in ("whole", "broken")]
    assert digests[0] == digests[1]


def test_too_few_sequences_are_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"score.sequences: .* 100,000 sequences, and \d+ are there"
    ):
        pretrain(recipe(prepared, sequences=100_000), tmp_path / "run")


def test_the_watchdog_hears_of_each_batch(prepared: Path) -> None:
    found = Prepared.open(prepared, recipe(prepared).corpus)
    mask = masker(found.tokenizer, Masking(probability=0.0), 0)
    heard: list[str] = []
    text = calibration_of(torch.nn.Identity(), found, mask, torch.device("cpu"), heard.append)._text
    list(text.batches(6))
    assert heard == [f"measuring the score, sequence {n} of 6" for n in (1, 5)]


def test_outputs_are_the_hidden_states_of_real_tokens(prepared: Path) -> None:
    found = Prepared.open(prepared, recipe(prepared).corpus)
    mask = masker(found.tokenizer, Masking(probability=0.0), 0)
    text = calibration_of(torch.nn.Identity(), found, mask, torch.device("cpu"), print)._text
    first, *rest = text.batches(6)
    assert len(first["input_ids"]) == 4 and len(rest[0]["input_ids"]) == 2
    real = int(first["attention_mask"].sum())
    assert real == found.lengths()[:4].sum()

    class Outputs:
        hidden_states = [torch.randn(*first["input_ids"].shape, 3) for _ in range(3)]

    states = text.outputs(lambda **_: Outputs, first)
    assert [tuple(state.shape) for state in states] == [(real, 3)] * 2
