"""Runs that are killed, stopped, hung or fed bad numbers, on several ranks (gloo, CPU)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import outside, pretrain_recipe, pretrain_values
from launching import Launch

from opfa.errors import STOPPED
from opfa.training import distributed
from opfa.upstream.pretrain import pretrain

PROGRAM = Path(__file__).parents[1] / "ranks.py"
KILLS = int(os.environ.get("OPFA_KILLS", "4"))  # more of them say more, and take longer
STEPS = 9 * KILLS  # up to seven go by before each kill
SCHEDULE = {"start": 2, "end": STEPS // 2, "hold_until": STEPS - 6, "every": 2, "target": 0.9}


def launched(job: dict[str, Any], directory: Path, ranks: int) -> Launch:
    path = directory / "jobs.json"
    path.write_text(json.dumps([job]))
    return Launch("ranks", [path], directory, ranks)


@pytest.fixture(scope="module")
def teacher(prepared: Path) -> Path:
    directory = prepared.parent / "teacher"
    if not directory.exists():
        pretrain(pretrain_recipe(prepared), directory)
    return directory / "model"


def values(prepared: Path, teacher: Path, **launch: Any) -> dict[str, Any]:
    return pretrain_values(
        prepared,
        model={"init": str(teacher)},
        pruning={"schedule": SCHEDULE},
        distillation={"teacher": str(teacher)},
        training={"steps": STEPS, "precision": "fp32", "dropout": 0.1},
        logging={"every_steps": 1, "checkpoint_steps": 3, "evaluate_steps": 7},
        launch={"micro_batch": 2, **launch},
    )


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def trained(run: Path) -> list[dict[str, Any]]:
    return [row for row in lines(run / "metrics.jsonl") if "eval" not in row]


def until(condition: Callable[[], bool], launch: Launch, every: float = 0.01) -> bool:
    """Wait for something, looking every few seconds; False when the processes ended before."""
    end = time.monotonic() + 180
    while not condition():
        if launch.is_over:
            return False
        assert time.monotonic() < end, launch.said(0)[-2000:]
        time.sleep(every)
    return True


@pytest.fixture(scope="module")
def unbroken(prepared: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happened to."""
    root = tmp_path_factory.mktemp("unbroken")
    job = {"values": values(prepared, teacher), "output": str(root / "run")}
    with launched(job, root, 2) as launch:
        assert launch.wait() == [0, 0], launch.said(0)
    return root / "run"


