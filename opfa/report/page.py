"""A page: one HTML file that needs no network, from a template and the data of a run or a model.

Styles, scripts and data stand inside. Whatever is inserted is escaped: texts by jinja2, data as
JSON that can't end its element. The page's content security policy allows nothing but this very
style and these very scripts, by their SHA-256, so not even a text that slipped through could run.
"""

import base64
import hashlib
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opfa.errors import redacted

WEB = Path(__file__).parent / "web"
SCRIPTS = {
    "run": ["charts.js"],
    "sweep": ["charts.js"],
    "search": ["front.js"],
    "model": ["matrix.js", "matrices.js"],
}


def render(
    name: str,
    values: Mapping[str, Any],
    data: Mapping[str, Any],
    blobs: Mapping[str, bytes],
) -> str:
    """The page `web/NAME.html` with the scripts `SCRIPTS[NAME]`. `values` are for the template. The
    script reads `data` as JSON, and `blobs` as base64 by their names.
    """
    loader = FileSystemLoader(WEB)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"percent": percent, "megabytes": megabytes, "shade": shade}
    style, script = _read("page.css"), "".join(map(_read, ["page.js", *SCRIPTS[name]]))
    return environment.get_template(f"{name}.html").render(
        **redacted(dict(values)),
        version=version("opfa"),
        style=Markup(style),  # ours
        script=Markup(script),  # ours
        style_digest=digest(style),
        script_digest=digest(script),
        data=redacted(_finite(data)),
        blobs={name: base64.b64encode(blob).decode() for name, blob in blobs.items()},
    )


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.2f}\N{NO-BREAK SPACE}%"


def megabytes(num_bytes: int) -> str:
    """Bytes in megabytes, of 10^6."""
    return (
        f"{num_bytes / 1e6:,.1f}\N{NO-BREAK SPACE}MB"
        if num_bytes >= 100_000
        else f"{num_bytes / 1e3:,.1f}\N{NO-BREAK SPACE}kB"
    )


def shade(share: float) -> int:
    """A share as one of the style's eleven shades."""
    return round(10 * share)


def _read(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """What a content security policy calls a script or a style that stands inside."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _finite(value: Any) -> Any:  # Any: what JSON can hold
    """The same with null for numbers that JSON doesn't have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
