"""launch/sagemaker/submit.py: the job that it makes, also by the real classes of Amazon's SDKs.

OPFA_SAGEMAKER3_PYTHON and OPFA_SAGEMAKER2_PYTHON are interpreters with `sagemaker-train` and
`sagemaker<3`; without them those tests are skipped.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import outside
from jobs import SAGEMAKER

from opfa.downstream.recipe import FinetuneRecipe
from opfa.storage.shipped import find_recipe
from opfa.training.run import Run

import submit  # isort: skip - jobs says where it is
import sdk  # isort: skip

ROLE = "arn:aws:iam::111122223333:role/r"
PLACE = ["--role", ROLE, "--instance", "ml.g5.xlarge"]
SPOT = ["--channel", "model=s3://b/m/", "--checkpoints", "s3://b/c", "--spot", "--hours", "2"]
PYTHONS = {n: os.environ.get(f"OPFA_SAGEMAKER{n}_PYTHON", "") for n in (2, 3)}


def planned(*words: str) -> dict[str, Any]:
    return submit.plan(submit.parser().parse_intermixed_args([*words, *PLACE]))


def test_a_dry_run_prints_the_job_and_needs_no_sdk(capsys: pytest.CaptureFixture[str]) -> None:
    submit.main(["sst2", "training.epochs=3", *PLACE, *SPOT, "seed=7", "--sdk", "3", "--dry-run"])
    job = json.loads(capsys.readouterr().out)
    assert job["hyperparameters"] == {"recipe": "sst2", "training__epochs": "3", "seed": "7"}
    assert job["channels"] == {"model": "s3://b/m/"}
    assert (job["spot"], job["seconds"], job["wait_seconds"]) == (True, 7200, 14400)
    assert (job["command"], job["name"], job["checkpoints"]) == (
        "finetune",
        "opfa-sst2",
        "s3://b/c",
    )
    job = planned("sst2", "training.epochs=3", "--sdk", "2")
    assert job["hyperparameters"] == {"recipe": "sst2", "training.epochs": "3"}
    assert job["wait_seconds"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sst2", "training.epoch=3"], "training.epoch: unknown key; did you mean 'epochs'"),
        (["sst2", "epochs=3"], "epochs: unknown key; known keys: name, seed"),
        (["sst22"], "did you mean 'sst2'"),
        (["sst2", "--spot"], "--spot: needs --checkpoints, or an interruption loses the run"),
        (
            ["sst2", "--channel", "training=s3://b"],
            "--channel training: unknown; opfa finetune",
        ),
        (["sst2", "--channel", "train=nowhere"], "--channel train=nowhere: no such place"),
        (["sst2", "--channel", "train"], "--channel train: reads NAME=VALUE"),
        (["sst2", "--instances", "2"], "--instances 2: fine-tuning is one process; give 1"),
        (["bert-base-90", "--instances", "2"], "give --channel run=fsx://"),
        (["bert-base-90", "--channel", "train=s3://b"], "opfa pretrain has data, model, teacher"),
        (
            ["sst2", "--instance", "ml.m5.xlarge"],
            "--instance ml.m5.xlarge: Hugging Face's",
        ),
        (["sst2", "--instances", "0"], "--instances, --hours: must be above 0"),
        (["sst2", "task.text='it'", "--sdk", "3"], "can't carry a single quote; write it with d"),
        (["sst2", f"task.text={'x' * 2501}"], "task.text: has 2,501 characters; SageMaker takes 2"),
        (["sst2", "--environment", "=x"], "--environment =x: reads NAME=VALUE"),
    ],
)
def test_what_would_fail_is_one_message_before_anything_is_uploaded(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        submit.main([*PLACE, *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("submit.py: ") and re.sub(r"\s+", " ", said).count(message) == 1, said


def test_a_missing_sdk_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for major, package in ((3, "sagemaker"), (2, "sagemaker<3")):
        monkeypatch.setitem(sys.modules, "sagemaker", None)  # pyright: ignore
        with pytest.raises(SystemExit):
            submit.main(["sst2", *PLACE, "--sdk", str(major)])
        said = capsys.readouterr().err
        assert said == f'submit.py: submit.py needs sagemaker: pip install "{package}"\n'


def test_what_is_uploaded_is_all_that_the_container_needs_and_little_else(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_bytes(find_recipe("sst2").read_bytes())
    (tmp_path / "code").mkdir()
    submit.stage(str(mine), tmp_path / "code")
    top = {path.name for path in (tmp_path / "code").iterdir()}
    scripts = {"train.py", "container.py", "torchrun.sh", "until_done.sh"}
    assert top == scripts | {*submit.PACKAGE, "recipe.toml", "requirements.txt"}
    assert (tmp_path / "code/recipe.toml").read_bytes() == mine.read_bytes()
    files = [path for path in (tmp_path / "code").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert not [path for path in files if path.suffix in (".pyc", ".so", ".png")]
    assert planned(str(mine))["hyperparameters"]["recipe"] == "recipe.toml"
    command = [sys.executable, "-c", "import opfa, train; print(opfa.__file__, train.__file__)"]
    environment = {k: v for k, v in outside().items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=tmp_path / "code",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    code = tmp_path / "code"
    assert done.stdout.split() == [str(code / "opfa/__init__.py"), str(code / "train.py")]


def test_metrics_are_found_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = FinetuneRecipe.read(find_recipe("sst2"))
    rows = [
        {"step": 5, "loss": 0.25, "distill_loss": 1.5, "learning_rate": 3e-05, "sparsity": 0.9},
        {"step": 5, "eval": True, "accuracy": 0.875},
        {"step": 9, "eval": True, "final": True, "accuracy": 0.9},
    ]
    with caplog.at_level("INFO"), Run(tmp_path / "run", recipe, steps=9) as run:
        for row in rows:
            run.log(row)
    text = caplog.text
    found = {name: re.findall(regex, text) for name, regex in submit.metrics_of(recipe).items()}
    assert {name: values for name, values in found.items() if values} == {
        "train:loss": ["0.25"],
        "train:distill_loss": ["1.5"],
        "train:learning_rate": ["3e-05"],
        "train:sparsity": ["0.9"],
        "validation:accuracy": ["0.875", "0.9"],
    }


def watched(tmp_path: Path, program: str) -> "subprocess.Popen[bytes]":
    """The first process of a version 2 container, which starts `program` as `train`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/train").write_text(f"#!/bin/bash\n{program}\n")
    (tmp_path / "bin/train").chmod(0o755)
    script = sdk.WATCH.format(run=tmp_path / "run")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    return subprocess.Popen(["/bin/bash", "-c", script], env={**os.environ, "PATH": path})


