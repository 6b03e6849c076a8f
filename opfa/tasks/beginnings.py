"""Long texts are cut before the tokenizer sees them, and the tokens that are kept stay the same.

A text of ten million characters takes a tokenizer seconds and gigabytes, for 128 tokens. A token
may have any number of characters, so the beginning grows until it has tokens enough. Only where
both halves of a pair are so long may the odd token be another half's.
"""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

CHARACTERS = 64  # for each token, to begin with
SPARE = 200  # tokens; the last word is cut too, and may have so many where it had one


def of_text(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """The beginning of a text, with the same first tokens."""

    def count(size: int) -> int:
        encoded = tokenizer(text[:size], add_special_tokens=False, verbose=False)
        return len(encoded["input_ids"])

    if tokenizer.truncation_side != "right":
        return text
    return text[: _enough(tokens, count, CHARACTERS * (tokens + SPARE), len(text))]


def of_words(tokenizer: PreTrainedTokenizerBase, words: list[str], tokens: int) -> list[str]:
    """The first words, with the same first tokens; each of them is its beginning."""

    def first(size: int) -> list[str]:
        return [of_text(tokenizer, word, tokens) for word in words[:size]]

    def count(size: int) -> int:
        encoded = tokenizer(
            first(size), is_split_into_words=True, add_special_tokens=False, verbose=False
        )
        return len(encoded["input_ids"])

    if tokenizer.truncation_side != "right":
        return words
    return first(_enough(tokens, count, tokens + SPARE, len(words)))


def _enough(tokens: int, count: Callable[[int], int], size: int, most: int) -> int:
    """How many characters or words are certain to have these tokens."""
    while size < most and count(size) < tokens + SPARE:
        size *= 4
    return size
