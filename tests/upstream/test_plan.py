"""The formulas of `opfa plan`, against counts made by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opfa.commands import app as cli
from opfa.errors import RecipeError
from opfa.training.zero import DeepSpeedFile
from opfa.upstream.formulas import (
    Shape,
    mask_update_bytes,
    memory_bytes,
    operations,
    shape_of,
    wire_bytes,
)
from opfa.upstream.plan import FILES, plan
from opfa.upstream.recipe import PretrainRecipe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/upstream/bert-base-90.toml"
BERT = ["model.init=", 'model.config={model_type="bert"}']
TOY = Shape(
    parameters=1_000,
    pruned=600,
    pruned_tensors=2,
    kept=0,
    measured=0,
    measuring=0,
    teacher=1_000,
    layers=2,
    hidden=10,
    intermediate=40,
    vocabulary=30,
    tokens=8,
    predicted=0.5,
    precision="bf16",
)


def bert(*overrides: str) -> PretrainRecipe:
    return PretrainRecipe.read(RECIPE, [*BERT, *overrides])


@pytest.mark.parametrize(
    ("stage", "state"),
    [(1, 2_000 + 4_000 + 3_000), (2, 2_000 + 1_000 + 3_000), (3, 500 + 1_000 + 3_000)],
)
def test_memory_by_stage(stage: int, state: int) -> None:
    zero = FILES[f"zero{stage}"]
    memory = memory_bytes(TOY, zero, gpus=4, micro_batch=3)
    assert memory["weights"] + memory["gradients"] + memory["optimizer"] == state
    assert memory["masks"] == 3 * 600
    assert memory["teacher"] == 2_000
    loss = (2 * 2 + 5 * 4) * 24 * 30 + (4 + 2) * 30 * 10  # logits, gradient of the projection
    assert memory["activations"] == 24 * 2 * (180 + 160) + loss


def test_gradient_checkpointing_keeps_one_layer_and_inputs_and_computes_again() -> None:
    again = replace(TOY, again=True)
    one, two = (
        memory_bytes(shape, FILES["zero1"], gpus=4, micro_batch=3)["activations"]
        for shape in (TOY, again)
    )
    assert one - two == 24 * (180 + 160 - 20)
    plain, more = (
        shape_of(bert(*words)) for words in ([], ["training.gradient_checkpointing=true"])
    )
    assert 1.2 < operations(more, 256) / operations(plain, 256) < 4 / 3


def test_a_score_by_curvature_needs_a_value_a_weight_and_a_copy_for_a_while() -> None:
    toy = replace(TOY, kept=600, measured=384, measuring=2 * 600)
    for stage, state in ((0, 2_400), (1, 600)):
        memory = memory_bytes(toy, FILES[f"zero{stage}"], gpus=4, micro_batch=3)
        assert memory["scores"] == state + 4 * (1_000 + 2 * 600)
    assert memory_bytes(TOY, FILES["zero1"], gpus=4, micro_batch=3)["scores"] == 0
    speeds = {"memory_gb": 80, "bandwidth_gbps": 400, "teraflops": 50}
    recipe = bert("pruning.pattern.score=curvature")
    found, shape = plan(recipe, gpus=8, **speeds), shape_of(recipe)
    assert (shape.kept, shape.measured, shape.measuring) == (shape.pruned, 384, 2 * shape.pruned)
    tokens = recipe.corpus.sequence_tokens
    per_sequence = 6 * tokens * (shape.parameters - 30_522 * 768 + 2 * 12 * 768 * tokens)
    assert found.measured_seconds == pytest.approx(384 * per_sequence / 50e12)
    said = [part for part in found.parts() if isinstance(part, str)]
    assert said[-1].startswith("scores are measured on 384 sequences, about ")
    assert said[-1].endswith(" at a time, 1 time(s)")
    assert plan(bert(), gpus=8, **speeds).measured_sequences == 0


def test_second_order_needs_its_blocks_and_gradients_at_each_update() -> None:
    recipe = PretrainRecipe.read(RECIPE.with_name("bert-base-obert.toml"), BERT)
    shape = shape_of(recipe)
    assert shape.pruned == 12 * 12 * 768**2 and shape.measuring == (50 + 16) * shape.pruned
    zero1 = memory_bytes(shape, FILES["zero1"], gpus=1, micro_batch=1)
    assert zero1["scores"] == 4 * (shape.pruned + shape.parameters + 66 * shape.pruned)
    speeds = {"gpus": 1, "memory_gb": 80, "bandwidth_gbps": 400, "teraflops": 100}
    found = plan(recipe, **speeds)
    assert (found.measured_sequences, found.measured_times) == (16_384, 12)
    often = plan(
        bert("pruning.pattern.score={kind='curvature',every=20}", "pruning.schedule.every=500"),
        **speeds,
    )
    assert often.measured_times == 9  # of 161 updates, at 0, 20, ... 160
    once = plan(bert("pruning.pattern.score=curvature"), **speeds)
    assert found.days is not None and often.days is not None and once.days is not None
    assert often.days - once.days == pytest.approx(8 * often.measured_seconds / 86400)


def test_offloading_takes_the_optimizer_away() -> None:
    zero = FILES["zero2-offload"]
    assert memory_bytes(TOY, zero, gpus=4, micro_batch=3)["optimizer"] == 0


@pytest.mark.parametrize("name", FILES)
def test_the_planned_files_are_those_of_launch(name: str) -> None:
    found = DeepSpeedFile.load(str(ROOT / f"launch/{name}.json")).zero_optimization
    assert found.stage == FILES[name].stage
    assert bool(found.offload_optimizer) == bool(FILES[name].offload_optimizer)


def test_a_file_that_the_recipe_names_is_planned_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "zero2.json"  # whatever its name says
    mine.write_text('{"zero_optimization": {"stage": 3}}')
    size = ["--gpus", "8", "--memory-gb", "80", "--bandwidth-gbps", "400"]
    assert cli.run(["plan", str(RECIPE), *size, *BERT, f"launch.deepspeed={mine}"]) == 0
    assert f"use: launch.deepspeed={mine} launch.micro_batch=32" in capsys.readouterr().out
    found, every = (
        plan(bert(*more), gpus=8, memory_gb=80, bandwidth_gbps=400, teraflops=150)
        for more in ([f"launch.deepspeed={mine}"], [])
    )
    (row,) = found.configurations
    assert row.wire_gb_per_step == every.configurations[-1].wire_gb_per_step


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(0, 2 * 3_000), (1, 3_000 + 1_500), (2, 6_000 + 1_500), (3, 2 * (3_000 + 3_000))],
)
def test_bytes_on_the_wire_by_stage(stage: int, expected: int) -> None:
    assert wire_bytes(TOY, stage=stage, gpus=4, accumulation=2) == expected
    assert wire_bytes(TOY, stage=stage, gpus=1, accumulation=2) == 0


def test_a_mask_update_sums_histograms_and_masks() -> None:
    assert mask_update_bytes(TOY, stage=2, gpus=2) == 2 * 786_432 + 600
    assert mask_update_bytes(TOY, stage=0, gpus=2) == 0


def test_operations_of_a_step() -> None:
    products = 1_000 - 300 + 150 + 2 * 2 * 10 * 8
    assert operations(TOY, batch=5) == 5 * 8 * (6 + 2) * products


def test_bert_base_has_the_size_of_its_model_card() -> None:
    result = plan(bert(), gpus=8, memory_gb=80, bandwidth_gbps=400, teraflops=150)
    assert result.model["parameters"] == pytest.approx(110e6, rel=0.01)
    assert result.model["pruned"] == 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert result.model["teacher"] == result.model["parameters"]
    for row in result.configurations:
        assert row.micro_batch is not None and row.micro_batch * row.accumulation * 8 == 256
        assert row.total_memory_gb <= 72
    assert result.recommended == "zero1"


def test_less_memory_means_smaller_passes_and_then_another_stage() -> None:
    def rows(memory_gb: float) -> dict[str, Any]:
        result = plan(bert(), gpus=8, memory_gb=memory_gb, bandwidth_gbps=400, teraflops=150)
        return {row.configuration: row.micro_batch for row in result.configurations}

    assert rows(6)["zero2"] < rows(80)["zero2"]
    assert rows(1.8)["zero1"] is None and rows(1.8)["zero2"] is not None
    assert set(rows(0.5).values()) == {None}


def test_the_table_of_launch_is_what_the_formulas_give() -> None:
    text = (ROOT / "launch/README.md").read_text()
    table = text.partition("<!-- scale -->")[2].partition("<!-- /scale -->")[0]
    shown = [line for line in table.splitlines() if line.startswith("| BERT")]
    large = (
        'model.config={model_type="bert",hidden_size=1024,num_hidden_layers=24,'
        "num_attention_heads=16,intermediate_size=4096}"
    )
    made = []
    for name, config in (("base", BERT[1]), ("large", large)):
        for gpus in (1, 8, 64, 512):
            batch = ["training.batch=4096"] if gpus == 512 else []
            recipe = PretrainRecipe.read(
                ROOT / f"recipes/upstream/bert-{name}-90.toml", ["model.init=", config, *batch]
            )
            result = plan(recipe, gpus=gpus, memory_gb=80, bandwidth_gbps=400, teraflops=150)
            rows = {row.configuration: row for row in result.configurations}

            def cells(key: str, style: str, *more: str, rows: dict[str, Any] = rows) -> str:
                names = ("zero1", "zero2", "zero3", *more)
                return " / ".join(format(getattr(rows[name], key), style) for name in names)

            first = rows["zero1"]
            made.append(
                f"| BERT-{name} | {gpus} | {result.batch} "
                f"| {first.micro_batch} x {first.accumulation} "
                f"| {cells('total_memory_gb', '.1f', 'zero2-offload')} "
                f"| {cells('wire_gb_per_step', '.2f')} "
                f"| {first.mask_updates_share_of_wire:.2%} | {cells('efficiency', '.0%')} |"
            )
    assert shown == made


def test_more_gpus_than_the_batch_can_feed_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"--gpus 512: must divide training\.batch = 256"):
        plan(bert(), gpus=512, memory_gb=80, bandwidth_gbps=400, teraflops=150)


def test_the_command_recommends_overrides_that_pretrain_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    size = ["--gpus", "64", "--memory-gb", "80", "--bandwidth-gbps", "100"]
    assert cli.run(["plan", str(RECIPE), *size, *BERT]) == 0
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("use: "))
    chosen = PretrainRecipe.read(RECIPE, line.removeprefix("use: ").split())
    assert chosen.launch.micro_batch == 4
    assert cli.run(["plan", str(RECIPE), *size, "--json", *BERT]) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == 64


@pytest.mark.parametrize(
    "wrong", ["--memory-gb=inf", "--bandwidth-gbps=nan", "--teraflops=inf", "--teraflops=1e308"]
)
def test_what_no_machine_has_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    machine = ["--gpus=1", "--memory-gb=80", "--bandwidth-gbps=400"]
    assert cli.run(["plan", str(RECIPE), *machine, wrong, *BERT]) == 2
    assert wrong.partition("=")[0] in capsys.readouterr().err


def test_a_rule_that_takes_for_ever_is_refused_in_seconds() -> None:
    slow = r"^(.*?.*?.*?.*?.*?.*?.*?.*?.*?.*?.*?)*?(?<!e)$"
    with pytest.raises(RecipeError, match=r"pruning\.include = .* takes more than 0\.2 s"):
        shape_of(bert(f"pruning.pattern.include=['{slow}']"))


def test_a_model_of_a_million_layers_is_refused_before_it_is_made() -> None:
    with pytest.raises(RecipeError, match="num_hidden_layers = 1000000: must be at most 1,000"):
        bert("model.config.num_hidden_layers=1000000")
