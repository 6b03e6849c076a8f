"""A part of a Markdown file that a command writes, between `<!-- mark -->` and `<!-- /mark -->`."""

from pathlib import Path

from opfa.errors import RunError
from opfa.storage.files import check_file, write_text


def check_between(file: Path, mark: str) -> None:
    """Raise `RunError` unless `write_between` can write there."""
    check_file(file)
    _around(file, mark)


def write_between(file: Path, mark: str, text: str) -> None:
    """Replace the text between the marks; raises `RunError` where there are none."""
    before, after = _around(file, mark)
    write_text(file, f"{before}{text}\n{after}")


def _around(file: Path, mark: str) -> tuple[str, str]:
    """The text before and after, with the marks."""
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    try:
        whole = file.read_text(encoding="utf-8") if file.exists() else ""
    except UnicodeDecodeError as error:
        raise RunError(f"{file}: is not a text: {error}") from error
    before, found, rest = whole.partition(start)
    _, has_end, after = rest.partition(end)
    if not found or not has_end:
        raise RunError(f"{file}: has no {start.strip()} with {end} after it")
    return before + found, has_end + after
