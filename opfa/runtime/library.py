"""The compiled kernels, called through ctypes: the structures of kernels/opfa_runtime.h.

ctypes releases the GIL during a call, and one library serves every version of Python and torch.
"""

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p

from opfa.errors import RunError
from opfa.runtime.build import loaded

ABI = 5
GROUP, PANEL, TABLES = 16, 6, 3  # as in kernels/opfa_runtime.h
MOST_HEAD = 256  # channels of a head, as in kernels/ops.h
LEVEL = "OPFA_RUNTIME_LEVEL"  # the variable that asks for less than the CPU has
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu", "tanh")
KINDS = (
    "embed",
    "load",
    "store",
    "norm",
    "linear",
    "attention",
    "rotary",
    "gate",
    "narrow",
)  # of programs
DTYPES = ("fp32", "bf16", "int8")


class Matrix(Structure):
    """`opfa_matrix`."""

    _fields_ = [
        *((name, c_int32) for name in ("rows", "columns", "block", "tile", "dtype")),
        *(
            (name, c_void_p)
            for name in ("starts", "entries", "masks", "visits", "indices", "values")
        ),
        *((name, c_void_p) for name in ("scales", "bias")),
    ]


class Buffer(Structure):
    """`opfa_buffer`."""

    _fields_ = [("offset", c_int64), ("channels", c_int32)]


class Step(Structure):
    """`opfa_step`."""

    _fields_ = [
        *((name, c_int32) for name in ("kind", "activation", "source", "target", "residual")),
        ("first", c_int32 * 3),
        *((name, c_int32) for name in ("channels", "heads", "window", "form")),
        *((name, c_float) for name in ("inverse", "zero", "epsilon", "scale")),
        ("matrix", POINTER(Matrix)),
        *((name, c_void_p) for name in ("weight", "bias", "product")),
        ("tables", c_void_p * TABLES),
    ]


class Program(Structure):
    """`opfa_program`."""

    _fields_ = [
        *((name, c_int32) for name in ("num_steps", "num_buffers", "group")),
        ("steps", POINTER(Step)),
        ("buffers", POINTER(Buffer)),
        ("channels", c_int64),
        *((name, c_int64) for name in ("scratch_start", "scratch")),
    ]


class Product(Structure):
    """`opfa_product`."""

    _fields_ = [
        *((name, c_int32) for name in ("tokens", "dtype")),
        *((name, POINTER(Matrix)) for name in ("matrix", "across")),
        *((name, c_void_p) for name in ("input", "output", "input_gradient")),
        *((name, c_void_p) for name in ("gradient", "bias_gradient", "workspace")),
    ]


class Call(Structure):
    """`opfa_call`."""

    _fields_ = [
        *((name, c_int32) for name in ("tokens", "sequences")),
        ("starts", c_void_p),
        ("ids", c_void_p * TABLES),
        *((name, c_void_p) for name in ("rows", "input", "output", "workspace")),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, at the level of `OPFA_RUNTIME_LEVEL` if that is set.

    Raises `RunError` where there is neither a library nor a compiler, or for a level that this CPU
    doesn't have.
    """
    found = loaded()
    found.opfa_levels.restype = found.opfa_level.restype = c_char_p
    found.opfa_choose.argtypes = [c_char_p]
    found.opfa_peak.restype = c_double
    found.opfa_pool_new.restype = found.opfa_pool_of.restype = c_void_p
    found.opfa_pool_of.argtypes = [c_int32, c_void_p, c_void_p, c_void_p]
    found.opfa_pool_free.argtypes = [c_void_p]
    found.opfa_workspace.restype = c_int64
    found.opfa_run.argtypes = [POINTER(Program), POINTER(Call), c_void_p]
    found.opfa_check.argtypes = [POINTER(Matrix), ctypes.c_uint64, ctypes.c_uint64]
    found.opfa_product_workspace.restype = c_int64
    found.opfa_product_workspace.argtypes = [POINTER(Product), c_int32, c_void_p]
    pointers = [c_int32, c_void_p, c_void_p, c_int64, c_void_p]
    found.opfa_take.argtypes = found.opfa_put.argtypes = pointers
    found.opfa_take.restype = found.opfa_put.restype = None
    found.opfa_forward.argtypes = found.opfa_backward.argtypes = [POINTER(Product), c_void_p]
    if found.opfa_abi() != ABI:
        raise RunError(f"{found._name}: has interface {found.opfa_abi()}, not {ABI}")
    level = os.environ.get(LEVEL)
    if level and found.opfa_choose(level.encode()):
        known = ", ".join(found.opfa_levels().decode().split())
        raise RunError(f"{LEVEL} = {level!r}: must be one of {known}, which this CPU has")
    return found


def level() -> str:
    """The instructions that the kernels use: amx, avx512bf16, ..., avx2, neon or plain."""
    return library().opfa_level().decode()


def levels() -> list[str]:
    """What this CPU can run, best first."""
    return library().opfa_levels().decode().split()
