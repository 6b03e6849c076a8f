"""Hidden states alone, learnt and measured on text without a masked token."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pretrain_recipe
from torch import Tensor
from transformers import PreTrainedModel

from opfa.bench import train as bench_train
from opfa.compression import distill
from opfa.errors import RecipeError
from opfa.models.pretraining import load_pretraining_model
from opfa.releases.provenance import row_of
from opfa.releases.release import release
from opfa.training.checkpoint import model_digest
from opfa.upstream import objective as objective_module
from opfa.upstream.batches import Batch, Prepared, masker, training_steps, validation_batches
from opfa.upstream.formulas import shape_of
from opfa.upstream.pretrain import order_of, pretrain
from opfa.upstream.recipe import Distillation, PretrainRecipe

STATES = {"hard_weight": 0.0, "soft_weight": 0.0, "hidden_weight": 2.0}
SCHEDULE = {"end": 2, "target": 0.5}


@pytest.fixture(scope="module")
def teacher(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher") / "run"
    pretrain(pretrain_recipe(prepared, training={"steps": 3}), output)
    return output / "model"


def states_alone(prepared: Path, teacher: Path, **sections: Any) -> PretrainRecipe:
    options: dict[str, Any] = {
        "masking": {"probability": 0.0},
        "model": {"init": str(teacher)},
        "distillation": {"teacher": str(teacher), **STATES},
        "pruning": {"schedule": SCHEDULE},
        "training": {"steps": 3, "dropout": 0.0},
    }
    return pretrain_recipe(prepared, **{**options, **sections})


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def clean(prepared: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("clean") / "run"
    pretrain(states_alone(prepared, teacher), output)
    return output


def distance(student: PreTrainedModel, teacher: PreTrainedModel, batches: list[Batch]) -> float:
    """By the formula: the mean over real tokens, layers and the width."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        with torch.no_grad():
            ours, theirs = (
                model.eval()(**batch.inputs, output_hidden_states=True).hidden_states
                for model in (student, teacher)
            )
        is_real = batch.inputs.get("attention_mask", torch.ones_like(batch.inputs["input_ids"]))
        for a, b in zip(ours, theirs, strict=True):
            total = total + (a - b)[is_real.bool()].square().mean(-1).sum() / len(ours)
        count += int(is_real.sum())
    return float(total) / count


def test_no_token_is_masked_in_training_or_evaluation(prepared: Path, teacher: Path) -> None:
    recipe = states_alone(prepared, teacher)
    data = Prepared.open(prepared, recipe.corpus)
    mask = masker(data.tokenizer, recipe.masking, recipe.seed)
    order = order_of(recipe, data.lengths(), 0, 1)
    trained = [
        b for step in training_steps(data, mask, order, steps=range(3), workers=0) for b in step
    ]
    special = data.tokenizer.mask_token_id, data.tokenizer.pad_token_id
    mask_id, pad_id = (torch.tensor(token) for token in special)
    for batch in [*trained, *validation_batches(data, mask, batch=8, num_examples=99)]:
        assert len(batch.predicted) == len(batch.labels) == 0
        assert not (batch.inputs["input_ids"] == mask_id).any()
        num_real = int(batch.inputs["input_ids"].ne(pad_id).sum())
        assert batch.counts()[:2] == (0, num_real)
    first = [data.train[i]["input_ids"].to_pylist()[0] for _, i in order.step(0)[0]]
    for ids, row in zip(first, trained[0].inputs["input_ids"].tolist(), strict=True):
        assert row[: len(ids)] == ids


def test_the_distance_is_measured_on_clean_text(prepared: Path, teacher: Path, clean: Path) -> None:
    recipe = states_alone(prepared, teacher)
    data = Prepared.open(prepared, recipe.corpus)
    mask = masker(data.tokenizer, recipe.masking, recipe.seed)
    held_out = list(validation_batches(data, mask, batch=8, num_examples=512))
    student, theirs = (
        load_pretraining_model(str(path), "mlm+nsp") for path in (clean / "model", teacher)
    )
    expected = distance(student, theirs, held_out)
    last = [row for row in rows_of(clean) if row.get("eval")][-1]
    assert last["hidden_loss"] == pytest.approx(expected, rel=1e-5)
    assert last["loss"] == pytest.approx(2.0 * expected, rel=1e-5)  # times its weight
    assert expected > 0


def test_rows_have_the_loss_of_hidden_states_and_no_head_s(clean: Path) -> None:
    for row in rows_of(clean):
        assert {key for key in row if key.endswith("loss")} == {"loss", "hidden_loss"}
        assert row["loss"] == pytest.approx(2.0 * row["hidden_loss"])
        assert math.isfinite(row["loss"])


def test_pictures_results_and_cards_are_made(clean: Path, tmp_path: Path) -> None:
    names = {path.name for path in (clean / "report").iterdir()}
    assert names == {"loss.png", "learning_rate.png", "sparsity.png", "index.html"}
    last = rows_of(clean)[-1]["hidden_loss"]
    assert row_of("x", clean).metrics == {"hidden_loss": last}
    facts = release(clean, tmp_path / "out")
    assert facts.metrics == {"hidden_loss": last}
    assert "feature-extraction" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(("probability", "tokens"), [(0.0, "masked"), (0.3, "all")])
def test_hidden_states_alone_need_no_logits_and_give_the_same_bits(
    prepared: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    probability: float,
    tokens: str,
) -> None:
    recipe = states_alone(
        prepared,
        teacher,
        masking={"probability": probability},
        distillation={"teacher": str(teacher), **STATES, "tokens": tokens},
        training={"steps": 3, "weight_decay": 0.1},
    )
    with monkeypatch.context() as patch:

        def all_rows(batch: Batch, _: Distillation | None) -> Tensor:
            return torch.cat([batch.predicted, batch.others])

        patch.setattr(objective_module, "rows_of", all_rows)
        pretrain(recipe, tmp_path / "with")
    with monkeypatch.context() as patch:
        patch.setattr(distill, "_project", None)
        pretrain(recipe, tmp_path / "without")
    assert rows_without_speed(tmp_path / "with") == rows_without_speed(tmp_path / "without")
    assert model_digest(tmp_path / "with/model") == model_digest(tmp_path / "without/model")


def rows_without_speed(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows_of(run)]


@pytest.mark.parametrize(
    "weights",
    [
        None,
        {"hard_weight": 0.5, "soft_weight": 0.0, "hidden_weight": 1.0},
        {"hard_weight": 0.0, "soft_weight": 0.1, "hidden_weight": 1.0},
        {"hard_weight": 0.0, "soft_weight": 0.0, "hidden_weight": 0.0},
        {},
    ],
)
def test_what_needs_masked_tokens_is_refused_without_any(
    prepared: Path, teacher: Path, weights: dict[str, float] | None
) -> None:
    distillation = None if weights is None else {"teacher": str(teacher), **weights}
    message = r"masking.probability = 0: no token is masked, .* distillation.hard_weight = 0, "
    with pytest.raises(RecipeError, match=message) as found:
        states_alone(prepared, teacher, distillation=distillation)
    given = "there is no [distillation]" if weights is None else "hidden_weight = "
    assert given in str(found.value)


def test_plans_and_benchmarks_know_clean_text(prepared: Path, teacher: Path) -> None:
    recipe = states_alone(prepared, teacher)
    assert shape_of(recipe).predicted == 0.0
    assert bench_train.variant_of(recipe, "ours").masking.probability == 0.0
    assert bench_train.variant_of(recipe, "masked").masking.probability == 0.15
