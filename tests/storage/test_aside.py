"""Temporary places: never links, used by one process at a time, gone when it is interrupted."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import finetune_recipe, pretrain_recipe

from opfa.commands import app as cli
from opfa.downstream import evaluate as evaluating
from opfa.errors import RunError
from opfa.hub import download as downloading
from opfa.inference import export as exporting
from opfa.releases import release as releasing
from opfa.storage.files import new_directory, new_file, work_directory, write_text
from opfa.storage.temporary import held, lock
from opfa.training.checkpoint import save_point
from opfa.training.run import Run
from opfa.upstream import corpus

Plant = Callable[[Path, Path], None]


def link(place: Path, victim: Path) -> None:
    place.symlink_to(victim)


def link_to_file(place: Path, victim: Path) -> None:
    place.symlink_to(victim / "kept/a.txt")


def dangling(place: Path, victim: Path) -> None:
    place.symlink_to(victim / "new")


def loop(place: Path, _: Path) -> None:
    place.symlink_to(place.name)


def hard_link(place: Path, victim: Path) -> None:
    os.link(victim / "kept/a.txt", place)


def pipe(place: Path, _: Path) -> None:
    os.mkfifo(place)


def directory_of_links(place: Path, victim: Path) -> None:
    (place / "sub").mkdir(parents=True)
    (place / "model.safetensors").symlink_to(victim / "kept/a.txt")
    (place / "config.json").symlink_to(victim / "new")
    (place / "kept").symlink_to(victim / "kept")
    (place / "sub/a").symlink_to(victim)
    os.link(victim / "kept/a.txt", place / "tokenizer.json")
    os.link(victim / "kept/a.txt", place / "README.md")


PLANTS = [link, link_to_file, dangling, loop, hard_link, pipe, directory_of_links]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory that nothing may touch."""
    victim = tmp_path / "victim"
    (victim / "kept").mkdir(parents=True)
    (victim / "kept/a.txt").write_text("precious")
    return victim


def check(victim: Path) -> None:
    found = {path.relative_to(victim).as_posix() for path in victim.rglob("*")}
    assert found == {"kept", "kept/a.txt"}
    assert (victim / "kept/a.txt").read_text() == "precious"


def make_directory(output: Path) -> None:
    with new_directory(output) as work:
        (work / "model.safetensors").write_text("ours")


def make_file(output: Path) -> None:
    write_text(output, "ours")


def make_run(output: Path) -> None:
    with Run(output, pretrain_recipe(output / "data"), steps=1):
        pass


def make_point(output: Path) -> None:
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_point(output / "checkpoints", 1, lambda to: write_text(to / "a", "x"), {}, keep=1)


