"""Benchmark of released files at BERT-base's shape, 90 % sparse: bytes of each part against their
entropy, and what loading costs against the dense file.

The weights are random; rows and columns differ in scale as those of trained encoders do, so that
8-bit values have about the entropy of real ones (7.2 bits measured on a pruned MiniLM). Times are
medians of loads in processes of their own, dense and compact in turn, both from the disk: the
system's cached pages of the file are given up before each.
"""

import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from opfa.compact import FILE, METHOD
from opfa.inspection import EMBEDDING
from opfa.models import HEADS, new_config
from opfa.quant import to_int8
from opfa.run import write_json
from opfa.sparsity.masks import magnitude_mask, num_zeros
from opfa.sparsity.packing import PARTS, TYPES
from opfa.sparsity.pattern import Pattern
from opfa.weights import DTYPES, PLAIN, Dtype, Format, write_weights

SPARSITY = 0.9
REPEATS = 5
FORMS: tuple[tuple[Format, Dtype], ...] = (
    ("dense", "fp32"),
    ("compact", "fp32"),
    ("compact", "fp16"),
    ("compact-int8", "fp32"),
)
KINDS = ("positions", "encoder values", "encoder scales", "embeddings", "rest")
Sizes = dict[str, int]


def bench_files() -> dict[str, Any]:
    """Bytes by part, bits a weight of the encoder, seconds and peak memory of loading."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directories, pruned = _write(Path(name))
        loads = _load_in_turn(list(directories.values()))
        for (form, dtype), directory in directories.items():
            parts = _parts(directory, pruned)
            encoder = parts["positions"] + parts["encoder values"] + parts["encoder scales"]
            seconds, peak = loads[directory]
            rows.append(
                {
                    "format": form,
                    "dtype": dtype,
                    "bytes": {**parts, "total": sum(p.stat().st_size for p in _weights(directory))},
                    "encoder_bits": 8 * encoder / sum(pruned.values()),
                    "limits": _limits(directory, pruned) if form != "dense" else {},
                    "seconds": seconds,
                    "peak_bytes": peak,
                }
            )
    return {"weights": sum(pruned.values()), "sparsity": SPARSITY, "rows": rows}


def _write(root: Path) -> tuple[dict[tuple[Format, Dtype], Path], Sizes]:
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
            weight.mul_(magnitude_mask(weight, num_zeros(SPARSITY, weight.numel())))
    model.save_pretrained(root / "source")
    pruned = {f"{name}.weight": layer.weight.numel() for name, layer in layers.items()}
    directories: dict[tuple[Format, Dtype], Path] = {}
    for form, dtype in FORMS:
        directory = root / f"{form}-{dtype}"
        directory.mkdir()
        write_weights(root / "source", directory, set(pruned), form=form, dtype=dtype)
        values = json.loads((root / "source" / "config.json").read_text())
        entry = {"quantization_config": {"quant_method": METHOD}} if form != "dense" else {}
        write_json(directory / "config.json", {**values, **entry})
        directories[form, dtype] = directory
    return directories, pruned


def _weights(directory: Path) -> list[Path]:
    return [path for path in (directory / PLAIN, directory / FILE) if path.exists()]


def _parts(directory: Path, pruned: Mapping[str, int]) -> Sizes:
    """Bytes of what is stored, by kind."""
    sizes = dict.fromkeys(
        ("positions", "encoder values", "encoder scales", "embeddings", "rest"), 0
    )
    for name, tensor in load_file(_weights(directory)[0]).items():
        owner, _, part = name.rpartition(".")
        kind = "embeddings" if EMBEDDING.search(name) and "Norm" not in name else "rest"
        if name in pruned:
            kind = "encoder values"
        elif owner in pruned and part in PARTS:
            kind = {"positions": "positions", "values": "encoder values"}.get(
                part, "encoder scales"
            )
        sizes[kind] += tensor.numel() * tensor.element_size()
    return sizes


def _limits(directory: Path, pruned: Mapping[str, int]) -> dict[str, float]:
    """Entropy in bytes: of independent positions, and of 8-bit values one by one."""
    stored = load_file(directory / FILE)
    limits = {"positions": 0.0, "encoder values": 0.0}
    for name, size in pruned.items():
        kind, count = stored[f"{name}.form"].tolist()[:2]
        limits["positions"] += size * _bits(torch.tensor([count, size - count])) / 8
        if TYPES[kind] == torch.int8:
            source = load_file(directory.parent / "source" / PLAIN, device="cpu")[name]
            limits["encoder values"] += _entropy_of_8_bits(source) / 8
    return {name: limit for name, limit in limits.items() if limit}


def _entropy_of_8_bits(weight: Tensor) -> float:
    live = to_int8(weight, "channel")[0][weight != 0]
    counts = torch.bincount(live.int() + 128, minlength=256)
    return int(counts.sum()) * _bits(counts)


def _bits(counts: Tensor) -> float:
    """Entropy of a distribution, in bits a symbol."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares.double() * shares.double().log2()).sum())


def _load_in_turn(directories: list[Path]) -> dict[Path, tuple[float, int]]:
    """Median seconds and largest peak of extra memory of loading each."""
    seconds: dict[Path, list[float]] = {directory: [] for directory in directories}
    peaks: dict[Path, int] = dict.fromkeys(directories, 0)
    for _ in range(REPEATS):
        for directory in directories:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                took, peak = pool.apply(_load, (directory,))
            seconds[directory].append(took)
            peaks[directory] = max(peaks[directory], peak)
    return {d: (statistics.median(seconds[d]), peaks[d]) for d in directories}


def _load(directory: Path) -> tuple[float, int]:
    """Seconds and extra bytes at the peak; both as from_pretrained has it."""
    model = HEADS["SequenceClassification"]
    torch.ones(8, 8) @ torch.ones(8, 8)  # what libraries allocate once
    for path in _weights(directory):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    model.from_pretrained(directory, dtype=DTYPES["fp32"])
    seconds = time.perf_counter() - start
    return seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
