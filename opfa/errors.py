"""What a user sees when something fails: kinds of errors, and how any failure becomes one.

Libraries that open a foreign file fail in more ways than a list of exceptions can name. `opening`
is the one place that catches them all.
"""

import contextlib
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

STOPPED = 75  # exit code of a run that stopped on request and saved: "try again later" (sysexits.h)
LONGEST = 500  # characters of a foreign message that are shown
TERSE = (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, MemoryError)
HIDDEN = "***"
TOKEN = (  # whose token is a secret; a tokenizer's pad_token and mask_token are none
    r"(?:(?:[a-z0-9]+[-_])*(?:access|auth|api|hf|hub|huggingface|refresh|session|security|bearer|"
    r"private|github|gitlab|oauth)[-_]?)?token"
)
SECRET = (
    rf"{TOKEN}|(?:x-[a-z]+-)?(?:signature|credential)|(?:[a-z0-9]+[-_])*(?:password|passwd|pwd|"
    r"passphrase|secret|credentials|(?:api|access|account|private|secret)[-_]?key(?:[-_]id)?)"
)
NAME = rf"(?<![a-z0-9_-])(?:{SECRET})"
QUOTED = r"""(?P<q>\\?["'])(?:[^"'\\\n]|\\.|(?!(?P=q))["'])*?(?P=q)"""
PORT = r"""\d{1,5}(?:[\s/?#:,;)\]'"]|$)"""
SECRETS = [  # a secret between two groups that are shown; case is ignored
    # a password in an address, which may hold "@", ":" and "/"; a path has one "/" of two
    rf"""(:\\?/\\?/|https?:/)(?:[^\s/:@[]+:(?!\s|{PORT})(?:\S*|[^\n@]*)|[^\s/?#'"<>]*)(@)""",
    r"(%3a%2f%2f)(?:(?!%2f)[^\s&/])*?(%40)",
    rf"""({NAME}["']?(?:=| = ))(?:{QUOTED}|[^\s&'"]+)()""",
    rf"({NAME}(?:\\?[\"'])\s*:\s*){QUOTED}()",  # as in JSON
    r"""([?&](?:sig|key|code|auth|jwt|pass)=)[^\s&#'"]+()""",
    r"""(\bauthorization["']?\s*[:=]\s*["']?(?:(?:bearer|basic|token)\s+)?)[^\s'",]+()""",
    # tokens that are told by their looks
    r"(\b(?:hf_|gh[pousr]_|github_pat_|glpat-))[a-z0-9_-]{16,}()",
    r"(\b(?-i:AKIA|ASIA))(?-i:[A-Z0-9]{16}\b)()",
    r"(\beyJ)[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}()",
]
PATTERNS = [re.compile(pattern, re.IGNORECASE) for pattern in SECRETS]
SECRET_NAME = re.compile(SECRET, re.IGNORECASE)
SECRET_VARIABLE = re.compile("(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
SHORTEST = 8  # characters of a variable's secret: hiding each "test" would hide too much
NOT_PLAIN = {
    stat.S_ISDIR: "a directory",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
Value = TypeVar("Value")


class OpfaError(Exception):
    """Something to tell the user: one message, no traceback, and the exit code `status`."""

    status = 2  # a mistake of theirs


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
    """The first line of an error, cut; with its type where the text says little (KeyError)."""
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    if not lines:
        return name
    if lines[0].endswith(":") and len(lines) > 1:  # what follows is the reason
        lines[0] = f"{lines[0]} {lines[1].strip()}"
    line = brief(lines[0], LONGEST)
    return f"{name}: {line}" if isinstance(error, TERSE) else line


def shown(value: object) -> str:
    """A value as Python writes it, shortened: it may be deep, or hold millions of characters."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxdict = 4, 10, 10
    short.maxstring = short.maxlong = short.maxother = 80
    return short.repr(value)


@contextlib.contextmanager
def opening(
    what: object, kind: type[OpfaError] = ModelError, problem: str = "can't be read"
) -> Iterator[None]:
    """Turn whatever fails while a foreign file is opened into one error, "`what`: `problem`:
    reason". Keep the block small: a mistake of ours in it would look like one of the file's.
    """
    try:
        yield
    except (OpfaError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic in Rust code is not an Exception
        raise kind(f"{what}: {problem}: {first_line(error)}") from error


@contextlib.contextmanager
def blaming(key: str, name: str) -> Iterator[None]:
    """Let what is wrong with a model say which key or argument names it: "`key` = 'name': ..."."""
    try:
        yield
    except ModelError as error:
        begin, text = f"{key} = {name!r}: ", str(error)
        for prefix in (begin, f"model {name!r}: ", f"tokenizer {name!r}: ", f"{name}: "):
            text = text.removeprefix(prefix)
        raise ModelError(f"{begin}{text}") from error


def not_plain(path: Path) -> str | None:
    """Why something is no plain file, nor a link to one; None where it is."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "is a link to nothing" if path.is_symlink() else "no such file"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in its name
        return f"can't be read: {error.strerror if isinstance(error, OSError) else error}"
    kinds = (name for is_kind, name in NOT_PLAIN.items() if is_kind(mode))
    return next((f"is {name}; give a plain file" for name in kinds), None)


def redacted(value: Value) -> Value:
    """The same text, or texts in a value that JSON can hold, without passwords, tokens and keys."""
    return _redacted(value, _secrets_of_environment())


def _redacted(value: Any, known: Sequence[str]) -> Any:  # Any: what JSON can hold
    if isinstance(value, str):
        shown = value
        for secret in known:
            shown = shown.replace(secret, HIDDEN)
        for pattern in PATTERNS:
            shown = pattern.sub(_hide, shown)
        return shown if shown == value else _redacted(shown, known)  # what is hidden may show more
    if isinstance(value, Mapping):
        return {key: _of_key(key, item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_redacted(item, known) for item in value)
    return value


def _of_key(key: object, value: Any, known: Sequence[str]) -> Any:  # Any: what JSON can hold
    is_secret = value and isinstance(value, str) and SECRET_NAME.fullmatch(str(key))
    return HIDDEN if is_secret else _redacted(value, known)


def _hide(match: re.Match[str]) -> str:
    quote = match.groupdict().get("q") or ""
    return f"{match[1]}{quote}{HIDDEN}{quote}{match[match.re.groups]}"


def _secrets_of_environment() -> list[str]:
    """What variables keep secret by their names, and the logins of proxies; the longest first."""
    secrets = set()
    for name, value in os.environ.items():
        if name.lower().endswith("_proxy"):
            login = value.rpartition("@")[0].rpartition("//")[2]
            secrets |= {login, login.partition(":")[2]}
        elif SECRET_VARIABLE.search(name) and not value.startswith("/"):  # no path of a file
            secrets.add(value)
    return sorted((s for s in secrets if len(s) >= SHORTEST), key=len, reverse=True)


def brief(value: object, most: int = 100) -> str:
    """What a value says, redacted and cut, for a message that stays short."""
    text = redacted(str(value))
    return text if len(text) <= most else f"{text[:most]}..."


class Redacting:
    """A text stream that hides secrets, those of the environment when it begins too."""

    def __init__(self, stream: TextIO) -> None:
        """Write to this stream."""
        self.stream = stream
        self._known = _secrets_of_environment()

    def write(self, text: str) -> int:
        """Write a text without its secrets."""
        return self.stream.write(text if text.isspace() else _redacted(text, self._known))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts without their secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:  # Any: whatever streams have
        """All else is the stream's own."""
        return getattr(self.stream, name)
