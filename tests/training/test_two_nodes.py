"""A real launch over two nodes: network namespaces, ssh, pdsh, `deepspeed --hostfile`."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import outside

from opfa.quickstart.quickstart import write_data
from opfa.upstream.corpus import prepare
from opfa.upstream.pretrain import pretrain
from opfa.upstream.recipe import PretrainRecipe
from opfa.weights.inspection import inspect

ROOT = Path(__file__).parents[2]
STEPS = 24


def nodes(what: str, directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    script = ["bash", str(ROOT / "tests/two_nodes.sh"), what, str(directory), *command]
    return subprocess.run(script, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two nodes, where this machine lets us make them."""
    missing = [tool for tool in ("ip", "pdsh", "ssh") if shutil.which(tool) is None]
    missing += [] if Path("/usr/sbin/sshd").exists() else ["sshd"]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root, iproute2, openssh and pdsh (missing: {missing})")
    directory = tmp_path_factory.mktemp("nodes")
    made = nodes("up", directory)
    try:
        if made.returncode:
            pytest.skip(f"this machine can't make two nodes: {made.stderr[-300:]}")
        yield directory
    finally:
        nodes("down", directory)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The quickstart's student with few steps, its data, and a teacher that was hardly trained."""
    root = tmp_path_factory.mktemp("quickstart")
    write_data(root / "data")
    data = [
        f"corpus.documents={json.dumps([str(root / 'data/documents.jsonl')])}",
        f"data={root / 'prepared'}",
        "logging.evaluate_examples=16",
    ]
    recipe = PretrainRecipe.read(
        ROOT / "recipes/quickstart/teacher.toml",
        [*data, "training.steps=3", "training.warmup_steps=0"],
    )
    prepare(recipe.corpus, root / "prepared")
    pretrain(recipe, root / "teacher")
    teacher = root / "teacher/model"
    schedule = {"pruning.schedule.end": 10, "pruning.schedule.hold_until": 16}
    schedule |= {"pruning.schedule.every": 2, "training.steps": STEPS, "training.warmup_steps": 2}
    return [
        *data,
        f"model.init={teacher}",
        f"distillation.teacher={teacher}",
        *(f"{key}={value}" for key, value in schedule.items()),
        "logging.every_steps=1",
        "logging.checkpoint_steps=4",
        "launch.timeout_seconds=60",
    ]


def launch(cluster: Path, run: Path, overrides: list[str]) -> "subprocess.Popen[bytes]":
    settings = {"HOSTFILE": cluster / "hostfile", "MASTER_ADDR": "10.77.0.1", "MAX_RESTARTS": 0}
    command = ["env", *(f"{key}={value}" for key, value in settings.items())]
    command += ["DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1", "bash", str(ROOT / "launch/pretrain.sh")]
    command += [str(ROOT / "recipes/quickstart/student.toml"), str(run), *overrides]
    script = ["bash", str(ROOT / "tests/two_nodes.sh"), "run", str(cluster), *command]
    with run.with_name(f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(script, stdout=log, stderr=log, cwd=ROOT, env=outside())


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_a_lost_node_ends_the_job_and_a_restart_gives_the_unbroken_masks(
    cluster: Path, overrides: list[str], tmp_path: Path
) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    said = unbroken.with_name("unbroken.log")
    assert launch(cluster, unbroken, overrides).wait(240) == 0, said.read_text()[-3000:]
    assert json.loads((unbroken / "environment.json").read_text())["world_size"] == 2

    broken = launch(cluster, run, overrides)
    end = time.monotonic() + 120
    while len(rows(run)) < 10:
        assert broken.poll() is None and time.monotonic() < end, said.read_text()[-3000:]
        time.sleep(0.02)
    nodes("lose", cluster)
    assert broken.wait(90) != 0
    assert not (run / "done.json").exists()
    assert rows(run)[-1]["step"] < STEPS

    assert nodes("up", cluster).returncode == 0
    assert launch(cluster, run, overrides).wait(240) == 0, run.with_name("run.log").read_text()[
        -3000:
    ]
    expected, found = inspect(str(unbroken / "model")), inspect(str(run / "model"))
    assert found["fingerprint"] == expected["fingerprint"]
    assert (run / "model/model.safetensors").read_bytes() == (
        unbroken / "model/model.safetensors"
    ).read_bytes()
