"""Keeping the best model, stopping early, sweeping, several seeds."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AfterStep, break_off, finetune_recipe
from safetensors.torch import load_file

from opfa.commands.app import run as command
from opfa.downstream import finetune as module
from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe, Sweep
from opfa.downstream.results import Rate
from opfa.downstream.selection import Best
from opfa.downstream.sweep import sweep, table
from opfa.errors import ModelError, RecipeError, RunError
from opfa.report import pictures
from opfa.storage import seal
from opfa.training.checkpoint import model_digest
from opfa.training.distributed import Stopped
from opfa.training.metrics import read


def rows(*values: float, every: int = 10) -> list[dict[str, Any]]:
    return [
        {"step": (i + 1) * every, "eval": True, "accuracy": value} for i, value in enumerate(values)
    ]


def test_the_best_is_the_first_of_equals() -> None:
    best = Best("accuracy")
    assert [best.see(row) for row in rows(0.5, 0.7, 0.7, 0.6)] == [True, True, False, False]
    assert (best.step, best.value) == (20, 0.7)


def test_early_evaluations_do_not_count() -> None:
    best = Best("accuracy", first_step=20)
    assert [best.see(row) for row in rows(0.9, 0.5, 0.6)] == [False, True, True]


def test_patience_counts_evaluations_without_a_new_best() -> None:
    best = Best("accuracy", patience=2)
    stops = []
    for row in rows(0.5, 0.4, 0.6, 0.6, 0.5):
        best.see(row)
        stops.append(best.is_time_to_stop)
    assert stops == [False, False, False, False, True]


def test_without_patience_it_is_never_time_to_stop() -> None:
    best = Best("accuracy")
    best.replay(rows(*([0.5] * 50)))
    assert not best.is_time_to_stop


def test_replay_is_as_if_it_had_seen_all() -> None:
    seen, replayed = Best("accuracy", patience=3), Best("accuracy", patience=3)
    history = rows(0.5, 0.7, 0.6, 0.6)
    for row in history:
        seen.see(row)
    replayed.replay([{"step": 5, "loss": 1.0}, *history])
    assert vars(seen) == vars(replayed)


# in a run: evaluations are replaced by a script, so that the best is known


def scripted(monkeypatch: pytest.MonkeyPatch, *values: float) -> list[torch.Tensor]:
    """Make evaluations return these accuracies; the weights at each one."""
    weights: list[torch.Tensor] = []

    def evaluate(model: Any, *_: Any, **__: Any) -> dict[str, float]:
        weights.append(model.classifier.weight.detach().cpu().clone())
        return {"accuracy": values[min(len(weights), len(values)) - 1]}

    monkeypatch.setattr(module, "evaluate", evaluate)
    return weights


def selecting(sparse: Path, examples: Path, **values: Any) -> FinetuneRecipe:
    return finetune_recipe(
        sparse, examples, selection={"every_steps": 2, **values}, logging={"checkpoint_steps": 3}
    )


def test_the_best_model_is_the_finished_one(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = scripted(monkeypatch, 0.5, 0.8, 0.6, 0.8, 0.7)  # steps 2, 4, 6, 8, 10 (the end)
    results = finetune(selecting(sparse, examples), tmp_path / "run")
    assert results.selected == {"step": 4, "accuracy": 0.8}
    kept = load_file(tmp_path / "run/model/model.safetensors")["classifier.weight"]
    assert torch.equal(kept, weights[1]) and not torch.equal(kept, weights[4])
    assert torch.equal(weights[5], weights[1])  # what was measured at the end is what was kept


def test_a_run_stops_when_patience_is_over(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 0.5, 0.4, 0.3, 0.9)
    finetune(selecting(sparse, examples, patience=2), tmp_path / "run")
    steps = [
        json.loads(x)["step"] for x in (tmp_path / "run/metrics.jsonl").read_text().split("\n") if x
    ]
    assert max(steps) == 6
    assert json.loads((tmp_path / "run/done.json").read_text())["step"] == 6


@pytest.mark.parametrize(
    ("patience", "stop_at"), [(None, 3), (None, 5), (None, 7), (None, 9), (2, 3), (2, 5), (2, 7)]
)
def test_a_resume_keeps_the_same_best_model(
    sparse: Path,
    examples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
    patience: int | None,
) -> None:
    # The same weights get the same score: the first run's, in the order in which they came.
    script = iter((0.5, 0.8, 0.6, 0.9, 0.7))
    scores: dict[bytes, float] = {}

    def evaluate(model: Any, *_: Any, **__: Any) -> dict[str, float]:
        weights = model.classifier.weight.detach().cpu().numpy().tobytes()
        if weights not in scores:
            scores[weights] = next(script)
        return {"accuracy": scores[weights]}

    monkeypatch.setattr(module, "evaluate", evaluate)
    recipe = selecting(sparse, examples, patience=patience)
    unbroken = finetune(recipe, tmp_path / "unbroken")

    break_off(stop_at, finetune, recipe, tmp_path / "broken")
    assert finetune(recipe, tmp_path / "broken", resume=True).values() == unbroken.values()
    both = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("unbroken", "broken")]
    assert both[0] == both[1]
    digests = [model_digest(tmp_path / name / "model") for name in ("unbroken", "broken")]
    assert digests[0] == digests[1]


def test_a_damaged_best_model_is_not_finished(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 0.5, 0.8, 0.6, 0.7, 0.7)
    path = tmp_path / "run/checkpoints/step-00000004/state-00000.safetensors"

    def damage() -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    with pytest.raises(RunError, match="step-00000004: is the best model and can't be used"):
        finetune(selecting(sparse, examples), tmp_path / "run", concerns=[AfterStep(9, damage)])


def test_a_run_that_was_killed_after_its_last_evaluation_logs_it_once(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = selecting(sparse, examples)

    class KilledError(Exception):
        pass

    def killed(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "finetuning_pictures", killed)
        with pytest.raises(KilledError):
            finetune(recipe, tmp_path / "run")
    finetune(recipe, tmp_path / "run", resume=True)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert sum("final" in line for line in lines) == 1
    assert len(lines) == len(set(lines))


def test_a_baseline_is_chosen_among_pruned_models_only(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 0.9, 0.8, 0.5, 0.6)
    recipe = finetune_recipe(
        sparse,
        examples,
        model={"zeros": "free"},
        pruning={"schedule": {"start": 0, "end": 6, "every": 2, "target": 0.95}},
        selection={"every_steps": 2},
    )
    results = finetune(recipe, tmp_path / "run")
    assert results.selected and results.selected["step"] == 8  # 6 is the first with the final mask
    assert results.sparsity == pytest.approx(0.95, abs=2e-3)


def test_an_eight_bit_model_is_chosen_among_eight_bit_models_only(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        scripted(patch, 0.9, 0.9, 0.5, 0.4)
        recipe = finetune_recipe(
            sparse, examples, quantization={"start": 0.5}, selection={"every_steps": 2}
        )
        results = finetune(recipe, tmp_path / "run")
    assert (
        results.selected and results.selected["step"] == 6
    )  # 5 of 10 steps only observe; 4 is one of them
    again = evaluate_model(str(tmp_path / "run/model"), recipe)
    assert again.quantized


def test_the_validation_split_is_looked_at_once_with_a_holdout(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    evaluate = module.evaluate

    def counting(model: Any, task: Any, split: Any, **options: Any) -> dict[str, float]:
        sizes.append(len(split.examples.labels))
        return evaluate(model, task, split, **options)

    monkeypatch.setattr(module, "evaluate", counting)
    finetune(selecting(sparse, examples, holdout=0.2), tmp_path / "run")
    validation = len((examples / "validation.jsonl").read_text().splitlines())
    assert sizes == [16] * 4 + [validation]  # steps 2, 4, 6, 8 (the end)
    rows = read(tmp_path / "run")
    assert [row["split"] for row in rows if row.get("eval")] == ["held_out"] * 4 + ["validation"]
    assert {row["split"] for row in rows if "loss" in row} == {"training"}


# sweeps and seeds


def test_a_sweep_compares_means_over_seeds(
    sparse: Path, examples: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = finetune_recipe(sparse, examples, sweep={"learning_rate": [1e-6, 2e-3]}, seed=7)
    with caplog.at_level("INFO", "opfa"):
        result = sweep(recipe, tmp_path / "out", num_seeds=2)
    assert "run 3 of 4: learning_rate-0.002/seed-7" in caplog.messages
    assert (
        sum(line.startswith("run 3 of 4: finished, validation:  ") for line in caplog.messages) == 1
    )
    names = [[run.run for run in row.runs] for row in result.rows]
    assert names == [
        ["learning_rate-1e-06/seed-7", "learning_rate-1e-06/seed-8"],
        ["learning_rate-0.002/seed-7", "learning_rate-0.002/seed-8"],
    ]
    for row in result.rows:
        values = [run.metrics["accuracy"] for run in row.runs]
        assert row.mean["accuracy"] == pytest.approx(sum(values) / 2)
        deviation = abs(values[0] - values[1]) / 2**0.5
        assert row.std["accuracy"] == pytest.approx(deviation)
    best = max(result.rows, key=lambda row: row.mean["accuracy"])
    assert result.learning_rate == best.learning_rate
    assert result.metrics == best.mean
    assert (tmp_path / "out" / result.best_run / "model/config.json").exists()
    assert json.loads((tmp_path / "out/results.json").read_text()) == result.values()
    seed = result.best_run.rpartition("-")[2]
    assert (tmp_path / "out/table.md").read_text().endswith(f"/seed-{seed}\n")
    assert (tmp_path / "out/report/sweep.png").exists()
    page = tmp_path / "out/report/index.html"
    links = re.findall(r'href="(\.\./[^"]+)"', page.read_text())
    assert len(links) == 4 and all((page.parent / link).is_file() for link in links)
    assert not list((tmp_path / "out").rglob("checkpoints"))


def test_a_comparison_is_sealed_as_it_is_written_without_secrets(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    secret = "hf_" + "abcdefgh" * 4
    result = sweep(finetune_recipe(sparse, examples, name=f"with {secret}"), tmp_path / "out")
    assert seal.read_json(tmp_path / "out/results.json") == result.values()
    assert result.task == "with hf_***"


def test_a_run_of_a_sweep_is_the_run_of_its_recipe(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(sparse, examples, seed=3)
    sweep(recipe, tmp_path / "out", num_seeds=2)
    alone = finetune(recipe.model_copy(update={"seed": 4}), tmp_path / "alone")
    among = json.loads((tmp_path / "out/seed-4/results.json").read_text())
    assert among == alone.values()


def test_rates_that_look_alike_are_different_runs(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(sparse, examples, sweep={"learning_rate": [1e-3, 1.0000001e-3]})
    rows = sweep(recipe, tmp_path / "out").rows
    hashes = [row.runs[0].recipe_sha256 for row in rows]
    assert hashes[0] != hashes[1]


def test_a_rate_that_diverges_is_told_and_is_not_the_best(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(sparse, examples, sweep={"learning_rate": [1e-3, 1e30]})
    result = sweep(recipe, tmp_path / "out")
    assert [row.num_diverged for row in result.rows] == [0, 1]
    assert result.learning_rate == 1e-3
    assert "| 1e+30 | 0, 1 diverged |  |" in (tmp_path / "out/table.md").read_text()
    recipe = finetune_recipe(sparse, examples, sweep={"learning_rate": [1e30]})
    with pytest.raises(RunError, match="every run diverged"):
        sweep(recipe, tmp_path / "all")


def test_a_sweep_resumes_where_it_was_and_may_get_more_seeds(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(sparse, examples)
    sweep(recipe, tmp_path / "out", num_seeds=1)
    before = (tmp_path / "out/seed-42/done.json").stat().st_mtime_ns
    assert len(sweep(recipe, tmp_path / "out", num_seeds=2, resume=True).rows[0].runs) == 2
    assert (tmp_path / "out/seed-42/done.json").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="holds another run"):
        sweep(recipe, tmp_path / "out", num_seeds=2)
    other = finetune_recipe(sparse, examples, training={"batch": 4})
    with pytest.raises(RunError, match="training.batch was 8 and is 4"):
        sweep(other, tmp_path / "out", num_seeds=2, resume=True)


def test_a_sweep_may_get_more_learning_rates_and_says_when_the_best_is_at_an_edge(
    sparse: Path, examples: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = finetune_recipe(sparse, examples, sweep={"learning_rate": [1e-3, 2e-3]})
    sweep(first, tmp_path / "out")
    done = tmp_path / "out/learning_rate-0.001/seed-42/done.json"
    before = done.stat().st_mtime_ns
    more = finetune_recipe(sparse, examples, sweep={"learning_rate": [1e-30, 1e-3, 2e-3, 4e-3]})
    assert "at an edge" in caplog.text  # one of two is
    caplog.clear()
    result = sweep(more, tmp_path / "out", resume=True)
    assert ("at an edge" in caplog.text) == (result.learning_rate in (1e-30, 4e-3))
    assert [row.learning_rate for row in result.rows] == [1e-30, 1e-3, 2e-3, 4e-3]
    assert done.stat().st_mtime_ns == before
    assert "1e-30" in (tmp_path / "out/recipe.toml").read_text()
    with pytest.raises(RunError, match="sweep was"):
        sweep(finetune_recipe(sparse, examples), tmp_path / "out", resume=True)


def test_the_command_makes_a_directory_for_one_seed_too(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.toml").write_text(finetune_recipe(sparse, examples).to_toml())
    words = ["finetune", str(tmp_path / "r.toml"), "--output", str(tmp_path / "out"), "--seeds"]
    assert command([*words, "1"]) == 0
    assert (tmp_path / "out/seed-42/done.json").exists()
    assert command([*words, "2", "--resume"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("seed-*")) == ["seed-42", "seed-43"]


def test_several_runs_are_not_resumed_as_one_nor_one_as_several(
    sparse: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.toml").write_text(finetune_recipe(sparse, examples).to_toml())
    words = ["finetune", str(tmp_path / "r.toml"), "--output"]
    one, several = str(tmp_path / "one"), str(tmp_path / "several")
    assert command([*words, several, "--seeds", "2"]) == 0
    assert command([*words, one]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert command([*words, several, "--resume"]) == 2
    message = "several: --resume without --seeds: it holds several runs, one for each seed"
    assert message in capsys.readouterr().err
    assert command([*words, one, "--resume", "--seeds", "2"]) == 2
    assert "one: --resume with --seeds: it holds a single run" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert command([*words, one, "--resume"]) == 0


def test_a_sweep_is_not_resumed_with_fewer_seeds(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    for name, rates in (("seeds", None), ("rates", {"learning_rate": [1e-3]})):
        recipe, out = finetune_recipe(sparse, examples, sweep=rates), tmp_path / name
        before = sweep(recipe, out, num_seeds=2)
        with pytest.raises(RunError, match="--resume with 1 seed.*holds seed-43 too; .*--seeds"):
            sweep(recipe, out, resume=True)
        assert json.loads((out / "results.json").read_text()) == before.values()


def test_several_runs_that_are_told_to_stop_save_and_go_on_later(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = finetune_recipe(sparse, examples)
    unbroken = sweep(recipe, tmp_path / "unbroken", num_seeds=2)
    out = tmp_path / "out"

    def stop() -> None:
        if (out / "seed-43").exists():
            (out / "stop").touch()

    with monkeypatch.context() as patch:
        stopping = functools.partial(finetune, concerns=[AfterStep(3, stop)])
        patch.setattr("opfa.downstream.sweep.finetune", stopping)
        with pytest.raises(Stopped, match="seed-43: stopped at step 3, which is saved"):
            sweep(recipe, out, num_seeds=2)
    assert (out / "stopped").exists() and not (out / "stop").exists()
    assert sweep(recipe, out, num_seeds=2, resume=True).values() == unbroken.values()
    assert not (out / "stopped").exists()


def test_the_command_runs_several_seeds(
    sparse: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.toml").write_text(finetune_recipe(sparse, examples).to_toml())
    out = str(tmp_path / "out")
    assert (
        command(["finetune", str(tmp_path / "r.toml"), "--output", out, "--seeds", "2", "--json"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert [run["seed"] for run in result["rows"][0]["runs"]] == [42, 43]
    assert set(result["std"]) == {"accuracy"}


def test_the_table_says_mean_and_deviation() -> None:
    values: dict[str, Any] = {
        "num_diverged": 0,
        "learning_rate": 3e-5,
        "score": 0.5,
        "runs": [1, 2],
    }
    row = Rate.model_construct(**values, mean={"accuracy": 0.5}, std={"accuracy": 0.01})
    squad = Rate.model_construct(**values, mean={"squad_f1": 81.234}, std={"squad_f1": None})
    assert table([row]) == (
        "| learning rate | seeds | accuracy |\n|---:|---:|---:|\n| 3e-05 | 2 | 0.5000 ± 0.0100 |\n"
    )
    assert table([squad]).endswith("| 3e-05 | 2 | 81.23 |\n")


@pytest.mark.parametrize(
    ("rates", "message"),
    [([], "sweep.learning_rate: .*at least 1"), ([1e-5, 1e-5], "stands twice"), ([0.0], "greater")],
)
def test_a_wrong_sweep_is_refused(
    sparse: Path, examples: Path, rates: list[float], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        finetune_recipe(sparse, examples, sweep={"learning_rate": rates})


def test_one_run_does_not_ignore_a_sweep(sparse: Path, examples: Path, tmp_path: Path) -> None:
    recipe = finetune_recipe(sparse, examples)
    recipe = recipe.model_copy(update={"sweep": Sweep(learning_rate=(1e-3,))})
    with pytest.raises(RecipeError, match="sweep: several runs"):
        finetune(recipe, tmp_path / "run")


def test_a_sweep_that_is_refused_before_its_first_run_leaves_nothing(
    examples: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(tmp_path / "nowhere", examples, sweep={"learning_rate": [1e-3]})
    with pytest.raises(ModelError, match="no such directory"):
        sweep(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
