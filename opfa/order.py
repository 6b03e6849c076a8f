"""Data order: which examples make up each step, as a function of (seed, epoch) alone.

Global position p = step * batch + i is example `permutation(epoch)[p mod N]` of epoch p div N. Each
rank takes its slice of every global batch, cut into micro-batches. So ranks, micro-batches, workers
and a resume change nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Place = tuple[int, int]  # epoch, example
ORDER, MASKING, HELD_OUT, PAIRS = 1, 2, 3, 4  # what a random stream is for: no two share one


def generator(seed: int, *counters: int) -> np.random.Generator:
    """An independent random stream for these numbers (Philox, counter based), the same on every
    machine.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *counters])))


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which examples make up each rank's micro-batches."""

    seed: int
    num_examples: int
    batch: int
    micro_batch: int
    rank: int
    world_size: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.batch // (self.micro_batch * self.world_size)

    def step(self, step: int) -> list[list[Place]]:
        """This rank's micro-batches in the step that follows `step` finished ones."""
        share = self.batch // self.world_size
        first = step * self.batch + self.rank * share
        places = [self._place(position) for position in range(first, first + share)]
        return [places[i : i + self.micro_batch] for i in range(0, share, self.micro_batch)]

    def _place(self, position: int) -> Place:
        epoch, index = divmod(position, self.num_examples)
        return epoch, int(_permutation(self.seed, epoch, self.num_examples)[index])


@lru_cache(maxsize=2)  # the current epoch and the one that a batch may reach into
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return generator(seed, ORDER, epoch).permutation(size)


@dataclass(frozen=True)
class MicroBatches:
    """A sampler of micro-batches for `DataLoader`."""

    order: Order
    steps: range

    def __iter__(self) -> Iterator[list[Place]]:
        """This rank's micro-batches, step by step."""
        for step in self.steps:
            yield from self.order.step(step)

    def __len__(self) -> int:
        """How many micro-batches there are."""
        return len(self.steps) * self.order.accumulation
