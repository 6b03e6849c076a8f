"""Commands: exit codes, one clear message each, nothing written when refused."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import finetune_recipe, pretrain_recipe

from opfa.commands import app as cli
from opfa.storage.files import write_text
from opfa.training import points
from opfa.training.checkpoint import newest_point
from opfa.training.loop import Progress

HEAVY = (
    "numpy",
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "matplotlib",
    "wandb",
    "sklearn",
    "tomlkit",
)
HUB = ("huggingface_hub", "httpx2")


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that must be refused; its message on stderr."""
    assert cli.run([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.fixture
def upstream(prepared: Path, tmp_path: Path) -> Path:
    write_text(tmp_path / "recipe.toml", pretrain_recipe(prepared).to_toml())
    return tmp_path / "recipe.toml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stesp=3", "training.stesp: unknown key; did you mean 'steps'?"),
        ('training.steps="many"', "training.steps: Input should be a valid integer (got 'many')"),
        ("pruning.schedule={start=9,end=3,target=0.9}", "end = 3: the ramp must not end before"),
        (
            "pruning.schedule={end=3,target=1.0}",
            "pruning.schedule.target: Input should be less than 1",
        ),
        ("pruning.schedule={end=3,target=-0.1}", "greater than or equal to 0"),
        ("pruning.schedule={end=99,target=0.9}", "must not come after training.steps = 8"),
        ("training.rewind_learning_rate=true", "needs [pruning]"),
        ("launch.deepspeed=nowhere.json", "launch.deepspeed = 'nowhere.json': can't read"),
        ("steps", "an override reads section.key=value"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_written(
    upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    output = tmp_path / "run"
    assert message in refused(capsys, "pretrain", upstream, "--output", output, override)
    assert not output.exists()


def test_a_pattern_that_matches_nothing_is_refused(
    upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = 'pruning={schedule={end=2,target=0.9},pattern={include=["decoder_layer"]}}'
    said = refused(capsys, "pretrain", upstream, "--output", tmp_path / "run", values)
    assert "pruning.include = 'decoder_layer': matches no linear layer" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl: no such file"),
        ("a.jsonl", "", "a.jsonl: is empty"),
        ("a.jsonl", '{"text": "good"}\n{"text": oops}\n', "a.jsonl, line 2: malformed JSON"),
        (
            "a.jsonl",
            '{"body": "good"}\n',
            "no column 'text' (corpus.text_column); there are 'body'",
        ),
        ("a.jsonl", '{"text": "good"}\n{"text": " "}\n', "line 2: 'text' is empty, invisible or"),
        ("a.jsonl", '{"text": "good"}\n', "1 documents leave only"),
        ("a.pdf", "x", "a.pdf: unknown kind of file"),
    ],
)
def test_bad_documents_are_refused(
    upstream: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: Any,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    documents = f"corpus.documents={json.dumps([str(tmp_path / name)])}"
    said = refused(capsys, "prepare", upstream, "--output", tmp_path / "out", documents)
    assert message in said
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.fixture
def downstream(prepared: Path, examples: Path, tmp_path: Path) -> Path:
    recipe = finetune_recipe(tmp_path / "model", examples)
    write_text(tmp_path / "recipe.toml", recipe.to_toml())
    return tmp_path / "recipe.toml"


def test_a_missing_model_is_one_message(
    downstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(
        capsys, "finetune", downstream, "--output", tmp_path / "run", "model.init=./nowhere"
    )
    assert "'./nowhere': can't be loaded" in said
    assert not (tmp_path / "run").exists()


def test_inspecting_nothing_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such directory" in refused(capsys, "inspect", tmp_path / "nowhere")
    assert "has no weights" in refused(capsys, "inspect", tmp_path)


def test_an_unknown_option_and_a_missing_one_are_refused(
    upstream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--speed" in refused(capsys, "pretrain", upstream, "--output", "x", "--speed", "9")
    assert "--output" in refused(capsys, "pretrain", upstream)


def test_pretrain_finetune_evaluate_inspect(
    upstream: Path,
    prepared: Path,
    examples: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pruning = "pruning.schedule={end=2,target=0.85}"
    steps = ["training.steps=3", "training.warmup_steps=0"]
    student = str(tmp_path / "student")
    assert cli.run(["pretrain", str(upstream), "--output", student, pruning, *steps]) == 0
    assert f"next    opfa inspect {student}/model\n" in capsys.readouterr().out
    task = tmp_path / "task.toml"
    write_text(task, finetune_recipe(Path(student) / "model", examples).to_toml())
    run = str(tmp_path / "task")
    assert cli.run(["finetune", str(task), "--output", run, "training.epochs=0.5", "--json"]) == 0
    finetuned = json.loads(capsys.readouterr().out)
    result = str(tmp_path / "result.json")
    assert cli.run(["evaluate", f"{run}/model", "--recipe", str(task), "--output", result]) == 0
    assert json.loads(Path(result).read_text())["metrics"] == finetuned["metrics"]
    for option in ("--output", "--predictions"):
        words = ["evaluate", f"{run}/model", "--recipe", str(task), option, str(tmp_path)]
        assert cli.run(words) == 2
        assert f"{option} {tmp_path}: is a directory" in capsys.readouterr().err
    capsys.readouterr()
    assert cli.run(["inspect", f"{run}/model", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["stated"] == "matches" and len(report["tensors"]) == 12
    assert cli.run(["inspect", f"{run}/model"]) == 0
    assert "sparsity.json: matches" in " ".join(capsys.readouterr().out.split())
    recipe = tomllib.loads((Path(student) / "recipe.toml").read_text())
    assert recipe["pruning"]["schedule"]["target"] == 0.85
    assert recipe["training"]["steps"] == 3


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_check_prints_what_a_recipe_resolves_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    given = pretrain_recipe(tmp_path) if kind == "pretrain" else finetune_recipe(tmp_path, tmp_path)
    write_text(tmp_path / "r.toml", given.to_toml())
    assert cli.run(["check", str(tmp_path / "r.toml"), "seed=7"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"# accepted, for opfa {kind}; ")
    write_text(tmp_path / "again.toml", out)
    assert cli.run(["check", str(tmp_path / "again.toml")]) == 0
    assert capsys.readouterr().out == out
    assert tomllib.loads(out)["seed"] == 7
    assert "did you mean 'seed'" in refused(capsys, "check", tmp_path / "r.toml", "sede=7")


def test_check_refuses_a_file_of_no_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.toml").write_text("[training]\nsteps = 1\n")
    assert "has neither [corpus]" in refused(capsys, "check", tmp_path / "r.toml")
    assert "can't read this recipe" in refused(capsys, "check", tmp_path / "none.toml")


def test_a_shell_completes_commands() -> None:
    variables = {"_OPFA_COMPLETE": "complete_bash", "COMP_WORDS": "opfa pre", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "opfa"],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        check=False,
    )
    assert done.stdout.split() == ["prepare", "pretrain", "predict"], done.stderr


def test_help_and_a_refused_recipe_load_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[training]\nsteps = 0\n")
    code = f"""
import sys
from opfa.commands import app as cli
assert cli.run(["--help"]) == 0
for command in ("pretrain", "finetune"):
    assert cli.run([command, "bad.toml", "--output", "x"]) == 2
assert cli.run(["check", "bad.toml"]) == 2
print([name for name in {HEAVY + HUB!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command",
    [
        "check", "prepare", "pretrain", "finetune", "evaluate", "calibrate", "export", "inspect",
        "download", "list", "quickstart",
    ],
)  # fmt: skip
def test_every_command_explains_itself_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Example: opfa {command}" in " ".join(out.split())
    assert cli.run([command, "-h"]) == 0
    assert capsys.readouterr().out == out


def test_ctrl_c_leaves_a_run_that_resumes(
    upstream: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from opfa.upstream import pretrain as module

    evaluate = module.Trainer.evaluate

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    output = str(tmp_path / "run")
    monkeypatch.setattr(module.Trainer, "evaluate", interrupted)
    assert cli.run(["pretrain", str(upstream), "--output", output]) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(module.Trainer, "evaluate", evaluate)
    assert cli.run(["pretrain", str(upstream), "--output", output, "--resume"]) == 0
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_a_disk_that_fills_up_during_a_save_costs_nothing_earlier(
    upstream: Path,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save, filler = points.save, small_disk / "filler"

    def filled(at: Progress, keep: int) -> None:
        if at.step == 6:
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(bytes(free - 4096))
        save(at, keep)

    monkeypatch.setattr(points, "save", filled)
    said = refused(capsys, "pretrain", upstream, "--output", small_disk / "run")
    assert "no space left" in said
    root = small_disk / "run/checkpoints"
    assert [path.name for path in root.iterdir()] == ["step-00000003"]
    assert newest_point(root) == root / "step-00000003"
    filler.unlink()
    monkeypatch.setattr(points, "save", save)
    assert cli.run(["pretrain", str(upstream), "--output", f"{small_disk}/run", "--resume"]) == 0


@pytest.mark.parametrize("hidden", [96, 160])
def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(
    prepared: Path,
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    hidden: int,
) -> None:
    config = {**pretrain_recipe(prepared).model.model_dump()["config"], "hidden_size": hidden}
    config["intermediate_size"] = 2 * hidden
    write_text(tmp_path / "r.toml", pretrain_recipe(prepared, model={"config": config}).to_toml())
    said = refused(capsys, "pretrain", tmp_path / "r.toml", "--output", small_disk / "run")
    assert "no space left" in said
    left = [path for path in (small_disk / "run").rglob("*") if "incomplete" in path.name]
    assert not left
    assert not (small_disk / "run/model").exists()
    shutil.rmtree(small_disk / "run")
