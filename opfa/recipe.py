"""Recipes: strict TOML files that become frozen, typed objects, which the code uses as they are.

Unknown keys are refused, all problems of a file are in one error, and nothing is repaired.
`section.key=value` (TOML on the right, or a bare word) replaces a key. Everything is bounded, so
that a wrong or hostile recipe is refused in seconds.
"""

import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opfa.errors import RecipeError, brief, not_plain, redacted
from opfa.toml import to_toml

SCALARS = {"str", "int", "float", "bool"}
MOST_BYTES = 1 << 20  # of a recipe file
MOST_CHARACTERS = 4_096  # of a text; a path has no more
MOST_ITEMS = 100_000  # of a list
MOST_KEYS = 1_000  # of a section
DEEPEST = 16  # sections and lists within each other
MOST_PROBLEMS = 20  # that are reported
LONGEST_PART = 60  # characters of a key that are shown, between two dots
MOST_SHOWN = 3  # overrides and keys in one message
MOST_ITEMS_SHOWN = 10  # of a list
LARGEST = 3.4e38  # of fp32
WRONG = {"": []}  # in the place of a value that was reported already; no key accepts it
# tomllib takes time and memory that grow with the square of a dotted key's length
DOTTED = re.compile(
    r"""(?<![\w"'-])(?:(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){100}"""
)
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # half of a surrogate pair is a byte that was no UTF-8

KINDS = {"pretrain": "corpus", "finetune": "task", "search": "search"}  # sections that tell

