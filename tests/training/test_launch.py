"""The scripts of launch/: restarts, stopping, and what they start."""

import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import outside, pretrain_recipe

from opfa.storage.files import write_text

LAUNCH = Path(__file__).parents[2] / "launch"
QUICK = {"RESTART_SECONDS": "0", "OMP_NUM_THREADS": "1", "GPUS": "2"}
QUICK["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed has functions compiled that none of these runs calls
STEPS = 40


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def until_done(run: Path, command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", f'source {LAUNCH}/until_done.sh; until_done "$@"', "-", str(run), command],
        env=outside(**QUICK, **settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_run_that_dies_is_resumed_until_it_is_done(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = script(
        tmp_path / "train",
        f'mkdir -p {run}; touch {run}/recipe.toml; echo "x $*" >> {tmp_path}/calls\n'
        f"[ $(wc -l < {tmp_path}/calls) -lt 3 ] && exit 9; touch {run}/done.json",
    )
    assert until_done(run, command).returncode == 0
    assert (tmp_path / "calls").read_text().splitlines() == ["x ", "x --resume", "x --resume"]


def test_restarts_are_bounded_and_an_exit_code_of_0_is_not_believed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = f"mkdir -p {run}; touch {run}/recipe.toml; echo x >> {tmp_path}/calls; exit 0"
    done = until_done(run, script(tmp_path / "train", text), MAX_RESTARTS="2")
    assert done.returncode == 1
    assert "giving up" in done.stderr
    assert (tmp_path / "calls").read_text().count("x") == 3


def test_a_refused_recipe_is_not_tried_again(tmp_path: Path) -> None:
    text = f"echo x >> {tmp_path}/calls; exit 2"
    assert until_done(tmp_path / "run", script(tmp_path / "train", text)).returncode == 2
    assert (tmp_path / "calls").read_text() == "x\n"


def test_a_run_that_was_told_to_stop_is_not_started_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = (
        f"mkdir -p {run}; touch {run}/recipe.toml {run}/stopped; echo x >> {tmp_path}/calls; exit 1"
    )
    assert until_done(run, script(tmp_path / "train", text)).returncode == 75
    assert (tmp_path / "calls").read_text() == "x\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_pause_ends_it_and_leaves_no_sign_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    text = f"mkdir -p {run}; touch {run}/recipe.toml; echo x >> {tmp_path}/calls; exit 9"
    command = script(tmp_path / "train", text)
    process = subprocess.Popen(
        # What nohup lets a shell ignore no trap of it gets.
        ["env", "--default-signal", "bash", "-euc"]
        + [f'source {LAUNCH}/until_done.sh; until_done "$@"', "-", str(run), command],
        env=outside(RESTART_SECONDS="60"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "restart 1 of 3 in 60 s" in process.stderr.readline()
    process.send_signal(number)
    assert process.wait(20) == 75
    assert not (run / "stop").exists()
    assert (tmp_path / "calls").read_text() == "x\n"


@pytest.mark.parametrize("name", ["pretrain.sh", "torchrun.sh"])
def test_a_mistake_is_refused_before_anything_is_started(
    recipe: Path, tmp_path: Path, name: str
) -> None:
    command = ["bash", str(LAUNCH / name), str(recipe), str(tmp_path / "run"), "training.steps=0"]
    refused = subprocess.run(
        command, env=outside(**QUICK), capture_output=True, text=True, check=False, timeout=60
    )
    assert refused.returncode == 2
    assert refused.stderr.count("training.steps: Input should be greater") == 1
    assert "launch.py" not in refused.stderr and "torchrun" not in refused.stderr


@pytest.fixture
def recipe(prepared: Path, tmp_path: Path) -> Path:
    made = pretrain_recipe(
        prepared,
        training={"steps": STEPS},
        pruning={"schedule": {"end": 20, "every": 5, "target": 0.9}},
        logging={"checkpoint_steps": 50},
    )
    write_text(tmp_path / "recipe.toml", made.to_toml())
    return tmp_path / "recipe.toml"


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("name", "by"),
    [("pretrain.sh", "SIGTERM"), ("torchrun.sh", "file")],
)
def test_a_run_that_is_stopped_saves_and_the_same_command_finishes_it(
    recipe: Path, tmp_path: Path, name: str, by: str
) -> None:
    run = tmp_path / "run"
    command = ["bash", str(LAUNCH / name), str(recipe), str(run), "launch.micro_batch=1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=outside(**QUICK, DS_ACCELERATOR="cpu"), stdout=log, stderr=log
        )
    end = time.monotonic() + 120
    while len(rows(run)) < 3:
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.01)
    (run / "stop").touch() if by == "file" else process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    step = rows(run)[-1]["step"]
    assert step < STEPS
    assert f"stopped at step {step}, which is saved" in (tmp_path / "log").read_text()
    again = subprocess.run(
        command,
        env=outside(**QUICK),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {step}" in again.stderr
    assert (run / "done.json").exists()
    launches = json.loads((run / "environment.json").read_text())["launches"]
    assert [(launch["from_step"], launch["world_size"]) for launch in launches] == [
        (0, 2),
        (step, 2),
    ]


def test_slurm_starts_one_rank_a_task_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    run, tools = tmp_path / "run", tmp_path / "tools"
    (tmp_path / ".venv/bin").mkdir(parents=True)
    tools.mkdir()
    script(
        tmp_path / ".venv/bin/opfa",
        f"mkdir -p {run}; touch {run}/recipe.toml\n"
        'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $*" >> calls; exit 75',
    )
    script(
        tools / "srun",
        'shift 2; for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" || s=$?; '
        "done; exit $s",
    )
    script(
        tools / "scontrol",
        'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$*" >> requeued; fi',
    )
    settings = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "4"}
    job = ["bash", str(LAUNCH / "slurm.sbatch"), "r.toml", str(run), "a.b=c"]
    environment = outside(**settings, PATH=f"{tools}:{os.environ['PATH']}")
    for _ in range(2):
        subprocess.run(job, env=environment, cwd=tmp_path, check=True, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[:2] == [f"{i}/2 {i} node7 pretrain r.toml --output {run} a.b=c" for i in range(2)]
    assert calls[2].endswith(f"--output {run} --resume a.b=c")
    assert (tmp_path / "requeued").read_text().splitlines() == ["requeue 12"] * 2
    (run / "stopped").touch()
    last = subprocess.run(job, env=environment, cwd=tmp_path, check=False, timeout=60)
    assert last.returncode == 75
    assert (tmp_path / "requeued").read_text().splitlines() == ["requeue 12"] * 2


def test_the_kubernetes_job_is_whole_and_names_files_that_exist() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    words = container["command"][-1].split()
    files = [word for word in words if word.startswith(("launch/", "recipes/"))]
    assert len(files) == 2
    assert all((LAUNCH.parent / file).exists() for file in files)
