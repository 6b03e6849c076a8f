"""The names that `import opfa` gives, and what they cost."""

import subprocess
import sys

import pytest
import typer

import opfa
from opfa.commands.app import app

PUBLIC = [
    "DataError",
    "DivergedError",
    "ModelError",
    "OpfaError",
    "PruningCallback",
    "RecipeError",
    "RunError",
    "SparsityGuard",
    "__version__",
    "archive",
    "calibrate",
    "check",
    "compare",
    "download",
    "evaluate",
    "export",
    "finetune",
    "fuse",
    "inspect",
    "list_models",
    "list_recipes",
    "load",
    "lock",
    "masked_lora",
    "new_recipe",
    "pack",
    "plan",
    "predict",
    "prepare",
    "pretrain",
    "prune",
    "prune_layers",
    "prune_structured",
    "push",
    "release",
    "search_models",
    "serve",
    "shrink",
    "trim",
    "unpack",
]


def test_these_names_are_public() -> None:
    assert sorted(opfa.__all__) == dir(opfa) == PUBLIC
    assert all(getattr(opfa, name) is not None for name in PUBLIC)


def test_they_are_the_objects_of_the_rooms() -> None:
    from opfa.errors import ModelError
    from opfa.integrations.guard import SparsityGuard

    assert opfa.SparsityGuard is SparsityGuard
    assert opfa.ModelError is ModelError
    assert issubclass(opfa.DivergedError, opfa.OpfaError)


def test_each_command_is_a_function_of_its_name() -> None:
    """But for `bench` and `quickstart`, which measure and show; some names would say too little."""
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    named = {"list": "list_models", "recipes": "list_recipes", "new": "new_recipe"}
    named["search"] = "search_models"  # `opfa.search` is a room
    functions = {named.get(name, name) for name in commands}
    assert functions - {"bench", "quickstart"} <= set(PUBLIC)


@pytest.mark.parametrize("name", ["release", "finetune", "prune"])
def test_a_function_stays_one_when_its_room_is_imported(name: str) -> None:
    import opfa.api.results  # noqa: F401 - all rooms
    import opfa.releases.release  # noqa: F401

    assert callable(getattr(opfa, name)) and getattr(opfa, name).__doc__


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'opfa' has no attribute 'prunee'"):
        opfa.prunee  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]


def test_importing_opfa_and_its_errors_waits_for_no_library() -> None:
    program = (
        "import sys, opfa; opfa.OpfaError, opfa.__version__\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
