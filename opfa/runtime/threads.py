"""Threads that compute for one or several programs, and how many there may be."""

import ctypes
import functools
import os
import sys
import threading
from pathlib import Path

import torch
from torch import nn

from opfa.errors import RunError
from opfa.runtime.library import library


class Pool:
    """Threads of the kernels. They sleep between calls, and end with the object. A process that
    was forked has none of them, and starts its own when it first needs them.
    """

    def __init__(self, threads: int) -> None:
        """Start them; raises `RunError` if the machine has none left."""
        self.threads = threads
        self._start()

    def _start(self) -> None:
        pointer = self._made()
        if not pointer:
            raise RunError(
                f"threads = {self.threads}: the machine has no memory or no threads left"
            )
        self._pointer: int = pointer
        self._process = os.getpid()

    def _made(self) -> int | None:
        return library().opfa_pool_new(self.threads)

    @property
    def pointer(self) -> int:
        """The `opfa_pool` of this process."""
        if self._process != os.getpid():
            self._start()
        return self._pointer

    def __del__(self) -> None:
        """End them."""
        if getattr(self, "_process", None) == os.getpid():
            library().opfa_pool_free(self._pointer)


class TorchThreads(Pool):
    """Torch's own threads, of GNU's OpenMP, for products between torch's operations. After each of
    those they spin for a while, on the cores that threads of ours would need.

    Where torch has no such threads, and in a forked process, they are a `Pool`'s.
    """

    def _made(self) -> int | None:
        team = _team() if os.getpid() == _OWN_PROCESS else None  # OpenMP's don't survive a fork
        return library().opfa_pool_of(self.threads, *team) if team else super()._made()


_OWN_PROCESS = os.getpid()


@functools.cache
def _team() -> "tuple[ctypes.c_void_p, ...] | None":
    """OpenMP's functions that start a team, number its threads and count them; None without it."""
    for file in Path(torch.__file__).with_name("lib").glob("libgomp*.so*"):
        found = ctypes.CDLL(str(file))  # loaded already
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        return tuple(ctypes.cast(getattr(found, name), ctypes.c_void_p) for name in names)
    return None


class _Given(threading.local):
    """How many threads torch had before the calls that are under way in this thread."""

    def __init__(self) -> None:
        self.numbers: list[int] = []


_given = _Given()


def keep_torch_to_one(model: nn.Module) -> None:
    """Let torch use one thread during each call of a model whose encoder runs in the kernels.

    Torch's threads spin for some milliseconds after each operation, even after a `tanh` of a
    pooler's 768 numbers, on the cores that the next call needs.
    """

    def before(*_: object) -> None:
        _given.numbers.append(torch.get_num_threads())
        torch.set_num_threads(1)

    def after(*_: object) -> None:
        torch.set_num_threads(_given.numbers.pop())

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after, always_call=True)


def num_threads(wanted: int | None) -> int:
    """How many threads to use: by default the cores that this process may use."""
    cores = max(1, min(_allowed(), _quota()))
    if wanted is None:
        return cores
    if not 1 <= wanted <= cores:
        raise RunError(f"threads = {wanted}: must be from 1 to the {cores} cores of this process")
    return wanted


def _allowed() -> int:
    """The cores that the system lets this process use; macOS has no such limits."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _quota() -> int:
    """The cores that the container's quota allows (cgroup 2)."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max"
        return os.cpu_count() or 1
