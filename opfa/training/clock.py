"""Seconds by part of a step. A clock that is on waits for the GPU after each part."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class Clock:
    """Adds up what each part took; one that is not on only names them."""

    is_on: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

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