def test_a_signal_to_a_version_2_container_makes_the_file_that_stops_a_run(tmp_path: Path) -> None:
    stop = tmp_path / "run/stop"
    program = (
        f"touch {tmp_path}/begun; for i in $(seq 600); do [ -e {stop} ] && exit 75; sleep .05; done"
    )
    with watched(tmp_path, program) as process:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 75
    assert stop.exists()


def test_a_version_2_container_ends_as_its_training_does(tmp_path: Path) -> None:
    with watched(tmp_path, "exit 9") as process:
        assert process.wait(30) == 9


Asked = Callable[..., dict[str, Any]]


def asked(major: int, *words: str) -> tuple[dict[str, Any], list[str]]:
    """What the real SDK asks of the service, and which keys it uploads."""
    if not PYTHONS[major]:
        pytest.skip(f"needs OPFA_SAGEMAKER{major}_PYTHON, an interpreter with that SDK")
    here = Path(__file__).parent
    settings = outside(PYTHONPATH=f"{SAGEMAKER.parents[1]}:{here}")
    command = [PYTHONS[major], str(here / "by_sdk.py"), "sst2", *words, *PLACE]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (request,) = found["asked"]
    return request, found["keys"]


VPC = ["--channel", "run=fsx://fs-1/runs", "--subnet", "subnet-1", "--security-group", "sg-1"]


@pytest.mark.parametrize("major", [2, 3])
def test_the_real_sdk_asks_for_this_job(major: int) -> None:
    words = ["training.epochs=3", *SPOT, *VPC, "--output", "s3://b/out", "--environment", "A=b"]
    request, keys = asked(major, *words)
    algorithm = request["AlgorithmSpecification"]
    assert "huggingface-pytorch-training:2." in algorithm["TrainingImage"]
    names = {definition["Name"] for definition in algorithm["MetricDefinitions"]}
    assert {"train:loss", "train:sparsity", "validation:accuracy"} <= names
    given = request["HyperParameters"]
    if major == 3:
        assert given == {"recipe": "sst2", "training__epochs": "3"}
        assert any(key.endswith("/code/opfa/data/order.py") for key in keys)
    else:
        assert (given["recipe"], given["training.epochs"]) == ('"sst2"', '"3"')
        assert given["sagemaker_program"] == '"train.py"'
        assert keys[0].endswith("sourcedir.tar.gz")
        assert algorithm["ContainerEntrypoint"][2].startswith(
            "trap 'mkdir -p /opt/ml/input/data/run"
        )
    channels = {each["ChannelName"]: each["DataSource"] for each in request["InputDataConfig"]}
    assert channels["model"]["S3DataSource"]["S3Uri"] == "s3://b/m/"
    assert channels["run"]["FileSystemDataSource"] == {
        "FileSystemId": "fs-1",
        "FileSystemType": "FSxLustre",
        "DirectoryPath": "/runs",
        "FileSystemAccessMode": "rw",
    }
    assert request["EnableManagedSpotTraining"] is True
    assert request["StoppingCondition"] == {
        "MaxRuntimeInSeconds": 7200,
        "MaxWaitTimeInSeconds": 14400,
    }
    assert request["CheckpointConfig"]["S3Uri"] == "s3://b/c"
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://b/out"
    assert request["VpcConfig"] == {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
    assert request["ResourceConfig"]["InstanceType"] == "ml.g5.xlarge"
    assert request["RoleArn"] == ROLE and request["Environment"] == {"A": "b"}
    assert request["TrainingJobName"].startswith("opfa-sst2-")


@pytest.mark.parametrize("major", [2, 3])
def test_the_real_sdk_takes_an_image_of_one_s_own(major: int) -> None:
    request, _ = asked(major, "--image", "111122223333.dkr.ecr.us-east-1.amazonaws.com/mine:1")
    assert request["AlgorithmSpecification"]["TrainingImage"].endswith("/mine:1")
    assert not request.get("EnableManagedSpotTraining")
