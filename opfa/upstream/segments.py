"""Tokenized documents to examples, in the two forms that pre-training knows.

    "mlm+nsp"  BERT's segment pairs (Devlin et al., 2019, appendix A.2): sentences A and B, where B
               is in half of the cases what follows A (label 0), else from another document (1)
    "mlm"      token streams of whole documents, parted by [SEP], cut into full sequences

A document is a list of segments, a segment a list of token ids.
"""

import numpy as np

from opfa.data.order import PAIRS, generator
from opfa.extras import importing
from opfa.upstream.recipe import Corpus

with importing("pre-training", "opfa[pretrain]"):
    from datasets import Dataset, Features, List, Value

EXAMPLE = Features(
    {
        "input_ids": List(Value("int32")),
        "second_segment": Value("int32"),  # where segment B starts; the length if there is none
        "next_sentence_label": Value("int8"),
    }
)
Example = tuple[list[int], int, int]  # the columns of EXAMPLE


def packed(
    documents: list[list[list[int]]], tokens: int, special: tuple[int, int]
) -> list[Example]:
    """Full sequences from a stream of documents with [SEP] between them; the last may be short."""
    cls, sep = special
    stream: list[int] = []
    for document in documents:
        stream += [*(token for segment in document for token in segment), sep]
    width = tokens - 2
    pieces = [stream[start : start + width] for start in range(0, len(stream) - 1, width)]
    examples = [[cls, *piece, sep] for piece in pieces]
    return [(ids, len(ids), -100) for ids in examples]


def segment_pairs(
    documents: Dataset, index: int, corpus: Corpus, special: tuple[int, int]
) -> list[Example]:
    """The pairs of one document, [CLS] A [SEP] B [SEP], as BERT makes them (README.md)."""
    random, documents = generator(corpus.seed, PAIRS, index), documents.with_format("arrow")
    segments = documents[index]["segments"][0].as_py()
    cls, sep = special
    room = aim = corpus.sequence_tokens - 3
    if random.random() < corpus.short_sequences:
        aim = int(random.integers(2, room + 1))
    examples: list[Example] = []
    position = 0
    while position < len(segments):
        chunk = _take(segments, position, aim)
        num_first = int(random.integers(1, len(chunk))) if len(chunk) > 1 else 1
        first = [token for segment in chunk[:num_first] for token in segment]
        is_random = len(chunk) == 1 or random.random() < 0.5
        if is_random:
            second = _elsewhere(documents, index, aim - len(first), random)
            position += num_first  # what was not used comes again
        else:
            second = [token for segment in chunk[num_first:] for token in segment]
            position += len(chunk)
        first, second = _shortened(first, second, room, random)
        examples.append(([cls, *first, sep, *second, sep], len(first) + 2, int(is_random)))
    return examples


def _take(segments: list[list[int]], start: int, num_tokens: int) -> list[list[int]]:
    """Segments from `start` on until they have so many tokens; at least one."""
    end, length = start + 1, len(segments[start])
    while end < len(segments) and length < num_tokens:
        length += len(segments[end])
        end += 1
    return segments[start:end]


def _elsewhere(
    documents: Dataset, index: int, num_tokens: int, random: np.random.Generator
) -> list[int]:
    """Segments of another document, which may be a book: only what is needed is read."""
    other = int(random.integers(len(documents) - 1))
    segments = documents[other + (other >= index)]["segments"][0].values
    start = int(random.integers(len(segments)))
    near = segments[start : start + max(1, num_tokens)].to_pylist()  # each has a token or more
    return [token for segment in _take(near, 0, num_tokens) for token in segment]


def _shortened(
    first: list[int], second: list[int], room: int, random: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Both cut, at random ends of the longer one, until they fit together, as BERT does."""
    pair, fronts, backs = (first, second), [0, 0], [len(first), len(second)]
    for _ in range(len(first) + len(second) - room):
        longer = 0 if backs[0] - fronts[0] > backs[1] - fronts[1] else 1
        if random.random() < 0.5:
            fronts[longer] += 1
        else:
            backs[longer] -= 1
    first, second = (half[a:b] for half, a, b in zip(pair, fronts, backs, strict=True))
    return first, second
