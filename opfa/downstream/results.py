"""What fine-tuning, evaluation and calibration give: results that print themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field

from opfa.errors import RunError, opening
from opfa.report.outcome import Outcome, Place, Unprinted, percent
from opfa.report.tables import Row, Table, column, figure
from opfa.storage import seal

if TYPE_CHECKING:  # results are read without waiting for torch
    from torch import Tensor

FILE = "results.json"


class Results(Row, extra="allow"):
    """What a run's results.json says; one of another version may say more, or less."""

    task: str
    metrics: dict[str, float]  # on the validation splits
    seed: int
    sparsity: float
    quantized: bool
    recipe_sha256: str
    model_sha256: str
    model_files_sha256: str | None = None
    selected: dict[str, int | float] | None = None  # with [selection]: the step, and its value


class FinetuneResult(Outcome, Results):
    """One fine-tuned model."""

    directory: Unprinted

    @classmethod
    def read(cls, run: Path) -> Self:
        """That of a finished run; raises `RunError` where its results.json is damaged."""
        values = seal.read_json(run / FILE)
        with opening(run / FILE, RunError, "is damaged"):
            return cls.model_validate({"directory": run, **values})

    @property
    def model(self) -> Path:
        """The directory of the model, for transformers, `opfa.load` and every command."""
        return self.directory / "model"

    def table(self) -> Table:
        """Its metrics, and how sparse it is."""
        rows = [(name, figure(value, None)) for name, value in self.metrics.items()]
        rows += [("zeros", percent(self.sparsity)), ("bits", "8" if self.quantized else "32")]
        if self.selected is not None:
            rows.append(("best model at step", f"{self.selected['step']:,}"))
        return Table((self.task, "validation"), rows, numbers_from=1)

    def places(self) -> Mapping[str, Path | str]:
        """Model and results."""
        return {"model": self.model, "results": self.directory / FILE}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """Predictions and 8 bits, or a release."""
        if self.quantized:
            small = ("--output", f"{self.directory}-small", "--format", "compact-int8")
            return [("release", self.directory, *small)]
        return [
            ("predict", self.directory, "FILE"),
            ("calibrate", self.directory, "--output", f"{self.directory}-8bit"),
            ("release", self.directory, "--output", f"{self.directory}-release"),
        ]


class _Named(Row):
    run: str  # its directory, below that of the sweep


class SweepRun(Results, _Named, extra="allow"):
    """One run of several."""


class Rate(Row):
    """All seeds of one learning rate."""

    learning_rate: float
    score: float | None  # the mean of what runs are compared by; None if all diverged
    mean: dict[str, float]
    std: dict[str, float | None]  # of a sample, n - 1; None for one seed
    runs: list[SweepRun]
    num_diverged: int


class SweepResult(Outcome):
    """Several fine-tunings of one recipe; `metrics` are means over the seeds of the best rate."""

    directory: Unprinted
    task: str
    metrics: dict[str, float]
    std: dict[str, float | None]
    learning_rate: float
    best_run: str
    sparsity: float
    quantized: bool
    recipe_sha256: str
    rows: list[Rate]
    sealed: str

    @property
    def model(self) -> Path:
        """The directory of the best run's model."""
        return self.directory / self.best_run / "model"

    def table(self) -> Table:
        """One line for each learning rate."""
        return rates_table(self.rows)

    def places(self) -> Mapping[str, Path | str]:
        """The best model, the results of all, the table."""
        place = self.directory
        return {"best model": self.model, "results": place / FILE, "table": place / "table.md"}

    def notes(self) -> Sequence[str]:
        """The best rate, of several."""
        sparse = f"{percent(self.sparsity)} zeros, {8 if self.quantized else 32} bits"
        best = f"best: learning rate {self.learning_rate}, " if len(self.rows) > 1 else ""
        return [f"{self.task}: {best}{sparse}"]

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """A release of the best run."""
        best = self.directory / self.best_run
        return [("release", best, "--output", f"{self.directory}-release")]


def rates_table(rows: Sequence[Rate]) -> Table:
    """Learning rate, number of seeds, mean and deviation of every metric."""
    names = list(max((row.mean for row in rows), key=len))
    lines = []
    for row in rows:
        mean, std = row.mean, row.std
        diverged = f", {row.num_diverged} diverged" if row.num_diverged else ""
        cells = [figure(mean[name], std[name]) if name in mean else "" for name in names]
        lines.append((str(row.learning_rate), f"{len(row.runs)}{diverged}", *cells))
    return Table(("learning rate", "seeds", *names), lines, numbers_from=0)


