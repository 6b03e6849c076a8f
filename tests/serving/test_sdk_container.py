"""train.py under the real container drivers of SDK version 3, unpatched: a mount namespace puts a
directory in the place of /opt/ml, and a process namespace makes bash process 1, as in a container.

Needs OPFA_SAGEMAKER3_PYTHON, an interpreter with `sagemaker-train`, and the right to unshare.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import finetune_recipe, outside, pretrain_recipe
from jobs import SAGEMAKER, through_s3

from opfa.downstream.finetune import finetune

import submit  # isort: skip - jobs says where it is

PYTHON = os.environ.get("OPFA_SAGEMAKER3_PYTHON", "")
UNSHARE = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
CAN = bool(PYTHON) and not subprocess.run([*UNSHARE, "true"], check=False).returncode
pytestmark = pytest.mark.skipif(
    not CAN, reason="needs OPFA_SAGEMAKER3_PYTHON, with SageMaker's SDK, and the right to unshare"
)
ML = Path("/opt/ml")
ROLE = "arn:aws:iam::111122223333:role/r"
DRIVERS = f"{ML}/input/data/sm_drivers"
OURS = f"chmod +x {DRIVERS}/sm_train.sh && {DRIVERS}/sm_train.sh"  # what the SDK asks for
THEIRS = (  # as its script does where `distributed` is given
    "set -e; python3 {0}/scripts/environment.py; source {1}/input/sm_training.env; "
    "cd {1}/input/data/code; exec python3 {0}/distributed_drivers/{2}"
)


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the SDK uploads for a job of submit.py: its drivers and sm_train.sh."""
    directory = tmp_path_factory.mktemp("drivers")
    here = Path(__file__).parent
    path = f"{SAGEMAKER.parents[1]}:{here}"
    settings = outside(PYTHONPATH=path, OPFA_DRIVERS=str(directory))
    words = ["sst2", "--role", ROLE, "--instance", "ml.g5.xlarge", "--sdk", "3"]
    command = [PYTHON, str(here / "by_sdk.py"), *words]
    subprocess.run(command, env=settings, capture_output=True, check=True)
    return directory


class Container:
    """A directory in the place of /opt/ml, and what runs there as process 1."""

    def __init__(
        self, root: Path, drivers: Path, recipe: str, given: dict[str, str], channels: list[Path]
    ) -> None:
        data = root / "input/data"
        for path in (root / "input/config", data / "code", root / "model", root / "output"):
            path.mkdir(parents=True)
        submit.stage("sst2", data / "code")
        (data / "code/requirements.txt").write_text("")  # the image has opfa already
        (data / "code/recipe.toml").write_text(recipe)
        shutil.copytree(drivers, data / "sm_drivers")
        for channel in channels:
            shutil.copytree(channel, data / channel.name)
        host = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"}
        configs: dict[str, Any] = {
            "resourceconfig": {**host, "current_instance_type": "ml.m5.large"},
            "inputdataconfig": {
                path.name: {"TrainingInputMode": "File"} for path in data.iterdir()
            },
            "hyperparameters": {"recipe": "recipe.toml", **given},
        }
        for name, values in configs.items():
            (root / f"input/config/{name}.json").write_text(json.dumps(values))
        for name, values in (
            ("sourcecode", {"entry_script": "train.py"}),
            ("distributed", {"process_count_per_node": 2}),
        ):
            (data / f"sm_drivers/{name}.json").write_text(json.dumps(values))
        self.root = root

    @property
    def run(self) -> Path:
        return self.root / "checkpoints/run"

    def start(self, script: str, **more: str) -> "subprocess.Popen[str]":
        place = f'mkdir -p {ML}; mount --bind "$1" {ML}; exec /bin/bash -c "$2"'
        settings = outside(
            **more,
            TRAINING_JOB_NAME="job",
            OMP_NUM_THREADS="1",
            DS_ACCELERATOR="cpu",
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            PYTHONPATH=f"{ML}/input/data/code",
            RESTART_SECONDS="0",
        )
        return subprocess.Popen(
            [*UNSHARE, "bash", "-c", place, "-", str(self.root), script],
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def interrupt(self, step: int, script: str, who: str = "", **more: str) -> tuple[int, str]:
        """Start, wait for a step, and tell the first process, or `who`, to end."""
        with self.start(script, **more) as process:
            rows = self.run / "metrics.jsonl"
            while not (rows.exists() and len(rows.read_text().splitlines()) > step):
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.02)
            inside = psutil.Process(process.pid).children(recursive=True)
            told = next(p for p in inside if any(word.endswith(who) for word in p.cmdline()))
            told.send_signal(signal.SIGTERM)
            said = process.communicate()[0]
        assert not (self.run / "done.json").exists() and list((self.run / "checkpoints").iterdir())
        through_s3(self.root / "checkpoints", deleted=["run/stop", "run/stopped"])
        return process.returncode, said

    def finish(self, script: str, **more: str) -> str:
        """Start, wait for the end, and return the model's digest."""
        with self.start(script, **more) as process:
            said = process.communicate()[0]
        assert process.returncode == 0, said
        assert "resumed at step" in said
        assert (self.root / "model/model.safetensors").is_file()
        return json.loads((self.run / "done.json").read_text())["model_sha256"]


