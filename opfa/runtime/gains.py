"""Where the sparse kernels of training gain over torch's dense product, by measurement."""

import torch

from opfa.runtime.patterns import Pattern

LEAST_SIZE = 1 << 14  # weights of a matrix; below, the way into the kernels costs more
LEAST_TOKENS = 64
MOST_DENSITY = {torch.float32: 0.3, torch.bfloat16: 0.15}


def gains(pattern: Pattern, num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether a step is faster in the kernels: forward, back and the gradient of weights."""
    size = pattern.rows * pattern.columns
    is_large = size >= LEAST_SIZE and num_tokens >= LEAST_TOKENS
    return is_large and pattern.density <= MOST_DENSITY.get(dtype, 0.0)
