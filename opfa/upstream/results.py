"""What preparing and pre-training give: results that print themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field

from opfa.report.outcome import Outcome, Place, Unprinted, percent
from opfa.report.tables import Row, Table
from opfa.training import finished, metrics

LOSS = "loss"  # all terms together: the last part of the names of what an evaluation gives


class SplitSize(Row, extra="ignore"):
    """The examples of one split."""

    documents: int
    examples: int
    tokens: int
    sha256: str  # over all tokens, however they are stored


class PrepareResult(Outcome):
    """Examples to pre-train on; with the keys of their `corpus.json`."""

    directory: Unprinted
    format: str
    corpus: dict[str, Any]  # the recipe's section
    skipped_records: int
    splits: dict[str, SplitSize]
    tokenizer_sha256: str
    training: Annotated[tuple[str, ...], Field(exclude=True)] = ("RECIPE", "--output", "RUN")

    def table(self) -> Table:
        """One line for each split."""
        rows = [
            (name, *(f"{number:,}" for number in (size.documents, size.examples, size.tokens)))
            for name, size in self.splits.items()
        ]
        return Table(("split", "documents", "examples", "tokens"), rows, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """Bad records, if some were skipped."""
        return [f"{self.skipped_records:,} bad records skipped"] if self.skipped_records else []

    def places(self) -> Mapping[str, Path | str]:
        """The examples, and what was skipped."""
        skipped = {"skipped": self.directory / "skipped.txt"} if self.skipped_records else {}
        return {"examples": self.directory, **skipped}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """To train on them."""
        return [("pretrain", *self.training, f"data={self.directory}")]


class PretrainResult(Outcome):
    """A pre-trained model."""

    directory: Place
    step: int  # how many there were
    sparsity: float
    metrics: dict[str, float | None]  # of the last evaluation, on held-out examples
    model_sha256: str

    @classmethod
    def read(cls, run: Path) -> Self:
        """That of a finished run; raises `RunError` if files that describe it changed."""
        done = finished.read(run)
        rows = (row for row in reversed(metrics.read(run)) if row.get("eval"))
        last = next(rows, {})
        return cls(
            directory=run,
            step=done["step"],
            sparsity=done.get("sparsity", 0.0),
            metrics={name: value for name, value in last.items() if name.endswith(LOSS)},
            model_sha256=done["model_sha256"],
        )

    @property
    def model(self) -> Path:
        """The directory of the model, for transformers and for fine-tuning."""
        return self.directory / "model"

    def table(self) -> Table:
        """Held-out losses, and how sparse it is."""
        found = [(name, value) for name, value in self.metrics.items() if value is not None]
        rows = [(name, f"{value:.4f}") for name, value in found]
        rows += [("zeros", percent(self.sparsity)), ("steps", f"{self.step:,}")]
        return Table((self.directory.name, "held-out"), rows, numbers_from=1)

    def places(self) -> Mapping[str, Path | str]:
        """The model, and pictures."""
        return {"model": self.model, "report": self.directory / "report"}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """To look at its zeros, and to fine-tune it."""
        tune = ("finetune", "RECIPE", "--output", "RUN", f"model.init={self.model}")
        return [("inspect", self.model), tune]