Name = Annotated[str, Field(max_length=200)]
Seed = Annotated[int, Field(ge=0, lt=1 << 62)]  # --seeds counts on from it, within 64 bits
Batch = Annotated[int, Field(ge=1, le=1 << 20)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of everything a recipe can say; recipes/README.md shows the text below each key."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Recipe(Section):
    """A whole recipe file."""

    @classmethod
    def read(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Read, override and check a recipe; raises `RecipeError` with its problems at once."""
        return cls.checked(read_values(path, overrides), brief(path, 300), overrides)

    @classmethod
    def checked(cls, values: Mapping[str, Any], where: str, overrides: Sequence[str]) -> Self:
        """`check` values that were overridden; a message names the overrides that it is about."""
        try:
            return cls.check(values, where)
        except RecipeError as error:
            named = [o for o in overrides if o.partition("=")[0].strip() in str(error)]
            given = f" with {' '.join(map(brief, named[:MOST_SHOWN]))}" if named else ""
            raise RecipeError(str(error).replace(where, f"{where}{given}", 1)) from None

    @classmethod
    def check(cls, values: Mapping[str, Any], where: str = "recipe") -> Self:
        """Make a recipe from plain values."""
        if (command := command_of(values)) and KINDS[command] not in cls.model_fields:
            what = f"has [{KINDS[command]}], so it is for opfa {command}"
            raise RecipeError(f"{where}: this recipe {what}")
        problems: dict[str, str] = {}  # by key
        bounded = _bounded(values, (), problems)
        found = None
        try:
            # JSON mode: strict about types, but lists may fill tuples and strings may fill enums.
            found = cls.model_validate_json(json.dumps(bounded))
        except ValidationError as error:
            reported = tuple(f"{key}." if key else "" for key in problems)
            for each in map(dict, error.errors(include_url=False)):
                key = _dotted(_place(cls, each)[0])
                if key not in problems and not key.startswith(reported):
                    problems[key] = _explain(cls, each) if len(problems) < MOST_PROBLEMS else ""
        if found is not None and not problems:
            return found
        lines = list(problems.values())
        if more := len(lines[MOST_PROBLEMS:]):
            lines[MOST_PROBLEMS:] = [f"and {more:,} more"]
        raise RecipeError(f"{where}:\n  " + "\n  ".join(lines))

    def to_toml(self) -> str:
        """The resolved recipe as text, complete and reusable, without the secrets in it."""
        return to_toml(redacted(self.model_dump(mode="json", exclude_none=True)))

    def check_packages(self) -> None:
        """Raise `RunError` if a package is missing that a run of this recipe needs."""

    def sha256(self) -> str:
        """Digest of the resolved values, whatever the file looked like, without secrets."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()


RecipeType = TypeVar("RecipeType", bound=Recipe)


def read_values(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe file says, overridden and not checked yet."""
    where = brief(path, 300)
    try:
        values = _parsed(read_small(path, where, "recipe"))
    except ValueError as error:
        raise RecipeError(f"{where}: not valid TOML: {brief(error, 200)}") from error
    for text in overrides:
        override_value(values, text)
    return values


def command_of(values: Mapping[str, Any]) -> str | None:
    """The command that a recipe is for, if one section tells."""
    found = [command for command, section in KINDS.items() if section in values]
    return found[-1] if len(found) == 1 or found == ["finetune", "search"] else None


def read_small(path: Path | str, where: str, kind: str) -> str:
    """The text of a small file; raises `RecipeError`, whose message begins with `where`."""
    problem = f"{where}: can't read this {kind}"
    try:
        path = Path(path)
        if reason := not_plain(path):
            raise RecipeError(f"{problem}: {reason}")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise RecipeError(f"{problem}: more than {MOST_BYTES:,} bytes")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{problem}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or a zero byte in the path
        raise RecipeError(f"{problem}: {error}") from error


def _parsed(text: str) -> dict[str, Any]:
    """TOML's values; raises `ValueError`."""
    if DOTTED.search(text):
        raise ValueError("a key has more than 100 parts")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError(f"more than {DEEPEST} sections or lists within each other") from error
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:
        raise ValueError("an integer has too many digits; 64 bits hold at most 19") from error


def override_value(values: dict[str, Any], given: str) -> None:
    """Put one section.key=value into plain values; raises `RecipeError`."""
    key, separator, text = given.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(f"{brief(given)!r}: an override reads section.key=value")
    if len(parts) > DEEPEST:
        raise RecipeError(f"{brief(given)!r}: its key has more than {DEEPEST} parts")
    target: Any = values  # Any: whatever TOML can hold
    for index, part in enumerate(parts[:-1]):
        items = len(target) if isinstance(target, list) else None
        target = _inside(target, part, dict | list if parts[index + 2 :] else dict)
        if target is None:
            what = f"is none of {items} sections, from 0" if items else "is a value, not a section"
            raise RecipeError(f"{brief(given)!r}: {brief(part)!r} {what}")
    if not text.strip():
        target.pop(parts[-1], None)
        return
    try:
        found = _parsed(f"value = {text}")
    except tomllib.TOMLDecodeError:
        found = {"value": text.strip()}  # a bare word, such as a path
    except ValueError as error:
        raise RecipeError(f"{brief(given)!r}: {error}") from error
    if len(found) > 1:
        raise RecipeError(f"{brief(given)!r}: more than one value")
    target[parts[-1]] = found["value"]


def _inside(target: Any, part: str, kind: type | UnionType) -> Any:  # Any: as above
    """A section in a section, new if need be, or an item of a list, by its number from 0."""
    if isinstance(target, list):
        target = {str(number): item for number, item in enumerate(target)}
        return target[part] if isinstance(target.get(part), kind) else None
    return target[part] if isinstance(target.setdefault(part, {}), kind) else None


def _bounded(  # Any: what TOML and JSON can hold
    value: Any, location: tuple[str | int, ...], problems: dict[str, str]
) -> Any:
    """The same value without what is beyond the bounds, which goes to the problems by key."""
    problem = _problem(value, is_deep=len(location) > DEEPEST)
    if problem is not None:
        key = _dotted(location)
        problems[key] = f"{key}: {problem}" if key else problem
        return WRONG
    if isinstance(value, list):
        return [_bounded(item, (*location, i), problems) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: _bounded(item, (*location, key), problems) for key, item in value.items()}
    return value


def _problem(value: Any, *, is_deep: bool) -> str | None:  # Any: as above
    """What is wrong with a value under any key, its parts left out."""
    match value:
        case str() if len(value) > MOST_CHARACTERS:
            return f"{len(value):,} characters, at most {MOST_CHARACTERS:,} are accepted"
        case str() if NO_TEXT.search(value):
            return f"must be a text in UTF-8 without zero bytes (got {ascii(brief(value))})"
        case int() if not -(1 << 63) <= value < 1 << 63:
            return "must be an integer of at most 64 bits"
        case float() if math.isfinite(value) and abs(value) > LARGEST:
            return f"must be within fp32, from -{LARGEST} to {LARGEST} (got {value})"
        case list() | Mapping() if is_deep:
            return f"more than {DEEPEST} sections or lists within each other"
        case Mapping() if NO_TEXT.search("".join(value)):
            return "its keys must be texts in UTF-8 without zero bytes"
        case list() | Mapping():
            most = MOST_ITEMS if isinstance(value, list) else MOST_KEYS
            is_long = len(value) > most
            return f"{len(value):,} values, at most {most:,} are accepted" if is_long else None
        case None | str() | int() | float():
            return None
    return f"a {type(value).__name__} has no place in a recipe; write a text (got {brief(value)})"


def _place(
    root: type[BaseModel], error: Mapping[str, Any]
) -> tuple[Sequence[str | int], Mapping[str, Any] | None, bool]:
    """The key of pydantic's error, the known keys of its section (None in a table of free names),
    and whether each of several allowed types has an error.
    """
    location = error["loc"]
    is_scalar = error["type"] != "extra_forbidden" and bool(set(location[-1:]) & SCALARS)
    key, models, known = list[str | int](), [root], None
    for part in location[:-1] if is_scalar else location:
        if len(models) > 1:  # of several kinds; pydantic's place has the chosen one
            models = [model for model in models if model.model_fields["kind"].default == part]
            continue
        key.append(part)
        if isinstance(part, int):  # of a list
            continue
        known = models[0].model_fields if models else None
        kind = known[part].annotation if known and part in known else None
        kinds = [each for each in (kind, *get_args(kind)) if isinstance(each, type)]
        models = [each for each in kinds if issubclass(each, BaseModel)]
    return key, known, is_scalar


def _explain(root: type[BaseModel], error: Mapping[str, Any]) -> str:
    location, known, is_scalar = _place(root, error)
    key, value = _dotted(location), error["input"]
    if error["type"] == "extra_forbidden":
        last, names = str(location[-1]), list(known or ())
        near = difflib.get_close_matches(last[:100], names, n=1)
        allowed = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
        letters = "" if last.isascii() else f" ({brief(ascii(last))})"  # they may look like others
        return f"{key}: unknown key{letters}; {allowed}"
    if error["type"].startswith("union_tag"):
        key, value = f"{key}.kind", error["ctx"].get("tag")
    if error["type"] in ("missing", "union_tag_not_found"):
        return f"{key}: missing; this key is required"
    message = brief(error["msg"].removeprefix("Value error, "), 500)
    if error["type"] == "union_tag_invalid":
        message = f"must be one of {error['ctx']['expected_tags']}"
    message = "must be a string, a number or a boolean" if is_scalar else message
    message = message.replace("Input should be a valid array", 'must be a list, such as ["a", "b"]')
    shown = "" if isinstance(value, dict) else f" (got {_shown(value)})"
    return f"{key}: {message}{shown}" if key else message


def _shown(value: Any) -> str:  # Any: whatever JSON can hold
    if isinstance(value, list) and len(value) > MOST_ITEMS_SHOWN:
        return f"{brief(repr(redacted(value[:MOST_ITEMS_SHOWN]))[:-1])}, ..."
    return brief(repr(redacted(value)))


def _dotted(location: Sequence[str | int]) -> str:
    """A key as a recipe has it, with long parts cut."""
    return ".".join(brief(part, LONGEST_PART) for part in map(str, location))