@pytest.fixture(autouse=True)
def _nothing_is_left_in_the_real_place() -> Any:
    was_there = ML.exists()
    yield
    if not was_there and ML.exists():
        ML.rmdir()


def test_fine_tuning_gets_the_signal_of_process_1_and_loses_nothing(
    drivers: Path, sparse: Path, examples: Path, tmp_path: Path
) -> None:
    model = tmp_path / "channels/model"
    shutil.copytree(sparse, model)
    channels = [model]
    for name in ("train", "validation"):
        channels.append(tmp_path / "channels" / name)
        channels[-1].mkdir()
        shutil.copy(examples / f"{name}.jsonl", channels[-1])
    recipe = finetune_recipe(sparse, examples).to_toml()
    given = {"training__epochs": "8", "logging__checkpoint_steps": "1000"}
    container = Container(tmp_path / "ml", drivers, recipe, given, channels)
    status, said = container.interrupt(3, OURS)
    assert status == 0 and "train.py: stopped; the job resumes" in said
    assert not (container.root / "output/failure").exists()
    digest = container.finish(OURS)
    assert (container.root / "model/opfa.json").is_file()
    long = {"training": {"epochs": 8.0}, "logging": {"checkpoint_steps": 1000}}
    finetune(finetune_recipe(sparse, examples, **long), tmp_path / "unbroken")
    done = json.loads((tmp_path / "unbroken/done.json").read_text())
    assert digest == done["model_sha256"]


def test_pre_training_on_two_processes_loses_nothing_by_either_torchrun(
    drivers: Path, prepared: Path, tmp_path: Path
) -> None:
    recipe = pretrain_recipe(
        prepared,
        pruning={"schedule": {"end": 20, "every": 4, "target": 0.9}},
        training={"steps": 40},
        logging={"every_steps": 1, "checkpoint_steps": 1000},
        launch={"timeout_seconds": 300},
    ).to_toml()
    data = tmp_path / "channels/data"
    shutil.copytree(prepared, data)
    (tmp_path / "recipe.toml").write_text(recipe)
    script = str(SAGEMAKER.parent / "torchrun.sh")
    command = ["bash", script, "recipe.toml", "unbroken", f"data={data}"]
    settings = outside(GPUS="2", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    settings["PATH"] = f"{Path(sys.executable).parent}:{settings['PATH']}"
    subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, check=True)
    digests = {json.loads((tmp_path / "unbroken/done.json").read_text())["model_sha256"]}

    ours = Container(tmp_path / "ours", drivers, recipe, {}, [data])
    status, said = ours.interrupt(5, OURS, GPUS="2")
    assert status == 0 and "train.py: stopped; the job resumes" in said, said
    digests.add(ours.finish(OURS, GPUS="2"))
    assert len(digests) == 1

    torchrun = THEIRS.format(DRIVERS, ML, "torchrun_driver.py")
    theirs = Container(tmp_path / "theirs", drivers, recipe, {}, [data])
    _, said = theirs.interrupt(8, torchrun, who="/torchrun")  # its driver hands no signal on
    assert "train.py: stopped; the job resumes" in said, said
    (theirs.root / "output/failure").unlink(missing_ok=True)  # a new container has none
    digests.add(theirs.finish(torchrun))
    assert len(digests) == 1


def test_a_failure_under_the_basic_driver_keeps_our_text(
    drivers: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(examples, examples).to_toml()
    container = Container(tmp_path / "ml", drivers, recipe, {"training__epoch": "3"}, [])
    with container.start(THEIRS.format(DRIVERS, ML, "basic_script_driver.py")) as process:
        said = process.communicate()[0]
    assert process.returncode == 2, said
    text = (container.root / "output/failure").read_text()
    assert text.startswith("hyperparameters: recipe.toml with training.epoch=3:\n")
    assert "training.epoch: unknown key; did you mean 'epochs'?" in text
