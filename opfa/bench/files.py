"""Benchmark of released files at BERT-base's shape, 90 % sparse: the bytes of each part against
their entropy, and what loading from the disk costs against the dense file.

The weights are random, with scales of rows and columns that give 8-bit values about the entropy of
real ones (7.2 bits, measured on a pruned MiniLM). Times are medians of loads in turn.
"""

import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from opfa.bench.measure import in_a_process, memory
from opfa.compression.pattern import Pattern
from opfa.compression.quant import to_int8
from opfa.compression.selection import magnitude_mask, num_zeros
from opfa.models.configs import new_config
from opfa.models.encoders import HEADS, save_model
from opfa.releases.rounding import DTYPES, PLAIN, Dtype, Format, write_weights
from opfa.report.tables import Result, Row, Table
from opfa.sparsity.anatomy import EMBEDDING
from opfa.storage.files import write_json
from opfa.weights.compact import CONFIG, FILE
from opfa.weights.packing import PARTS, TYPES

SPARSITY = 0.9
REPEATS = 5
FORMS: tuple[tuple[Format, Dtype], ...] = (
    ("dense", "fp32"),
    ("compact", "fp32"),
    ("compact", "fp16"),
    ("compact-int8", "fp16"),
)
OF_ENCODER = {
    "positions": "positions",
    "values": "encoder values",
    "scale": "encoder scales",
    "form": "encoder scales",
}
KINDS = ("positions", "encoder values", "encoder scales", "embeddings", "rest")


class Form(Row):
    """One form of a release: bytes by part, and what loading takes (medians)."""

    format: str
    dtype: str
    parts: dict[str, int]
    limits: dict[str, float]  # entropy in bytes
    bytes: int
    encoder_bits: float  # for each weight of the encoder
    returned: float  # seconds until `from_pretrained` returns
    seconds: float  # until every weight was read once
    peak_bytes: int | float


class Files(Result):
    """All forms; the first one is dense."""

    weights: int
    sparsity: float
    rows: list[Form]

    def parts(self, *, is_long: bool = False) -> Iterator[Table | str]:
        """Bytes in millions, and loading against the dense file."""
        dense, rows = self.rows[0], []
        for row in self.rows:
            sizes = [f"{size / 1e6:.2f}" for size in (*row.parts.values(), row.bytes)]
            loads = f"{row.seconds:.2f}", f"{row.seconds / dense.seconds:.2f}"
            peak = f"{row.peak_bytes / dense.bytes:.2f}"
            name = f"{row.format}, {row.dtype}"
            rows.append((name, *sizes, f"{row.encoder_bits:.3f}", *loads, peak))
            if row.limits:
                limits = {kind: f"{limit / 1e6:.2f}" for kind, limit in row.limits.items()}
                cells = [limits.get(kind, "") for kind in dense.parts]
                rows.append(("  entropy", *cells, *[""] * 5))
        head = ("format", *dense.parts, "all", "bits a weight", "load, s", "x dense")
        title = f"{self.weights:,} weights in the encoder"
        yield Table((*head, "peak, x dense"), rows, title, numbers_from=1)
        yield "bytes in millions; loading until every weight was read once, from the disk"


