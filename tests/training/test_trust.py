"""What a run or a corpus wrote is checked when it is read again: one byte more, less or another is
one message with the file's name.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_older, break_off, finetune_recipe, pretrain_recipe

from opfa.commands import app as cli
from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.sweep import sweep
from opfa.errors import DataError, ModelError, OpfaError, RunError
from opfa.releases.provenance import row_of
from opfa.releases.release import release
from opfa.storage import seal
from opfa.training import checkpoint, metrics
from opfa.upstream.prepared import Prepared
from opfa.upstream.pretrain import pretrain

Damage = Callable[[Path], object]
FEW = {"training": {"epochs": 0.5}}  # 5 steps


def edited(path: Path) -> None:
    """Change a value and leave the file valid."""
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "added": 1}))


def flipped(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Lose the second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def finished(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning to 8 bits; tests take copies."""
    run = tmp_path_factory.mktemp("finished") / "run"
    finetune(finetune_recipe(sparse, examples, quantization={"bits": 8}, **FEW), run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data"


# what a finished model answers by


def lowercase_off(path: Path) -> None:
    values = json.loads(path.read_text())
    values["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokenizer.json", lowercase_off),
        ("tokenizer_config.json", edited),
        ("config.json", edited),
        ("quantization.safetensors", flipped),
        ("sparsity.json", edited),
        ("model.safetensors", flipped),
        ("tokenizer.json", Path.unlink),
        ("added_tokens.json", lambda path: path.write_text('{"[NEW]": 5}')),
        ("special_tokens_map.json", lambda path: path.write_text("{}")),
        ("chat_template.jinja", lambda path: path.write_text("x")),
        ("preprocessor_config.json", lambda path: path.write_text("{}")),
        ("vocab.txt", lambda path: path.write_text("a\nb\n")),
        ("spiece.model", lambda path: path.write_bytes(b"x")),
        ("generation_config.json", lambda path: path.write_text("{}")),
    ],
)
def test_a_model_is_not_released_with_another_file_than_its_run_wrote(
    run: Path, tmp_path: Path, name: str, damage: Damage
) -> None:
    damage(run / "model" / name)
    with pytest.raises(ModelError, match=name):
        release(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["recipe.toml", "results.json", "environment.json"])
def test_what_a_run_says_of_itself_is_not_released_after_an_edit(
    run: Path, tmp_path: Path, name: str
) -> None:
    path = run / name
    path.write_text(path.read_text().replace("42", "43", 1) + "\n")
    with pytest.raises(RunError, match=f"not as the run left it: {name} has changed"):
        release(run, tmp_path / "out")


def test_an_edited_done_json_is_noticed_by_its_own_seal(run: Path, tmp_path: Path) -> None:
    path = run / "done.json"
    path.write_text(path.read_text().replace('"step": 5', '"step": 6'))
    with pytest.raises(RunError, match=r"done\.json: is damaged, or was edited"):
        release(run, tmp_path / "out")


