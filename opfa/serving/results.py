"""What a server did, and what packing for an endpoint gives; apart from what makes them, since
they need none of its packages.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from opfa.report.outcome import Outcome, Place
from opfa.report.tables import Result, Table


class Served(Result):
    """What a server did until it was stopped."""

    model: str
    address: str
    requests: int
    answered: int  # with status 200
    examples: int
    seconds: float

    def parts(self, *, is_long: bool = False) -> Iterable[Table | str]:
        """One line for each number."""
        rows = [
            ("requests", f"{self.requests:,}"),
            ("answered", f"{self.answered:,}"),
            ("examples", f"{self.examples:,}"),
            ("seconds", f"{self.seconds:,.0f}"),
        ]
        yield Table((self.model, ""), rows, numbers_from=1)
        yield f"    next  {shlex.join(['opfa', 'bench', 'serve', self.model])}"


class ArchiveResult(Outcome):
    """An archive for SageMaker."""

    file: Place
    kind: str
    precision: Literal["int8", "fp32"]
    bytes: int
    unpacked: int  # bytes of the files in it
    files: list[str]
    heads: tuple[int, int] | None = None  # that are left, and of how many; None: nothing shrunk
    neurons: tuple[int, int] | None = None
    metrics: dict[str, tuple[float, float]] | None = None  # before and after pruning

    def table(self) -> Table:
        """What is in it."""
        rows = [
            ("task", self.kind),
            ("precision", self.precision),
            ("bytes", f"{self.bytes:,}"),
            ("bytes unpacked", f"{self.unpacked:,}"),
        ]
        for what, left in (("heads", self.heads), ("neurons", self.neurons)):
            if left is not None:
                rows.append((f"{what} left", f"{left[0]:,} of {left[1]:,}"))
        for name, (before, after) in (self.metrics or {}).items():
            rows.append((name, f"{before:.4f} -> {after:.4f}"))
        return Table((self.file.name, "for SageMaker"), rows, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """What it is for."""
        return ["An endpoint of a Hugging Face inference container answers with it, on the CPU"]

    def places(self) -> Mapping[str, Path | str]:
        """The file."""
        return {"archive": self.file}
