"""Features: what a model is called with, tokenized from checked examples.

As in SQuAD, a long context becomes overlapping windows, and an answer outside a window is its
[CLS]. A word's tag stands on its first token. Choices make batches [examples, choices, tokens], and
texts that are embedded [examples, texts, tokens].
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from opfa.errors import DataError
from opfa.tasks import beginnings
from opfa.tasks.checks import Row
from opfa.tasks.examples import Examples
from opfa.tasks.recipe import Task
from opfa.tasks.rows import Rows

Batch = dict[str, Tensor]
Columns = dict[str, list[Any]]  # Any: numbers, or lists of them
Labels = list[Any]  # Any: numbers, lists of them, or SQuAD's answers
# Columns of features, and how many examples don't fit.
Build = Callable[[Task, PreTrainedTokenizerBase, Examples, slice, Labels], tuple[Columns, int]]

TARGETS = ("labels", "start_positions", "end_positions")
DECODING = ("example", "context", "offsets", "cls", "words")  # what only scoring needs
CHUNK = 1_000  # examples that are tokenized at once, if they aren't long
CHUNK_CHARACTERS = 4 << 20  # with their windows about 500 MB
UNKNOWN = 0.2  # more tokens that are none of the vocabulary's are worth a warning
NO_LABEL = -100  # cross_entropy's ignore_index
NOWHERE = -1e4  # the logit of a place without a token: its probability is 0, its logarithm finite
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: `features` and `collate` are for a DataLoader, `examples` for scoring."""

    features: Rows
    examples: Examples
    classes: tuple[str, ...]  # in the order of the model's outputs
    collate: Callable[[Sequence[Row]], Batch]

    def lengths(self) -> np.ndarray:
        """Tokens of each example [N]; of its longest choice, where it has several."""
        return np.array([num_tokens(ids) for ids in self.features["input_ids"]])


def sequences(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: Examples, part: slice, labels: Labels
) -> tuple[Columns, int]:
    """A text or a pair, cut at `sequence_tokens`."""
    texts, pairs = examples.texts[part], examples.pairs and examples.pairs[part]
    encoded = _encoded(task, tokenizer, texts, pairs)
    return {**encoded, "labels": labels}, _num_cut(encoded)


def _encoded(
    task: Task, tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None
) -> BatchEncoding:
    """Texts or pairs, cut at `sequence_tokens`; long ones even before the tokenizer sees them."""
    tokens = task.sequence_tokens
    texts = [beginnings.of_text(tokenizer, text, tokens) for text in texts]
    pairs = pairs and [beginnings.of_text(tokenizer, text, tokens) for text in pairs]
    return tokenizer(texts, pairs, truncation=True, max_length=tokens)


def sentences(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: Examples, part: slice, labels: Labels
) -> tuple[Columns, int]:
    """Each text of an example by itself, cut at `sequence_tokens`: [examples, texts, tokens]."""
    columns = [examples.texts, *([] if examples.pairs is None else [examples.pairs])]
    encoded = [_encoded(task, tokenizer, column[part], None) for column in columns]
    grouped = {
        name: [list(texts) for texts in zip(*(each[name] for each in encoded), strict=True)]
        for name in encoded[0]
    }
    is_cut = zip(*map(_are_cut, encoded), strict=True)
    return {**grouped, "labels": labels}, sum(map(any, is_cut))


def tagged_words(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: Examples, part: slice, labels: Labels
) -> tuple[Columns, int]:
    """Words with their tags, cut. `words` are the indices of those that have a token."""
    tokens = task.sequence_tokens
    kept = [beginnings.of_words(tokenizer, words, tokens) for words in examples.texts[part]]
    rows = [_with_blanks(words) for words in kept]
    encoded = tokenizer(rows, is_split_into_words=True, truncation=True, max_length=tokens)
    columns: Columns = {**encoded, "labels": [], "words": []}
    for index, tags in enumerate(labels):
        words = encoded.word_ids(index)
        pairs = zip(words, [None, *words], strict=False)
        firsts = [None if word == before else word for word, before in pairs]
        columns["labels"].append([NO_LABEL if word is None else tags[word] for word in firsts])
        columns["words"].append([word for word in firsts if word is not None])
    return columns, _num_cut(encoded)


def _with_blanks(words: Sequence[str]) -> list[str]:
    """Words as they stand in a text: byte-level tokenizers know a word by the blank before it."""
    stripped = [word.strip() for word in words]
    return [*stripped[:1], *(f" {word}" for word in stripped[1:])]


def choices(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: Examples, part: slice, labels: Labels
) -> tuple[Columns, int]:
    """A text beside each of its choices; every example must have as many."""
    assert examples.pairs is not None, "choices are pairs"
    options = examples.pairs[part]
    num_choices = len(examples.pairs[0])
    for place, of_one in zip(examples.places[part], options, strict=True):
        if len(of_one) != num_choices:
            what = f"has {len(of_one)} choices, the first example {num_choices}"
            raise DataError(f"{examples.source}, {place}: {what}")
    texts = [text for text in examples.texts[part] for _ in range(num_choices)]
    flat = [choice for of_one in options for choice in of_one]
    encoded = _encoded(task, tokenizer, texts, flat)
    grouped = {
        name: [rows[i : i + num_choices] for i in range(0, len(flat), num_choices)]
        for name, rows in encoded.items()
    }
    return {**grouped, "labels": labels}, _num_cut(encoded, num_choices)


