"""launch/sagemaker/train.py in a container made of directories and variables."""

import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import finetune_recipe, outside, pretrain_recipe
from jobs import SAGEMAKER, environment, through_s3

from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import OpfaError, RunError

import container  # isort: skip - after jobs, which says where they are
import train  # isort: skip

LONG = {"training": {"epochs": 8.0}, "logging": {"every_steps": 1, "checkpoint_steps": 1000}}


def started(variables: dict[str, str]) -> "subprocess.Popen[str]":
    settings = outside(**variables, OMP_NUM_THREADS="1")
    command = [sys.executable, str(SAGEMAKER / "train.py"), "--ignored", "1"]
    return subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)


def until_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Wait until a run has logged this step."""
    rows = run / "metrics.jsonl"
    while process.poll() is None:
        if rows.exists() and len(rows.read_text().splitlines()) > step:
            return
        time.sleep(0.01)
    assert process.stderr is not None
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def job(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe file, hyperparameters over it, and channels."""
    directory = tmp_path_factory.mktemp("job")
    recipe = finetune_recipe(sparse, examples)
    values = recipe.to_toml().replace(str(examples), "nowhere").replace(str(sparse), "nothing")
    (directory / "mine.toml").write_text(values)
    for split in ("train", "validation"):
        (directory / split).mkdir()
        (directory / split / "rows.jsonl").write_bytes((examples / f"{split}.jsonl").read_bytes())
    (directory / "model").mkdir()
    with tarfile.open(directory / "model/model.tar.gz", "w:gz") as tar:
        for path in sparse.iterdir():
            tar.add(path, path.name)
    hyperparameters = {"recipe": str(directory / "mine.toml"), "training.epochs": 8}
    hyperparameters |= {"logging__checkpoint_steps": "1000", "logging.every_steps": 1}
    channels = {name: directory / name for name in ("train", "validation", "model")}
    return hyperparameters, channels


