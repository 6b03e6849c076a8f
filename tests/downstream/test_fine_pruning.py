"""Movement pruning while fine-tuning: two kinds of scores at once, resumed, at the run's pace."""

from pathlib import Path
from typing import Any

import pytest
from conftest import break_off, finetune_recipe
from safetensors.torch import load_file

import opfa
from opfa.compression.pruner import FILE
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.training import metrics
from opfa.training.checkpoint import model_digest
from opfa.training.loop import Concern, Progress

MOVING: dict[str, Any] = {
    "schedule": {"start": 2, "end": 6, "every": 2, "hold_until": 9, "target": 0.75},
    "parts": [
        {"include": [r"\.attention\."], "score": {"kind": "movement"}},
        {
            "include": [r"\.(intermediate|output)\."],
            "exclude": [r"\.attention\."],
            "score": {"kind": "soft_movement", "penalty": 1e4, "learning_rate": 0.64},
            "target": 0.995,
        },
    ],
}


def moving(sparse: Path, examples: Path) -> FinetuneRecipe:
    """10 steps, of which 4 warm up; a resume point after steps 1, 2, ..."""
    logging = {"every_steps": 1, "checkpoint_steps": 1}
    sections = {"training": {"warmup": 0.4}, "pruning": MOVING, "logging": logging}
    return finetune_recipe(sparse, examples, model={"zeros": "free"}, **sections)


@pytest.fixture(scope="module")
def whole(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("moving") / "run"
    finetune(moving(sparse, examples), output)
    return output


def test_hard_movement_reaches_its_target_and_soft_what_its_penalty_makes(whole: Path) -> None:
    found = opfa.inspect(whole)["tensors"]
    hard = {t["sparsity"] for name, t in found.items() if "attention" in name}
    soft = {t["sparsity"] for name, t in found.items() if "attention" not in name}
    assert hard == {0.75} and len(found) == 12
    assert 0 < min(soft) < max(soft) < 0.5  # nobody asked for it
    rows = [row for row in metrics.read(whole) if not row.get("eval") and "sparsity" in row]
    assert [row["sparsity"] for row in rows][:2] == [0.0, 0.0]
    total = opfa.inspect(whole)["total"]
    assert rows[-1]["sparsity"] == pytest.approx(total["sparsity"])
    page = (whole / "report/index.html").read_text()
    assert "Sparsity of the pruned matrices" in page


def test_a_resumed_movement_run_equals_an_unbroken_one(
    sparse: Path, examples: Path, whole: Path, tmp_path: Path
) -> None:
    recipe = moving(sparse, examples)
    break_off(5, finetune, recipe, tmp_path / "run")
    finetune(recipe, tmp_path / "run", resume=True)
    assert metrics.read(tmp_path / "run") == metrics.read(whole)
    assert model_digest(tmp_path / "run/model") == model_digest(whole / "model")


def test_scores_learn_at_the_pace_of_the_run(sparse: Path, examples: Path, tmp_path: Path) -> None:
    """AdamW's first step is its rate; the first of four steps of warm-up has a quarter of it."""
    paces: list[float] = []

    class Watching(Concern):
        def after_backward(self, at: Progress) -> None:
            paces.append(at.pace)

        def after_step(self, at: Progress) -> None:
            at.is_over = at.step == 2

    finetune(moving(sparse, examples), tmp_path / "run", concerns=[Watching()])
    assert paces == [0.25, 0.5]
    saved = load_file(tmp_path / "run/checkpoints/step-00000001" / FILE)
    scores = [run for key, run in saved.items() if key.startswith("score/") and "attention" in key]
    assert len(scores) == 8
    most = max(float(score.abs().max()) for score in scores)
    assert most == pytest.approx(0.01 * 0.25, rel=0.1)  # epsilon takes a little
