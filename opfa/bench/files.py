"""Benchmark of released files at BERT-base's shape, 90 % sparse: bytes of each part against their
entropy, and what loading costs against the dense file.

The weights are random; rows and columns differ in scale as those of trained encoders do, so that
8-bit values have about the entropy of real ones (7.2 bits measured on a pruned MiniLM). Times are
medians of loads in processes of their own, dense and compact in turn, both from the disk: the
system's cached pages of the file are given up before each.
"""

import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from opfa.bench.measure import in_a_process, memory
from opfa.compression.pattern import Pattern
from opfa.compression.quant import to_int8
from opfa.compression.selection import magnitude_mask, num_zeros
from opfa.models.configs import new_config
from opfa.models.encoders import HEADS
from opfa.release.rounding import DTYPES, PLAIN, Dtype, Format, write_weights
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


def bench_files() -> dict[str, Any]:
    """Bytes by part, bits a weight of the encoder, seconds and peak memory of loading."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directories, pruned = _write(Path(name))
        loads = _load_in_turn(list(directories.values()))
        for (form, dtype), directory in directories.items():
            parts = _parts(directory, pruned)
            encoder = sum(parts[kind] for kind in KINDS[:3])
            rows.append(
                {
                    "format": form,
                    "dtype": dtype,
                    "parts": parts,
                    "limits": _limits(directory, pruned) if form != "dense" else {},
                    "bytes": sum(path.stat().st_size for path in _weights(directory)),
                    "encoder_bits": 8 * encoder / sum(pruned.values()),
                    **loads[directory],
                }
            )
    return {"weights": sum(pruned.values()), "sparsity": SPARSITY, "rows": rows}


def _write(root: Path) -> tuple[dict[tuple[Format, Dtype], Path], dict[str, int]]:
    """The model in every form; and how many weights each pruned matrix has."""
    config = new_config({"model_type": "bert"})
    torch.manual_seed(0)
    model = HEADS["SequenceClassification"].from_config(config)
    layers = Pattern().layers(model)
    with torch.no_grad():
        for layer in layers.values():
            weight = layer.weight
            weight.mul_(torch.randn(weight.shape[0], 1).mul(0.3).exp())
            weight.mul_(torch.randn(1, weight.shape[1]).mul(0.2).exp())
            weight.masked_fill_(~magnitude_mask(weight, num_zeros(SPARSITY, weight.numel())), 0.0)
    model.save_pretrained(root / "source")
    pruned = {f"{name}.weight": layer.weight.numel() for name, layer in layers.items()}
    directories: dict[tuple[Format, Dtype], Path] = {}
    for form, dtype in FORMS:
        directory = root / f"{form}-{dtype}"
        directory.mkdir()
        write_weights(root / "source", directory, set(pruned), form=form, dtype=dtype)
        values = json.loads((root / "source" / "config.json").read_text())
        write_json(directory / "config.json", {**values, **(CONFIG if form != "dense" else {})})
        directories[form, dtype] = directory
    return directories, pruned


def _weights(directory: Path) -> list[Path]:
    return [path for path in (directory / PLAIN, directory / FILE) if path.exists()]


def _parts(directory: Path, pruned: Mapping[str, int]) -> dict[str, int]:
    """Bytes of what is stored, by kind."""
    sizes: Counter[str] = Counter()
    for name, tensor in load_file(_weights(directory)[0]).items():
        owner, _, part = name.rpartition(".")
        kind = "embeddings" if EMBEDDING.search(name) and "Norm" not in name else "rest"
        if name in pruned:
            kind = "encoder values"
        elif owner in pruned and part in PARTS:
            kind = OF_ENCODER[part]
        sizes[kind] += tensor.numel() * tensor.element_size()
    return {kind: sizes[kind] for kind in KINDS}


def _limits(directory: Path, pruned: Mapping[str, int]) -> dict[str, float]:
    """Entropy in bytes: of independent positions, and of 8-bit values one by one."""
    stored = load_file(directory / FILE)
    source = load_file(directory.parent / "source" / PLAIN)
    limits = {"positions": 0.0, "encoder values": 0.0}
    for name, size in pruned.items():
        kind, count = stored[f"{name}.form"].tolist()[:2]
        limits["positions"] += size * _bits(torch.tensor([count, size - count])) / 8
        if TYPES[kind] == torch.int8:
            limits["encoder values"] += _entropy_of_8_bits(source[name]) / 8
    return {name: limit for name, limit in limits.items() if limit}


def _entropy_of_8_bits(weight: Tensor) -> float:
    live = to_int8(weight, "channel")[0][weight != 0]
    counts = torch.bincount(live.int() + 128, minlength=256)
    return int(counts.sum()) * _bits(counts)


def _bits(counts: Tensor) -> float:
    """Entropy of a distribution, in bits a symbol."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares.double() * shares.double().log2()).sum())


def _load_in_turn(directories: list[Path]) -> dict[Path, dict[str, float]]:
    """Medians of what each load took."""
    found: dict[Path, list[dict[str, float]]] = {directory: [] for directory in directories}
    for _ in range(REPEATS):
        for directory in directories:
            found[directory].append(in_a_process(_load, directory))
    return {
        directory: {key: statistics.median(load[key] for load in loads) for key in loads[0]}
        for directory, loads in found.items()
    }


def _load(directory: Path) -> dict[str, float]:
    """Seconds until `from_pretrained` returns and until every weight was read once, for a plain
    file is only mapped until then; and the peak of extra memory.
    """
    model = HEADS["SequenceClassification"]
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))  # what libraries allocate once
    for path in _weights(directory):
        with path.open("rb") as file:
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
