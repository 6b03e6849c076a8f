"""What a user is told when something fails: kinds of errors, and how any failure becomes one.

A foreign file (model, tokenizer, data, ONNX) makes the libraries that open it fail in more ways
than a list of exceptions can name. `opening` is the one place that catches them all. Whoever wants
to see the original traceback runs `opfa --verbose`.
"""

import contextlib
import re
from collections.abc import Iterator

STOPPED = 75  # exit code of a run that was told to stop and saved: "try again later" (sysexits.h)
LONGEST = 500  # characters of a foreign message that are shown
TERSE = (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, MemoryError)
SECRET_WORDS = (
    r"(?:access_|auth_|api_|hf_)?token|api_?key|access_?key|secret(?:_?key)?|password|passwd|"
    r"credentials?|signature|x-amz-signature|x-amz-credential|sig"
)
SECRETS = (  # what may hold a secret, and what is shown in its place
    (re.compile(r"(?<=://)[^\s/'\"]*@"), "***@"),
    (re.compile(rf"(?i)\b({SECRET_WORDS})(\s*[=:]\s*)(?!\*\*\*)[^\s&'\",;)\]}}]+"), r"\1\2***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_***"),
)


class OpfaError(Exception):
    """Something to tell the user: one message, no traceback, and the exit code `status`; 2 means a
    mistake of theirs.
    """

    status = 2


class RecipeError(OpfaError):
    """A recipe that can't be used; names the key, the value and what is allowed."""


class DataError(OpfaError):
    """Documents or examples that can't be used; names the file, and the line where there is one."""


class ModelError(OpfaError):
    """A checkpoint, configuration or tokenizer that can't be used for what was asked."""


class RunError(OpfaError):
    """A run directory or machine that can't be used for what was asked."""


class DivergedError(RunError):
    """A run whose loss or gradient is not finite any more."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, at most `LONGEST` characters; with its type where the
    text alone says little, as a KeyError's.
    """
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    if not lines:
        return name
    if lines[0].endswith(":") and len(lines) > 1:  # what follows is the reason
        lines[0] = f"{lines[0]} {lines[1].strip()}"
    line = lines[0] if len(lines[0]) <= LONGEST else f"{lines[0][:LONGEST]}..."
    return f"{name}: {line}" if isinstance(error, TERSE) else line


@contextlib.contextmanager
def opening(
    what: object, kind: type[OpfaError] = ModelError, problem: str = "can't be read"
) -> Iterator[None]:
    """Turn whatever fails while a foreign file is opened into one error of this kind, "`what`:
    `problem`: reason".

    Keep the block small: a mistake of ours in it would look like one of the file's.
    """
    try:
        yield
    except (OpfaError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic in Rust code is not an Exception
        raise kind(f"{what}: {problem}: {first_line(error)}") from error


def redacted(text: str) -> str:
    """The same text with the secrets in it replaced: passwords in addresses, tokens, keys."""
    for pattern, shown in SECRETS:
        text = pattern.sub(shown, text)
    return text
