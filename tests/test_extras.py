"""Optional packages: one place says how to get them, and pyproject.toml has what it says."""

import ast
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RunError
from opfa.extras import has, has_or_says, importing, require
from opfa.serving.archive import REQUIREMENTS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NAMES = {  # of packages that are imported by another name
    "huggingface_hub": "huggingface-hub",
    "jinja2": "jinja2",
    "prometheus_client": "prometheus-client",
    "sentence_transformers": "sentence-transformers",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
ALSO = {"numpy"}  # comes with those of the base, in any version that they accept


def names(requirements: Sequence[str]) -> set[str]:
    """Packages that requirements name; those of an extra for the extra."""
    found: set[str] = set()
    for requirement in requirements:
        match = re.match(r"([\w.-]+)(?:\[(.*?)\])?", requirement)
        assert match is not None
        name, extras = match.groups()
        parts = [names(EXTRAS[extra]) for extra in extras.split(",")] if extras else [{name}]
        found |= set().union(*parts)
    return found


def imported(node: ast.AST) -> set[str]:
    """What pip calls the packages of others that are imported in a piece of code."""
    found: set[str] = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            found |= {alias.name for alias in each.names}
        elif isinstance(each, ast.ImportFrom) and not each.level:
            found.add(str(each.module))
    tops = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) - {"opfa"}
    return {NAMES.get(name, name) for name in tops}


ELSEWHERE = ROOT / "opfa/serving/handler"  # runs without opfa, by a requirements.txt of its own


def blocks(tree: ast.AST) -> list[tuple[ast.With, str]]:
    """The blocks of `importing`, and what pip is asked for there."""
    found = []
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.With)):
        call = node.items[0].context_expr
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "importing":
            assert isinstance(call.args[1], ast.Constant)
            found.append((node, str(call.args[1].value)))
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "opfa").rglob("*.py")), ids=lambda p: p.stem)
def test_what_is_not_of_the_base_is_imported_in_a_block_that_says_how_to_get_it(
    path: Path,
) -> None:
    tree = ast.parse(path.read_text())
    for block, requirement in blocks(tree):
        assert imported(block) <= names([requirement])
        block.body = []
    for node in ast.walk(tree):  # after a check, or in a function of what has checked
        if isinstance(node, ast.FunctionDef) and path.name == "engine.py":
            node.body = []
    allowed = names(PROJECT["dependencies"]) | ALSO
    if path.parent == ELSEWHERE:
        allowed = names(REQUIREMENTS.split())
    assert imported(tree) <= allowed


def test_all_has_every_extra_but_a_compiler_and_those_of_development() -> None:
    apart = ("dev", "all", "runtime")
    everything = set().union(*(names(EXTRAS[e]) for e in EXTRAS if e not in apart))
    assert names(["opfa[all]"]) == everything
    assert everything <= names(["opfa[dev]"])
    assert not everything & names(PROJECT["dependencies"])


def test_a_missing_package_is_named_with_what_needs_it_and_its_command(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = r'^logging.wandb needs wandb: pip install "opfa\[wandb\]"$'
    assert not has("wandb") and has("torch") and not has("no_such_package")
    with pytest.raises(RunError, match=message):
        require("logging.wandb", "opfa[wandb]", "torch", "wandb")
    with pytest.raises(RunError, match=message), importing("logging.wandb", "opfa[wandb]"):
        import wandb  # noqa: F401
    broken = pytest.raises(RunError, match="a page: cannot import name 'nothing'")
    with broken, importing("a page", "x"):
        from json import nothing  # type: ignore[attr-defined] # noqa: F401
    with caplog.at_level("INFO"):
        assert not has_or_says("a picture", "opfa[plots]", "no_such_package")
    assert caplog.messages == [
        'a picture needs no_such_package: pip install "opfa[plots]"; left out'
    ]


@pytest.mark.parametrize(
    ("package", "section", "message"),
    [
        ("wandb", {"logging": {"wandb": "offline"}}, r"logging.wandb = 'offline' needs wandb"),
        ("datasets", {"task": {"hub": "a/b"}}, r"task.hub = 'a/b' needs datasets"),
    ],
)
def test_a_run_that_needs_a_missing_package_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, section: dict, message: str
) -> None:
    from opfa.training.run import check_output

    monkeypatch.setitem(sys.modules, package, None)
    values = {"name": "x", "model": {"init": "m"}, "task": {}, "training": {}, **section}
    values["training"] = {"learning_rate": 1e-3, "epochs": 1.0, "batch": 8}
    with pytest.raises(RunError, match=message):
        check_output(tmp_path / "run", FinetuneRecipe.check(values), resume=False)
    assert not (tmp_path / "run").exists()
