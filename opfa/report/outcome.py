"""How a command ends: a short table of what came out, where it is, and what to run next."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainSerializer

from opfa.report.tables import Result, Table

Place = Annotated[Path, PlainSerializer(str)]  # a path that `--json` prints
Unprinted = Annotated[Path, Field(exclude=True)]  # one that only the table has


class Outcome(Result):
    """What a command made. A subclass says what came out, where it is and what to run next."""

    def table(self) -> Table:
        """What came out."""
        raise NotImplementedError

    def places(self) -> Mapping[str, Path | str]:
        """What was written, by what it is."""
        return {}

    def notes(self) -> Sequence[str]:
        """What else is worth a line."""
        return ()

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """The words of the commands that usually come next, without `opfa`."""
        return ()

    def values(self) -> dict[str, Any]:
        """What `--json` prints: the values that it was given."""
        return self.model_dump(exclude_unset=True)

    def parts(self, *, is_long: bool = False) -> Iterator[Table | str]:
        """The table; then one line each, indented, which Markdown shows as they are."""
        yield self.table()
        yield from self.notes()
        places = {name: str(path) for name, path in self.places().items()}
        lines = [shlex.join(["opfa", *map(str, words)]) for words in self.commands()]
        pairs = [*places.items(), *zip(("next", *("" for _ in lines)), lines, strict=False)]
        width = max((len(name) for name, _ in pairs), default=0)
        if pairs:
            yield "\n".join(f"    {name:{width}}  {text}" for name, text in pairs)


def percent(share: float) -> str:
    """A share, such as a sparsity."""
    return f"{share:.2%}"
