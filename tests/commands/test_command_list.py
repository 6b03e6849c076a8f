"""The list of commands in opfa/commands/README.md is the one of `--help`. Run as a program, this
file writes it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from opfa.commands.app import app
from opfa.report.between import write_between
from opfa.report.tables import Table

README = Path(__file__).parents[2] / "opfa/commands/README.md"


def rows(group: Any, words: str) -> Iterator[tuple[str, str, str]]:
    """Each command with the first line of its help and its example."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from rows(command, f"{words} {name}")
        else:
            example = command.epilog.removeprefix("Example: ")
            yield f"`{words} {name}`", command.help.splitlines()[0], f"`{example}`"


def listed() -> str:
    head = ("command", "what it does", "example")
    return Table(head, list(rows(typer.main.get_command(app), "opfa"))).markdown()


def test_the_list_of_commands_is_that_of_help() -> None:
    text = README.read_text()
    assert text.partition("<!-- commands -->\n")[2].partition("\n<!-- /commands -->")[0] == listed()


if __name__ == "__main__":
    write_between(README, "commands", listed())
