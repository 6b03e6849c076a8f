"""Dynamic masking (BERT, section 3.1) of a batch: a pure function of (seed, epoch, example).

Of each example's n ordinary tokens, round(probability * n) are chosen, at least one unless the
probability is 0: those with the smallest random numbers. With whole words, all tokens of a word
share a number. Of the chosen, 80 % become [MASK], 10 % a random token and 10 % stay. The numbers
come from a counter and a mixing function (SplitMix64), for all tokens in one go.
"""

from dataclasses import dataclass

import numpy as np

CHOICE, FATE, REPLACEMENT = 1, 2, 3  # what a random number is for


@dataclass(frozen=True, kw_only=True)
class Masker:
    """Masks batches."""

    seed: int
    probability: float
    whole_word: bool
    mask_id: int
    is_special: np.ndarray  # bool [V]: tokens that are never chosen
    is_continuation: np.ndarray  # bool [V]: tokens that belong to the word before

    def __call__(
        self, ids: np.ndarray, lengths: np.ndarray, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A masked copy of token ids [B, T], of which each row's first `lengths` [B] are real, and
        the flat positions of those to predict, row by row; `places` [B, 2] are (epoch, example).
        """
        if self.probability == 0:
            return ids.copy(), np.zeros(0, dtype=np.int64)
        chosen = np.flatnonzero(self._choose(ids, lengths, places))
        rows, columns = np.divmod(chosen, ids.shape[1])
        fate = _uniform(_numbers(self.seed, FATE, places[rows], columns))
        inputs = ids.copy()
        flat = inputs.reshape(-1)
        flat[chosen[fate < 0.8]] = self.mask_id
        is_replaced = (fate >= 0.8) & (fate < 0.9)
        ordinary = np.flatnonzero(~self.is_special)
        drawn = _numbers(self.seed, REPLACEMENT, places[rows[is_replaced]], columns[is_replaced])
        flat[chosen[is_replaced]] = ordinary[drawn % np.uint64(len(ordinary))]
        return inputs, chosen

    def _choose(self, ids: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> np.ndarray:
        columns = np.arange(ids.shape[1])
        is_candidate = ~self.is_special[ids] & (columns < lengths[:, None])
        keys = np.broadcast_to(columns, ids.shape)
        if self.whole_word:
            starts = ~self.is_continuation[ids]
            keys = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
        numbers = _numbers(self.seed, CHOICE, places[:, None], keys)
        numbers[~is_candidate] = np.iinfo(np.uint64).max
        num_chosen = np.rint(self.probability * is_candidate.sum(1)).astype(np.int64)
        last = np.maximum(num_chosen - 1, 0)[:, None]
        return is_candidate & (numbers <= np.take_along_axis(np.sort(numbers, axis=1), last, 1))


def _numbers(seed: int, use: int, places: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """64 random bits for each counter of each place [..., 2]."""
    number = _mixed(np.array([seed], dtype=np.uint64))
    for part in (np.array([use]), places[..., 0], places[..., 1], counters):
        number = _mixed(number + part.astype(np.uint64))
    return number


def _mixed(number: np.ndarray) -> np.ndarray:  # Steele et al., 2014
    number = number + np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


def _uniform(numbers: np.ndarray) -> np.ndarray:
    """In [0, 1), of which 53 bits are random."""
    return (numbers >> np.uint64(11)) * 2.0**-53
