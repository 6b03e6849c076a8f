"""Benchmarks that users can repeat: what a mask update costs at BERT-base size.

Times are medians of several runs in one process; extra memory is the growth of the peak resident
set during an update.
"""

import gc
import resource
import statistics
import time
from typing import Any

import torch

from opfa.sparsity.masks import num_zeros
from opfa.sparsity.pattern import Pattern

SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]  # one BERT-base layer
NUM_LAYERS = 12
SPARSITY = 0.9
REPEATS = 5


def bench_masks() -> dict[str, Any]:
    """Seconds and extra bytes of a mask update over 12 BERT-base layers, per layer and global."""
    random = torch.Generator().manual_seed(0)
    weights = {
        f"layer.{layer}.{index}.weight": torch.randn(shape, generator=random) * 0.02
        for layer in range(NUM_LAYERS)
        for index, shape in enumerate(SHAPES)
    }
    size = sum(weight.numel() for weight in weights.values())
    scopes = []
    for scope in ("layer", "global"):
        pattern = Pattern(scope=scope)
        gc.collect()
        before = _peak_bytes()
        seconds, masks = [], {}
        for _ in range(REPEATS):
            start = time.perf_counter()
            masks = pattern.masks(weights, SPARSITY)
            seconds.append(time.perf_counter() - start)
        extra = _peak_bytes() - before
        zeros = {name: mask.numel() - int(mask.sum()) for name, mask in masks.items()}
        if scope == "global":
            is_exact = sum(zeros.values()) == num_zeros(SPARSITY, size)
        else:
            is_exact = all(z == num_zeros(SPARSITY, weights[n].numel()) for n, z in zeros.items())
        scopes.append(
            {
                "scope": scope,
                "seconds": statistics.median(seconds),
                "extra_bytes": extra,
                "is_exact": is_exact,
            }
        )
    return {
        "weights": size,
        "sparsity": SPARSITY,
        "threads": torch.get_num_threads(),
        "scopes": scopes,
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
