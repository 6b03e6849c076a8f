"""What an inspection finds: the result of `opfa inspect`, which prints itself."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from opfa.report.tables import ALL, LayerKinds, Result, Row, Table, layer_table
from opfa.sparsity.chosen import in_words
from opfa.sparsity.structure import Structure

DEAD = {"dead_rows": "output rows", "dead_columns": "input columns", "dead_heads": "heads"}


class Share(Row, strict=True, extra="ignore"):
    """How many weights of some tensors are zero."""

    zeros: int
    size: int
    sparsity: float

    @classmethod
    def of(cls, zeros: int, size: int) -> "Share":
        """This number of zeros among `size` weights."""
        return cls(zeros=zeros, size=size, sparsity=zeros / size if size else 0.0)


class Pruned(Row, strict=True, extra="ignore"):
    """A pruned tensor, as sparsity.json has it."""

    shape: list[int]
    zeros: int
    sparsity: float


Word = Annotated[str, Field(pattern=r"^[\w .-]{1,60}$")]  # of someone's file; it is shown
Chosen = dict[Word, int | float | bool | Word]


class Stated(Row, strict=True, extra="ignore"):
    """The part of a sparsity.json that is checked against the weights, and what chose its zeros."""

    tensors: dict[str, Pruned]
    fingerprint: str
    total: Share
    chosen_by: list[Chosen] = Field(default=[], max_length=100, exclude_if=lambda found: not found)

    @field_validator("chosen_by")
    @classmethod
    def _check(cls, found: list[Chosen]) -> list[Chosen]:
        if any("kind" not in each for each in found):
            raise ValueError("each needs its kind")
        return found


class Layer(LayerKinds, Share):
    """The matrices of a numbered layer, pruned or not."""

    def shares(self) -> dict[str, float]:
        """The sparsity of each kind, and of all."""
        return {**self.kinds, ALL: self.sparsity}


class Inspection(Result):
    """Everything that `opfa inspect` finds in a checkpoint; sparsity.json's keys come first."""

    name: str = Field(exclude=True)
    format: str
    total: Share
    tensors: dict[str, Pruned]
    fingerprint: str
    dense: dict[str, int]  # linear matrices without zeros, and their sizes
    bytes: int  # of the weight files
    stated: Literal["matches", "differs"] | None  # its own sparsity.json
    # scores and their numbers, where it says so and matches
    chosen_by: list[Chosen] = Field(default=[], exclude_if=lambda found: not found)
    patterns: dict[str, Structure]
    layers: list[Layer]
    encoder: Share  # all numbered layers
    whole: Share  # everything in the files
    excluded: dict[str, dict[str, int]]  # tensors without zeros, and their sizes, by part
    sizes: dict[str, int | None]  # bytes: dense, in files, and with entropy-coded places
    downloaded_bytes: int

    def parts(self, *, is_long: bool = False) -> Iterator[Table | str]:
        """Layers, or all tensors; then what is excluded, structure and sizes."""
        if self.tensors:
            if is_long:
                yield self._tensors()
            elif self.layers:
                yield layer_table("sparsity, %", self.layers)
            yield self._parts()
            share = f"{self.total.zeros:,} of {self.total.size:,} weights are zero"
            yield f"{self.name}: {share} ({self.total.sparsity:.4%})"
            if self.chosen_by:
                yield f"zeros chosen by: {in_words(self.chosen_by)}"
            yield from self._structure()
            yield f"fingerprint: {self.fingerprint}"
        else:
            yield f"{self.name}: dense, no linear matrix has zeros"
        num_dense = sum(self.dense.values())
        yield f"linear matrices without zeros: {len(self.dense)} ({num_dense:,} weights)"
        sizes, limit = self.sizes, ""
        if sizes["limit"] is not None:
            limit = f", {sizes['limit']:,} at least (live weights as they are, and their places)"
        yield f"bytes: {sizes['dense']:,} as dense tensors, {sizes['file']:,} in files{limit}"
        if self.downloaded_bytes:
            yield f"downloaded: {self.downloaded_bytes:,} bytes"
        yield f"sparsity.json: {self.stated or 'none'}"

    def _tensors(self) -> Table:
        rows = []
        for name, row in self.tensors.items():
            found = self.patterns[name]
            shape = " x ".join(str(extent) for extent in row.shape)
            counts = {what: getattr(found, key) for key, what in DEAD.items()}
            dead = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
            more = f" and {found.exceptions:,} more zeros" if found.exceptions else ""
            cells = (f"{row.zeros:,}", f"{row.sparsity:.4%}", found.pattern + more, dead)
            rows.append((name, shape, *cells))
        return Table(("tensor", "shape", "zeros", "sparsity", "pattern", "dead"), rows)

    def _parts(self) -> Table:
        """What the zeros are a share of: pruned matrices, encoder, everything."""
        labels = {"encoder": "encoder matrices without zeros"}
        total = self.total
        rows = [("pruned matrices", f"{len(self.tensors):,}", f"{total.size:,}", _percent(total))]
        rows += [
            (f"excluded: {labels.get(n, n)}", f"{p['tensors']:,}", f"{p['size']:,}", "-")
            for n, p in self.excluded.items()
            if p["tensors"]
        ]
        sums = {"matrices of the layers": self.encoder, "everything": self.whole}
        rows += [(n, "", f"{s.size:,}", _percent(s)) for n, s in sums.items() if s.size]
        return Table(("part", "tensors", "weights", "zero"), rows, numbers_from=1)

    def _structure(self) -> Iterator[str]:
        counts = Counter(row.pattern for row in self.patterns.values())
        found = ", ".join(f"{pattern} ({n})" for pattern, n in counts.most_common())
        yield f"pattern (matrices): {found}"
        for key, what in DEAD.items():
            dead = [count for row in self.patterns.values() if (count := getattr(row, key))]
            if dead:
                yield f"dead {what}: {sum(dead):,}, in {len(dead)} matrices"


def _percent(share: Share) -> str:
    return f"{share.sparsity:.2%}"