class EvaluateResult(Outcome):
    """What a fine-tuned model is worth."""

    model: Unprinted
    predictions: Path | None = Field(default=None, exclude=True)
    task: str
    metrics: dict[str, float]
    quantized: bool
    model_files_sha256: str
    examples_sha256: str

    def table(self) -> Table:
        """Its metrics."""
        rows = [(name, figure(value, None)) for name, value in self.metrics.items()]
        rows.append(("bits", "8" if self.quantized else "32"))
        return Table((self.task, str(self.model)), rows, numbers_from=1)

    def places(self) -> Mapping[str, Path | str]:
        """The answers, if they were asked for."""
        return {} if self.predictions is None else {"predictions": self.predictions}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """Where its zeros are."""
        return [("inspect", self.model)]


class CalibrateResult(Outcome):
    """A model before 8 bits, and after."""

    directory: Unprinted
    task: str
    fp32: dict[str, float]
    int8: dict[str, float]
    examples: int  # that it saw
    sparsity: float
    model_sha256: str
    model_files_sha256: str

    @property
    def model(self) -> Path:
        """The directory of the model."""
        return self.directory

    def table(self) -> Table:
        """Each metric before and after."""
        rows = changes(self.fp32, self.int8)
        return Table((self.task, "fp32", "8 bits"), rows, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """What it saw."""
        return [f"calibrated on {self.examples:,} examples; {percent(self.sparsity)} zeros"]

    def places(self) -> Mapping[str, Path | str]:
        """The model."""
        return {"model": self.directory}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """ONNX Runtime computes with integers."""
        return [("export", self.directory, "--output", f"{self.directory}-onnx/model.onnx")]


class Kept(Row):
    """What is left of a layer."""

    heads: int = column("heads")
    of_heads: int = column("of")
    neurons: int = column("neurons", ",")
    of_neurons: int = column("of", ",")

    @classmethod
    def of_gone(cls, heads: "Tensor", neurons: "Tensor") -> Self:
        """Counted from what is gone, True in [heads] and in [neurons]."""
        return cls(
            heads=int((~heads).sum()),
            of_heads=len(heads),
            neurons=int((~neurons).sum()),
            of_neurons=len(neurons),
        )


class StructuredResult(Outcome):
    """A model before some of its heads and neurons went, and after."""

    directory: Place
    task: str
    before: dict[str, float]
    after: dict[str, float]
    of: str
    cost: float
    left: float
    layers: list[Kept]
    examples: int  # that scores and least squares saw
    sparsity: float

    def table(self) -> Table:
        """Metrics, cost and units, before and after."""
        rows = changes(self.before, self.after)
        rows.append((self.of, f"{self.cost:,.6g}", f"{self.left:,.6g}"))
        kept = self.layers
        heads = f"{sum(k.of_heads for k in kept):,}", f"{sum(k.heads for k in kept):,}"
        neurons = f"{sum(k.of_neurons for k in kept):,}", f"{sum(k.neurons for k in kept):,}"
        rows += [("heads", *heads), ("neurons", *neurons)]
        return Table((self.task, "before", "after"), rows, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """What it saw."""
        return [f"chosen on {self.examples:,} training examples; {percent(self.sparsity)} zeros"]

    def places(self) -> Mapping[str, Path | str]:
        """The model."""
        return {"model": self.directory}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """Smaller matrices."""
        return [("shrink", self.directory, "--output", f"{self.directory}-small")]


class DepthResult(Outcome):
    """A model before some of its layers went, and after."""

    directory: Place
    task: str
    before: dict[str, float]
    after: dict[str, float]
    kept: list[int]  # numbers of the layers
    of_layers: int
    examples: int  # that scores saw
    is_sparse: bool

    def table(self) -> Table:
        """Metrics and layers, before and after."""
        rows = changes(self.before, self.after)
        rows.append(("layers", str(self.of_layers), str(len(self.kept))))
        return Table((self.task, "before", "after"), rows, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """Which are left."""
        return [f"left: layers {', '.join(map(str, self.kept))}"]

    def places(self) -> Mapping[str, Path | str]:
        """The model."""
        return {"model": self.directory}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """It has to learn again."""
        zeros = [] if self.is_sparse else ["model.zeros=free"]
        return [("finetune", "RECIPE", "--output", "RUN", f"model.init={self.directory}", *zeros)]


def changes(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """A line for each metric."""
    return [(n, figure(value, None), figure(after[n], None)) for n, value in before.items()]
