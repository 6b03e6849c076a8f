"""A run that is told to stop, at whatever moment, stops before anything else begins."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import finetune_recipe, pretrain_recipe
from test_survival import launched

from opfa.commands import app as cli
from opfa.downstream import finetune as finetuning
from opfa.downstream.sweep import sweep
from opfa.quickstart import quickstart
from opfa.report import pictures
from opfa.training import loop
from opfa.training.distributed import Stopped, Supervisor
from opfa.training.loop import Losses
from opfa.upstream import pretrain as pretraining

FEW = {"training": {"epochs": 0.3}}  # 3 steps
MOMENTS: dict[str, tuple[Any, str]] = {  # what is interrupted, of a run
    "writing the model": (finetuning, "write_finished"),
    "drawing": (pictures, "finetuning_pictures"),
    "marking it done": (finetuning.finished, "write"),
}


def tell(by: str, output: Path) -> None:
    """Tell a run to stop."""
    if by == "file":
        (output / "stop").touch()
    elif by == "a run's file":
        (output / "seed-42/stop").touch()
    else:
        os.kill(os.getpid(), signal.Signals[by])


def interrupting(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, stop: Callable[[], None]
) -> None:
    """Call `stop` the first time that this function is called."""
    function, calls = getattr(where, name), []

    def called(*values: object, **more: object) -> object:
        calls.append(name)
        if len(calls) == 1:
            stop()
        return function(*values, **more)

    monkeypatch.setattr(where, name, called)


@pytest.mark.parametrize(
    ("by", "moment"),
    [
        ("SIGTERM", "writing the model"),
        ("SIGTERM", "marking it done"),
        ("SIGINT", "writing the model"),
        ("file", "drawing"),
        ("a run's file", "drawing"),
    ],
)
def test_several_runs_told_to_stop_at_the_end_of_one_stop_before_the_next(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    by: str, moment: str, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "r.toml").write_text(finetune_recipe(sparse, examples, **FEW).to_toml())
    output = tmp_path / "out"
    where, name = MOMENTS[moment]
    interrupting(monkeypatch, where, name, lambda: tell(by, output))
    words = ["finetune", str(tmp_path / "r.toml"), "--output", str(output), "--seeds", "2"]
    assert cli.run(words) == 75
    assert "out: stopped before seed-43; continue with" in capsys.readouterr().err
    assert (output / "seed-42/done.json").exists()
    assert not (output / "seed-43").exists()
    assert not list(output.rglob("stop"))
    if by == "file":
        assert cli.run([*words, "--resume"]) == 0


@pytest.mark.parametrize("by", ["SIGTERM", "SIGINT"])
def test_several_runs_told_to_stop_while_the_next_is_loaded_stop_there(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    recipe = finetune_recipe(sparse, examples, **FEW)
    sweep(recipe, tmp_path / "out")
    interrupting(monkeypatch, finetuning, "load_tokenizer", lambda: tell(by, tmp_path))
    with pytest.raises(Stopped, match="nothing is lost"):
        sweep(recipe, tmp_path / "out", num_seeds=2, resume=True)
    assert not (tmp_path / "out/seed-43/checkpoints").exists()


def test_a_signal_to_a_run_that_diverges_is_not_lost(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = finetune_recipe(sparse, examples, **FEW)

    def diverges(*_: object) -> list[Losses]:
        tell("SIGTERM", tmp_path)
        return [(torch.tensor(torch.nan),)]

    monkeypatch.setattr(loop, "accumulate", diverges)
    with pytest.raises(Stopped, match="stopped before seed-43"):
        sweep(recipe, tmp_path / "out", num_seeds=2)


@pytest.mark.parametrize("moment", ["loading", "finishing"])
def test_one_run_told_to_stop_ends_with_75_or_is_whole(
    sparse: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    (tmp_path / "r.toml").write_text(finetune_recipe(sparse, examples, **FEW).to_toml())
    name = "load_tokenizer" if moment == "loading" else "write_finished"
    before = signal.getsignal(signal.SIGTERM)
    interrupting(monkeypatch, finetuning, name, lambda: tell("SIGTERM", tmp_path))
    words = ["finetune", str(tmp_path / "r.toml"), "--output", str(tmp_path / "out")]
    assert cli.run(words) == (75 if moment == "loading" else 0)
    assert (tmp_path / "out/done.json").exists() == (moment == "finishing")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("moment", ["loading", "finishing"])
def test_a_pretraining_told_to_stop_ends_with_75_or_is_whole(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    recipe = pretrain_recipe(prepared, training={"steps": 2, "warmup_steps": 0})
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    name = "open_together" if moment == "loading" else "write_finished"
    interrupting(monkeypatch, pretraining, name, lambda: tell("SIGTERM", tmp_path))
    words = ["pretrain", str(tmp_path / "r.toml"), "--output", str(tmp_path / "out")]
    assert cli.run(words) == (75 if moment == "loading" else 0)
    assert (tmp_path / "out/done.json").exists() == (moment == "finishing")


def test_the_quickstart_told_to_stop_does_not_begin_its_next_stage() -> None:
    done = []
    with Supervisor(60.0) as supervisor:
        supervisor.save_on_signals()
        with quickstart._stage("1/7  one", supervisor):
            tell("SIGTERM", Path())
            done.append(1)
        with (
            pytest.raises(Stopped, match="stopped before 2/7"),
            quickstart._stage("2/7  two", supervisor),
        ):
            done.append(2)
    assert done == [1]


def test_what_is_damaged_on_one_machine_ends_every_rank(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    path = next((tmp_path / "data/train").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    values = json.loads(pretrain_recipe(tmp_path / "data").model_dump_json(exclude_none=True))
    job = {"values": values, "output": str(tmp_path / "run")}
    with launched(job, tmp_path, ranks=2) as launch:
        assert launch.wait() == [2, 2]
        for rank in (0, 1):
            assert f"{path.relative_to(tmp_path / 'data')} has changed" in launch.said(rank)
    assert not (tmp_path / "run").exists()
