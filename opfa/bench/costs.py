"""What a pre-training step costs: the result of `opfa bench train`."""

from collections.abc import Iterator
from typing import Any

from opfa.report.tables import Result, Row, Table, column


class Variant(Row):
    """One way to compute the step."""

    seconds: float = column("seconds, the fastest", ".3g")
    median: float = column("median", ".3g")
    slowest: float = column("slowest", ".3g")
    peak_bytes: int = column("peak memory, GB", ".2f", 1e-9)
    library_bytes: int = column("of it libraries", ".2f", 1e-9)  # before a model is loaded


class Costs(Result):
    """A step by variant and by part, with ratios of the fastest steps."""

    machine: dict[str, Any]  # Any: as a run's environment.json has it
    threads: int
    model: dict[str, Any]  # Any: as the recipe has it
    batch: int
    sequence_tokens: int
    real_tokens: int | float
    precision: str
    steps: int
    variants: dict[str, Variant]
    seconds_by_part: dict[str, float]
    tokens_per_second: float
    flops_per_step: float
    matrix_flops_per_second: float
    share_of_matrix_rate: float
    mask_update_share: float | None
    loader_tokens_per_second: float
    loss_bytes: int
    ratios: dict[str, float]

    def parts(self, *, is_long: bool = False) -> Iterator[Table | str]:
        """Variants, ratios, and the parts of a step."""
        places = ", ".join(self.machine["accelerators"]) or self.machine["processor"]
        yield (
            f"{self.batch} x {self.sequence_tokens} tokens in {self.precision}, {places}, "
            f"{self.threads} threads; {self.steps} steps each:"
        )
        yield Table.of("step", self.variants)
        yield self._ratios()
        rate = f"{self.tokens_per_second:,.0f} real tokens per second in the fastest step"
        yield f"{rate}. By part, measured apart:"
        total = sum(self.seconds_by_part.values())
        rows = [(n, f"{s:.3g}", f"{s / total:.0%}") for n, s in self.seconds_by_part.items()]
        yield Table(("part", "seconds", "share"), rows, numbers_from=1)
        loss = f"{self.loss_bytes / 1e6:,.0f}"
        yield f"Memory of the loss for 8 x 512 tokens and 30,522 entries: {loss} MB."

    def _ratios(self) -> Table:
        rate, plain = self.matrix_flops_per_second, self.variants["plain"].seconds
        products = f"share of this machine's matrix products, {rate / 1e9:,.0f} GFLOP/s"
        loader = self.loader_tokens_per_second / self.tokens_per_second
        rows = {name: f"{ratio:.2f}" for name, ratio in self.ratios.items()}
        ours = self.flops_per_step / rate
        rows["matrix products of ours alone / plain, time"] = f"{ours / plain:.2f}"
        rows[products] = f"{self.share_of_matrix_rate:.0%}"
        rows["speed of the loader alone / of training"] = f"{loader:,.0f}"
        if self.mask_update_share is not None:
            rows["mask update / time between two of them"] = f"{self.mask_update_share:.3%}"
        head = ("ratio; times are of the fastest steps", "")
        return Table(head, list(rows.items()), numbers_from=1)
