"""What packing for an endpoint gives; apart from what makes it, which needs ONNX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from opfa.report.outcome import Outcome, Place
from opfa.report.tables import Table


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
