"""The house: rooms whose imports only go down, and one door to each outside library."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "opfa"
FLOORS = [  # rooms of one floor don't know each other; a file at the top is a room of its own
    {"errors", "toml"},
    {"recipe", "extras"},
    {"storage"},
    {"data", "sparsity"},
    {"compression", "report"},
    {"hub"},
    {"weights"},
    {"models", "integrations"},
    {"training", "tasks", "runtime"},
    {"upstream", "downstream"},
    {"releases", "inference", "quickstart"},
    {"search", "serving"},
    {"api", "bench"},
    {"commands"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_that_name(library: str) -> set[str]:
    return {
        room_of(path)
        for path in FILES
        if any(name.split(".")[0] == library for name in imports(path))
    }


def test_every_room_has_its_floor() -> None:
    assert {room_of(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    known = {name.split(".")[1] for name in imports(path) if name.startswith("opfa.")} & set(FLOOR)
    assert not {other for other in known - {room} if FLOOR[other] >= FLOOR[room]}


def test_the_top_has_at_most_six_files() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_tests_mirror_the_rooms() -> None:
    folders = {path.parent.name for path in Path(__file__).parent.glob("*/test_*.py")}
    assert folders <= set(FLOOR)


def test_only_the_engine_names_deepspeed() -> None:
    users = {path.name for path in FILES if any(i.startswith("deepspeed") for i in imports(path))}
    assert users == {"engine.py"}


def test_only_the_hub_names_huggingface_hub() -> None:
    assert rooms_that_name("huggingface_hub") == {"hub"}


BASES = {"PreTrainedModel", "PreTrainedTokenizerBase", "PretrainedConfig"}  # types of signatures
TRANSFORMERS = {  # by room what it names beyond those, and why
    "models": None,  # it is the door
    "integrations": None,  # opfa inside of transformers: its trainer, its loading
    "tasks": {"BatchEncoding"},  # what a tokenizer returns: tokens, and where they are in the text
    "runtime": {"BaseModelOutput", "BaseModelOutputWithPooling"},  # what an encoder returns
}


def test_rooms_name_only_the_base_classes_of_transformers_beside_its_door() -> None:
    for path in FILES:
        names = {n for n in imports(path) if n.split(".")[0] == "transformers"}
        allowed = TRANSFORMERS.get(room_of(path), set())
        if allowed is not None:
            assert {name.rpartition(".")[2] for name in names} <= BASES | allowed, path


def test_no_file_is_longer_than_a_reader_likes() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in FILES}
    assert not {str(path): size for path, size in sizes.items() if size > 300}