def test_a_run_that_is_killed_again_and_again_equals_the_unbroken_one(
    prepared: Path, teacher: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    chance = random.Random(0)
    num_in_a_save, num_kills = 0, 0
    for attempt in range(KILLS + 1):
        job = {"values": values(prepared, teacher), "output": str(run), "resume": run.exists()}
        with launched({**job, "slow": 0.01}, tmp_path, 2) as launch:
            if attempt == KILLS:
                assert launch.wait() == [0, 0], launch.said(0)
                break
            before = len(trained(run))
            aim = before + chance.randrange(1, 5)
            is_running = until(lambda b=aim: len(trained(run)) >= b, launch)
            aside = run / "checkpoints/.incomplete"
            if attempt % 2 == 0:
                is_running = is_running and until(lambda a=aside: any(a.glob("*")), launch, 0.0005)
            else:
                time.sleep(chance.random() * 0.1)
            launch.kill()
            num_kills += is_running
            num_in_a_save += aside.exists()
    assert num_kills == KILLS
    assert num_in_a_save >= KILLS // 3
    for name in ("model/model.safetensors", "model/sparsity.json"):
        assert (run / name).read_bytes() == (unbroken / name).read_bytes()


def test_world_size_2_then_1_then_2_by_sigterm(
    prepared: Path, teacher: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for ranks, name, aim in ((2, "zero2", 8), (1, "zero1", 20), (2, "zero3", None)):
        file = PROGRAM.parent.parent / f"launch/{name}.json"
        chosen = values(prepared, teacher, deepspeed=str(file))
        chosen["training"]["dropout"] = 0.0
        job = {"values": chosen, "output": str(run), "resume": run.exists(), "slow": 0.01}
        with launched(job, tmp_path, ranks) as launch:
            if aim is None:
                assert launch.wait() == [0] * ranks, launch.said(0)
                break
            assert until(lambda a=aim: len(trained(run)) >= a, launch)
            launch.signal(-1, signal.SIGTERM)  # one rank is enough
            assert launch.wait() == [STOPPED] * ranks, launch.said(0)
            step = trained(run)[-1]["step"]
            assert aim <= step < STEPS
            assert f"stopped at step {step}" in launch.said(0)
    reference = tmp_path / "reference"
    chosen = values(prepared, teacher)
    chosen["training"]["dropout"] = 0.0
    with launched({"values": chosen, "output": str(reference)}, tmp_path, 1) as launch:
        assert launch.wait() == [0]
    masks = [row["masks"] for row in lines(reference.with_name("reference.watched.jsonl"))]
    found = {row["step"]: row["masks"] for row in lines(run.with_name("run.watched.jsonl"))}
    assert [found[step] for step in range(STEPS + 1)] == masks
    losses = [row["loss"] for row in trained(reference)]
    assert [row["loss"] for row in trained(run)] == pytest.approx(losses, rel=1e-5)


def test_a_killed_rank_ends_the_others_with_a_message(
    prepared: Path, teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = {"values": values(prepared, teacher), "output": str(run), "slow": 0.05}
    with launched(job, tmp_path, 2) as launch:
        assert until(lambda: len(trained(run)) >= 3, launch)
        launch.signal(1, signal.SIGKILL)
        assert launch.wait_for(0, 30) == 1
        assert "lost contact with another process while" in launch.said(0)
        assert "--resume" in launch.said(0)


def test_a_hung_rank_ends_the_others_in_time(prepared: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = values(prepared, teacher, timeout_seconds=30.0)
    with launched({"values": chosen, "output": str(run), "slow": 0.05}, tmp_path, 2) as launch:
        assert until(lambda: len(trained(run)) >= 3, launch)
        launch.signal(1, signal.SIGSTOP)
        assert launch.wait_for(0, 90) == distributed.HUNG
        assert "rank 0: nothing was finished for 30 s while" in launch.said(0)


def test_a_loss_that_is_not_finite_stops_every_rank_before_the_step(
    prepared: Path, teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = {"values": values(prepared, teacher), "output": str(run), "bad_step": 5}
    with launched(job, tmp_path, 2) as launch:
        assert launch.wait() == [2, 2]
        for rank in (0, 1):
            assert "step 5: the loss is not finite on rank [1]" in launch.said(rank)
    assert trained(run)[-1]["step"] == 4


def test_a_second_run_in_the_same_directory_is_refused(
    prepared: Path, teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = {"values": values(prepared, teacher), "output": str(run), "slow": 0.2}
    with launched(job, tmp_path, 1) as launch:
        assert until(lambda: len(trained(run)) >= 2, launch)
        (tmp_path / "other").mkdir()
        with launched({**job, "resume": True}, tmp_path / "other", 1) as second:
            assert second.wait() == [2]
            said = f"{run}: is being trained already, by process {launch.processes[0].pid} on"
            assert said in second.said(0)
        assert not launch.is_over


def test_ranks_whose_launcher_is_gone_end_too(
    prepared: Path, teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = {"values": values(prepared, teacher), "output": str(run), "slow": 0.2}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", str(PROGRAM)]
            + [str(tmp_path / "jobs.json")],
            env=outside(OMP_NUM_THREADS="1"),
            stdout=log,
            stderr=log,
        )
    end = time.monotonic() + 180
    while len(trained(run)) < 2:
        assert launcher.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    while "rank 0: the launcher is gone" not in (tmp_path / "log").read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(1.0)
    step = len(trained(run))
    time.sleep(1.0)
    assert len(trained(run)) == step < STEPS
