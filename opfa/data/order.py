"""Data order: which examples make up each step, as a function of (seed, epoch) alone.

Global position p = step * batch + i is example `order(epoch)[p mod N]` of epoch p div N; each rank
takes its slice of a batch. With lengths, as in transformers' group_by_length, runs of `GROUPED`
batches of a permutation are sorted by length and cut again, and the batches shuffled.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

Place = tuple[int, int]  # epoch, example
ORDER, HELD_OUT, PAIRS = 1, 3, 4  # what a random stream is for: no two share one
GROUPED = 50


def generator(seed: int, *counters: int) -> np.random.Generator:
    """An independent random stream for these numbers (Philox), the same on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *counters])))


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which examples make up each rank's micro-batches; with `lengths` [N] in tokens, by length."""

    seed: int
    num_examples: int
    batch: int
    micro_batch: int
    rank: int
    world_size: int
    lengths: np.ndarray | None = None
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

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
        if epoch not in self._epochs:
            self._epochs.pop(epoch - 2, None)  # a batch reaches back into the last one
            self._epochs[epoch] = self._epoch(epoch)
        return epoch, int(self._epochs[epoch][index])

    def _epoch(self, epoch: int) -> np.ndarray:
        size, random = self.num_examples, generator(self.seed, ORDER, epoch)
        order = random.permutation(size)
        if self.lengths is None:
            return order
        first = -epoch * size % self.batch  # these end the batch that the last epoch began
        num_batches = max(0, size - first) // self.batch
        whole = order[first : first + num_batches * self.batch]
        run = self.batch * max(1, min(GROUPED, num_batches // 4))
        for start in range(0, len(whole), run):
            part = whole[start : start + run]
            part[:] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = whole.reshape(num_batches, self.batch)
        batches[:] = batches[random.permutation(num_batches)]
        return order


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