def test_a_run_of_an_older_version_is_released_with_a_warning(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    as_older(run)
    release(run, tmp_path / "out")
    assert "SHA-256 of its weights alone" in caplog.text


def test_an_edited_model_is_told_of_when_it_is_used_and_not_released(
    sparse: Path, examples: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(sparse.parent, tmp_path / "up")
    lowercase_off(tmp_path / "up/model/tokenizer.json")
    recipe = finetune_recipe(tmp_path / "up/model", examples, **FEW)
    finetune(recipe, tmp_path / "down")
    assert "up/model: is not what its run wrote: tokenizer.json has changed" in caplog.text
    with pytest.raises(RunError, match=r"when it was made: tokenizer\.json has changed"):
        release(tmp_path / "down", tmp_path / "out")
    caplog.clear()
    edited(tmp_path / "down/model/config.json")
    evaluate_model(str(tmp_path / "down/model"), recipe)
    assert "down/model: is not what its run wrote: config.json has changed" in caplog.text


@pytest.mark.parametrize("key", ["model.init", "model.tokenizer", "distillation.teacher"])
def test_a_resume_with_another_model_than_it_began_with_is_refused(
    sparse: Path, finished: Path, examples: Path, tmp_path: Path, key: str,
) -> None:  # fmt: skip
    shutil.copytree(sparse, tmp_path / "model")
    shutil.copytree(finished / "model", tmp_path / "teacher")
    model = {"init": str(tmp_path / "model"), "tokenizer": str(tmp_path / "model")}
    teacher = {"teacher": str(tmp_path / "teacher"), "hard_weight": 0.5, "soft_weight": 0.5}
    recipe = finetune_recipe(sparse, examples, model=model, distillation=teacher)
    break_off(5, finetune, recipe, tmp_path / "run")
    directory = "teacher" if key == "distillation.teacher" else "model"
    edited(tmp_path / directory / "tokenizer_config.json")
    name = "model.init" if directory == "model" else key
    message = rf"{name} is not what the run began with: tokenizer_config\.json has changed"
    with pytest.raises(RunError, match=message):
        finetune(recipe, tmp_path / "run", resume=True)


def test_the_teachers_logits_are_computed_again_when_they_are_damaged(
    sparse: Path, finished: Path, examples: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    teacher = {"teacher": str(finished / "model"), "hard_weight": 0.5, "soft_weight": 0.5}
    recipe = finetune_recipe(sparse, examples, distillation=teacher)
    finetune(recipe, tmp_path / "unbroken")
    break_off(5, finetune, recipe, tmp_path / "run")
    flipped(tmp_path / "run/teacher.safetensors")
    finetune(recipe, tmp_path / "run", resume=True)
    assert "teacher.safetensors: is damaged; computing them again" in caplog.text
    digests = [checkpoint.model_digest(tmp_path / n / "model") for n in ("unbroken", "run")]
    assert digests[0] == digests[1]


# prepared examples


@pytest.mark.parametrize("damage", [flipped, cut, Path.unlink], ids=["flipped", "cut", "missing"])
@pytest.mark.parametrize(
    "name",
    [
        "corpus.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "train/data-00000-of-00001.arrow",
        "validation/data-00000-of-00001.arrow",
        "train/state.json",
        "validation/dataset_info.json",
    ],
)
def test_a_damaged_corpus_is_one_message(data: Path, name: str, damage: Damage) -> None:
    damage(data / name)
    with pytest.raises(DataError, match=name):
        Prepared.open(data, pretrain_recipe(data).corpus)


def test_a_file_too_many_and_exchanged_splits_are_noticed(data: Path) -> None:
    corpus = pretrain_recipe(data).corpus
    (data / "train/more.arrow").write_bytes(b"x")
    with pytest.raises(DataError, match=r"train/more\.arrow is new"):
        Prepared.open(data, corpus)
    (data / "train/more.arrow").unlink()
    (data / "notes.txt").write_text("beside it, where nothing is read")
    Prepared.open(data, corpus)
    for old, new in (("train", "other"), ("validation", "train"), ("other", "validation")):
        (data / old).rename(data / new)
    with pytest.raises(DataError, match=r"train/.* has changed"):
        Prepared.open(data, corpus)


def test_an_older_corpus_is_compared_with_the_digests_of_its_tokens(data: Path) -> None:
    path, corpus = data / "corpus.json", pretrain_recipe(data).corpus
    summary = {k: v for k, v in json.loads(path.read_text()).items() if "seal" not in k}
    path.write_text(json.dumps({k: v for k, v in summary.items() if k != seal.FILES}))
    Prepared.open(data, corpus)
    for old, new in (("train", "other"), ("validation", "train"), ("other", "validation")):
        (data / old).rename(data / new)
    with pytest.raises(DataError, match="train has changed"):
        Prepared.open(data, corpus)
    path.write_text(json.dumps({"format": summary["format"]}))
    with pytest.raises(DataError, match=r"corpus\.json: is damaged: KeyError"):
        Prepared.open(data, corpus)


def test_a_run_checks_its_examples_unless_they_are_trusted(data: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(data, training={"steps": 2, "warmup_steps": 0})
    path = next((data / "train").glob("*.arrow"))
    flipped(path)
    with pytest.raises(DataError, match="train/.* has changed"):
        pretrain(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    pretrain(recipe, tmp_path / "run", trust_data=True)


# files of a run beside its resume points


def unfinished(prepared: Path, output: Path) -> Any:
    """A pre-training of 8 steps that was broken off after 7, of which 6 are saved."""
    recipe = pretrain_recipe(prepared)
    pretrain(recipe, output)
    (output / "done.json").unlink()
    shutil.rmtree(output / "model")
    return recipe


@pytest.fixture(scope="module")
def half(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("half") / "run"
    return unfinished(prepared, output), output


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["mlm_loss"]) for row in metrics.read(run)]


@pytest.mark.parametrize("lines", [3, 5])
def test_a_resume_that_lost_rows_is_refused(
    half: tuple[Any, Path], tmp_path: Path, lines: int
) -> None:
    shutil.copytree(half[1], tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    with pytest.raises(RunError, match=r"metrics\.jsonl: its rows up to step 6 are not those"):
        pretrain(half[0], tmp_path / "run", resume=True)


def test_rows_after_the_resume_point_may_be_damaged(half: tuple[Any, Path], tmp_path: Path) -> None:
    shutil.copytree(half[1], tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-40] + bytes(60))
    pretrain(half[0], tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(half[1])


@pytest.mark.parametrize("damage", [flipped, cut, lambda path: path.write_bytes(b"\xff{}")])
@pytest.mark.parametrize("name", ["environment.json", "recipe.toml", "metrics.jsonl"])
def test_a_damaged_file_of_an_unfinished_run_is_one_message(
    half: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str, damage: Damage,
) -> None:  # fmt: skip
    shutil.copytree(half[1], tmp_path / "run")
    (tmp_path / "r.toml").write_text(half[0].to_toml())
    damage(tmp_path / "run" / name)
    words = ["pretrain", str(tmp_path / "r.toml"), "--output", str(tmp_path / "run"), "--resume"]
    assert cli.run(words) == 2
    assert capsys.readouterr().err.startswith(f"opfa: {tmp_path}/run")


@pytest.mark.parametrize("damage", [flipped, cut])
@pytest.mark.parametrize("name", ["done.json", "results.json", "environment.json"])
def test_a_finished_run_with_a_damaged_file_is_not_taken_as_finished(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Damage
) -> None:
    damage(run / name)
    words = ["finetune", str(run / "recipe.toml"), "--output", str(run), "--resume"]
    assert cli.run(words) == 2
    assert name in capsys.readouterr().err


def test_a_sweep_names_a_damaged_file_of_its_runs_and_of_its_own(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    recipe, out = finetune_recipe(sparse, examples, **FEW), tmp_path / "out"
    sweep(recipe, out, num_seeds=2)
    text = (out / "results.json").read_text()
    (out / "results.json").write_text(text.replace('"std"', '"sdt"', 1))
    with pytest.raises(RunError, match=r"out/results\.json: is damaged"):
        row_of("a", out)
    edited(out / "seed-42/results.json")
    with pytest.raises(RunError, match=r"seed-42: not as the run left it: results\.json has"):
        sweep(recipe, out, num_seeds=2, resume=True)


def test_only_the_last_row_may_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert metrics.read(tmp_path) == [{"step": 1}, {"step": 2}]
    for text in ('{"step": 1}\n{"st\n{"step": 3}\n', '{"step": 1}\n{"st\n', "{}\n", "[1]\n"):
        path.write_text(text)
        with pytest.raises(RunError, match=r"metrics\.jsonl, line [12]: is damaged"):
            metrics.read(tmp_path)


# what decides the last bits


def test_a_resume_with_other_threads_says_so_and_every_launch_notes_them(
    half: tuple[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(half[1], tmp_path / "run")
    torch.set_num_threads(2)
    try:
        pretrain(half[0], tmp_path / "run", resume=True)
    finally:
        torch.set_num_threads(1)
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [line for line in said if "threads was 1 and is 2; so its last bits" in line]
    launches = json.loads((tmp_path / "run/environment.json").read_text())["launches"]
    assert [launch["threads"] for launch in launches] == [1, 2]
    assert launches[0].keys() >= {"torch", "interop_threads", "processor", "processes"}


# RANK


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "1"}, {"RANK": "x"}, {"RANK": "7", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "3"}],
)
def test_rank_alone_changes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str],
) -> None:  # fmt: skip
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    recipe = FinetuneRecipe.read(run / "recipe.toml", ["training.learning_rate=0.5"])
    (tmp_path / "other.toml").write_text(recipe.to_toml())
    before = (run / "recipe.toml").read_bytes()
    for more, message in (([], "holds another run"), (["--resume"], "with another recipe")):
        words = ["finetune", str(tmp_path / "other.toml"), "--output", str(run), *more]
        assert cli.run(words) == 2
        assert message in capsys.readouterr().err
    assert (run / "recipe.toml").read_bytes() == before
    (tmp_path / "other.toml").write_text("seed = 'x'")
    for command in ("finetune", "pretrain"):
        words = [command, str(tmp_path / "other.toml"), "--output", str(tmp_path / "new")]
        assert cli.run(words) == 2
        assert "seed" in capsys.readouterr().err


def test_fine_tuning_under_a_launcher_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for more in ([], ["--seeds", "2"]):
        words = ["finetune", str(run / "recipe.toml"), "--output", str(tmp_path / "new"), *more]
        assert cli.run(words) == 2
        assert "opfa finetune: uses one process, and WORLD_SIZE = 4" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK: is not set"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK: 'x' is not a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK = 2, WORLD_SIZE = 2: no place in a launch"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE: 'two' is not a whole number"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK = 0, WORLD_SIZE = 0: no place"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set, so this was no launcher"),
    ],
)
def test_a_launch_that_can_not_be_is_one_message(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str,
) -> None:  # fmt: skip
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "r.toml").write_text(pretrain_recipe(prepared).to_toml())
    assert cli.run(["pretrain", str(tmp_path / "r.toml"), "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_seals_notice_every_edit_and_only_edits(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    seal.write_sealed(path, {"a": 0.1, "b": [1, None], "ü": {"c": "d"}})
    assert seal.read_json(path)["a"] == 0.1
    path.write_text(json.dumps(json.loads(path.read_text())))  # other blanks
    seal.read_json(path)
    for old, new in (("0.1", "0.2"), ("null", "true"), ('"d"', '"e"'), ('"a"', '"A"')):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        with pytest.raises(OpfaError, match=r"a\.json: is damaged, or was edited"):
            seal.read_json(path)
        path.write_text(text)
    path.write_text('{"files_sha256": {}}')  # a list without a seal was never written
    with pytest.raises(RunError, match="is damaged"):
        seal.read_json(path)