def test_a_spot_interruption_loses_nothing(
    job: Any, sparse: Path, examples: Path, tmp_path: Path
) -> None:
    hyperparameters, channels = job
    root, unbroken = tmp_path / "ml", tmp_path / "unbroken"
    variables = environment(root, hyperparameters, channels)
    run = root / "checkpoints/run"
    with started(variables) as process:
        until_step(run, 3, process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
    assert process.returncode == 0, said
    assert "train.py: stopped; the job resumes where it starts again" in said
    assert list((root / "model").iterdir()) == [] and not (root / "output/failure").exists()
    assert not (run / "done.json").exists() and list((run / "checkpoints").iterdir())
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    through_s3(root / "checkpoints", deleted=["run/stop", "run/stopped"])
    with started(variables) as process:
        said = process.communicate()[1]
    assert process.returncode == 0, said
    assert f"resumed at step {step}" in said and step >= 3
    done = json.loads((run / "done.json").read_text())
    finetune(finetune_recipe(sparse, examples, **LONG), unbroken)
    assert done["model_sha256"] == json.loads((unbroken / "done.json").read_text())["model_sha256"]
    files = {path.name for path in (root / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.toml"} <= files
    assert {"model.onnx", "opfa.json", "code"} <= files  # an endpoint answers with it as it is
    assert (root / "output/data/metrics.jsonl").read_text().count("\n") >= 80
    found = FinetuneRecipe.read(root / "model/recipe.toml").task
    assert found.train == "train/rows.jsonl"  # as in a release, without the place


def test_a_failure_is_a_text_where_sagemaker_looks_for_it(tmp_path: Path) -> None:
    wrong = {"recipe": "sst2", "epochs": 3, "training.epoch": 1}
    with started(environment(tmp_path, wrong)) as process:
        said = process.communicate()[1]
    assert process.returncode == 2
    expected = "hyperparameters: sst2 with epochs=3 training.epoch=1:\n"
    expected += "  training.epoch: unknown key; did you mean 'epochs'?\n  epochs: unknown key;"
    assert (tmp_path / "output/failure").read_text().startswith(expected)
    assert said.count("\n") == 3 and said.startswith(f"train.py: {expected}")


def test_what_ends_a_training_is_the_text_of_its_failure(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "import sys; print('one\\nopfa: no memory\\n  of mine', file=sys.stderr); sys.exit(9)"
    words = [sys.executable, "-c", program]
    hyperparameters, channels = job
    variables = environment(tmp_path, hyperparameters, channels)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "process_of", lambda *_: (words, {}))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as ended:
        train.main()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert ended.value.code == 9
    text = "opfa finetune ended with 9: opfa: no memory\n  of mine"
    assert (tmp_path / "output/failure").read_text() == text
    assert "one\nopfa: no memory\n" in capfd.readouterr().err


def test_a_fault_is_told_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SM_OUTPUT_DIR", str(tmp_path))
    error = ZeroDivisionError("by nothing")
    train.hook(type(error), error, None)
    assert (tmp_path / "failure").read_text().endswith("ZeroDivisionError: by nothing\n")
    assert "by nothing" in capsys.readouterr().err


def job_of(root: Path, *given: Any, **more: Any) -> container.Job:
    return container.Job.of(environment(root, *given, **more))


def words(root: Path, *given: Any, **more: Any) -> list[str]:
    return list(container.Task.of(job_of(root, *given, **more)).words)


def test_hyperparameters_are_keys_of_the_recipe_as_on_a_command_line(tmp_path: Path) -> None:
    given = {
        "recipe": "sst2",
        "training.epochs": 2,
        "training__learning_rate": "1e-4",
        "task.has_unanswerable": False,
        "pruning": None,
        "task.classes": ["a", "b"],
        "sagemaker_program": "train.py",
        "_tuning_objective_metric": "accuracy",
    }
    assert words(tmp_path, given) == [
        "training.epochs=2",
        "training.learning_rate=1e-4",
        "task.has_unanswerable=false",
        "pruning=",
        'task.classes=["a", "b"]',
    ]


def test_channels_are_data_and_models(job: Any, tmp_path: Path) -> None:
    hyperparameters, channels = job
    found = dict(word.split("=") for word in words(tmp_path, hyperparameters, channels))
    assert found["task.train"] == str(channels["train"] / "rows.jsonl")
    assert found["model.init"] == str(tmp_path / "unpacked/model")
    assert (tmp_path / "unpacked/model/config.json").is_file()
    (tmp_path / "many").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / "many" / name).touch()
    many = {**channels, "train": tmp_path / "many"}
    with pytest.raises(RunError, match=r"'train': holds 2 files; task.train=NAME says.*a\."):
        words(tmp_path, hyperparameters, many)
    chosen = words(tmp_path, {**hyperparameters, "task.train": "b.csv"}, many)
    assert f"task.train={tmp_path}/many/b.csv" in chosen
    with pytest.raises(RunError, match=r"task.train = c.csv: is not in the channel 'train' \(a"):
        words(tmp_path, {**hyperparameters, "task.train": "c.csv"}, many)
    with pytest.raises(RunError, match="channel 'training': unknown; a job of opfa finetune can"):
        words(tmp_path, hyperparameters, {"training": tmp_path})
    assert words(tmp_path, hyperparameters, {"code": tmp_path, "sm_drivers": tmp_path})


def test_an_archive_of_a_channel_writes_nothing_outside(job: Any, tmp_path: Path) -> None:
    hyperparameters, _ = job
    (tmp_path / "model-channel").mkdir()
    with tarfile.open(tmp_path / "model-channel/model.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo("../../evil")
        tar.addfile(entry)
    with pytest.raises(RunError, match=r"model.tar.gz: can't be unpacked: '../../evil' would"):
        words(tmp_path, hyperparameters, {"model": tmp_path / "model-channel"})
    (tmp_path / "model-channel/model.tar.gz").write_bytes(b"no archive")
    with pytest.raises(RunError, match=r"model.tar.gz: can't be unpacked: .*not a gzip file"):
        words(tmp_path, hyperparameters, {"model": tmp_path / "model-channel"})


def test_a_job_that_can_not_be_done_is_one_message(job: Any, tmp_path: Path) -> None:
    hyperparameters, channels = job
    with pytest.raises(RunError, match="SM_HPS: is not set, so this is no SageMaker training"):
        container.Job.of({})
    with pytest.raises(RunError, match="hyperparameter recipe: is missing"):
        words(tmp_path, {})
    with pytest.raises(OpfaError, match="did you mean 'sst2'"):
        words(tmp_path, {"recipe": "sst22"})
    two = {"SM_HOSTS": ["algo-2", "algo-1"], "SM_CURRENT_HOST": "algo-2"}
    with pytest.raises(RunError, match="is for 2 hosts, and fine-tuning is one process"):
        words(tmp_path, hyperparameters, channels, **two)
    with pytest.raises(RunError, match=r"for 2 hosts, and .*channel 'run' of a file system"):
        words(tmp_path, {"recipe": "bert-base-90"}, {}, **two)


def test_pre_training_is_torchrun_over_all_hosts_into_one_directory(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text(pretrain_recipe(prepared).to_toml())
    shared = tmp_path / "shared"
    shared.mkdir()
    two = {"SM_HOSTS": ["algo-2", "algo-1"], "SM_CURRENT_HOST": "algo-2"}
    two |= {"SM_NETWORK_INTERFACE_NAME": "eth7"}
    given = ({"recipe": str(tmp_path / "mine.toml")}, {"data": prepared, "run": shared})
    job = job_of(tmp_path, *given, **two)
    task = container.Task.of(job)
    command, settings = train.process_of(task, job)
    script = SAGEMAKER.parent / "torchrun.sh"
    recipe, run = str(tmp_path / "mine.toml"), str(shared / "run")
    assert command == ["bash", str(script), recipe, run, f"data={prepared}"]
    assert {name: settings[name] for name in settings if name != "PATH"} == {
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "algo-1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "eth7",
        "NCCL_SOCKET_IFNAME": "eth7",
    }
    assert not job.is_first
    monkeypatch.setenv("WORLD_SIZE", "4")  # the SDK's torchrun has started this rank
    (shared / "run").mkdir()
    (shared / "run/recipe.toml").touch()
    command, _ = train.process_of(task, job)
    assert command[:4] == [sys.executable, "-m", "opfa", "pretrain"] and command[-1] == "--resume"
    monkeypatch.setenv("LOCAL_RANK", "1")
    alone = job_of(tmp_path, *given)
    assert not alone.is_first
    monkeypatch.delenv("LOCAL_RANK")
    assert alone.is_first


def test_a_signal_before_the_training_begins_is_not_lost() -> None:
    child = train.Child()
    child.tell()
    assert child.run([sys.executable, "-c", "raise SystemExit(0)"], {}) == -signal.SIGTERM
