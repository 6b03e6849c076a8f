"""`launch/reproduce.sh`: the whole experiment on a tiny model, its recipes made short."""

import gzip
import importlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences

from opfa import cli
from opfa.models import load_pretraining_model, load_tokenizer, write_model
from opfa.recipe import STOPPED

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes/minilm"
SHORTER = {
    "sequence_tokens = 128": "sequence_tokens = 24",
    "validation = 0.01": "validation = 0.1",
    "steps = 2_000": "steps = 6",
    "warmup_steps = 100": "warmup_steps = 1",
    "warmup_steps = 40": "warmup_steps = 1",
    "end = 1_000": "end = 3",
    "hold_until = 1_600": "hold_until = 4",
    "every = 20": "every = 1",
    "batch = 32": "batch = 8",
}
SHORT = ("training.steps=3", "pruning.schedule.end=1", "pruning.schedule.hold_until=2")


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def output(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as launch/reproduce.sh makes it."""
    directory = tmp_path_factory.mktemp("reproduce")
    model = load_pretraining_model(str(sparse), "mlm")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    write_model(model, load_tokenizer(str(sparse)), directory / "model")
    texts = list(sentences())
    documents = [{"text": " ".join(texts[i : i + 14])} for i in range(0, 280, 14)]
    write(directory / "data/pretrain/train-0.jsonl.gz", documents)
    rows = [{"sentence": text, "label": int("cat" in text)} for text in texts]
    write(directory / "data/sst2/train.jsonl.gz", rows[:80])
    write(directory / "data/sst2/validation.jsonl.gz", rows[80:120])
    shutil.copytree(RECIPES, directory / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    for recipe in (directory / "recipes").glob("*.toml"):
        text = recipe.read_text()
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        recipe.write_text(text)
    return directory


@pytest.fixture(scope="module")
def reproduce(output: Path) -> Any:
    """The program, run in `output` and in this process; `commands` are those that it ran."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        patch.chdir(output)
        program: Any = importlib.import_module("reproduce")
        program.commands = []

        def execute(arguments: list[str]) -> int:
            program.commands.append(arguments)
            return cli.run(arguments)

        patch.setattr(program, "execute", execute)
        patch.setattr(program, "SHORT", SHORT)
        patch.setattr(program, "RATES", "sweep.learning_rate=[1e-4, 1e-3]")
        program.main(["students", "sst2", "ablations"])
        yield program


@pytest.fixture(scope="module")
def table(reproduce: Any, output: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((output / "table.json").read_text())


def test_every_method_is_measured_at_its_sparsity(table: dict[str, Any], output: Path) -> None:
    found = {(row["method"], row["percent"]): row for row in table["rows"]}
    methods = ("one-shot", "gradual", "prune-once", "prune-once-8bit")
    assert list(found) == [("dense", 0), *((m, p) for m in methods for p in (85, 90))]
    for (method, percent), row in found.items():
        results = json.loads((output / row["run"] / "results.json").read_text())
        assert results["sparsity"] == pytest.approx(percent / 100, abs=2e-3)
        assert results["quantized"] == method.endswith("8bit")
        assert row["mean"] == results["metrics"]["accuracy"]
        assert row["recovery"] == row["mean"] / found["dense", 0]["mean"]


def test_every_method_takes_as_many_steps(table: dict[str, Any], output: Path) -> None:
    steps = {
        json.loads((output / row["run"] / f"seed-{seed}/done.json").read_text())["step"]
        for row in table["rows"]
        for seed in row["seeds"]
        if not row["method"].endswith("8bit")
    }
    assert steps == {10}


def test_every_number_can_be_traced(table: dict[str, Any], output: Path) -> None:
    text = (output / "table.md").read_text()
    for row in [*table["rows"], *table["ablations"]]:
        results = json.loads((output / row["run"] / "results.json").read_text())
        assert row["recipe_sha256"] == results["recipe_sha256"]
        assert f"| `{row['run']}` |" in text
        assert f"`{row['recipe_sha256'][:12]}`" in text
        assert row["seeds"] == ([42, 43, 44] if "method" in row else [42])


def test_rates_are_chosen_on_held_out_examples_and_used_for_both_sparsities(
    reproduce: Any, table: dict[str, Any], output: Path
) -> None:
    for method in ("dense", "one-shot", "gradual", "prune-once"):
        (chosen,) = [words for words in reproduce.commands if f"runs/sst2/{method}-rates" in words]
        assert "selection.holdout=0.1" in chosen
        rates = json.loads((output / f"runs/sst2/{method}-rates/results.json").read_text())
        best = max(rates["rows"], key=lambda row: row["score"])["learning_rate"]
        used = {row["learning_rate"] for row in table["rows"] if row["method"] == method}
        assert used == {best}
    finals = [words for words in reproduce.commands if "--seeds" in words]
    assert len(finals) == 9
    assert not any("selection" in word for words in finals for word in words)


def test_each_ablation_has_a_row(reproduce: Any, table: dict[str, Any]) -> None:
    assert {row["change"] for row in table["ablations"]} == set(reproduce.ABLATIONS)


def test_there_are_pictures(table: dict[str, Any], output: Path) -> None:
    for name in ("accuracy.png", "cost.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_does_not_run_again(reproduce: Any) -> None:
    num_commands = len(reproduce.commands)
    reproduce.main(["sst2"])
    assert len(reproduce.commands) == num_commands


def test_what_was_begun_goes_on(reproduce: Any, output: Path) -> None:
    (output / "runs/sst2/dense-0/finished").unlink()
    before = (output / "runs/sst2/dense-0/results.json").read_text()
    reproduce.main(["sst2"])
    assert "--resume" in reproduce.commands[-1]
    assert (output / "runs/sst2/dense-0/results.json").read_text() == before


def test_a_command_that_fails_ends_with_its_exit_code(
    reproduce: Any, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (output / "runs/teacher/finished").unlink()
    monkeypatch.setattr(reproduce, "execute", lambda _: STOPPED)
    with pytest.raises(SystemExit) as ended:
        reproduce.main(["students"])
    assert ended.value.code == STOPPED
    assert not (output / "runs/teacher/finished").exists()


def test_an_unknown_part_is_named(reproduce: Any) -> None:
    with pytest.raises(SystemExit, match="qqp: no such part; there are students, sst2, rte"):
        reproduce.main(["qqp"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "Usage: bash launch/reproduce.sh MODEL DATA"), (["none", "none", "out"], "none/config")],
)
def test_wrong_arguments_end_before_anything_is_made(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    script = str(ROOT / "launch/reproduce.sh")
    ended = subprocess.run(
        ["bash", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not list(tmp_path.iterdir())
