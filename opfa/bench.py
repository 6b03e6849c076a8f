"""Benchmarks that users can repeat: what a mask update costs at BERT-base size.

Times are medians of several runs. Extra memory is the growth of the peak resident set during the
updates, the masks included; each scope has a process of its own, since a peak never falls.
"""

import multiprocessing
import resource
import statistics
import time
from typing import Any

import torch

from opfa.sparsity.masks import magnitude_mask, num_zeros
from opfa.sparsity.pattern import Pattern

SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]  # one BERT-base layer
NUM_LAYERS = 12
SPARSITY = 0.9
REPEATS = 5


def bench_masks() -> dict[str, Any]:
    """Seconds and extra bytes of a mask update over 12 BERT-base layers, per layer and global."""
    scopes = []
    for scope in ("layer", "global"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            scopes.append(pool.apply(_bench_scope, (scope,)))
    size = NUM_LAYERS * sum(rows * columns for rows, columns in SHAPES)
    threads = torch.get_num_threads()
    return {"weights": size, "sparsity": SPARSITY, "threads": threads, "scopes": scopes}


def _bench_scope(scope: Any) -> dict[str, Any]:  # Any: one of Pattern's scopes
    random = torch.Generator().manual_seed(0)
    weights = {
        f"layer.{layer}.{index}.weight": torch.randn(shape, generator=random).mul_(0.02)
        for layer in range(NUM_LAYERS)
        for index, shape in enumerate(SHAPES)
    }
    pattern = Pattern(scope=scope)
    magnitude_mask(torch.randn(64, 64), 9)  # what libraries allocate once
    before = _peak_bytes()
    seconds, masks = [], {}
    for _ in range(REPEATS):
        masks.clear()  # the last round's are gone
        start = time.perf_counter()
        masks = pattern.masks(weights, SPARSITY)
        seconds.append(time.perf_counter() - start)
    extra = _peak_bytes() - before
    zeros = {name: mask.numel() - int(mask.sum()) for name, mask in masks.items()}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    if scope == "global":
        is_exact = sum(zeros.values()) == num_zeros(SPARSITY, sum(sizes.values()))
    else:
        is_exact = all(zeros[name] == num_zeros(SPARSITY, sizes[name]) for name in zeros)
    seconds = statistics.median(seconds)
    return {"scope": scope, "seconds": seconds, "extra_bytes": extra, "is_exact": is_exact}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
