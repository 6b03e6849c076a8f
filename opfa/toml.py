"""Values as TOML, in one fixed form: a recipe's digest is the digest of this text."""

import json
from collections.abc import Mapping
from typing import Any


def to_toml(values: Mapping[str, Any], prefix: str = "") -> str:
    """Nested values as text, a section for each mapping."""
    plain = {k: v for k, v in values.items() if not isinstance(v, Mapping)}
    lines = [f"{_key(key)} = {toml_value(value)}" for key, value in plain.items()]
    for key, value in values.items():
        if isinstance(value, Mapping):
            name = f"{prefix}{_key(key)}"
            lines += ["", f"[{name}]", to_toml(value, f"{name}.").rstrip("\n")]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    is_bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if is_bare else toml_value(key)


def toml_value(value: Any) -> str:  # Any: whatever JSON can hold
    """A value as TOML writes it."""
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    # TOML's strings, numbers and booleans are JSON's, but for its escapes of emoji and of DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
