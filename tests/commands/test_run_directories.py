"""A run stands for its model in every command and key, and what can't be loaded is named by its
key.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import finetune_recipe

from opfa.commands import app as cli
from opfa.downstream.finetune import finetune
from opfa.releases.provenance import steps


@pytest.fixture(scope="module")
def run(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that began with another run, by its directory."""
    output = tmp_path_factory.mktemp("finetuned") / "run"
    training = {"epochs": 0.2}
    finetune(finetune_recipe(sparse.parent, examples, training=training), output)
    return output


def done(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """What a command prints as JSON."""
    status = cli.run([*map(str, words), "--json"])
    said = capsys.readouterr()
    assert status == 0, said.err
    return json.loads(said.out)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.run(list(map(str, words))) == 2
    return capsys.readouterr().err


def test_evaluate_takes_a_run_and_its_recipe(run: Path, capsys: Any) -> None:
    found = done(capsys, "evaluate", run)
    assert found == done(capsys, "evaluate", run / "model")
    assert found == done(capsys, "evaluate", run / "model", "--recipe", run / "recipe.toml")
    assert found["metrics"] == json.loads((run / "results.json").read_text())["metrics"]


def test_calibrate_takes_a_run_and_leaves_its_recipe(
    run: Path, examples: Path, tmp_path: Path, capsys: Any
) -> None:
    done(capsys, "calibrate", run, "--output", tmp_path / "8", "--examples", 8)
    recipe = (tmp_path / "8/recipe.toml").read_text()
    assert 'text = "text"' in recipe and str(examples) not in recipe  # nobody's directories
    validation = f"task.validation={examples / 'validation.jsonl'}"
    assert done(capsys, "evaluate", tmp_path / "8", validation)["quantized"]


def test_inspect_and_finetune_take_a_run(
    run: Path, examples: Path, tmp_path: Path, capsys: Any
) -> None:
    fingerprints = {done(capsys, "inspect", m)["fingerprint"] for m in (run, run / "model")}
    assert len(fingerprints) == 1
    recipe = finetune_recipe(
        run, examples, training={"epochs": 0.1}, distillation={"teacher": str(run)}
    )
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    done(capsys, "finetune", tmp_path / "recipe.toml", "--output", tmp_path / "again")
    assert [step.run for step in steps(tmp_path / "again")][:2] == [tmp_path / "again", run]
    began = json.loads((tmp_path / "again/environment.json").read_text())
    assert "model.safetensors" in began["files_sha256"]["model.init"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.init", "./no"), ("model.tokenizer", "./no"), ("distillation.teacher", "./no")],
)
def test_a_model_that_is_not_there_is_named_by_its_key(
    run: Path, tmp_path: Path, capsys: Any, key: str, value: str
) -> None:
    words = ("finetune", run / "recipe.toml", "--output", tmp_path / "x", f"{key}={value}")
    said = refused(capsys, *words)
    assert said == f"opfa: {key} = './no': can't be loaded: no such directory\n"


def test_a_model_without_a_recipe_needs_one(sparse: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "plain").symlink_to(sparse)
    for command in (["evaluate"], ["calibrate", "--output", tmp_path / "x"]):
        said = refused(capsys, command[0], tmp_path / "plain", *command[1:])
        assert f"--recipe: is needed, since {tmp_path / 'plain'} is no run" in said
        said = refused(capsys, command[0], "runs/mein", *command[1:])
        assert said == "opfa: --recipe: is needed, since runs/mein is no directory here\n"


@pytest.mark.parametrize(
    "words",
    ["release runs/mein --output x", "push runs/mein me/mine", "unpack runs/mein --output x"],
)
def test_a_directory_that_is_not_there_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *words.split()) == "opfa: runs/mein: no such directory\n"


def test_a_run_that_is_not_finished_is_no_model(tmp_path: Path, run: Path, capsys: Any) -> None:
    (tmp_path / "half/checkpoints").mkdir(parents=True)
    (tmp_path / "half/recipe.toml").write_text((run / "recipe.toml").read_text())
    for command in ("evaluate", "inspect"):
        assert "is a run that isn't finished" in refused(capsys, command, tmp_path / "half")