def bench_files() -> Files:
    """Write every form and load it."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directories, pruned = _write(Path(name))
        loads = _load_in_turn(list(directories.values()))
        for (form, dtype), directory in directories.items():
            parts = _parts(directory, pruned)
            encoder = sum(parts[kind] for kind in KINDS[:3])
            found = Form(
                format=form,
                dtype=dtype,
                parts=parts,
                limits=_limits(directory, pruned) if form != "dense" else {},
                bytes=_weights(directory).stat().st_size,
                encoder_bits=8 * encoder / sum(pruned.values()),
                **loads[directory],
            )
            rows.append(found)
    return Files(weights=sum(pruned.values()), sparsity=SPARSITY, rows=rows)


def _write(root: Path) -> tuple[dict[tuple[Format, Dtype], Path], dict[str, int]]:
    """The model in every form; and how many weights each pruned matrix has."""
    torch.manual_seed(0)
    model = HEADS["SequenceClassification"].from_config(new_config({"model_type": "bert"}))
    layers = Pattern().layers(model)
    with torch.no_grad():
        for layer in layers.values():
            weight = layer.weight
            weight.mul_(torch.randn(weight.shape[0], 1).mul(0.3).exp())
            weight.mul_(torch.randn(1, weight.shape[1]).mul(0.2).exp())
            weight.masked_fill_(~magnitude_mask(weight, num_zeros(SPARSITY, weight.numel())), 0.0)
    save_model(model, root / "source")
    pruned = {f"{name}.weight": layer.weight.numel() for name, layer in layers.items()}
    values = json.loads((root / "source/config.json").read_text())
    directories: dict[tuple[Format, Dtype], Path] = {
        (form, dtype): root / f"{form}-{dtype}" for form, dtype in FORMS
    }
    for (form, dtype), directory in directories.items():
        directory.mkdir()
        write_weights(root / "source", directory, set(pruned), form=form, dtype=dtype)
        write_json(directory / "config.json", {**values, **(CONFIG if form != "dense" else {})})
    return directories, pruned


def _weights(directory: Path) -> Path:
    return next(path for path in (directory / PLAIN, directory / FILE) if path.exists())


def _parts(directory: Path, pruned: Mapping[str, int]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, tensor in load_file(_weights(directory)).items():
        owner, _, part = name.rpartition(".")
        kind = "embeddings" if EMBEDDING.search(name) and "Norm" not in name else "rest"
        if name in pruned:
            kind = "encoder values"
        elif owner in pruned and part in PARTS:
            kind = OF_ENCODER[part]
        sizes[kind] += tensor.numel() * tensor.element_size()
    return {kind: sizes[kind] for kind in KINDS}


def _limits(directory: Path, pruned: Mapping[str, int]) -> dict[str, float]:
    """Entropy in bytes of independent positions, and of independent 8-bit values."""
    stored = load_file(directory / FILE)
    source = load_file(directory.parent / "source" / PLAIN)
    limits = {"positions": 0.0, "encoder values": 0.0}
    for name, size in pruned.items():
        kind, count = stored[f"{name}.form"].tolist()[:2]
        limits["positions"] += size * _bits(torch.tensor([count, size - count])) / 8
        if TYPES[kind] == torch.int8:
            weight = source[name]
            live = to_int8(weight, "channel")[0][weight != 0]
            counts = torch.bincount(live.int() + 128, minlength=256)
            limits["encoder values"] += int(counts.sum()) * _bits(counts) / 8
    return {name: limit for name, limit in limits.items() if limit}


def _bits(counts: Tensor) -> float:
    """Entropy of a distribution, in bits a symbol."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares.double() * shares.double().log2()).sum())


def _load_in_turn(directories: list[Path]) -> dict[Path, dict[str, float]]:
    found: dict[Path, list[dict[str, float]]] = {directory: [] for directory in directories}
    for _ in range(REPEATS):
        for directory in directories:
            found[directory].append(in_a_process(_load, directory))
    return {
        directory: {key: statistics.median(load[key] for load in loads) for key in loads[0]}
        for directory, loads in found.items()
    }


def _load(directory: Path) -> dict[str, float]:
    """What one load takes. A plain file is only mapped until its weights are read."""
    model = HEADS["SequenceClassification"]
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))  # what libraries allocate once
    with _weights(directory).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    start = time.perf_counter()
    loaded = model.from_pretrained(directory, dtype=DTYPES["fp32"])
    returned = time.perf_counter()
    for parameter in loaded.parameters():
        parameter.detach().sum()
    seconds = {"returned": returned - start, "seconds": time.perf_counter() - start}
    return {**seconds, "peak_bytes": memory("VmHWM") - before}
