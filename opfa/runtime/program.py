"""The steps of a network for the kernels, put together in Python and run in one call."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opfa.errors import ModelError, RunError
from opfa.runtime import library as native
from opfa.runtime.library import ACTIVATIONS, DTYPES, GROUP, KINDS, MOST_HEAD, TABLES, library
from opfa.runtime.packing import Floats, Packed
from opfa.runtime.threads import Pool

ALIGNMENT = 16  # floats
LEAST_CHANNELS = 64  # so that narrow inputs have room for whole tiles
NARROW_GROUP = 32  # tokens that bf16 and int8 inputs hold together
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Form:
    """The input of bf16 or int8 matrices: q = clamp(round(x / scale) + zero, 0, 255) in int8."""

    dtype: str
    scale: float = 1.0
    zero: int = 0

    def fields(self) -> dict[str, float]:
        """What a step says of it. torch multiplies by 1 / scale, as an fp32 number."""
        inverse = float(np.float32(1) / np.float32(self.scale))
        return {"form": DTYPES.index(self.dtype), "inverse": inverse, "zero": self.zero}


@dataclass
class Program:
    """Steps over buffers of channels. Arrays that a step names are kept as long as the program."""

    steps: list[native.Step] = field(default_factory=list)
    buffers: list[native.Buffer] = field(default_factory=list)
    channels: int = 0
    group: int = GROUP
    _kept: list[object] = field(default_factory=list)

    def buffer(self, channels: int) -> int:
        """A new buffer; gives its number."""
        channels = max(channels, LEAST_CHANNELS)
        self.buffers.append(native.Buffer(self.channels, channels))
        self.channels += channels
        return len(self.buffers) - 1

    def embed(self, tables: Sequence[Floats], target: int) -> None:
        """target = the sum of rows of tables [entries, channels], by the ids of a call."""
        self._add("embed", target=target, channels=tables[0].shape[1], tables=self._tables(tables))

    def load(self, target: int, channels: int) -> None:
        """target = the rows of a call's input."""
        self._add("load", target=target, channels=channels)

    def store(self, source: int, channels: int) -> None:
        """The rows of a call's output = source."""
        self._add("store", source=source, channels=channels)

    def norm(
        self, source: int, target: int, weight: Floats, bias: Floats | None, epsilon: float
    ) -> None:
        """Layer normalization over all channels."""
        values = {"weight": self._pointer(weight), "bias": self._pointer(bias)}
        self._add(
            "norm", source=source, target=target, channels=len(weight), epsilon=epsilon, **values
        )

    def narrow(self, source: int, target: int, channels: int, form: Form) -> None:
        """target = source as the input of bf16 or int8 matrices."""
        self._add("narrow", source=source, target=target, channels=channels, **form.fields())

    def linear(
        self,
        matrix: Packed,
        bias: Floats | None,
        source: int,
        target: int,
        *,
        scales: Floats | None = None,
        first: int = 0,
        activation: str = "none",
        residual: int = -1,
        form: Form | None = None,
    ) -> None:
        """target = activation(matrix @ source + bias + residual), from its channel `first`.

        `scales` are those of an int8 matrix's rows, times its input's. With `form` the target is
        the input of the next matrix.
        """
        if matrix.dtype:
            self.group = NARROW_GROUP
        struct = matrix.as_struct(bias=self._pointer(bias), scales=self._pointer(scales))
        self._kept += [matrix, struct]
        self._add(
            "linear",
            source=source,
            target=target,
            residual=residual,
            first=(ctypes.c_int32 * 3)(first, 0, 0),
            activation=ACTIVATIONS.index(activation),
            matrix=ctypes.pointer(struct),
            **(form.fields() if form else {}),
        )

    def attention(
        self, source: int, target: int, channels: int, heads: int, *, window: int = 0
    ) -> None:
        """Attention of the queries, keys and values that follow each other in source.

        A token sees those at most `window` away, or with 0 all of its sequence. Raises `ModelError`
        for heads that are too large, or don't fill the channels.
        """
        if channels % heads or not 0 < channels // heads <= MOST_HEAD:
            what = f"{channels} channels in {heads} heads: the runtime has at most {MOST_HEAD} each"
            raise ModelError(f"{what}, and none over")
        first = (ctypes.c_int32 * 3)(0, channels, 2 * channels)
        sizes = {"channels": channels, "heads": heads, "window": window}
        scale = (channels // heads) ** -0.5
        self._add("attention", source=source, target=target, first=first, scale=scale, **sizes)

    def rotate(self, source: int, channels: int, heads: int, tables: Sequence[Floats]) -> None:
        """Rotate queries and keys by position; tables are cosines and sines [positions, half]."""
        first = (ctypes.c_int32 * 3)(0, channels, 0)
        sizes = {"channels": channels, "heads": heads}
        self._add("rotary", source=source, first=first, tables=self._tables(tables), **sizes)

    def gate(self, source: int, target: int, channels: int, activation: str) -> None:
        """target = activation(first half of source) * second half."""
        first = (ctypes.c_int32 * 3)(0, channels, 0)
        kind = ACTIVATIONS.index(activation)
        sizes = {"channels": channels, "activation": kind}
        self._add("gate", source=source, target=target, first=first, **sizes)

    def _add(self, kind: str, **values: object) -> None:
        values = {"residual": -1, **values}
        self.steps.append(native.Step(kind=KINDS.index(kind), **values))

    def _tables(self, tables: Sequence[Floats]) -> ctypes.Array:
        return (ctypes.c_void_p * TABLES)(*map(self._pointer, tables))

    def _pointer(self, array: NDArray | None) -> int | None:
        if array is None:
            return None
        assert array.flags.c_contiguous, "kernels read rows"
        self._kept.append(array)
        return array.ctypes.data


class Runner:
    """A program with a pool of threads; may be called from several threads at once."""

    def __init__(self, program: Program, pool: Pool) -> None:
        """Bring the steps into one piece."""
        self._kept, self.pool = program, pool
        self.workspaces: list[Floats] = []  # new memory at each call would be brought page by page
        steps = (native.Step * len(program.steps))(*program.steps)
        buffers = (native.Buffer * len(program.buffers))(*program.buffers)
        sizes = len(steps), len(buffers), program.group
        self._program = native.Program(*sizes, steps, buffers, program.channels)

    def run(
        self,
        starts: Ints,
        ids: Sequence[Ints] = (),
        *,
        rows: Ints | None = None,
        source: Floats | None = None,
        target: Floats,
    ) -> None:
        """Compute target [rows, channels] for sequences whose tokens begin at `starts`.

        `ids` are each token's rows of the embedded tables, `rows` its row in source and target.
        """
        num_tokens = int(starts[-1])
        size = library().opfa_workspace(ctypes.byref(self._program), num_tokens)
        try:  # another thread may take the last one between a look and a pop
            workspace = self.workspaces.pop()
        except IndexError:
            workspace = np.empty(0, np.float32)
        if len(workspace) < size + ALIGNMENT:
            workspace = np.empty(size + ALIGNMENT, np.float32)
        start = -workspace.ctypes.data // 4 % ALIGNMENT
        pointers = [None if a is None else a.ctypes.data for a in (rows, source, target)]
        call = native.Call(
            num_tokens,
            len(starts) - 1,
            starts.ctypes.data,
            (ctypes.c_void_p * TABLES)(*(each.ctypes.data for each in ids)),
            *pointers,
            workspace[start:].ctypes.data,
        )
        if library().opfa_run(ctypes.byref(self._program), ctypes.byref(call), self.pool.pointer):
            raise RunError(f"no memory for {num_tokens:,} tokens")
        self.workspaces.append(workspace)
