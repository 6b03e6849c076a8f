"""Packages that only a part of opfa needs, and what is said where one is missing.

`pip install opfa` brings what fine-tuning on files, predicting and inspecting need; the rest comes
with extras. Every import of the rest stands in a block of `importing`.
"""

import contextlib
import logging
from collections.abc import Iterator
from importlib.util import find_spec

from opfa.errors import RunError, first_line

log = logging.getLogger(__name__)


def has(package: str) -> bool:
    """Whether a package is installed. It is not imported."""
    try:
        return find_spec(package) is not None
    except ImportError:  # of an import hook
        return False


def needs(what: str, package: str, requirement: str) -> str:
    """The sentence about a package that is missing: what needs it, and how to get it."""
    return f'{what} needs {package}: pip install "{requirement}"'


def require(what: str, requirement: str, *packages: str) -> None:
    """Raise `RunError` for the first of these packages that is missing. For the time before work:
    nothing is imported.
    """
    for package in packages:
        if not has(package):
            raise RunError(needs(what, package, requirement))


def has_or_says(what: str, requirement: str, package: str) -> bool:
    """Whether a package is installed, for what can be left out. Says so where it is not."""
    if has(package):
        return True
    log.info("%s; left out", needs(what, package, requirement))
    return False


@contextlib.contextmanager
def importing(what: str, requirement: str) -> Iterator[None]:
    """A block of imports. Raises `RunError` for a package that is missing, which
    `pip install REQUIREMENT` brings, and for one that is broken.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise RunError(needs(what, str(error.name).partition(".")[0], requirement)) from error
    except ImportError as error:
        raise RunError(f"{what}: {first_line(error)}") from error
