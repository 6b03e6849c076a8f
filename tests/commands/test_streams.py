"""Standard streams that are closed, full, or left by their reader."""

import subprocess
import sys
from pathlib import Path

import pytest

OPFA = """
import sys
import typer
from opfa.commands import app as cli
cli.app = typer.Typer()
@cli.app.command()
def shown(): print("x" * 100_000)
@cli.app.command()
def refused(): raise cli.RunError("no")
cli.main()
"""
LIST = f"{sys.executable} -c '{OPFA}' shown"
REFUSED = f"{sys.executable} -c '{OPFA}' refused"


def ran(command: str, directory: Path) -> tuple[int, str]:
    """Exit code of the first program of a pipe, and what is said on stderr."""
    words = ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=directory, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("reader", ["true", "head -c 1 > /dev/null"])
def test_a_reader_that_leaves_is_no_error(tmp_path: Path, reader: str) -> None:
    assert ran(f"{LIST} | {reader}", tmp_path) == (0, "")


def test_a_full_disk_behind_stdout_is_one_message(tmp_path: Path) -> None:
    status, said = ran(f"{LIST} > /dev/full", tmp_path)
    assert status == 2
    assert said == "opfa: the standard output: can't be written: no space left on device\n"


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "2> /dev/full"])
def test_closed_streams_change_no_exit_code(tmp_path: Path, streams: str) -> None:
    assert ran(f"{LIST} {streams} | cat > /dev/null", tmp_path) == (0, "")
    assert ran(f"{REFUSED} {streams} | cat > /dev/null", tmp_path)[0] == 2


def test_a_message_never_goes_into_a_file_that_got_the_number_of_stderr(tmp_path: Path) -> None:
    code = """
import os, sys
from opfa.commands.streams import secure
secure()
with open("a", "wb") as file:
    os.write(2, b"a library says")
    print("and we", file=sys.stderr, flush=True)
"""
    assert ran(f"{sys.executable} -c '{code}' 2>&-", tmp_path)[0] == 0
    assert (tmp_path / "a").read_bytes() == b""


NOISY = """
import logging, os
import typer
from opfa.commands import app as cli
cli.app = typer.Typer()
@cli.app.command()
def noisy():
    log = logging.getLogger("opfa.x")
    log.debug("a row")
    log.info("a line, %s", os.environ.get("TQDM_DISABLE"))
    log.warning("a warning")
    print("a result")
cli.main()
"""


@pytest.mark.parametrize(
    ("switch", "said"),
    [
        ("", "a line, None\na warning\n"),
        ("--quiet", "a warning\n"),
        ("--verbose", "a row\na line, None\na warning\n"),
    ],
)
def test_how_much_is_said_beside_the_result(tmp_path: Path, switch: str, said: str) -> None:
    assert ran(f"{sys.executable} -c '{NOISY}' {switch}", tmp_path) == (0, said)


def test_quiet_and_verbose_exclude_each_other(tmp_path: Path) -> None:
    status, said = ran(f"{sys.executable} -c '{NOISY}' --quiet --verbose", tmp_path)
    assert (status, said) == (2, "opfa: --verbose and --quiet: give one of them\n")
