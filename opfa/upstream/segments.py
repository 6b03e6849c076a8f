"""Tokenized documents to examples, in the two forms that pre-training knows.

    "mlm+nsp"  BERT's segment pairs (Devlin et al., 2019, appendix A.2): sentences A and B, where B
               is in half of the cases what follows A (label 0), else from another document (1)
    "mlm"      token streams of whole documents, parted by [SEP], cut into full sequences

A document is a list of segments (sentences, or one segment for all), a segment a list of token ids.
"""

import numpy as np
from datasets import Dataset, Features, List, Value

from opfa.order import PAIRS, generator
from opfa.upstream.recipe import Corpus

EXAMPLE = Features(
    {
        "input_ids": List(Value("int32")),
        "second_segment": Value(
            "int32"
        ),  # index of the first token of segment B; the length if there is none
        "next_sentence_label": Value("int8"),
    }
)
Example = tuple[list[int], int, int]  # the columns of EXAMPLE


def packed(
    documents: list[list[list[int]]], tokens: int, special: tuple[int, int]
) -> list[Example]:
    """Full sequences from a stream of documents with [SEP] between them; only the last one may be
    shorter.
    """
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
    """The segment pairs of one document, each [CLS] A [SEP] B [SEP] with at most `sequence_tokens`
    tokens.
    """
    random = generator(corpus.seed, PAIRS, index)
    segments = documents[index]["segments"]
    examples: list[Example] = []
    position = 0
    while position < len(segments):
        room = corpus.sequence_tokens - 3
        if random.random() < corpus.short_sequences:
            room = int(random.integers(2, room + 1))
        chunk = _take(segments, position, room)
        num_first = int(random.integers(1, len(chunk))) if len(chunk) > 1 else 1
        first = [token for segment in chunk[:num_first] for token in segment]
        is_random = len(chunk) == 1 or random.random() < 0.5
        if is_random:
            second = _elsewhere(documents, index, max(1, room - len(first)), random)
            position += num_first  # what was not used comes again
        else:
            second = [token for segment in chunk[num_first:] for token in segment]
            position += len(chunk)
        _shorten(first, second, room, random)
        cls, sep = special
        examples.append(([cls, *first, sep, *second, sep], len(first) + 2, int(is_random)))
    return examples


def _take(segments: list[list[int]], start: int, num_tokens: int) -> list[list[int]]:
    chunk, length = [], 0
    for segment in segments[start:]:
        chunk.append(segment)
        length += len(segment)
        if length >= num_tokens:
            break
    return chunk


def _elsewhere(
    documents: Dataset, index: int, num_tokens: int, random: np.random.Generator
) -> list[int]:
    other = int(random.integers(len(documents) - 1))
    segments = documents[other + (other >= index)]["segments"]
    start = int(random.integers(len(segments)))
    return [token for segment in _take(segments, start, num_tokens) for token in segment]


def _shorten(first: list[int], second: list[int], room: int, random: np.random.Generator) -> None:
    """Drop tokens of the longer segment, at its front or back, until both fit, as BERT does."""
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        longer.pop(0 if random.random() < 0.5 else -1)
