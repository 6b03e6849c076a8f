"""Values as TOML, in one fixed form: a recipe's digest is the digest of this text."""

import json
from collections.abc import Mapping
from typing import Any


def to_toml(values: Mapping[str, Any], prefix: str = "") -> str:
    """Nested values as text, a section for each mapping, also of a list of mappings."""
    plain = {k: v for k, v in values.items() if not _sections(v)}
    lines = [f"{_key(key)} = {toml_value(value)}" for key, value in plain.items()]
    for key, value in values.items():
        name = f"{prefix}{_key(key)}"
        head = f"[{name}]" if isinstance(value, Mapping) else f"[[{name}]]"
        for section in _sections(value):
            lines += ["", head, to_toml(section, f"{name}.").rstrip("\n")]
    return "\n".join(lines) + "\n"


def _sections(value: Any) -> list[Mapping[str, Any]]:  # Any: whatever JSON can hold
    """A mapping, or those of a list that has nothing else."""
    found = value if isinstance(value, list) else [value]
    return found if all(isinstance(each, Mapping) for each in found) else []


def _key(key: str) -> str:
    is_bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if is_bare else toml_value(key)


def toml_value(value: Any) -> str:  # Any: whatever JSON can hold
    """A value as TOML writes it."""
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    # TOML's strings, numbers and booleans are JSON's, but for its escapes of emoji and of DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
