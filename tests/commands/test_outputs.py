"""Outputs that can't be written are refused first, in one message, and nothing is touched."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import finetune_recipe, mounted, pretrain_recipe
from test_cli import HEAVY

from opfa.commands import app as cli
from opfa.search.recipe import SearchRecipe
from opfa.storage.files import write_text

COMMANDS = {  # words, with what doesn't exist as input; and what its output is
    "prepare": ("prepare up.toml --output {}", "directory"),
    "pretrain": ("pretrain up.toml --output {}", "run"),
    "finetune": ("finetune down.toml --output {}", "run"),
    "finetune, seeds": ("finetune down.toml --seeds 2 --output {}", "run"),
    "search": ("search search.toml --output {}", "run"),
    "evaluate": ("evaluate ./nowhere --recipe down.toml --output {}", "new file"),
    "predictions": ("evaluate ./nowhere --recipe down.toml --predictions {}", "file"),
    "calibrate": ("calibrate ./nowhere --recipe down.toml --output {}", "directory"),
    "export": ("export ./nowhere --output {}", "new file"),
    "predict": ("predict ./nowhere --output {}", "new file"),
    "report": ("export ./nowhere --output new.onnx --report {}", "file"),
    "release": ("release ./nowhere --output {}", "directory"),
    "pack": ("pack ./nowhere --output {}", "directory"),
    "shrink": ("shrink ./nowhere --output {}", "directory"),
    "trim": ("trim ./nowhere --text nowhere.txt --output {}", "directory"),
    "unpack": ("unpack ./nowhere --output {}", "directory"),
    "plot": ("inspect ./nowhere --plot {}", "file"),
    "page": ("inspect ./nowhere --page {}", "file"),
    "download": ("download ./nowhere --output {}", "directory"),
    "quickstart": ("quickstart --output {}", "run"),
    "bench": ("bench train --write {}", "file"),
}
OUTPUTS = {  # and for which kinds of outputs they are good
    "below a file": ("file/out", ()),
    "far below a file": ("file/a/b/out", ()),
    "a link to nothing": ("dangling", ()),
    "below a link to nothing": ("dangling/out", ()),
    "a loop": ("loop", ()),
    "below a loop": ("loop/a/out", ()),
    "a long name": ("n" * 256, ()),
    "too long while it is incomplete": ("n" * 250, ("run",)),
    "a long parent": ("n" * 256 + "/out", ()),
    "a long path": ("/".join(["n" * 100] * 39), ()),
    "a zero byte": ("a\0b", ()),
    "no name": ("", ()),
    "only a parent": ("missing/..", ()),
    "a directory in use": ("used", ()),
    "a file": ("file", ("file",)),
    "a link to a file": ("link", ()),
    "a picture that is a link": ("link.png", ()),
    "a picture that is a directory": ("used.png", ("directory", "run", "new file")),
    "a pipe": ("pipe", ()),
    "the null device": ("/dev/null", ()),
    "the standard output": ("/dev/stdout", ()),
    "below a device": ("/dev/null/out", ()),
    "in /proc": ("/proc/out", ()),
}
CASES = [
    (command, output)
    for command, (_, kind) in COMMANDS.items()
    for output, (_, good_for) in OUTPUTS.items()
    if kind not in good_for
    and (command, output) not in {("download", "a directory in use"), ("download", "no name")}
]


def words_of(command: str, output: str) -> list[str]:
    return [word.replace("{}", output) for word in COMMANDS[command][0].split()]


def tree(directory: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted(directory.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        found.append((str(path), path.read_text() if is_file else ""))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write_text(place / "up.toml", pretrain_recipe(place / "nowhere").to_toml())
    down = finetune_recipe(place / "nowhere", place)
    write_text(place / "down.toml", down.to_toml())
    values = {**down.model_dump(mode="json", exclude_none=True), "search": {}}
    write_text(place / "search.toml", SearchRecipe.check(values).to_toml())
    (place / "file").write_text("mine")
    (place / "dangling").symlink_to("nothing")
    (place / "loop").symlink_to("loop")
    (place / "link").symlink_to("file")
    (place / "link.png").symlink_to("file")
    (place / "used.png").mkdir()
    (place / "used").mkdir()
    (place / "used/thesis.tex").write_text("important")
    os.mkfifo(place / "pipe")
    return place


@pytest.mark.parametrize(("command", "output"), CASES)
def test_an_output_that_cant_be_written_is_refused_before_anything_is_read(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    output: str,
) -> None:
    monkeypatch.chdir(place)
    before = tree(place)
    assert cli.run(words_of(command, OUTPUTS[output][0])) == 2
    said = capsys.readouterr().err
    assert said.startswith("opfa: ") and said.count("\n") == 1 and len(said) < 1500
    assert "nowhere" not in said.replace("leads nowhere", "")
    assert tree(place) == before


def test_a_bad_output_is_refused_before_a_heavy_library_is_loaded(place: Path) -> None:
    code = f"""
