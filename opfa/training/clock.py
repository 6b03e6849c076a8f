"""Seconds by part of a step. A clock that is on waits for the GPU after each part."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch


class Clock:
    """Adds up what each part took, in `seconds`."""

    def __init__(self, is_on: bool = False) -> None:
        """`is_on`: measure; otherwise parts are only named."""
        self.is_on = is_on
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside as this part."""
        if not self.is_on:
            yield
            return
        start = time.perf_counter()
        yield
        wait_for_gpu()
        self.seconds[name] += time.perf_counter() - start


def wait_for_gpu() -> None:
    """Until all that was asked of it is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
