"""Recipes: strict TOML files that become frozen, typed objects.

The object that a recipe fills is the object that the code uses. Unknown keys are refused, every
problem of a file is reported in one error, and nothing is repaired or guessed. A recipe says what
defines a result; values given on the command line as `section.key=value` (TOML syntax on the right,
bare words allowed) replace single keys.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from opfa.errors import RecipeError

SCALARS = {"str", "int", "float", "bool"}


class Section(BaseModel):
    """Base of everything a recipe can say: frozen, keyword-only, no unknown keys, no silent
    conversions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Recipe(Section):
    """A whole recipe file."""

    @classmethod
    def read(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Read, override and check a recipe; raises `RecipeError` with all problems at once."""
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: can't read this recipe: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{path}: not valid TOML: {error}") from error
        for override in overrides:
            _override(values, override)
        try:
            return cls.check(values, where=str(path))
        except RecipeError as error:
            named = [o for o in overrides if o.partition("=")[0].strip() in str(error)]
            given = f" with {' '.join(named)}" if named else ""
            raise RecipeError(str(error).replace(str(path), f"{path}{given}", 1)) from None

    @classmethod
    def check(cls, values: Mapping[str, Any], where: str = "recipe") -> Self:
        """Make a recipe from plain values."""
        try:
            # JSON mode: strict about types, but lists may fill tuples and strings may fill enums.
            return cls.model_validate_json(json.dumps(values, default=_not_a_value))
        except ValidationError as error:
            problems = [_explain(cls, dict(e)) for e in error.errors()]
            raise RecipeError(f"{where}:\n  " + "\n  ".join(dict.fromkeys(problems))) from None

    def to_toml(self) -> str:
        """Write the resolved recipe, complete and reusable."""
        return _toml(self.model_dump(mode="json", exclude_none=True))

    def sha256(self) -> str:
        """Digest of the resolved recipe: equal recipes, equal digests, whatever the file looked
        like.
        """
        return hashlib.sha256(self.to_toml().encode()).hexdigest()


RecipeType = TypeVar("RecipeType", bound=Recipe)


def _not_a_value(value: object) -> object:
    raise RecipeError(f"{value!r}: a {type(value).__name__} has no place in a recipe; write a text")


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(f"{override!r}: an override reads section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word, such as a path
    target = values
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise RecipeError(f"{override!r}: {part!r} is a value, not a section")
    if text.strip():
        target[parts[-1]] = value
    else:
        target.pop(parts[-1], None)


def _explain(root: type[BaseModel], error: dict[str, Any]) -> str:
    location = list(error["loc"])
    is_scalar = error["type"] != "extra_forbidden" and bool(set(location[-1:]) & SCALARS)
    if is_scalar:  # one of several errors, one for each type that a free value may have
        location.pop()
    key = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        known = _keys_at(root, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        allowed = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {allowed}"
    if error["type"] == "missing":
        return f"{key}: missing; this key is required"
    message = error["msg"].removeprefix("Value error, ")
    if is_scalar:
        message = "must be a string, a number or a boolean"
    value = error["input"]
    shown = "" if isinstance(value, dict) else f" (got {value!r})"
    return f"{key}: {message}{shown}" if key else message


def _keys_at(root: type[BaseModel], location: Iterable[str | int]) -> list[str]:
    model = root
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        candidates = [annotation, *get_args(annotation)]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return list(model.model_fields)
        model = models[0]
    return list(model.model_fields)


def _toml(values: Mapping[str, Any], prefix: str = "") -> str:
    plain = {k: v for k, v in values.items() if not isinstance(v, Mapping)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    for key, value in values.items():
        if isinstance(value, Mapping):
            name = f"{prefix}{_key(key)}"
            lines += ["", f"[{name}]", _toml(value, f"{name}.").rstrip("\n")]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    is_bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if is_bare else _value(key)


def _value(value: Any) -> str:  # Any: whatever JSON can hold
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    # TOML's strings, numbers and booleans are JSON's, but for its escapes of emoji and of DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
