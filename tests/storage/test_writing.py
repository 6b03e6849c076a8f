"""What a disk refuses while a command writes: one message, and nothing half-written."""

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import finetune_recipe, pretrain_recipe

from opfa.commands import app as cli
from opfa.errors import RunError
from opfa.storage.files import write_text, writing

COMMANDS = {
    "prepare": "prepare up.toml --output {}",
    "pretrain": "pretrain up.toml --output {}",
    "finetune": "finetune down.toml --output {}",
    "seeds": "finetune down.toml --seeds 2 --output {}",
    "release": "release ready --output {}",
    "compact": "release ready --format compact-int8 --output {}",
    "unpack": "unpack packed --output {}",
    "calibrate": "calibrate ready/model --recipe down.toml --output {}",
    "export": "export ready/model --output {}",
    "download": "download packed --output {}",
    "evaluate": "evaluate ready/model --recipe down.toml --output {}",
    "predictions": "evaluate ready/model --recipe down.toml --predictions {}",
    "plot": "inspect ready/model --plot {}",
    "quickstart": "quickstart --output {}",
}
LIMITS = {  # bytes of a file, so that another one fails each time
    "prepare": (0, 2_000, 11_000),
    "pretrain": (0, 1_000, 8_000),
    "finetune": (40, 1_000, 30_000),
    "seeds": (0, 3_000),
    "release": (0, 1_000, 8_000),
    "compact": (4_000, 12_000),
    "unpack": (1_000, 20_000),
    "calibrate": (0, 20_000),
    "export": (0, 3_000),
    "download": (0, 3_000, 12_000),
    "evaluate": (0,),
    "predictions": (300,),
    "plot": (0, 8_000),
    "quickstart": (0, 20_000),
}
SPACES = {"prepare": (0, 20_000), "finetune": (16_000,), "release": (0, 30_000), "plot": (0,),
          "unpack": (20_000,), "calibrate": (20_000,), "export": (8_000,), "download": (20_000,),
          "predictions": (0,), "pretrain": (0,), "quickstart": (100_000,)}  # fmt: skip
OF_A_RUN = {"recipe.toml", "environment.json", "metrics.jsonl", ".lock", "checkpoints"}


@pytest.fixture(scope="module")
def place(
    prepared: Path, sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory with recipes, a finished run and a release of it."""
    place = tmp_path_factory.mktemp("place")
    write_text(place / "up.toml", pretrain_recipe(prepared, training={"steps": 4}).to_toml())
    down = finetune_recipe(sparse, examples, logging={"checkpoint_steps": 2})
    write_text(place / "down.toml", down.to_toml())
    words = ["finetune", f"{place}/down.toml", "--output", f"{place}/ready"]
    assert cli.run(words) == 0
    words = ["release", f"{place}/ready", "--output", f"{place}/packed", "--format", "compact"]
    assert cli.run(words) == 0
    return place


def words_of(command: str, output: Path) -> list[str]:
    return [word.replace("{}", str(output)) for word in COMMANDS[command].split()]


@contextlib.contextmanager
def limit(num_bytes: int) -> Iterator[None]:
    """No file may become longer than this."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def check(command: str, output: Path, capsys: pytest.CaptureFixture[str], reason: str) -> None:
    """The command fails with one message, and leaves nothing that passes for whole."""
    capsys.readouterr()
    assert cli.run(words_of(command, output)) == 2
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith("opfa: ") and reason in last and "Traceback" not in said
    assert str(output) in last
    left = {path.relative_to(output.parent).parts for path in output.parent.rglob("*")}
    assert not [parts for parts in left if any("incomplete" in part for part in parts)]
    if command in ("pretrain", "finetune", "seeds"):
        names = {part for parts in left for part in parts[1:] if not part.startswith("seed-")}
        assert names <= OF_A_RUN
    else:
        assert not output.exists()


@pytest.mark.parametrize(
    ("command", "num_bytes"), [(c, n) for c, limits in LIMITS.items() for n in limits]
)
def test_a_limit_on_a_files_size_is_one_message(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    num_bytes: int,
) -> None:
    monkeypatch.chdir(place)
    (tmp_path / "new").mkdir()
    with limit(num_bytes):
        check(command, tmp_path / "new/out.png", capsys, "file too large")


@pytest.mark.parametrize(
    ("command", "space"), [(c, n) for c, spaces in SPACES.items() for n in spaces]
)
def test_a_disk_that_fills_up_is_one_message(
    place: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    space: int,
) -> None:
    monkeypatch.chdir(place)
    (small_disk / "new").mkdir()
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - space))
    reason = "are free here" if command == "download" else "no space left on device"
    check(command, small_disk / "new/out.png", capsys, reason)


def test_a_disk_that_wandbs_files_fill_is_one_message(
    place: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    with contextlib.suppress(
        ConnectionError
    ):  # its service may have ended with a forked child of a test
        wandb.teardown()
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 24_000))
    output = small_disk / "out"
    assert cli.run([*words_of("finetune", output), "logging.wandb=offline"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"opfa: {output}/") and "no space left on device" in last
    assert {path.name for path in output.iterdir()} <= {*OF_A_RUN, "wandb"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("command", ["prepare", "finetune", "release", "predictions", "plot"])
def test_what_a_disk_refuses_when_it_is_synced_is_one_message(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    number: int,
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "new").mkdir()
    check(command, tmp_path / "new/out.png", capsys, os.strerror(number).lower())


def test_errors_of_libraries_are_told_by_their_cause(tmp_path: Path) -> None:
    def failing() -> None:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos") from None

    with pytest.raises(RunError, match="no space left on device"), writing(tmp_path / "out"):
        failing()
    with pytest.raises(RunError, match="file too large"), writing(tmp_path / "out"):
        raise ValueError("I/O error: File too large (os error 27)")


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), FileNotFoundError(2, "No such file", "/input"), ValueError("[Errno 2]")],
)
def test_a_fault_of_ours_is_not_told_as_the_disks(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), writing(tmp_path / "out"):
        raise error


def test_a_copy_that_fails_names_the_new_file(tmp_path: Path) -> None:
    def copy() -> Any:
        with writing(tmp_path / "out"), limit(2):
            shutil.copyfile(__file__, tmp_path / "copied")

    with pytest.raises(RunError, match="out: can't be written: .*/copied: file too large"):
        copy()
