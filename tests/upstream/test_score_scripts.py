"""The scripts that compare scores and tell what they cost, on a tiny encoder."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_BERT, sentences, write_records
from transformers import AutoModel, BertConfig, BertModel, BertTokenizer

import opfa
from opfa.upstream.recipe import PretrainRecipe

RECIPES = Path(__file__).parents[2] / "recipes/minilm"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[Any, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        yield importlib.import_module("scores"), importlib.import_module("score_costs")


@pytest.fixture(scope="module")
def place(tokenizer: BertTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with `model` and `prepared`, as the recipes want it, and in it this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("place"))
        lines = list(sentences())
        rows = [{"text": " ".join(lines[start : start + 30])} for start in range(0, 300, 3)]
        write_records(Path("data/pretrain/train-0.jsonl.gz"), rows)
        torch.manual_seed(0)
        config = {**TINY_BERT, "max_position_embeddings": 128}
        BertModel(BertConfig(vocab_size=len(tokenizer), **config)).save_pretrained("model")
        tokenizer.save_pretrained("model")
        opfa.prepare(RECIPES / "minilm-sparse-90.toml", "prepared")
        yield Path.cwd()


def row(score: str, target: float, steps: int, seed: int, final: float, mean: float) -> Any:
    return {
        **{"score": score, "target": target, "steps": steps, "seed": seed},
        **{"final_distance": final, "mean_distance": mean},
    }


def test_the_table_has_a_line_for_each_score_and_means_over_seeds(scripts: Any) -> None:
    rows = [
        row("curvature", 0.9, 480, 42, 0.02, 0.04),
        row("magnitude", 0.97, 480, 42, 0.09, 0.1),
        row("magnitude", 0.9, 480, 42, 0.03, 0.05),
        row("magnitude", 0.9, 480, 43, 0.05, 0.07),
        row("magnitude", 0.9, 4800, 42, 0.01, 0.02),
    ]
    assert scripts[0].table(rows).splitlines() == [
        "| score | zeros | 480 steps, final / mean | 4,800 steps, final / mean |",
        "| --- | ---: | ---: | ---: |",
        "| magnitude | 90% | 0.0400 / 0.0600 ± 0.0141 | 0.0100 / 0.0200, 1 seed |",
        "| curvature | 90% | 0.0200 / 0.0400, 1 seed |  |",
        "| magnitude | 97% | 0.0900 / 0.1000, 1 seed |  |",
    ]


@pytest.mark.parametrize("steps", [2, 12, 480, 4800])
def test_each_row_is_a_recipe_whose_moments_keep_their_shares(scripts: Any, steps: int) -> None:
    for score in scripts[0].scores(steps):
        name = scripts[0].OWN_RECIPES.get(score, "minilm-sparse-90.toml")
        asked = scripts[0].changes(score, steps, 0.9)
        overrides = [f"{key}={opfa_value(value)}" for key, value in asked.items()]
        found = PretrainRecipe.read(RECIPES / name, [f"training.steps={steps}", *overrides])
        ramp = found.ramp()
        assert ramp is not None and ramp.last_update <= steps
        whole = PretrainRecipe.read(RECIPES / name)
        if score in scripts[0].FIXED:
            assert (ramp.last_update, ramp.target) == (0, 0.9)
        elif steps == 4800:
            assert ramp == whole.ramp()
        if steps == 4800:
            assert found.training == whole.training


def opfa_value(value: Any) -> str:
    """As an override has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def test_a_fixed_student_keeps_the_zeros_that_admm_chose(
    scripts: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts[0], "ONE_SHOT_SEQUENCES", 16)
    command = ["prepared", "fixed", "fixed.json", "--steps", "2", "--targets", "0.9"]
    scripts[0].main([*command, "--seeds", "42", "--scores", "ADMM, fixed"])
    masks = {opfa.inspect(f"fixed/{n}")["fingerprint"] for n in ("ADMM-0.9", "ADMM-fixed-0.9-2-42")}
    assert len(masks) == 1


