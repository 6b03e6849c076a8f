"""A recipe as text that people read: values are changed in it, and its comments stay.

tomlkit changes the text where a value differs. What came out is parsed again by tomllib and
compared with the values that were asked for, so there is an error or the right recipe.
"""

import contextlib
import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opfa.errors import RecipeError

COMMAND = re.compile(r"#\s+(opfa .*)")
READING = "check|prepare|pretrain|finetune|plan"  # commands whose first word is a recipe
ABOVE = re.compile(r"((?:^#.*\n)+)(^\[.*\n)", re.MULTILINE)  # comments of a section, and its header
BELOW = re.compile(r"(^\[.*\n)((?:^#\ue000.*\n)+)", re.MULTILINE)  # the same while it is changed


def what_it_is(text: str) -> str:
    """The first line of a recipe's first comment."""
    lines = [line for line in text.splitlines() if not line.startswith("#:")]
    return lines[0][1:].strip() if lines and lines[0].startswith("#") else ""


def commands_in(text: str) -> list[str]:
    """The commands that a recipe's first comment shows."""
    head = text.partition("\nname =")[0]
    found = (COMMAND.match(line) for line in head.splitlines())
    return [match[1].strip() for match in found if match]


def for_file(text: str, name: str, file: Path, schema: str) -> str:
    """The text of a shipped recipe as a file of one's own: where the schema is, and what the
    comments say of commands, and of places that are called after it. All else stays.
    """
    shown, stem = shlex.quote(str(file)), shlex.quote(file.stem)
    lines = [line for line in text.splitlines() if not line.startswith("#:schema")]
    lines.insert(0, f"#:schema {schema}")
    for index, line in enumerate(lines):
        if COMMAND.match(line):
            rule = rf"(opfa (?:{READING}) )(?:\S*/)?{re.escape(name)}(?:\.toml)?(?=\s|$)"
            lines[index] = re.sub(rule, lambda match: f"{match[1]}{shown}", line)
        if line.startswith("#") and not line.startswith("#:"):
            rule = rf"\b(runs|prepared)/{re.escape(name)}(?![\w-])"
            lines[index] = re.sub(rule, lambda match: f"{match[1]}/{stem}", lines[index])
    return "\n".join(lines) + "\n"


def changed(text: str, after: Mapping[str, Any], where: str) -> str:
    """The text with other values and the same comments; a new key is the last of its section.

    Raises `RecipeError` where the text can't be changed so.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    # tomlkit counts a comment right above a header to the section before it
    text = ABOVE.sub(lambda match: match[2] + match[1].replace("#", "#\ue000"), text)
    with contextlib.suppress(TOMLKitError, tomllib.TOMLDecodeError):
        document = tomlkit.parse(text)
        _change(document, tomllib.loads(text), after)
        found = document.as_string().rstrip("\n") + "\n"
        found = BELOW.sub(lambda match: match[2].replace("#\ue000", "#") + match[1], found)
        if _exact(tomllib.loads(found)) == _exact(after):
            return found
    raise RecipeError(f"{where}: its text can't be changed like this; edit the file instead")


def _change(table: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Touch only what differs in a table of tomlkit."""
    from tomlkit import item, nl
    from tomlkit.items import Table

    for key in before.keys() - after.keys():
        del table[key]
    for key, value in after.items():
        old = before.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            _change(table[key], old, value)
        elif key not in before or _exact(old) != _exact(value):
            new = item(value)
            if isinstance(new, Table):
                new.add(nl())
            table[key] = new


def _exact(value: Any) -> str:  # Any: as in TOML
    """Another text for 1, 1.0 and true, which Python takes for equal."""
    return json.dumps(value, sort_keys=True, default=repr)
