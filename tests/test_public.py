"""The names that `import opfa` gives, and what they cost."""

import subprocess
import sys

import pytest

import opfa

PUBLIC = [
    "DataError",
    "DivergedError",
    "ModelError",
    "OpfaError",
    "RecipeError",
    "RunError",
    "SparsityGuard",
    "__version__",
    "fuse",
    "inspect",
    "lock",
    "masked_lora",
    "predict",
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


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'opfa' has no attribute 'prune'"):
        opfa.prune  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]


def test_importing_opfa_and_its_errors_waits_for_no_library() -> None:
    program = (
        "import sys, opfa; opfa.OpfaError, opfa.__version__\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