def test_students_are_trained_once_and_measured_on_clean_text(
    scripts: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {"pruning.pattern.score": {"kind": "curvature", "sequences": 4, "every": 1}}
    monkeypatch.setattr(scripts[0], "scores", lambda _: {"magnitude": {}, "curvature": again})
    command = ["prepared", "runs", "scores.json", "--steps", "2", "--targets", "0.9"]
    for score in ("magnitude", "curvature"):
        scripts[0].main([*command, "--seeds", "42", "--scores", score])
    rows = json.loads(Path("scores.json").read_text())
    assert [each["score"] for each in rows] == ["magnitude", "curvature"]
    assert [
        opfa.inspect(run)["chosen_by"][0]["kind"] for run in sorted(Path("runs").iterdir())
    ] == [
        "curvature",
        "magnitude",
    ]
    for each in rows:
        assert each["sparsity"] == pytest.approx(0.9, abs=1e-3)
        assert min(each["final_distance"], each["mean_distance"]) > 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")}
    Path("scores.json").write_text(json.dumps(rows[:1]))  # stopped before the second was written
    scripts[0].main([*command, "--seeds", "42", "--scores", "magnitude", "curvature"])
    again_rows = json.loads(Path("scores.json").read_text())
    kept = [{k: v for k, v in each.items() if k != "seconds"} for each in rows]
    assert [{k: v for k, v in each.items() if k != "seconds"} for each in again_rows] == kept
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")}

    found = scripts[0].measured(Path("model"), Path("model"), Path("prepared"))
    assert found == {"final_distance": 0.0, "mean_distance": 0.0}
    _check_by_hand(place, rows[0])


def _check_by_hand(place: Path, found: Any) -> None:
    """One sequence at a time, so nothing is padded."""
    from datasets import load_from_disk

    run = place / "runs/magnitude-0.9-2-42/model"
    ours, theirs = (AutoModel.from_pretrained(each).eval() for each in (run, place / "model"))
    sums, num = torch.zeros(3, dtype=torch.float64), 0
    for ids in load_from_disk(str(place / "prepared/validation"))["input_ids"]:
        given = {"input_ids": torch.tensor([ids]), "output_hidden_states": True}
        with torch.no_grad():
            pairs = zip(ours(**given).hidden_states, theirs(**given).hidden_states, strict=True)
        sums += torch.tensor([float((a - b).double().square().mean()) for a, b in pairs]) * len(ids)
        num += len(ids)
    assert found["final_distance"] == pytest.approx(float(sums[-1]) / num, rel=1e-4)
    assert found["mean_distance"] == pytest.approx(float(sums.mean()) / num, rel=1e-4)


@pytest.mark.parametrize("name", ["magnitude", "activation", "curvature", "fisher", "movement"])
def test_what_a_score_costs_is_measured(
    scripts: Any, name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (place / "model").is_dir()
    scripts[1].one(name, "model", "data/pretrain/train-0.jsonl.gz", 8)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["score"] == name and found["seconds"] > 0 and found["bytes"] >= 0
    assert found["is_learnt"] == (name == "movement")
    assert found["sequences"] == (8 if name in ("activation", "curvature", "fisher") else 0)


def test_costs_of_bert_base_are_those_of_the_plan(scripts: Any) -> None:
    costs = scripts[1]
    pruned = 12 * 12 * 768**2
    base = {name: costs.planned(name, "upstream/bert-base-90.toml", *costs.BERT)
            for name in costs.SCORES}  # fmt: skip
    assert base["magnitude"] == (0, 0)
    assert base["movement"] == (3 * 4 * pruned, 0)
    assert base["fisher"][0] - base["curvature"][0] == 4 * (50 + 16 - 2) * pruned
    assert base["curvature"][1] == pytest.approx(3 * base["activation"][1])  # 384 and 128 sequences


def test_the_table_of_costs_has_a_line_for_each_score(scripts: Any) -> None:
    found = {
        "processor": "Some CPU",
        "threads": 2,
        "rows": [
            {"score": "curvature", "sequences": 384, "is_learnt": False, "seconds": 39.26,
             "bytes": 85_400_000, "planned_bytes": 160_000_000, "base_seconds": 5.44,
             "base_bytes": 1_500_000_000},
            {"score": "movement", "sequences": 0, "is_learnt": True, "seconds": 0.0123,
             "bytes": 1e6, "planned_bytes": 2e6, "base_seconds": 0.0, "base_bytes": 3e6},
        ],
    }  # fmt: skip
    lines = scripts[1].table(found).splitlines()
    assert lines[2:] == [
        "| `curvature` | 384 | 39.3 | 85 | 160 | 5.4 | 1,500 |",
        "| `movement`, each step |  | 0.0123 | 1 | 2 |  | 3 |",
        "",
        "Measured with 2 thread(s) of Some CPU.",
    ]
