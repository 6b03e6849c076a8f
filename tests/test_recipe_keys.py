"""The keys of all recipes, in recipes/README.md and as JSON schemas, are those of the code.

    OPFA_REWRITE=1 pytest tests/test_recipe_keys.py

writes both anew.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, Field

from opfa.compression.scores import Magnitude
from opfa.downstream.recipe import FinetuneRecipe
from opfa.recipe import Recipe, Section
from opfa.search.recipe import SearchRecipe
from opfa.upstream.recipe import PretrainRecipe

RECIPES = Path(__file__).parents[1] / "recipes"
KINDS: dict[str, type[Recipe]] = {
    "pretrain": PretrainRecipe,
    "finetune": FinetuneRecipe,
    "search": SearchRecipe,
}
SAME = {"search": FinetuneRecipe}  # whose keys are listed already
BEGIN, END = "<!-- keys: OPFA_REWRITE=1 pytest tests/test_recipe_keys.py -->", "<!-- /keys -->"
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def sections(
    kind: type[BaseModel], name: str = "", *, is_optional: bool = False
) -> Iterator[tuple[str, type[BaseModel], bool]]:
    """A model and the models in it: name in a recipe, class, and whether it is off by default. Of
    several in a list the name ends with [], and they have what is listed of their base, and more.
    """
    yield name, kind, is_optional
    for key, field in kind.model_fields.items():
        for inner in sections_of(field.annotation):
            path, is_off = f"{name}.{key}".lstrip("."), field.default is None
            if get_origin(field.annotation) is tuple:
                yield f"{path}[]", inner, not field.is_required()
            else:
                yield from sections(inner, path, is_optional=is_off)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The section that a key is; all of them where its `kind` chooses one."""
    found = (annotation, *get_args(annotation))
    return [each for each in found if isinstance(each, type) and issubclass(each, BaseModel)]


def type_of(schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in schema:
        return ", ".join(type_of(each) for each in schema["anyOf"] if each["type"] != "null")
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{json.dumps(v)}`" for v in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} of {type_of(schema['prefixItems'][0])}"
    if schema["type"] == "array":
        return f"list of {type_of(schema['items'])}"
    if schema["type"] == "object":
        return f"table of {type_of(schema['additionalProperties'])}"
    bounds = [f"{sign} {bound(schema[key])}" for key, sign in BOUNDS.items() if key in schema]
    return " ".join([schema["type"], *bounds])


def bound(value: float) -> str:
    """A limit in figures; 2^62 for one of 19 digits."""
    exponent = int(value).bit_length() - 1
    return f"2^{exponent}" if value >= 1e12 and value == 2**exponent else f"{value:.12g}"


def table(name: str, kind: type[BaseModel], *, is_optional: bool) -> list[str]:
    properties = kind.model_json_schema()["properties"]
    rows = []
    known = kind.__mro__[1].__annotations__ if name.endswith("[]") else {}
    for key, field in kind.model_fields.items():
        if sections_of(field.annotation) or key in known:
            continue
        default = "*required*" if field.is_required() else f"`{json.dumps(field.default)}`"
        default = "" if default == "`null`" else default
        cells = (f"`{key}`", type_of(properties[key]), default, str(field.description))
        rows.append(" | ".join(cell.replace("|", "\\|") for cell in cells))
    doc = " ".join(str(kind.__doc__).split())
    title = f"#### `[{name}]`" if name else "#### (no section)"
    title = f"#### `[[{name[:-2]}]]`" if name.endswith("[]") else title
    title += ", optional" if is_optional else ""
    head = ["", "| key | type | default | meaning |", "| --- | --- | --- | --- |"] if rows else []
    return ["", title, "", doc, *head, *(f"| {row} |" for row in rows)]


def page() -> str:
    lines = []
    for command, kind in KINDS.items():
        lines += ["", f"### `opfa {command}`"]
        known = [name for name, *_ in sections(SAME[command])] if command in SAME else []
        if known:
            lines += ["", f"All sections of `opfa finetune` but `[sweep]`, and `[{command}]`:"]
        for name, section, is_optional in sections(kind):
            if name not in known:
                lines += table(name, section, is_optional=is_optional)
    return "\n".join([*lines, ""])


def schema(kind: type[Recipe]) -> str:
    return json.dumps(kind.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


@pytest.fixture(scope="module", autouse=True)
def _rewrite() -> None:
    if os.environ.get("OPFA_REWRITE"):
        text = (RECIPES / "README.md").read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        (RECIPES / "README.md").write_text(f"{before}{BEGIN}\n{page()}\n{END}{after}")
        for name, kind in KINDS.items():
            (RECIPES / f"schema/{name}.json").write_text(schema(kind))


def test_the_readme_has_all_keys() -> None:
    found = (RECIPES / "README.md").read_text().split(BEGIN)[1].split(END)[0]
    assert found == f"\n{page()}\n"


def test_every_kind_of_a_section_is_listed() -> None:
    class Random(Section):
        kind: Literal["random"] = "random"

    class Either(Section):
        score: Annotated[Magnitude | Random, Field(discriminator="kind")] = Magnitude()

    assert [(name, kind) for name, kind, _ in sections(Either)][1:] == [
        ("score", Magnitude),
        ("score", Random),
    ]


def test_a_section_is_optional_where_it_is_off_by_default() -> None:
    optional = {name for name, _, is_optional in sections(FinetuneRecipe) if is_optional}
    several = {"pruning.parts[]"}
    assert optional == several | {"selection", "sweep", "distillation", "pruning", "quantization"}


@pytest.mark.parametrize("value, expected", [(1 << 62, "2^62"), (1 << 20, "1048576"), (0.5, "0.5")])
def test_a_limit_is_written_exactly(value: float, expected: str) -> None:
    assert bound(value) == expected


@pytest.mark.parametrize("name", KINDS)
def test_the_schema_is_that_of_the_recipe(name: str) -> None:
    assert (RECIPES / f"schema/{name}.json").read_text() == schema(KINDS[name])


@pytest.mark.parametrize("name", KINDS)
def test_every_key_has_one_line(name: str) -> None:
    for section, kind, _ in sections(KINDS[name]):
        for key, field in kind.model_fields.items():
            line = field.description or ""
            is_section = sections_of(field.annotation)
            assert is_section or (line.endswith(".") and "\n" not in line), f"{section}.{key}"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.toml")), ids=lambda path: path.name)
def test_every_recipe_names_its_schema(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    target = path.parent / first.removeprefix("#:schema ")
    keys = json.loads(target.read_text())["properties"]
    assert first.startswith("#:schema ") and ("corpus" in keys) == ("[corpus" in path.read_text())
    assert ("search" in keys) == ("[search]" in path.read_text())
