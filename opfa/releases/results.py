"""What releasing and unpacking give: results that print themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from opfa.report.outcome import Outcome, Place, Unprinted, percent
from opfa.report.tables import Table, figure


class ReleaseResult(Outcome):
    """A release, with the facts of its `release.json`."""

    directory: Unprinted
    name: str
    task: str
    kind: str | None  # None for a pre-trained model
    format: str
    dtype: str
    quantized: bool
    sparsity: float
    fingerprint: str
    chosen_by: list[dict[str, Any]] = Field(default=[], exclude_if=lambda found: not found)
    bytes: int  # of the weight files
    metrics: dict[str, float]
    metrics_of: str  # these files, or the weights before rounding
    examples_sha256: str
    seed: int
    recipe_sha256: str
    shape: dict[str, Any] | None = None  # only of an uneven model
    base_model: str | None
    license: str | None
    address: str | None = None  # only if it was uploaded

    def table(self) -> Table:
        """Metrics, zeros, bytes."""
        rows = [(name, figure(value, None)) for name, value in self.metrics.items()]
        rows += [("zeros", percent(self.sparsity)), ("bytes", f"{self.bytes:,}")]
        return Table((self.name, f"{self.format}, {self.dtype}"), rows, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """What the metrics are of, where that is not these files."""
        of_these = self.metrics_of == "these files"
        return [] if of_these else [f"metrics are of {self.metrics_of}"]

    def places(self) -> Mapping[str, Path | str]:
        """The release, its card, its address."""
        uploaded = {"uploaded": self.address} if self.address else {}
        return {"release": self.directory, "card": self.directory / "README.md", **uploaded}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """To upload it, and to make a compact one plain."""
        unpack = ("unpack", self.directory, "--output", f"{self.directory}-plain")
        push = ("push", self.directory, "OWNER/NAME")
        return [
            *([] if self.address else [push]),
            *([unpack] if self.format != "dense" else [("inspect", self.directory)]),
        ]


class UnpackResult(Outcome):
    """The plain form of a compact model."""

    directory: Place
    bytes: int  # of the weight file
    zeros: int | None  # of the matrices that sparsity.json lists; None without one

    def table(self) -> Table:
        """Bytes and zeros."""
        rows = [("bytes", f"{self.bytes:,}")]
        rows += [] if self.zeros is None else [("zeros", f"{self.zeros:,}")]
        return Table((self.directory.name, "plain"), rows, numbers_from=1)

    def places(self) -> Mapping[str, Path | str]:
        """The model."""
        return {"model": self.directory}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """Where its zeros are."""
        return [("inspect", self.directory)]