def _num_cut(encoded: BatchEncoding, num_choices: int = 1) -> int:
    """How many examples are longer than they may be, in one choice or several."""
    is_cut = _are_cut(encoded)
    return sum(any(is_cut[i : i + num_choices]) for i in range(0, len(is_cut), num_choices))


def _are_cut(encoded: BatchEncoding) -> list[bool]:
    assert encoded.encodings is not None, "a fast tokenizer's"
    return [bool(encoding.overflowing) for encoding in encoded.encodings]


def windows(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: Examples, part: slice, labels: Labels
) -> tuple[Columns, int]:
    """Questions with every window of their contexts, and the first answer in each; beside what the
    model sees, the question's index, the context's tokens, their offsets, and the place of [CLS].
    """
    assert examples.pairs is not None, "the recipe asks for text_pair"
    _check_room(task, tokenizer, examples, part)
    encoded = tokenizer(
        examples.texts[part],
        examples.pairs[part],
        truncation="only_second",
        max_length=task.sequence_tokens,
        stride=task.stride_tokens,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    columns = dict(encoded)
    columns["example"] = [part.start + i for i in columns.pop("overflow_to_sample_mapping")]
    columns["offsets"] = columns.pop("offset_mapping")
    columns |= {"context": [], "cls": []}
    spans, has_answer = [], {i for i, answers in enumerate(labels, part.start) if answers["text"]}
    for window, example in enumerate(columns["example"]):
        ids = encoded.sequence_ids(window)
        first = ids.index(1) if 1 in ids else len(ids)
        context = (first, first + ids.count(1))
        cls = columns["input_ids"][window].index(tokenizer.cls_token_id)
        span = _token_span(columns["offsets"][window], context, labels[example - part.start])
        columns["context"].append(context)
        columns["cls"].append(cls)
        spans.append(span or (cls, cls))
        if span:
            has_answer.discard(example)
    columns["start_positions"], columns["end_positions"] = map(list, zip(*spans, strict=True))
    return columns, len(has_answer)


def _check_room(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: Examples, part: slice
) -> None:
    """Neighbouring windows overlap by `stride_tokens`, so each must hold more than that."""
    questions = tokenizer(examples.texts[part], add_special_tokens=False)["input_ids"]
    most = task.sequence_tokens - tokenizer.num_special_tokens_to_add(pair=True)
    for place, question in zip(examples.places[part], questions, strict=True):
        if most - len(question) <= task.stride_tokens:
            sizes = f"{task.sequence_tokens} that overlap by {task.stride_tokens}"
            what = f"the question has {len(question)} tokens, too many for windows of {sizes}"
            raise DataError(f"{examples.source}, {place}: {what}")


def _token_span(
    offsets: Sequence[Sequence[int]], context: tuple[int, int], answers: Row
) -> tuple[int, int] | None:
    """First and last token of the first answer, if there is one and this window has all of it."""
    first, stop = context
    if first == stop or not answers["text"]:
        return None
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    if start < offsets[first][0] or end > offsets[stop - 1][1]:
        return None
    # An answer may begin within a token; and characters that the tokenizer drops are in none.
    first_token = bisect_right(offsets, start, first, stop, key=lambda offset: offset[1])
    last_token = bisect_left(offsets, end, first, stop, key=lambda offset: offset[0]) - 1
    return (first_token, last_token) if first_token <= last_token else None


def parts(examples: Examples) -> Iterator[slice]:
    """Slices of examples that are tokenized at once."""
    pairs = examples.pairs or [""] * len(examples.texts)
    start = num_characters = 0
    for index, example in enumerate(zip(examples.texts, pairs, strict=True)):
        num = _num_characters(example)
        if index > start and (index - start == CHUNK or num_characters + num > CHUNK_CHARACTERS):
            yield slice(start, index)
            start, num_characters = index, 0
        num_characters += num
    yield slice(start, len(examples.texts))


def _num_characters(value: str | Sequence[Any]) -> int:  # Any: a text, or texts in lists
    return len(value) if isinstance(value, str) else sum(map(_num_characters, value))


def check_language(task: Task, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> None:
    """Warn of a tokenizer that doesn't know this language."""
    most = beginnings.CHARACTERS * task.sequence_tokens  # the beginning of a text tells
    texts = [t if isinstance(t, str) else " ".join(t[:most]) for t in examples.texts[:CHUNK]]
    sample = [text[:most] for text in texts]
    ids = [i for row in tokenizer(sample, verbose=False)["input_ids"] for i in row]
    share = ids.count(tokenizer.unk_token_id) / len(ids)
    if share > UNKNOWN:
        log.warning("%s: the tokenizer doesn't know %.0f %% of it", examples.source, 100 * share)


def collate(pad_token_id: int, rows: Sequence[Row]) -> Batch:
    """Pad to the longest row of the batch."""
    tokens = max(num_tokens(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad_token_id, "labels": NO_LABEL}
    return {
        name: torch.tensor([_padded(row[name], tokens, fill.get(name, 0)) for row in rows])
        for name in rows[0]
        if name not in DECODING
    }


def num_tokens(ids: Sequence[Any]) -> int:
    """The length of a row, of its longest choice where it has several."""
    return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)


def _padded(value: Any, tokens: int, fill: int) -> Any:  # Any: a number, or lists of them
    if not isinstance(value, list):
        return value
    if isinstance(value[0], list):
        return [_padded(row, tokens, fill) for row in value]
    return value + [fill] * (tokens - len(value))
