"""What a search found: its front, what was taken of it, and how they print themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from opfa.report.outcome import Outcome, Unprinted
from opfa.report.tables import Row, Table, figure
from opfa.search.shapes import Shape

FILE = "results.json"
PAGE = "report/index.html"


class Judged(Row):
    """A shape, what it is worth on the examples that it was chosen by and on fresh ones, and what
    it costs: milliseconds predicted from the table and measured, multiply-adds, bytes.
    """

    number: int  # of the evaluation
    shape: Shape
    held_out: float
    fresh: float
    costs: dict[str, float]
    measured: float  # milliseconds

    def cells(self) -> tuple[str, ...]:
        """Its line in a table, without its name."""
        costs, shape = self.costs, self.shape
        return (
            figure(self.held_out, None),
            figure(self.fresh, None),
            f"{costs['milliseconds']:.2f}",
            f"{self.measured:.2f}",
            f"{costs['macs'] / 1e6:,.1f}",
            f"{costs['bytes'] / 1e6:,.1f}",
            str(sum(shape.layers)),
            str(sum(shape.heads)),
            f"{sum(shape.neurons):,}",
            shape.inside,
        )


HEAD = ("held out", "fresh", "ms", "measured", "MMACs", "MB", "layers", "heads", "neurons")
INSIDE = "inside"


class Taken(Row):
    """A point that was shrunk, trained on, and measured on the validation split once."""

    number: int
    run: str  # its directory, below that of the search
    metrics: dict[str, float]


class SearchResult(Outcome):
    """A front of models, each better than every other one in something."""

    directory: Unprinted
    task: str
    metric: str
    evaluations: int
    hypervolume: float | None  # None for a recipe of one point
    whole: Judged
    front: list[Judged]
    even: list[Judged]  # models all of whose layers are alike, for comparison
    taken: list[Taken]
    recipe_sha256: str
    sealed: str

    def table(self) -> Table:
        """One line for each point, the best one first."""
        rows = [("whole", *self.whole.cells())]
        rows += [(f"{point.number:04}", *point.cells()) for point in self.front]
        head = (f"{self.task}: {self.metric}", *HEAD, INSIDE)
        if not any(point.shape.inside for point in self.front):
            head, rows = head[:-1], [row[:-1] for row in rows]
        return Table(head, rows, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """How much was tried, and what was taken."""
        lines = []
        if self.hypervolume is not None:
            what = f"{self.evaluations} models judged, {len(self.front)} on the front"
            lines.append(f"{what}, hypervolume {self.hypervolume:.4f}")
        for each in self.taken:
            found = ", ".join(f"{n} {figure(v, None)}" for n, v in each.metrics.items())
            lines.append(f"{each.number:04} trained on: validation {found}")
        return lines

    def places(self) -> Mapping[str, Path | str]:
        """The page, recipes of points, and models that were taken."""
        found: dict[str, Path | str] = {"page": self.directory / PAGE}
        if self.hypervolume is not None:
            found["recipes"] = self.directory / "front"
        for each in self.taken:
            found[f"model {each.number:04}"] = self.directory / each.run / "model"
        return found

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """A point of the front as a model, or a release of one."""
        if self.taken:
            run = self.directory / self.taken[0].run
            return [("release", run, "--output", f"{self.directory}-release")]
        recipe = self.directory / "front" / f"{self.front[0].number:04}.toml"
        return [("search", recipe, "--output", f"{self.directory}-model")]
