"""How benchmarks measure: seconds, on a GPU too, and peaks of memory. Each runs in its own process,
since a peak never falls.
"""

import atexit
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from opfa.errors import RunError
from opfa.training import launch
from opfa.training.clock import wait_for_gpu
from opfa.training.distributed import end_process

Value = TypeVar("Value")


def timed(step: Callable[[], object]) -> float:
    """Seconds that it takes, with what it leaves to a GPU."""
    wait_for_gpu()
    start = time.perf_counter()
    step()
    wait_for_gpu()
    return time.perf_counter() - start


def peak_bytes() -> int:
    """The most memory that this process had; on a GPU, the most that torch had there."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_of_host()


def peak_of_host() -> int:
    """The most memory of the host that this process had."""
    if Path("/proc/self/status").exists():
        return memory("VmHWM")  # getrusage may report the peak of its parent
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(key: str) -> int:
    """Bytes of this process, on Linux: VmRSS resident now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def in_a_process(function: Callable[..., Value], *arguments: Any) -> Value:
    """Call a function in its own process; raises `RunError` if that fails."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, *arguments))
    process.start()
    theirs.close()  # so that its end is seen here
    try:
        return ours.recv()
    except EOFError as error:
        raise RunError("a measuring process ended; its output says why") from error
    finally:
        process.join()


def _send(connection: Connection, function: Callable[..., object], *arguments: Any) -> None:
    atexit.register(end_process, 0)  # after everything else at exit
    for key in launch.VARIABLES:  # of a launch that this process has no part in
        os.environ.pop(key, None)
    is_done = False
    try:
        connection.send(function(*arguments))
        is_done = True
    finally:
        if not is_done:  # at once, else it waits for its own children before it says why
            traceback.print_exc()
            end_process(1)
