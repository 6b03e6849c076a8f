"""Dynamic masking (BERT, section 3.1) as a pure function of (seed, epoch, example).

Of each example's ordinary tokens, round(probability * n) are chosen, at least one. Of the chosen,
80 % become [MASK], 10 % a random token and 10 % stay. With whole words, words are drawn in random
order until that many tokens are chosen. Nothing here depends on ranks, workers or what was masked
before.
"""

from dataclasses import dataclass

import numpy as np

from opfa.order import MASKING, generator

IGNORED = -100  # the label of a token that is not predicted, torch's default


@dataclass(frozen=True, kw_only=True)
class Masker:
    """Masks one example at a time.

    `is_special` and `is_continuation` are tables over the vocabulary, bool [V]: special tokens are
    never chosen, and a continuation belongs to the word before it.
    """

    seed: int
    probability: float
    whole_word: bool
    mask_id: int
    is_special: np.ndarray
    is_continuation: np.ndarray

    def __call__(self, ids: np.ndarray, epoch: int, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Masked copies of token ids [T]: (input ids, labels), labels `IGNORED` where nothing is
        predicted.
        """
        random = generator(self.seed, MASKING, epoch, example)
        chosen = self._choose(ids, random)
        fate = random.random(len(chosen))
        inputs, labels = ids.copy(), np.full(len(ids), IGNORED, dtype=np.int64)
        labels[chosen] = ids[chosen]
        inputs[chosen[fate < 0.8]] = self.mask_id
        replaced = chosen[(fate >= 0.8) & (fate < 0.9)]
        ordinary = np.flatnonzero(~self.is_special)
        inputs[replaced] = ordinary[random.integers(len(ordinary), size=len(replaced))]
        return inputs, labels

    def _choose(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        candidates = np.flatnonzero(~self.is_special[ids])
        num_chosen = min(len(candidates), max(1, round(self.probability * len(candidates))))
        if not self.whole_word:
            return np.sort(random.permutation(candidates)[:num_chosen])
        starts = ~self.is_continuation[ids[candidates]]
        starts |= np.diff(candidates, prepend=-2) > 1  # no word goes on behind a special token
        words = np.split(candidates, np.flatnonzero(starts)[1:])
        order = random.permutation(len(words))
        ends = np.cumsum([len(words[w]) for w in order])
        num_words = int(np.searchsorted(ends, num_chosen)) + 1
        return np.sort(np.concatenate([words[w] for w in order[:num_words]]))
