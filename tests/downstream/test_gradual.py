"""Pruning while fine-tuning, as GMP* does it: a first step, a ramp, a rate that rewinds, a last
phase with fixed masks, and a teacher.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import break_off, finetune_recipe, pretrain_recipe
from torch import Tensor

from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RecipeError
from opfa.sparsity.layers import masks_of
from opfa.training.checkpoint import model_digest
from opfa.training.loop import Concern, Progress
from opfa.upstream.pretrain import pretrain
from opfa.weights.inspection import inspect

# 10 steps; masks change after 2, 4, 6 (the ramp), 7 (the last update), and then no more.
SCHEDULE = {"start": 2, "end": 6, "every": 2, "hold_until": 7, "initial": 0.5, "target": 0.9}
SPARSITY = [0.0, 0.0, 0.5, 0.5, 0.85, 0.85, 0.9, 0.9, 0.9, 0.9, 0.9]  # after so many steps
# Of the steps 1 to 10, in shares of the peak: two of warm-up, then down from the newest update.
RATES = [1 / 2, 1, 1, 7 / 8, 1, 5 / 6, 1, 3 / 4, 2 / 4, 1 / 4]
TEACHERS: dict[str, dict[str, Any] | None] = {
    "no teacher": None,
    "its logits": {"hard_weight": 0.0, "soft_weight": 1.0},
    "its hidden states": {"hard_weight": 0.3, "soft_weight": 0.3, "hidden_weight": 10.0},
}


@pytest.fixture(scope="module")
def dense(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dense") / "run"
    pretrain(pretrain_recipe(prepared, training={"steps": 3}), output)
    return output / "model"


@pytest.fixture(scope="module")
def teacher(dense: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher") / "run"
    finetune(finetune_recipe(dense, examples, model={"zeros": "free"}), output)
    return output / "model"


def gradual(
    dense: Path, examples: Path, teacher: Path, kind: str, **sections: Any
) -> FinetuneRecipe:
    settings = TEACHERS[kind]
    if settings is not None:
        sections["distillation"] = {"teacher": str(teacher), **settings}
    training = {"warmup": 0.2, "rewind_learning_rate": True}
    sections = {"training": training, "pruning": {"schedule": SCHEDULE}, **sections}
    return finetune_recipe(dense, examples, model={"zeros": "free"}, **sections)


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if not row.get("eval")]


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_first_step_a_ramp_and_a_hold_with_a_rate_that_rewinds(
    dense: Path,
    examples: Path,
    teacher: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    masks: list[dict[str, Tensor]] = []

    class Watching(Concern):
        def begin(self, at: Progress) -> None:
            self.after_step(at)

        def after_step(self, at: Progress) -> None:
            masks.append({name: mask.clone() for name, mask in masks_of(at.model).items()})

    finetune(gradual(dense, examples, teacher, kind), tmp_path / "run", concerns=[Watching()])

    assert len(masks) == 11 and len(masks[0]) == 12
    for found, sparsity in zip(masks, SPARSITY, strict=True):
        for mask in found.values():
            assert int((~mask).sum()) == round(sparsity * mask.numel())
    changes = [
        step
        for step in range(1, 11)
        if any(not torch.equal(masks[step][n], masks[step - 1][n]) for n in masks[0])
    ]
    assert set(changes) <= {2, 4, 6, 7} and {2, 4, 6} <= set(changes)
    tensors = inspect(tmp_path / "run/model")["tensors"]
    for tensor in tensors.values():
        assert tensor["zeros"] == round(0.9 * tensor["shape"][0] * tensor["shape"][1])

    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 11))
    expected = [1e-3 * rate for rate in RATES]
    assert [row["learning_rate"] for row in rows] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_resumed_gradual_run_equals_an_unbroken_one(
    dense: Path,
    examples: Path,
    teacher: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    logging = {"every_steps": 1, "checkpoint_steps": 3}  # between two updates
    recipe = gradual(dense, examples, teacher, kind, logging=logging)
    finetune(recipe, tmp_path / "unbroken")
    break_off(5, finetune, recipe, tmp_path / "broken")
    finetune(recipe, tmp_path / "broken", resume=True)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "unbroken")
    assert model_digest(tmp_path / "broken/model") == model_digest(tmp_path / "unbroken/model")


def test_without_the_key_the_rate_does_not_rewind(
    dense: Path, examples: Path, teacher: Path, tmp_path: Path
) -> None:
    digests, recipes = set(), []
    for number, training in enumerate(({}, {"rewind_learning_rate": False})):
        recipe = gradual(
            dense, examples, teacher, "no teacher", training={"warmup": 0.2, **training}
        )
        finetune(recipe, tmp_path / f"{number}")
        shares = [1 / 2, 1, *(left / 8 for left in range(8, 0, -1))]
        found = [row["learning_rate"] for row in rows_of(tmp_path / f"{number}")]
        assert found == pytest.approx([1e-3 * share for share in shares], rel=1e-12)
        digests.add(model_digest(tmp_path / f"{number}/model"))
        recipes.append(recipe)
    assert len(digests) == 1
    assert recipes[0].sha256() == recipes[1].sha256()
    assert "rewind" not in recipes[1].to_toml()  # recipes of before the key keep their digest
    again = FinetuneRecipe.check(recipes[1].model_dump(mode="json"))
    assert again == recipes[0]


def test_rewinding_needs_pruning(dense: Path, examples: Path) -> None:
    message = "training.rewind_learning_rate: needs \\[pruning\\], whose updates it follows"
    with pytest.raises(RecipeError, match=message):
        finetune_recipe(dense, examples, training={"rewind_learning_rate": True})


def test_a_written_recipe_rewinds_again(dense: Path, examples: Path, tmp_path: Path) -> None:
    recipe = gradual(dense, examples, dense, "no teacher")
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert FinetuneRecipe.read(tmp_path / "recipe.toml") == recipe
    assert recipe.pruning is not None
    assert recipe.learning_rate(10).rewind_at == recipe.pruning.ramp(10)


def test_a_rate_in_cycles_is_lowest_before_each_update_and_resumes_bit_for_bit(
    dense: Path, examples: Path, tmp_path: Path
) -> None:
    training = {"warmup": 0.1, "cyclic_learning_rate": True, "lowest_learning_rate": 1e-4}
    logging = {"every_steps": 1, "checkpoint_steps": 3}
    recipe = gradual(dense, examples, dense, "no teacher", training=training, logging=logging)
    finetune(recipe, tmp_path / "unbroken")
    # Warm-up; down before the first update; two steps each; and after the ramp down to the end.
    expected = [10, 10, 10, 1, 10, 1, 10, 7, 4, 1]
    found = [row["learning_rate"] for row in rows_of(tmp_path / "unbroken")]
    assert found == pytest.approx([1e-4 * rate for rate in expected], rel=1e-12)
    break_off(5, finetune, recipe, tmp_path / "broken")
    finetune(recipe, tmp_path / "broken", resume=True)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "unbroken")
    assert model_digest(tmp_path / "broken/model") == model_digest(tmp_path / "unbroken/model")
