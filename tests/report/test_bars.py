"""Bars and log lines on a terminal of 80 columns."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import outside

CODE = """
import logging, os, sys
from opfa.commands.app import Lines
from opfa.report.bars import Bar
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Lines()])
with Bar("run 2 of 6", 40) as bar:
    for step in range(1, 41):
        bar.move_to(step)
        bar.say(f"loss {1 / step:.4f}")
        if step % 10 == 0:
            with bar.doing("evaluating"):
                logging.info("run 2 of 6: step %d/40, held out:  accuracy 0.5", step)
print("the end")
"""
CONTROL = re.compile(r"\x1b\[([\d;]*)([A-Za-z])|\x1b\[\?25[lh]|(\r)|(\n)|([^\x1b\r\n]+)")
COLOUR = re.compile(r"\x1b\[[\d;]*3[0-8]")


def screen(output: str) -> list[str]:
    """The lines that a terminal shows after this output."""
    lines, row, column = [""], 0, 0
    for number, letter, is_return, is_feed, text in CONTROL.findall(output):
        if is_return:
            column = 0
        elif is_feed:
            row, lines = row + 1, lines + [""] * (row + 2 - len(lines))
        elif letter == "A":
            row = max(0, row - int(number or 1))
        elif letter == "K":
            lines[row] = "" if number == "2" else lines[row][:column]
        elif text:
            old = lines[row].ljust(column)
            lines[row] = old[:column] + text + old[column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines if line.strip()]


def written(columns: int, **settings: str) -> str:
    """What a program writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = outside(TERM="xterm", **settings)
    program = subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=theirs, stderr=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # the program has ended
            break
        if not part:
            break
        output += part
    os.close(ours)
    assert program.wait() == 0
    return output.decode()


@pytest.mark.parametrize("columns", [80, 120])
def test_log_lines_stand_above_the_bar_and_neither_breaks_the_other(columns: int) -> None:
    output = written(columns, NO_COLOR="")
    *lines, bar, end = screen(output)
    assert lines == [
        f"run 2 of 6: step {step}/40, held out:  accuracy 0.5" for step in (10, 20, 30, 40)
    ]
    assert re.fullmatch(r"run 2 of 6 ━+ 40/40 .*loss 0\.0250", bar)
    assert len(bar) <= columns and COLOUR.search(output)
    assert end == "the end"


def test_bars_can_be_without_colour_and_turned_off() -> None:
    assert not COLOUR.search(written(80, NO_COLOR="1"))
    assert len(screen(written(80, TQDM_DISABLE="1"))) == 5
