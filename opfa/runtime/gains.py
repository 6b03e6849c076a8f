"""Where the sparse kernels of training gain over torch's dense products, by measurement.

A step of a layer is forward, back and the gradient of its weights, with the dense gradient written
out. Its time against a dense layer's depends on how many live, and on weights times tokens, which
is what the way into the kernels is paid with. README.md has the measurement.
"""

import torch

# The least weights times tokens by the highest density, below which dense products may be faster.
LEAST_WORK: dict[torch.dtype, tuple[tuple[float, int], ...]] = {
    torch.float32: ((0.12, 1 << 25), (0.22, 1 << 26), (0.32, 1 << 27), (0.5, 1 << 29)),
    torch.bfloat16: ((0.12, 1 << 27), (0.22, 1 << 28)),
}


def gains(size: int, density: float, num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether a step of so many tokens of a type is faster in the kernels, for a matrix of `size`
    weights of which a share of `density` lives.
    """
    for highest, least in LEAST_WORK.get(dtype, ()):
        if density <= highest:
            return size * num_tokens >= least
    return False
