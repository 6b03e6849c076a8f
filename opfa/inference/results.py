"""What an export and a pruning give: results that print themselves; the first has the keys of its
report file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from opfa.report.outcome import Outcome, Place, Unprinted, percent
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


class PruneResult(Outcome):
    """What was pruned, counted; the last keys are those of `sparsity.json`."""

    directory: Place | None  # None for a model in memory
    score: str
    grain: str
    scope: Literal["layer", "global"]
    left: dict[str, tuple[int, int]]  # heads, neurons or blocks: how many, and of how many
    zeros: int
    size: int  # of the pruned tensors together
    sparsity: float
    fingerprint: str
    tensors: dict[str, dict[str, Any]]  # by name: shape, zeros, sparsity
    # with texts
    is_reconstructed: bool = False
    final_distance: float | None = None  # mean squared difference of a value of hidden states
    mean_distance: float | None = None  # the same, of all layers and the embeddings
    held_out: int | None = None  # sequences that distances are of
    seconds: float | None = None

    def table(self) -> Table:
        """How many weights of how many."""
        rows = [
            ("zeros", f"{self.zeros:,}"),
            ("weights", f"{self.size:,}"),
            ("sparsity", percent(self.sparsity)),
            ("matrices", f"{len(self.tensors):,}"),
            *((f"{units} left", f"{kept:,} of {of:,}") for units, (kept, of) in self.left.items()),
        ]
        name = "model" if self.directory is None else self.directory.name
        how = f"{self.score}, {'least squares' if self.is_reconstructed else 'one shot'}"
        if self.held_out is not None:
            rows += [
                ("final hidden states, squared distance", f"{self.final_distance:.4f}"),
                ("hidden states of all layers", f"{self.mean_distance:.4f}"),
                ("seconds", f"{self.seconds:,.1f}"),
            ]
        return Table((name, how), rows, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """What the distances are of."""
        if self.held_out is None:
            return []
        return [f"distance from the dense model's, on {self.held_out:,} sequences held out"]

    def places(self) -> Mapping[str, Path | str]:
        """The model, if it was written."""
        return {} if self.directory is None else {"model": self.directory}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """To look at it, to make it smaller, and to fine-tune it with its zeros held."""
        if self.directory is None:
            return []
        tune = ("finetune", "RECIPE", "--output", "RUN", f"model.init={self.directory}")
        small = ("shrink", self.directory, "--output", f"{self.directory}-small")
        can_shrink = not self.left.keys().isdisjoint({"heads", "neurons"})
        return [("inspect", self.directory), *([small] if can_shrink else []), tune]