import sys
from opfa.commands import app as cli
for words in {[words_of(command, "dangling/out") for command in COMMANDS]!r}:
    assert cli.run(words) == 2, words
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=place, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A read-only file system, where this machine lets us make one."""
    yield from mounted(tmp_path / "read-only", "ro")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_on_a_read_only_disk_is_refused(
    place: Path,
    read_only: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.chdir(place)
    for output in (read_only / "out.png", read_only / "a/b/out.png"):
        if command == "plot" and output.parent != read_only:
            continue  # for which a directory must exist
        assert cli.run(words_of(command, str(output))) == 2
        assert "read-only file system" in capsys.readouterr().err.lower()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")
def test_an_output_without_the_right_to_write_is_refused(place: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    code = f"""
import os, sys
import encodings.utf_8_sig  # while this interpreter's own files can be read
from opfa.commands import app as cli
from opfa.hub import download
os.seteuid(65534)
for words in {[words_of(command, "CLOSED/out.png") for command in COMMANDS]!r}:
    words = [word.replace("CLOSED", sys.argv[1]) for word in words]
    assert cli.run(words) == 2, words
"""
    for path in (place, *place.parents[:2], tmp_path, *tmp_path.parents[:1]):
        path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, str(closed)],
        capture_output=True,
        text=True,
        cwd=place,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("permission denied") == len(COMMANDS)
    assert not list(closed.iterdir())


@pytest.mark.parametrize("name", ["checkpoints", "model", "report", "wandb"])
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_file_in_the_way_inside_of_a_run_is_refused(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
) -> None:
    monkeypatch.chdir(place)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    for more in ([], ["--resume"]):
        assert cli.run([*words_of(command, str(tmp_path / "run")), *more]) == 2
        assert f"{name} is a file" in capsys.readouterr().err
    assert tree(tmp_path / "run") == [(str(tmp_path / "run" / name), "mine")]


def test_two_outputs_of_one_command_are_two_files(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    words = [*words_of("evaluate", "a.json"), "--predictions", "./a.json"]
    assert cli.run(words) == 2
    assert "are the same file" in capsys.readouterr().err
    assert cli.run(["export", "./nowhere", "--output", "a.onnx", "--report", "a.onnx"]) == 2
    assert "is the output too" in capsys.readouterr().err


def test_a_file_without_marks_is_refused_before_the_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.md").write_text("no marks")
    (tmp_path / "b.md").write_bytes(b"\xff\xfe")
    assert cli.run(["bench", "train", "--write", str(tmp_path / "a.md")]) == 2
    assert "has no <!-- opfa bench train -->" in capsys.readouterr().err
    assert cli.run(["bench", "train", "--write", str(tmp_path / "b.md")]) == 2
    assert "is not a text" in capsys.readouterr().err
