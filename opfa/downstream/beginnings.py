"""Long texts are cut before the tokenizer sees them, and the tokens that are kept stay the same.

A text of ten million characters takes a tokenizer seconds and gigabytes, for 128 tokens. Its
beginning is taken instead: twice the tokens that are kept, so that none of these is near the cut.
How many characters that is can't be known (blanks are no tokens, and a word of any length may be
one), so the beginning grows until it is enough.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

CHARACTERS = 64  # for each token, to begin with
WORD = 200  # characters; longer words are cut, or not known, by any tokenizer
PIECE = 1 << 20  # characters whose tokens are counted at once


@dataclass(frozen=True, kw_only=True)
class Beginnings:
    """Cuts texts of which a tokenizer keeps the first `tokens` tokens."""

    tokenizer: PreTrainedTokenizerBase
    tokens: int

    def of_text(self, text: str, least: int = 0) -> str:
        """The beginning of a text, which has `least` tokens if the whole text has so many."""
        least = max(least, 2 * self.tokens)
        size = CHARACTERS * least
        while size < len(text) and self.tokenizer.truncation_side == "right":
            beginning = _at_blank(text, size)
            if self.count(beginning) >= least:
                return beginning
            size *= 4
        return text

    def of_pair(self, first: str, second: str) -> tuple[str, str]:
        """The beginnings of both; the longer one stays the longer one, since it may get one token
        more than the other.
        """
        pair = self.of_text(first), self.of_text(second)
        if pair == (first, second):
            return pair
        nums = [self.count(text) for text in pair]
        if min(nums) < 2 * self.tokens:  # that one is whole, and the other one longer
            return pair
        is_first_longer = self.count(first) > self.count(second)
        if is_first_longer and nums[0] <= nums[1]:
            return self.of_text(first, nums[1] + 1), pair[1]
        if not is_first_longer and nums[0] > nums[1]:
            return pair[0], self.of_text(second, nums[0])
        return pair

    def of_words(self, words: list[str]) -> list[str]:
        """The first words, each of them its beginning."""
        num_words = 2 * self.tokens
        while num_words < len(words) and self.tokenizer.truncation_side == "right":
            beginning = [self.of_text(word) for word in words[:num_words]]
            if sum(map(self.count, beginning)) >= 2 * self.tokens:
                return beginning
            num_words *= 4
        return [self.of_text(word) for word in words]

    def count(self, text: str) -> int:
        """How many tokens a text has; of a long one, about."""
        num_tokens = 0
        while text:
            piece = _at_blank(text, PIECE)
            encoded = self.tokenizer(piece, add_special_tokens=False, verbose=False)
            num_tokens += len(encoded["input_ids"])
            text = text[len(piece) :]
        return num_tokens


def _at_blank(text: str, size: int) -> str:
    """The first characters of a text, at most `size`; no word is cut unless it is long."""
    beginning = text[:size]
    if len(beginning) < len(text) and not text[size].isspace():
        words = beginning[-WORD:].rsplit(None, 1)
        if len(words) == 2 and not beginning[-1].isspace():
            return beginning[: -len(words[1])]
    return beginning