PLACES = [  # a temporary place, below the parent of the output; and what uses it
    (".out.incomplete", make_directory),
    (".out.incomplete/files", make_directory),
    (".out.incomplete/.lock", make_directory),
    (".out.incomplete/other", make_directory),
    (".out.incomplete", make_file),
    (".out.incomplete/files", make_file),
    (".out.incomplete/.lock", make_file),
    ("out/.lock", make_run),
    ("out/.recipe.toml.incomplete", make_run),
    ("out/checkpoints/.incomplete", make_point),
]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize(("name", "make"), PLACES)
def test_what_is_planted_in_a_temporary_place_leads_nowhere(
    tmp_path: Path, victim: Path, name: str, make: Callable[[Path], None], plant: Plant
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    plant(tmp_path / name, victim)
    make(tmp_path / "out")
    check(victim)
    assert not (tmp_path / ".out.incomplete").exists()
    assert make is not make_file or (tmp_path / "out").read_text() == "ours"
    assert make is not make_directory or [p.name for p in (tmp_path / "out").iterdir()] == [
        "model.safetensors"
    ]
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.fixture(scope="module")
def place(
    prepared: Path, sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory with recipes, a finished run and a release of it."""
    place = tmp_path_factory.mktemp("place")
    write_text(place / "up.toml", pretrain_recipe(prepared).to_toml())
    recipe = finetune_recipe(sparse, examples, training={"epochs": 0.2})
    write_text(place / "down.toml", recipe.to_toml())
    words = ["finetune", f"{place}/down.toml", "--output", f"{place}/ready"]
    assert cli.run(words) == 0
    words = ["release", f"{place}/ready", "--output", f"{place}/packed", "--format", "compact"]
    assert cli.run(words) == 0
    return place


COMMANDS = {
    "prepare": "prepare up.toml --output {}",
    "release": "release ready --output {}",
    "unpack": "unpack packed --output {}",
    "calibrate": "calibrate ready/model --recipe down.toml --output {}",
    "download": "download packed --output {}",
    "export": "export ready/model --output {}",
    "evaluate": "evaluate ready/model --recipe down.toml --output {}",
}


def words_of(command: str, output: Path) -> list[str]:
    return [word.replace("{}", str(output)) for word in COMMANDS[command].split()]


@pytest.mark.parametrize("name", [".out.incomplete", ".out.incomplete/files"])
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "export"])
def test_no_command_follows_a_planted_link(
    place: Path,
    tmp_path: Path,
    victim: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
) -> None:
    monkeypatch.chdir(place)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    link(tmp_path / name, victim)
    assert cli.run(words_of(command, tmp_path / "out")) == 0
    check(victim)
    assert (tmp_path / "out").exists() and not (tmp_path / "out").is_symlink()
    assert not os.path.lexists(tmp_path / ".out.incomplete")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "evaluate"])
def test_a_second_process_with_the_same_output_is_refused_at_once(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    if command == "download":
        pytest.skip("waits; see test_download.py")
    monkeypatch.chdir(place)
    with work_directory(tmp_path / "out") as work:
        (work / "a").write_text("of the first")
        assert cli.run(words_of(command, tmp_path / "out")) == 2
        assert "out: is being written by another process" in capsys.readouterr().err
        assert (work / "a").read_text() == "of the first"
    assert not list(tmp_path.iterdir())


def test_what_another_process_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    make_directory(tmp_path / "out")
    with pytest.raises(RunError, match="exists already"), new_directory(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from opfa.storage.files import new_directory
with new_directory(Path(sys.argv[1])) as work:
    (work / "old").write_text("half")
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert (tmp_path / ".out.incomplete/files/old").exists()
    (tmp_path / ".out.incomplete/older").write_text("of a version before")
    make_directory(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_directories_that_were_made_for_an_output_go_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_directory(tmp_path / "a/b/out"):
        raise KeyError
    with pytest.raises(KeyError), new_file(tmp_path / "a/b/out"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_lock_with_a_second_name_still_keeps_others_out(tmp_path: Path) -> None:
    """As in a backup by hard links, made while a run trains."""
    with (tmp_path / ".lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        os.link(tmp_path / ".lock", tmp_path / "backup")
        with pytest.raises(BlockingIOError):
            lock(tmp_path / ".lock")
    lock(tmp_path / ".lock").close()
    assert (tmp_path / "backup").stat().st_ino != (tmp_path / ".lock").stat().st_ino


@pytest.mark.parametrize("usual", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_given_back(tmp_path: Path, usual: signal.Signals) -> None:
    before = signal.getsignal(usual)
    with held(tmp_path / "out"):
        assert signal.getsignal(usual) != before
    assert signal.getsignal(usual) == before


STALLED = {  # where a command is in the middle; `prepare` in worker processes of its own
    "prepare": (corpus, "_cut_group"),
    "release": (releasing, "inspect_checkpoint"),
    "unpack": (releasing, "verify"),
    "calibrate": (evaluating, "fill_finished"),
    "export": (exporting.onnx_graph, "trace"),
    "download": (downloading, "_check_code"),
}


def begin(directory: Path, words: list[str], stalled: tuple[Any, str]) -> int:
    """A process that runs a command, and stalls in the middle of it for a minute."""

    def stall(*_: Any, **__: Any) -> None:
        (directory / "begun").touch()
        time.sleep(60)

    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stderr = (directory / "said").open("w")
    setattr(*stalled, stall)
    status = 1
    try:
        status = cli.run(words)
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> int:
    """The exit code of a process that has to end soon."""
    for _ in range(3000):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("ending", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
@pytest.mark.parametrize("command", STALLED)
def test_a_command_that_is_interrupted_leaves_nothing_that_passes_for_whole(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    ending: signal.Signals,
    status: int,
) -> None:
    monkeypatch.chdir(place)
    child = begin(tmp_path, words_of(command, tmp_path / "new/out"), STALLED[command])
    while not (tmp_path / "begun").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), (tmp_path / "said").read_text()
        time.sleep(0.02)
    os.killpg(child, ending)  # as a terminal does: its children too
    assert ended(child) == status
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said and said.splitlines()[-1].startswith("opfa: ")
    assert not (tmp_path / "new/out").exists()
    assert not (tmp_path / "new").exists()
