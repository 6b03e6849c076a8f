"""Sparse products with a gradient, as operators of torch: W x, W^T g, and g x^T where W lives.

    sparse_linear(input, values, bias, pattern)    y = W x + b

`values` [live] are W's live weights in the order of a `Pattern`. The kernels sum in fp32 whatever
the numbers of the tokens, fp32 or bf16; fp64 is computed in plain loops that others are compared
with. The operators take a pattern by its number, because operators know tensors and numbers only.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from opfa.errors import RunError
from opfa.runtime.library import Product, library
from opfa.runtime.patterns import PATTERNS, Pattern, struct_of, take
from opfa.runtime.threads import Pool, TorchThreads, num_threads

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 3}  # of rows of tokens
ALIGNMENT = 16  # floats
TWICE = "the sparse kernels have no second derivative: train without them (kernels=False)"


def sparse_linear(input: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """W x + b for tokens [..., columns], as [..., rows] of the same type.

    `values` [live] and `bias` [rows] are fp32, or fp64 with an input of fp64.
    """
    rows = input.reshape(-1, pattern.columns)
    found = torch.ops.opfa.sparse_linear(rows, values, bias, pattern.number)
    return found.view(*input.shape[:-1], pattern.rows)


@torch.library.custom_op("opfa::sparse_linear", mutates_args=())
def _forward(input: Tensor, values: Tensor, bias: Tensor | None, pattern: int) -> Tensor:
    where = PATTERNS[pattern]
    output = input.new_empty(len(input), where.rows)
    if output.numel():
        product = _product(where, input, values, bias, is_back=False)
        _run(library().opfa_forward, product, output, is_back=False)
    return output


@torch.library.custom_op("opfa::sparse_linear_backward", mutates_args=())
def _backward(
    gradient: Tensor, input: Tensor, values: Tensor, pattern: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    where = PATTERNS[pattern]
    shapes = (input.shape, (where.num_live,), (where.rows,))
    types = (input.dtype, values.dtype, values.dtype)
    found = [
        torch.empty(shape if is_wanted else 0, dtype=dtype)
        for shape, dtype, is_wanted in zip(shapes, types, wanted, strict=True)
    ]
    if not len(input):
        return found[0], found[1].zero_(), found[2].zero_()
    product = _product(where, input, values, is_back=True)
    pointers = [x.data_ptr() if ok else None for x, ok in zip(found, wanted, strict=True)]
    product.input_gradient, product.gradient, product.bias_gradient = pointers
    _run(library().opfa_backward, product, gradient.contiguous(), is_back=True)
    return found[0], found[1], found[2]


@_forward.register_fake
def _(input: Tensor, values: Tensor, bias: Tensor | None, pattern: int) -> Tensor:
    return input.new_empty(len(input), PATTERNS[pattern].rows)


@_backward.register_fake
def _(
    gradient: Tensor, input: Tensor, values: Tensor, pattern: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    weights, biases = values.new_empty(values.shape), values.new_empty(gradient.shape[1:])
    all_of_it = (input.new_empty(input.shape), weights, biases)
    x, w, b = (x if ok else x.new_empty(0) for x, ok in zip(all_of_it, wanted, strict=True))
    return x, w, b


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, bias, pattern = inputs
    ctx.save_for_backward(input, values)
    ctx.has_bias = bias is not None
    ctx.pattern = PATTERNS[pattern]  # the graph keeps it


def _go_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
    wanted.append(ctx.has_bias and ctx.needs_input_grad[2])
    input, values = ctx.saved_tensors
    found = torch.ops.opfa.sparse_linear_backward(
        gradient, input, values, ctx.pattern.number, wanted
    )
    return (*(x if ok else None for x, ok in zip(found, wanted, strict=True)), None)


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RunError(TWICE)


torch.library.register_autograd("opfa::sparse_linear", _go_back, setup_context=_remember)
torch.library.register_autograd("opfa::sparse_linear_backward", _refuse)


class _Product(Product):
    """`opfa_product`, with the tensors that it points to."""

    kept: list[Tensor]


def _product(
    where: Pattern, input: Tensor, values: Tensor, bias: Tensor | None = None, *, is_back: bool
) -> _Product:
    exact = torch.float64 if input.dtype == torch.float64 else torch.float32
    input, values = input.contiguous(), values.to(exact).contiguous()
    bias = None if bias is None else bias.to(exact).contiguous()
    matrix = ctypes.pointer(struct_of(where.matrix, values, bias))
    product = _Product(len(input), DTYPES[input.dtype], matrix, input=input.data_ptr())
    product.kept = [input, values, *([] if bias is None else [bias])]
    if is_back and exact == torch.float32:
        across = take(values, where.across)
        product.across = ctypes.pointer(struct_of(where.transposed, across))
        product.kept.append(across)
    return product


def _run(function: Any, product: _Product, output: Tensor, *, is_back: bool) -> None:
    pool = _pool(min(torch.get_num_threads(), _cores()))
    product.output = output.data_ptr()
    size = library().opfa_product_workspace(ctypes.byref(product), is_back, pool.pointer)
    workspace = torch.empty(size + ALIGNMENT)
    start = -workspace.data_ptr() // 4 % ALIGNMENT
    product.workspace = workspace.data_ptr() + 4 * start
    if function(ctypes.byref(product), pool.pointer):
        raise RunError(f"no memory for {product.tokens:,} tokens")


@functools.cache
def _cores() -> int:
    """Asked once: each product would read the container's quota from a file."""
    return num_threads(None)


@functools.cache
def _pool(threads: int) -> Pool:
    return TorchThreads(threads)


class _Live(torch.autograd.Function):
    """The live weights of a matrix, as one vector; backwards they go to their places."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, pattern: Pattern) -> Tensor:  # noqa: D102 - torch's protocol
        ctx.pattern, ctx.shape = pattern, weight.shape
        return pattern.take(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: D102 - torch's protocol
        whole = gradients[0].new_zeros(ctx.shape)
        ctx.pattern.put(gradients[0], whole)
        return whole, None


def live_of(weight: Tensor, pattern: Pattern) -> Tensor:
    """The live weights [live] of a matrix, in the pattern's order, with a gradient."""
    return _Live.apply(weight, pattern)
