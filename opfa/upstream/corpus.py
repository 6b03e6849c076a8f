"""Documents to pre-training examples: read, tokenize once, cut, and write memory-mapped Arrow
shards with a digest.

    "mlm+nsp": BERT's segment pairs (Devlin et al., 2019, appendix A.2): sentences A and B of up to the sequence length, where B is
               in half of the cases the true continuation (label 0) and otherwise from another document (label 1).
    "mlm":     token streams of whole documents, parted by [SEP], cut into full sequences.

Every example is a pure function of (corpus, seed, document), so the number of processes changes
nothing. Masking is not done here but anew in every epoch. The directory appears under its name only
when it is complete.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from tokenizers import BertWordPieceTokenizer
from transformers import PreTrainedTokenizerBase

from opfa.models import load_tokenizer, quiet_transformers, wordpiece_tokenizer
from opfa.order import generator
from opfa.recipe import DataError, RunError
from opfa.records import expand, read_records
from opfa.upstream.recipe import Corpus, TokenizerTraining

FORMAT = "opfa-corpus/1"
GROUP = 64  # documents that one call cuts into examples; part of the result
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
EXAMPLE = Features(
    {
        "input_ids": List(Value("int32")),
        "second_segment": Value(
            "int32"
        ),  # index of the first token of segment B; the length if there is none
        "next_sentence_label": Value("int8"),
    }
)
log = logging.getLogger(__name__)


def prepare(corpus: Corpus, output: Path) -> dict[str, Any]:
    """Write the examples of a corpus, and its tokenizer, to a new directory; returns what
    `corpus.json` says.
    """
    if output.exists():
        raise RunError(f"{output}: exists already; give a new directory")
    work = output.with_name(f"{output.name}.incomplete-{os.getpid()}")
    work.mkdir(parents=True)
    try:
        summary = _prepare(corpus, work)
        os.replace(work, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return summary


def _prepare(corpus: Corpus, work: Path) -> dict[str, Any]:
    documents = _documents(corpus, work / "cache")
    log.info("%d documents read", len(documents))
    tokenizer = _tokenizer(corpus, documents)
    tokenizer.save_pretrained(work / "tokenizer")
    tokenized = documents.map(
        _tokenize,
        batched=True,
        remove_columns=documents.column_names,
        fn_kwargs={"tokenizer": tokenizer, "by_sentence": corpus.objective == "mlm+nsp"},
        features=Features({"segments": List(List(Value("int32")))}),
        desc="Tokenizing",
    )
    held_out = _held_out(len(tokenized), corpus)
    parts = {
        "train": tokenized.select(np.flatnonzero(~held_out)),
        "validation": tokenized.select(np.flatnonzero(held_out)),
    }
    summary: dict[str, Any] = {
        "format": FORMAT,
        "corpus": corpus.model_dump(mode="json"),
        "splits": {},
    }
    for name, part in parts.items():
        if len(part) < 2:
            raise DataError(
                f"{len(documents)} documents leave only {len(part)} for {name}; at least 2 are needed"
            )
        examples = _examples(part, tokenizer, corpus)
        if len(examples) == 0:
            raise DataError(f"the {name} documents are too short: not one example came out")
        examples.save_to_disk(work / name)
        summary["splits"][name] = {"documents": len(part), **_measure(examples)}
        log.info("%s: %s", name, summary["splits"][name])
    summary["tokenizer_sha256"] = tokenizer_digest(tokenizer)
    (work / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(work / "cache", ignore_errors=True)
    return summary


def _documents(corpus: Corpus, cache: Path) -> Dataset:
    if corpus.hub:
        try:
            dataset = load_dataset(corpus.hub, corpus.hub_config, split=corpus.hub_split)
        except (OSError, ValueError) as error:
            raise DataError(
                f"corpus.hub = {corpus.hub!r}: can't be loaded: {str(error).splitlines()[0]}"
            ) from error
        assert isinstance(dataset, Dataset)
        if corpus.text_column not in dataset.column_names:
            raise DataError(
                f"{corpus.hub}: no column {corpus.text_column!r}; there are {dataset.column_names}"
            )
        return dataset.select_columns([corpus.text_column]).rename_columns(
            {corpus.text_column: "text"}
        )
    files = expand(corpus.documents)
    for file in files:  # all of them are checked before any work is done
        next(_texts(file, corpus.text_column))
    try:
        made = Dataset.from_generator(
            _all_texts,
            features=Features({"text": Value("string")}),
            cache_dir=str(cache),
            gen_kwargs={"files": [str(file) for file in files], "column": corpus.text_column},
        )
    except DatasetGenerationError as error:  # what it wraps says which line, or that a disk is full
        raise error.__cause__ or error from None
    assert isinstance(made, Dataset)
    return made


def _all_texts(files: list[str], column: str) -> Iterator[dict[str, str]]:
    for file in files:
        for text in _texts(Path(file), column):
            yield {"text": text}


def _texts(file: Path, column: str) -> Iterator[str]:
    for where, record in read_records(file):
        if column not in record:
            raise DataError(f"{file}, {where}: no column {column!r}; there are {sorted(record)}")
        text = record[column]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{file}, {where}: {column!r} is empty or not a text")
        yield text


def _tokenizer(corpus: Corpus, documents: Dataset) -> PreTrainedTokenizerBase:
    if corpus.train_tokenizer is None:
        assert corpus.tokenizer is not None
        return load_tokenizer(corpus.tokenizer)
    wanted = corpus.train_tokenizer
    vocabulary = _vocabulary(wanted, documents)
    return wordpiece_tokenizer(
        vocabulary, lowercase=wanted.lowercase, tokens=corpus.sequence_tokens
    )


def _vocabulary(wanted: TokenizerTraining, documents: Dataset) -> dict[str, int]:
    """A WordPiece vocabulary, the same on every run.

    Trained twice, since the trainer numbers "##a", "##b", … in the order of a hash map and breaks
    ties by number (huggingface/tokenizers#1794): the first pass finds them, the second is told
    their numbers.
    """
    vocabulary: dict[str, int] = {}
    for num_tokens in (1, wanted.vocabulary):
        trainer = BertWordPieceTokenizer(lowercase=wanted.lowercase, strip_accents=wanted.lowercase)
        trainer.train_from_iterator(
            (batch["text"] for batch in documents.iter(1000)),
            vocab_size=num_tokens,
            min_frequency=wanted.min_frequency,
            show_progress=False,
            special_tokens=[*SPECIAL, *sorted(t for t in vocabulary if t.startswith("##"))],
        )
        vocabulary = trainer.get_vocab()
    return vocabulary


def _tokenize(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, by_sentence: bool
) -> dict[str, list[list[list[int]]]]:
    texts = [_sentences(text) if by_sentence else [text] for text in batch["text"]]
    flat = [sentence for sentences in texts for sentence in sentences]
    with quiet_transformers():  # a document is longer than a model's positions, and that is fine
        ids = iter(
            tokenizer(flat, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        )
    segments = [[s for s in (next(ids) for _ in sentences) if s] for sentences in texts]
    for text, document in zip(batch["text"], segments, strict=True):
        if not document:
            raise DataError(f"a document has no tokens, only invisible characters: {text[:40]!r}")
    return {"segments": segments}


def _sentences(text: str) -> list[str]:
    return [s for line in text.splitlines() for s in SENTENCE_END.split(line) if s.strip()]


def _held_out(size: int, corpus: Corpus) -> np.ndarray:
    num_held_out = max(2, round(corpus.validation * size))
    chosen = generator(corpus.seed, 0).permutation(size)[:num_held_out]
    return np.isin(np.arange(size), chosen)


def _examples(documents: Dataset, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> Dataset:
    num_groups = -(-len(documents) // GROUP)
    groups = Dataset.from_dict({"group": range(num_groups)})
    return groups.map(
        _cut_group,
        batched=True,
        batch_size=1,
        remove_columns=["group"],
        fn_kwargs={
            "documents": documents,
            "corpus": corpus,
            "special": (tokenizer.cls_token_id, tokenizer.sep_token_id),
        },
        features=EXAMPLE,
        num_proc=min(num_groups, os.cpu_count() or 1),
        desc="Cutting examples",
    )


def _cut_group(
    batch: dict[str, list[int]], documents: Dataset, corpus: Corpus, special: tuple[int, int]
) -> dict[str, list]:
    (group,) = batch["group"]
    members = range(group * GROUP, min((group + 1) * GROUP, len(documents)))
    examples: list[Example] = []
    if corpus.objective == "mlm":
        examples = packed(
            [documents[m]["segments"] for m in members], corpus.sequence_tokens, special
        )
    else:
        for member in members:
            examples += segment_pairs(documents, member, corpus, special)
    return {name: [example[i] for example in examples] for i, name in enumerate(EXAMPLE)}


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
    random = generator(corpus.seed, 1, index)
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
    """Drop tokens of the longer segment, at its front or back, until both fit (BERT's truncation)."""
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        longer.pop(0 if random.random() < 0.5 else -1)


def _measure(examples: Dataset) -> dict[str, Any]:
    """Counts, and a digest over all tokens that does not depend on how they are stored."""
    digest, num_tokens = hashlib.sha256(), 0
    for table in examples.with_format("arrow").iter(1000):
        for name in EXAMPLE:
            column = table[name].combine_chunks()
            if name == "input_ids":
                digest.update(column.value_lengths().to_numpy().tobytes())
                column = column.flatten()
                num_tokens += len(column)
            digest.update(column.to_numpy().tobytes())
    return {"examples": len(examples), "tokens": num_tokens, "sha256": digest.hexdigest()}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary with its ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(vocabulary.encode()).hexdigest()
