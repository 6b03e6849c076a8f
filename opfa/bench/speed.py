"""How fast encoders compute: the result of `opfa bench inference`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opfa.report.tables import Result, Row, Table, column


class Speed(Row):
    """One contestant's milliseconds, and how many times ours in fp32 they are, by round."""

    fastest: float = column("fastest, ms", ".1f")
    median: float = column("median, ms", ".1f")
    ratio: float = column("times ours, fp32", ".2f")
    low: float = column("a quarter of rounds below", ".2f")
    high: float = column("above", ".2f")
    milliseconds: list[float]  # medians of rounds


class Steadiness(Row):
    """GFLOP/s of multiply-adds in the registers of one core, measured around each turn."""

    slowest: float
    median: float
    fastest: float


class Shape(Row):
    """An encoder."""

    family: str
    layers: int
    hidden: int
    heads: int
    sparsity: float  # of the layers in the kernels

    def __str__(self) -> str:
        """In words."""
        return f"{self.family}, {self.layers} layers of {self.hidden}, {self.sparsity:.0%} zeros"


class Race(Row):
    """Contestants on one model, and why others were left out."""

    shape: Shape
    tokens: int
    rounds: int
    speeds: dict[str, Speed]
    left_out: dict[str, str]
    peak: Steadiness

    def parts(self) -> Iterator[Table | str]:
        """The table, and who is missing."""
        yield Table.of("engine", self.speeds)
        for name, reason in self.left_out.items():
            yield f"{name}: left out: {reason}"
        slow, middle, fast = self.peak.slowest, self.peak.median, self.peak.fastest
        yield (
            f"Around the turns one core could do {slow:.0f} to {fast:.0f} GFLOP/s of fp32 "
            f"multiply-adds, in the median {middle:.0f}."
        )


class Part(Row):
    """Steps of one kind alone."""

    fastest: float = column("fastest, ms", ".2f")
    median: float = column("median, ms", ".2f")
    rate: float | None = column("GFLOP/s", ".0f")  # live weights only
    share: float | None = column("of the fp32 peak", ".0%")


class Anatomy(Row):
    """A call by part, for each type."""

    parts: dict[str, Part]
    peak: Steadiness


class Sweep(Row):
    """Median milliseconds by sparsity or by tokens, and torch's fp32 time over ours by round."""

    milliseconds: dict[str, dict[str, float]]
    ratios: dict[str, dict[str, float]]  # of each of ours

    def table(self, head: str, style: str) -> Table:
        """One line for each value."""
        values = list(dict.fromkeys(v for curve in self.milliseconds.values() for v in curve))
        heads = [f"{name}, ms" for name in self.milliseconds]
        heads += [f"torch, fp32 / {name}" for name in self.ratios]
        rows = []
        for value in values:
            curves = [(self.milliseconds, ".1f"), (self.ratios, ".2f")]
            cells = [
                format(curve[value], digits) if value in curve else ""
                for curves_of, digits in curves
                for curve in curves_of.values()
            ]
            rows.append((format(float(value), style), *cells))
        return Table((head, *heads), rows, numbers_from=0)


class Figures(Row):
    """Single numbers; all of fp32 where nothing else is said."""

    one_thread: float
    batch_lengths: list[int]
    batch: float
    batch_even: float
    streams: float
    one_stream: float
    memory: dict[str, float]
    loads: dict[str, float]
    idle: dict[str, float]
    bytes_a_weight: dict[str, float]

    def table(self, threads: int) -> Table:
        """One line for each number."""
        lengths = f"{len(self.batch_lengths)} sequences, {min(self.batch_lengths)} to "
        lengths += f"{max(self.batch_lengths)} tokens"
        rows = {
            f"time with one thread / with {threads}": f"{self.one_thread:.2f}",
            f"time a real token, {lengths} / one of 128": f"{self.batch:.2f}",
            "the same / as many tokens in even sequences": f"{self.batch_even:.2f}",
            f"sequences a second, {threads} streams of one thread": f"{self.streams:.0f}",
            f"sequences a second, one stream of {threads} threads": f"{self.one_stream:.0f}",
        }
        rows |= {f"memory of the model, MB: {n}": f"{v / 1e6:.0f}" for n, v in self.memory.items()}
        rows |= {f"loading, s: {name}": f"{value:.1f}" for name, value in self.loads.items()}
        idle = {f"of a core from 0.1 s after a call on: {n}": v for n, v in self.idle.items()}
        rows |= {name: f"{value:.1%}" for name, value in idle.items()}
        sizes = self.bytes_a_weight.items()
        rows |= {f"packed bytes a live weight: {name}": f"{value:.2f}" for name, value in sizes}
        return Table(("figure", ""), list(rows.items()), numbers_from=1)


class Inference(Result):
    """What `opfa bench inference` finds."""

    machine: dict[str, Any]  # Any: as a run's environment.json has it
    level: str
    threads: int
    versions: dict[str, str]
    race: Race
    anatomy: Anatomy
    by_sparsity: Sweep | None  # None for a model that was given
    by_tokens: Sweep
    figures: Figures
    small: Race | None

    def draw(self, path: Path) -> None:
        """Draw latency against sparsity and tokens."""
        from opfa.report.pictures import latency_picture  # needs opfa[plots]

        curves = {"sparsity": self.by_sparsity, "tokens": self.by_tokens}
        shown = {name: sweep.milliseconds for name, sweep in curves.items() if sweep is not None}
        latency_picture(
            shown, f"{self.race.shape.family}: one sequence, {self.threads} threads", path
        )

    def parts(self, *, is_long: bool = False) -> Iterator[Table | str]:
        """The race, then where the time goes, curves, single figures, and a small model."""
        yield (
            f"{self.race.shape}, 1 x {self.race.tokens} tokens, {self.threads} threads, "
            f"{self.machine['processor']} ({self.level}), {self.race.rounds} rounds:"
        )
        yield from self.race.parts()
        yield "Steps of one kind alone, and all of them:"
        yield Table.of("part", self.anatomy.parts)
        if self.by_sparsity is not None:
            yield f"1 x {self.race.tokens} tokens by sparsity:"
            yield self.by_sparsity.table("zeros", ".0%")
        yield f"One sequence with {self.race.shape.sparsity:.0%} zeros by its length:"
        yield self.by_tokens.table("tokens", ".0f")
        yield self.figures.table(self.threads)
        if self.small is not None:
            yield f"{self.small.shape}, 1 x {self.small.tokens} tokens:"
            yield from self.small.parts()
        yield ", ".join(f"{name} {version}" for name, version in self.versions.items())
