"""The page on which a text is tried: one HTML document, made when the server starts.

It loads nothing but itself and asks this server alone; its content security policy says so. Answers
become text in the page, never markup.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opfa.report.page import WEB as SHARED
from opfa.report.page import digest
from opfa.serving.asking import example
from opfa.tasks.recipe import Task

WEB = Path(__file__).parent / "web"
LIMIT = "texts are cut at {} tokens"
LIMITS = {"question-answering": "a long context is read in windows of {} tokens"}
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src '{style}'; "
    "script-src '{script}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def render(task: Task, about: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The page for a model, and its headers."""
    environment = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined
    )
    environment.trim_blocks = environment.lstrip_blocks = True
    style = _read(SHARED / "page.css") + _read(WEB / "try.css")
    script = _read(WEB / "try.js")
    fields = list(_fields(task))
    page = environment.get_template("try.html").render(
        about=about,
        fields=fields,
        limit=LIMITS.get(task.kind, LIMIT).format(task.sequence_tokens),
        data={"kind": task.kind, "text": task.text, "pair": task.text_pair},
        version=version("opfa"),
        style=Markup(style),  # ours
        script=Markup(script),  # ours
    )
    return page, {
        "Content-Security-Policy": POLICY.format(style=digest(style), script=digest(script)),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def _fields(task: Task) -> Iterator[dict[str, Any]]:
    """One for each column: its name, what it is, and what stands in it at first."""
    given = example(task)
    row = {task.text: given} if isinstance(given, str) else given
    for name, value in row.items():
        is_list = isinstance(value, list)
        yield {
            "name": name,
            "is_list": is_list,
            "hint": "one a line" if is_list else "",
            "value": "\n".join(value) if is_list else value,
            "lines": 6 if name == task.text_pair and task.kind == "question-answering" else 3,
        }


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
