"""A recipe as text that people read: values are changed in it, and its comments stay.

The change is found by comparing values, not by reading overrides a second time. What came out is
parsed again, so a text that this can't edit (a list over several lines) is an error, not a wrong
recipe. Rejected: tomlkit, one more library for a page of code.
"""

import contextlib
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opfa.errors import RecipeError
from opfa.toml import toml_value

HEADER = re.compile(r"\[([^\[\]]+)\]\s*(?:#.*)?$")
COMMAND = re.compile(r"#\s+(opfa .*)")
READING = "check|prepare|pretrain|finetune|plan"  # commands whose first word is a recipe
Place = tuple[str, str]  # section, or "" before the first one, and key


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
    commands in its first comment say. All else stays.
    """
    shown, stem = shlex.quote(str(file)), shlex.quote(file.stem)
    lines = [line for line in text.splitlines() if not line.startswith("#:schema")]
    lines.insert(0, f"#:schema {schema}")
    for index, line in enumerate(lines):
        if COMMAND.match(line):
            rule = rf"(opfa (?:{READING}) )(?:\S*/)?{re.escape(name)}(?:\.toml)?(?=\s|$)"
            named = re.sub(rule, lambda match: f"{match[1]}{shown}", line)
            rule = rf"\b(runs|prepared)/{re.escape(name)}(?![\w-])"
            lines[index] = re.sub(rule, lambda match: f"{match[1]}/{stem}", named)
    return "\n".join(lines) + "\n"


def changed(text: str, after: Mapping[str, Any], where: str) -> str:
    """The text with other values and the same comments."""
    before, lines = tomllib.loads(text), text.splitlines()
    for section in [each for each in _sections(before) if each not in list(_sections(after))]:
        _remove_section(lines, section)
    old, new = dict(_leaves(before)), dict(_leaves(after))
    for section, key in old.keys() - new.keys():
        if (index := _find(lines, section, key)) is not None:
            del lines[index]
    for place, value in new.items():
        if place not in old or old[place] != value or type(old[place]) is not type(value):
            _put(lines, *place, value)
    found = "\n".join(lines) + "\n"
    with contextlib.suppress(tomllib.TOMLDecodeError):  # a part of a list over several lines
        if tomllib.loads(found) == after:
            return found
    raise RecipeError(f"{where}: its text can't be changed like this; edit the file instead")


def _sections(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{prefix}{key}"
            yield from _sections(value, f"{prefix}{key}.")


def _leaves(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[Place, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{section}.{key}".lstrip("."))
        else:
            yield (section, key), value


def _bounds(lines: list[str], section: str) -> tuple[int, int] | None:
    """The first line of a section, its header left out, and the one after its last."""
    headers = [
        (i, match[1].strip()) for i, line in enumerate(lines) if (match := HEADER.match(line))
    ]
    starts = [(0, ""), *((index + 1, name) for index, name in headers)]
    ends = [*(index for index, _ in headers), len(lines)]
    return next(
        ((start, end) for (start, name), end in zip(starts, ends, strict=True) if name == section),
        None,
    )


def _find(lines: list[str], section: str, key: str, comment: str = "") -> int | None:
    """The line of a key, or with `comment` the comment that suggests it."""
    start, end = _bounds(lines, section) or (0, 0)
    rule = re.compile(rf"{comment}{re.escape(key)}\s*=")
    return next((index for index in range(start, end) if rule.match(lines[index])), None)


def _put(lines: list[str], section: str, key: str, value: Any) -> None:  # Any: as in TOML
    """Write a value in its line, in the one that suggests it, or in a new one."""
    line = f"{key} = {toml_value(value)}"
    index = _find(lines, section, key)
    if index is None:
        index = _find(lines, section, key, r"#\s*")
    if index is not None:
        lines[index] = line + _comment(lines[index].removeprefix("#").strip())
        return
    bounds = _bounds(lines, section)
    if bounds is None:
        lines += ["", f"[{section}]", line]
        return
    start, end = bounds
    keys = [i for i in range(start, end) if lines[i].strip() and not lines[i].startswith("#")]
    lines.insert(keys[-1] + 1 if keys else start, line)


def _comment(line: str) -> str:
    """What stands behind a value, with the blanks before it."""
    for match in re.finditer(r"\s*#", line):
        try:
            tomllib.loads(line[: match.start()])
        except tomllib.TOMLDecodeError:
            continue  # a # within a text
        return line[match.start() :]
    return ""


def _remove_section(lines: list[str], section: str) -> None:
    """Take a section out; a comment right above the next one belongs to that one."""
    if (bounds := _bounds(lines, section)) is None:
        return
    start, end = bounds
    while end < len(lines) and lines[end - 1].startswith("#"):
        end -= 1
    del lines[start - 1 : end]
