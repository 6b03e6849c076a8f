"""`opfa bench train`: the plain step that it compares with is the same training, and what it prints
is what was measured. No test asserts a time.
"""

import contextlib
import io
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pretrain_recipe
from launching import CONTEXT

from opfa.bench import train
from opfa.bench.costs import Costs
from opfa.bench.measure import in_a_process
from opfa.bench.plain import Plain
from opfa.bench.train import Ours, bench_train, variant_of
from opfa.commands import app as cli
from opfa.errors import RecipeError, RunError
from opfa.models.configs import load_tokenizer
from opfa.models.encoders import write_model
from opfa.models.pretraining import load_pretraining_model
from opfa.sparsity.layers import masked_layers
from opfa.sparsity.masks import fingerprint, nonzero_masks
from opfa.upstream.recipe import PretrainRecipe

MEASURED, LOSS_BYTES = train._measured, train._loss_bytes


@pytest.fixture(scope="module")
def recipe(
    prepared: Path, sparse: Path, tmp_path_factory: pytest.TempPathFactory
) -> PretrainRecipe:
    dense = tmp_path_factory.mktemp("dense") / "model"
    model, tokenizer = load_pretraining_model(str(sparse), "mlm+nsp"), load_tokenizer(str(sparse))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    write_model(model, tokenizer, dense)
    return pretrain_recipe(
        prepared,
        model={"init": str(dense), "config": None},
        pruning={"schedule": {"end": 4, "every": 2, "target": 0.8}},
        distillation={"teacher": str(sparse)},
        training={"dropout": 0.0, "learning_rate": 1e-3, "warmup_steps": 0},
        launch={"micro_batch": 8, "workers": 0},
    )


@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_the_plain_step_is_the_same_training(recipe: PretrainRecipe, tokens: str) -> None:
    values = recipe.model_dump(mode="json", exclude_none=True)
    values["distillation"]["tokens"] = tokens
    recipe = PretrainRecipe.check(values)
    ours, plain = Ours(variant_of(recipe, "ours")), Plain(recipe)
    for _ in range(3):
        ours.step()
        plain.step()
    trainer = ours.trainer
    assert trainer.pruner is not None
    theirs = dict(plain.student.named_parameters())
    effective = {}
    for name, layer in masked_layers(trainer.student).items():
        effective[f"{name}.weight"] = layer.effective_weight().detach()
    assert len(effective) == 12
    hooked = {name: theirs[name].detach() for name in effective}
    for name, weight in effective.items():
        hooked[name] = hooked[name] * (weight != 0)  # its optimizer moved them after the hook
    assert fingerprint(nonzero_masks(hooked)) == fingerprint(trainer.pruner.masks())
    for name, parameter in trainer.student.named_parameters():
        expected = hooked.get(name, theirs[name])
        torch.testing.assert_close(effective.get(name, parameter), expected, rtol=1e-4, atol=2e-6)


def test_variants_lack_what_their_names_say(recipe: PretrainRecipe) -> None:
    found = {name: variant_of(recipe, name) for name in ("ours", "no teacher", "dense")}
    assert [r.distillation is not None for r in found.values()] == [True, False, False]
    assert [r.pruning is not None for r in found.values()] == [True, True, False]
    ramp = found["ours"].ramp()
    assert ramp is not None and ramp.sparsity_at(0) == 0.8  # masks as later in the run


@pytest.fixture(scope="module")
def result(recipe: PretrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("bench")
    (directory / "recipe.toml").write_text(recipe.to_toml())
    (directory / "README.md").write_text(
        "# A\n<!-- opfa bench train -->\nold\n<!-- /opfa bench train -->\nZ\n"
    )
    command = ["bench", "train", str(directory / "recipe.toml"), "--rounds", "1", "--json"]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        patch.setattr(train, "_measured", _measured_with_small_matrices)
        patch.setattr(multiprocessing, "get_context", lambda _: CONTEXT)  # has imported torch
        assert cli.run([*command, "--write", str(directory / "README.md")]) == 0
    found = json.loads(printed.getvalue())
    return {**found, "readme": (directory / "README.md").read_text()}


def _measured_with_small_matrices(name: str, recipe: PretrainRecipe) -> dict[str, Any]:
    train.SIDE["cpu"] = 256
    return MEASURED(name, recipe)


def _loss_bytes_of_2048_tokens(precision: str) -> dict[str, Any]:
    train.LOSS_SHAPE = (2048, *train.LOSS_SHAPE[1:])  # whole logits would take 250 MB
    return LOSS_BYTES(precision)


def test_every_variant_and_part_is_measured(result: dict[str, Any]) -> None:
    assert list(result["variants"]) == ["ours", "no teacher", "dense", "plain"]
    assert set(result["seconds_by_part"]) == {
        "data",
        "teacher forward",
        "student forward",
        "loss",
        "backward",
        "optimizer",
    }
    assert all(row["seconds"] > 0 for row in result["variants"].values())


def test_shares_and_ratios_follow_from_what_was_measured(result: dict[str, Any]) -> None:
    seconds = {name: row["seconds"] for name, row in result["variants"].items()}
    ratios = result["ratios"]
    assert ratios["ours / plain, time"] == seconds["ours"] / seconds["plain"]
    assert ratios["ours / no teacher, time"] == seconds["ours"] / seconds["no teacher"]
    assert ratios["no teacher / dense, time"] == seconds["no teacher"] / seconds["dense"]
    assert result["tokens_per_second"] == result["real_tokens"] / seconds["ours"]
    rate = result["flops_per_step"] / seconds["ours"] / result["matrix_flops_per_second"]
    assert result["share_of_matrix_rate"] == pytest.approx(rate)
    assert 0 < result["real_tokens"] <= result["batch"] * result["sequence_tokens"]
    assert result["model"]["init"] == "model"  # no path of the machine


def test_the_loss_keeps_its_limit_of_memory(result: dict[str, Any]) -> None:
    assert 94e6 < result["loss_bytes"] < 300e6  # at least the gradient of the projection in fp32


def test_tables_go_between_the_marks(result: dict[str, Any]) -> None:
    readme = result.pop("readme")
    assert readme.startswith("# A\n<!-- opfa bench train -->\n")
    assert readme.endswith("<!-- /opfa bench train -->\nZ\n")
    assert Costs.model_validate(result).markdown() in readme
    assert "old" not in readme


def test_a_model_from_scratch_is_refused_before_anything_is_measured(prepared: Path) -> None:
    with pytest.raises(RecipeError, match="model.config: opfa bench train needs a model"):
        bench_train(pretrain_recipe(prepared), [], rounds=1)


def test_a_measuring_process_that_fails_is_one_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="a measuring process ended; its output says why"):
        in_a_process(int, "told")
    assert "ValueError: invalid literal for int() with base 10: 'told'" in capfd.readouterr().err
