"""What an export gives: a result that prints itself, with the keys of its report file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from opfa.report.outcome import Outcome, Unprinted
from opfa.report.tables import Row, Table


class Sides(Row):
    """A number of the model, and of the ONNX file."""

    model: int
    onnx: int


class Zeros(Sides):
    """Zeros of both, and live weights that 8 bits round to zero."""

    rounded: int


class Fingerprints(Row):
    """SHA-256 over the places of zeros."""

    model: str
    onnx: str


class Parity(Row):
    """Whether ONNX Runtime answers as torch does, over a whole split."""

    examples: int
    max_difference: float  # of a logit
    equal_predictions: float | None  # share; None for a regression
    metrics: dict[str, dict[str, float]]  # by "torch", "onnx", in 8 bits also "torch, disturbed"
    repeated_predictions: float | None = None  # share that torch itself repeats; only in 8 bits


class ExportResult(Outcome):
    """An ONNX file that stands for its model."""

    file: Unprinted
    precision: Literal["int8", "fp32"]
    opset: int
    bytes: Sides
    zeros: Zeros
    fingerprint: Fingerprints
    parity: Parity | None = None  # only if it was asked for

    def table(self) -> Table:
        """The model beside the file."""
        rows = [
            ("bytes", f"{self.bytes.model:,}", f"{self.bytes.onnx:,}"),
            ("zeros", f"{self.zeros.model:,}", f"{self.zeros.onnx:,}"),
            ("fingerprint", self.fingerprint.model[:12], self.fingerprint.onnx[:12]),
        ]
        if self.parity is not None:
            ours, theirs = (self.parity.metrics[side] for side in ("torch", "onnx"))
            rows += [(name, f"{ours[name]:.4f}", f"{theirs[name]:.4f}") for name in ours]
        title = f"{self.file} ({self.precision})"
        return Table(("", "model", "ONNX"), rows, title, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """What was rounded, and what was compared."""
        lines = []
        if self.zeros.rounded:
            lines.append(f"live weights that 8 bits round to zero: {self.zeros.rounded:,}")
        if (parity := self.parity) is not None:
            equal = parity.equal_predictions
            shown = "" if equal is None else f", {equal:.2%} of the predictions equal"
            difference = f"logits differ by up to {parity.max_difference:.1e}"
            lines.append(f"{parity.examples:,} examples: {difference}{shown}")
            if parity.repeated_predictions is not None:
                what = "torch with itself, its layers disturbed in the last digit"
                lines.append(f"{what}: {parity.repeated_predictions:.2%} equal")
        return lines

    def places(self) -> Mapping[str, Path | str]:
        """The file; configuration and tokenizer are beside it."""
        return {"file": self.file}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """Its zeros."""
        return [("inspect", self.file)]
