"""The page of a checkpoint: every matrix as a picture of its zeros, heads, sizes and tables."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from opfa.report import maps
from opfa.report.page import megabytes, percent, render
from opfa.report.run_page import FILE
from opfa.report.tables import Result, Table
from opfa.sparsity.anatomy import NumHeads, heads_of, layer_labels, layer_of, short_kinds
from opfa.sparsity.chosen import KEY, in_words
from opfa.sparsity.masks import Masks
from opfa.storage.files import write_text
from opfa.storage.runs import recipe_beside


def write_model_page(
    path: Path,
    name: str,
    found: Result,
    masks: Masks,
    num_heads: NumHeads | None,
    *,
    budget: int = maps.BUDGET,
) -> None:
    """Write what `opfa inspect` found in a checkpoint, with its masks [out, in]: exact ones if they
    need at most `budget` bytes.
    """
    result, masks = found.values(), _in_order(masks)
    edge, blobs = maps.packed(masks, budget)
    parts = list(found.parts(is_long=True))
    values = {
        "name": name,
        "run": _run_page(name, path),
        "cards": list(_cards(result)),
        "grid": _grid(result, list(masks)),
        "outside": [(i, n) for i, n in enumerate(masks) if layer_of(n) is None],
        "names": list(masks),
        "edge": edge,
        "heads": _heads(masks, num_heads) if num_heads else [],
        "sizes": list(_sizes(result["sizes"])),
        "tables": [_table(part) for part in parts if isinstance(part, Table)],
        "lines": [part for part in parts if isinstance(part, str)],
    }
    matrices = [_matrix(*item, result, num_heads) for item in masks.items()]
    data = {"edge": edge, "thumbnail": maps.THUMBNAIL, "matrices": matrices}
    named = {str(index): blob for index, blob in enumerate(blobs.values())}
    blobs = {"thumbnails": maps.thumbnails(masks), **named}
    write_text(path, render("model", values, data, blobs))


def _run_page(name: str, path: Path) -> tuple[str, str] | None:
    """The page of the run whose model this is, and a link to it from `path`; None without one."""
    recipe = recipe_beside(name)
    if recipe is None or not (page := recipe.parent / FILE).is_file():
        return None
    return str(page), quote(os.path.relpath(page, path.parent))


def _in_order(masks: Masks) -> Masks:
    """As data flow through a model; what is in no layer comes last."""
    kinds = list(short_kinds(layer.kind for name in masks if (layer := layer_of(name))))

    def place(name: str) -> tuple[bool, str, int, int]:
        layer = layer_of(name)
        if layer is None:
            return True, name, 0, 0
        return False, layer.stack, layer.number, kinds.index(layer.kind)

    return {name: masks[name] for name in sorted(masks, key=place)}


def _cards(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What matters most: label, value, note."""
    labels = {
        "total": "pruned matrices",
        "encoder": "matrices of the layers",
        "whole": "everything",
    }
    for key, label in labels.items():
        share = result[key]
        if share["size"]:
            note = f"of {share['size']:,} weights are zero"
            yield label, percent(share["sparsity"]), note
    if KEY in result:
        kinds = ", ".join(dict.fromkeys(str(each["kind"]) for each in result[KEY]))
        yield "zeros chosen by", kinds, in_words(result[KEY])
    yield "live weights", f"{result['whole']['size'] - result['whole']['zeros']:,}", "in everything"
    stated = {None: "has none", "matches": "says the same", "differs": "says something else"}
    yield "sparsity.json", stated[result["stated"]], f"fingerprint {result['fingerprint'][:12]}"


def _matrix(
    name: str, mask: Tensor, result: Mapping[str, Any], num_heads: NumHeads | None
) -> dict[str, Any]:
    """What the script has to know of a matrix."""
    row, pattern = result["tensors"][name], result["patterns"][name]
    place = heads_of(name, num_heads)
    if place is not None and mask.shape[place[0]] % place[1]:
        place = None
    return {
        "name": name,
        "shape": list(mask.shape),
        "zeros": row["zeros"],
        "pattern": pattern["pattern"],
        "heads": None
        if place is None or num_heads is None
        else {"axis": place[0], "groups": place[1], "count": num_heads.of(name)},
    }


def _grid(result: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Matrices by layer and kind: the index of each one that has zeros, and its sparsity."""
    layers = result["layers"]
    kinds = short_kinds(kind for row in layers for kind in row["kinds"])
    places = {(at.stack, at.number, at.kind): i for i, n in enumerate(names) if (at := layer_of(n))}
    rows = []
    labels = layer_labels([(row["stack"], row["layer"]) for row in layers]) if layers else []
    for label, row in zip(labels, layers, strict=True):
        cells = [(places.get((row["stack"], row["layer"], k)), row["kinds"].get(k)) for k in kinds]
        rows.append((label, cells, row["sparsity"]))
    return {"kinds": list(kinds.values()), "rows": rows}


def _heads(masks: Masks, num_heads: NumHeads) -> list[tuple[str, list[dict[str, Any]]]]:
    """By layer, what is left of each head: a label, and a cell for each head."""
    found = maps.heads(masks, num_heads)
    removed = {"text": "removed", "shade": 0.0, "is_gone": True, "parts": ""}
    cells = [
        [
            {
                "text": "gone" if head.is_gone else f"{100 * head.density:.1f}",
                "shade": math.sqrt(head.density),
                "is_gone": head.is_gone,
                "parts": ", ".join(
                    f"{part} {percent(share)}" for part, share in head.shares.items()
                ),
            }
            for head in row
        ]
        + [removed] * (num_heads.most - len(row))
        for row in found.values()
    ]
    return list(zip(layer_labels(list(found)), cells, strict=True)) if found else []


def _sizes(sizes: Mapping[str, int | None]) -> Iterator[tuple[str, str, float]]:
    """Label, size and share of the largest."""
    labels = {
        "dense": "as dense tensors",
        "file": "in files",
        "limit": "at least, for live weights and their places",
    }
    most = max(size or 0 for size in sizes.values())
    for key, label in labels.items():
        if (size := sizes[key]) is not None:
            yield label, f"{megabytes(size)} ({size:,} bytes)", size / most


def _table(table: Table) -> tuple[str, list[str], list[list[str]], int]:
    start = len(table.head) if table.numbers_from is None else table.numbers_from
    return (
        table.title or f"{table.head[0]}s".capitalize(),
        list(table.head),
        [list(row) for row in table.rows],
        start,
    )
