"""Tables: what `opfa inspect` and `opfa bench files` print, short enough for a screen whatever the
size of the model; and how a measured figure, and a table in Markdown, is written.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from opfa.sparsity.anatomy import layer_labels, short_kinds

Report = dict[str, Any]  # what `inspect` and `compare` return
DEAD = {"dead_rows": "output rows", "dead_columns": "input columns", "dead_heads": "heads"}


def figure(mean: float, deviation: float | None) -> str:
    """A metric, with its deviation over seeds where there are several."""
    digits = 2 if abs(mean) > 1.0 else 4  # SQuAD's are 0..100
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, of cells that are Markdown themselves."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def print_sparsity(name: str, result: Report, *, has_tensors: bool) -> None:
    """Layers, or all tensors; then what is excluded, structure and sizes."""
    console = Console()
    if result["tensors"]:
        if has_tensors:
            console.print(_tensors(result))
        elif result["layers"]:
            console.print(_layers(result["layers"], "sparsity, %"))
        console.print(_parts(result))
        total = result["total"]
        share = f"{total['zeros']:,} of {total['size']:,} weights are zero"
        print(f"{name}: {share} ({total['sparsity']:.4%})")
        for line in _structure(result["patterns"]):
            print(line)
        print(f"fingerprint: {result['fingerprint']}")
    else:
        print(f"{name}: dense, no linear matrix has zeros")
    dense, sizes = result["dense"], result["sizes"]
    print(f"linear matrices without zeros: {len(dense)} ({sum(dense.values()):,} weights)")
    print(f"bytes: {sizes['dense']:,} as dense tensors, {sizes['file']:,} in files", end="")
    if sizes["limit"] is not None:
        print(f", {sizes['limit']:,} at least (live weights as they are, and where they lie)")
    else:
        print()
    if result["downloaded_bytes"]:
        print(f"downloaded: {result['downloaded_bytes']:,} bytes")
    print(f"sparsity.json: {result['stated'] or 'none'}")


def _layers(rows: list[Report], title: str) -> Table:
    """One row for each layer; a number is a share in percent."""
    kinds = short_kinds(kind for row in rows for kind in row["kinds"])
    has_whole = "sparsity" in rows[0]
    columns = [*kinds.values(), *(["all"] if has_whole else [])]
    table = Table("layer", *columns, box=SIMPLE_HEAD, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    labels = layer_labels([(row["stack"], row["layer"]) for row in rows])
    for label, row in zip(labels, rows, strict=True):
        shares = [row["kinds"].get(kind) for kind in kinds]
        shares += [row["sparsity"]] if has_whole else []
        table.add_row(label, *("" if share is None else f"{100 * share:.2f}" for share in shares))
    return table


def _tensors(result: Report) -> Table:
    table = Table("tensor", "shape", "zeros", "sparsity", "pattern", "dead", box=SIMPLE_HEAD)
    table.columns[0].overflow = "fold"
    for name, row in result["tensors"].items():
        found = result["patterns"][name]
        shape = " x ".join(str(extent) for extent in row["shape"])
        dead = ", ".join(f"{found[key]} {what}" for key, what in DEAD.items() if found[key])
        pattern = found["pattern"]
        if found["exceptions"]:
            pattern += f" and {found['exceptions']:,} more zeros"
        table.add_row(name, shape, f"{row['zeros']:,}", f"{row['sparsity']:.4%}", pattern, dead)
    return table


def _parts(result: Report) -> Table:
    """What the zeros are a share of: pruned matrices, encoder, everything."""
    table = Table("part", "tensors", "weights", "zero", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(label: str, tensors: int | None, row: Report) -> None:
        count = "" if tensors is None else f"{tensors:,}"
        share = f"{row['sparsity']:.2%}" if "sparsity" in row else "-"
        table.add_row(label, count, f"{row['size']:,}", share)

    add("pruned matrices", len(result["tensors"]), result["total"])
    labels = {"encoder": "encoder matrices without zeros"}
    for part, row in result["excluded"].items():
        if row["tensors"]:
            add(f"excluded: {labels.get(part, part)}", row["tensors"], row)
    table.add_section()
    if result["encoder"]["size"]:
        add("matrices of the layers", None, result["encoder"])
    add("everything", None, result["whole"])
    return table


def _structure(patterns: dict[str, Report]) -> Iterator[str]:
    counts = Counter(row["pattern"] for row in patterns.values())
    found = ", ".join(f"{pattern} ({n})" for pattern, n in counts.most_common())
    yield f"pattern (matrices): {found}"
    for key, what in DEAD.items():
        dead = [row[key] for row in patterns.values() if row[key]]
        if dead:
            yield f"dead {what}: {sum(dead):,}, in {len(dead)} matrices"


def print_comparison(result: Report, *, has_tensors: bool) -> None:
    """Layers where masks differ, or all tensors; then lines that sum up, from before to after."""
    if has_tensors:
        Console().print(_compared(result["tensors"]))
    elif result["layers"] and not result["same_masks"]:
        Console().print(_layers(result["layers"], "weights whose mask changed, %"))
    for side in ("a", "b"):
        alone = result[f"only_in_{side}"]
        if alone:
            print(f"only in {result[side]}: {len(alone)} matrices ({alone[0]}, …)")
    for name, (ours, theirs) in result["different_shapes"].items():
        print(f"{name}: not compared, {ours} and {theirs}")
    if result["unpaired"]:
        print(f"pruned and not compared: {', '.join(result['unpaired'])}")
    print(f"from {result['a']} to {result['b']}, {len(result['tensors'])} matrices:")
    print(result["summary"])


def _compared(tensors: Report) -> Table:
    columns = ("tensor", "zero in both", "came back", "newly pruned", "moved", "at most by")
    table = Table(*columns, box=SIMPLE_HEAD)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in tensors.items():
        counts = (f"{row[key]:,}" for key in ("both", "only_a", "only_b"))
        moved = "-" if row["moved"] is None else f"{row['moved']:.2%}"
        furthest = "-" if row["max_abs"] is None else f"{row['max_abs']:.2e}"
        table.add_row(name, *counts, moved, furthest)
    return table


def print_files(result: Report) -> None:
    """What `opfa bench files` found: bytes by part, and loading against the dense file."""
    dense = result["rows"][0]
    table = Table(box=SIMPLE_HEAD, title=f"{result['weights']:,} weights in the encoder")
    columns = (*dense["parts"], "all", "bits a weight", "load, s", "x dense", "peak, x dense")
    table.add_column("format")
    for column in columns:
        table.add_column(column, justify="right")
    for row in result["rows"]:
        parts = [f"{size / 1e6:.2f}" for size in row["parts"].values()]
        loads = (row["seconds"], row["seconds"] / dense["seconds"])
        table.add_row(
            f"{row['format']}, {row['dtype']}",
            *parts,
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['encoder_bits']:.3f}",
            *(f"{load:.2f}" for load in loads),
            f"{row['peak_bytes'] / dense['bytes']:.2f}",
        )
        limits = row["limits"]
        if limits:
            cells = [
                f"{limits[kind] / 1e6:.2f}" if kind in limits else "" for kind in dense["parts"]
            ]
            table.add_row("  entropy", *cells, style="dim")
    Console().print(table)
    print("bytes in millions; loading until every weight was read once, from the disk")
