"""The documents of a corpus, from files or the Hub; a bad one stops, or is noted in skipped.txt."""

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import numpy as np

from opfa.data.records import Bad, expand, no_column, read_records, stop
from opfa.errors import DataError, opening
from opfa.extras import importing
from opfa.upstream.recipe import Corpus

with importing("pre-training", "opfa[pretrain]"):
    from datasets import Dataset, Features, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError

KEY = "corpus.text_column"
NO_TEXT = "empty, invisible or not a text"


def documents_of(corpus: Corpus, cache: Path, skipped: Path | None) -> Dataset:
    """All documents, as one column `text`; raises `DataError` unless bad ones may be skipped."""
    if corpus.hub:
        with opening(f"corpus.hub = {corpus.hub!r}", DataError, "can't be loaded"):
            dataset = load_dataset(corpus.hub, corpus.hub_config, split=corpus.hub_split)
        assert isinstance(dataset, Dataset)
        if corpus.text_column not in dataset.column_names:
            names = dict.fromkeys(dataset.column_names)
            raise no_column(corpus.hub, "header", names, corpus.text_column, KEY)
        texts = dataset.select_columns([corpus.text_column])
        return _good(texts.rename_columns({corpus.text_column: "text"}), corpus, skipped)
    try:
        files = expand(corpus.documents)
    except DataError as error:
        raise DataError(f"corpus.documents: {error}") from None
    for file in files:  # all of them are checked before any work is done
        bad = stop if skipped is None else lambda _: None
        if next(_texts(file, corpus.text_column, bad), None) is None:
            raise DataError(f"{file}: every record is bad")
    try:
        made = Dataset.from_generator(
            _all_texts,
            features=Features({"text": Value("string")}),
            cache_dir=str(cache),
            writer_batch_size=100,  # each document may be long
            gen_kwargs={"files": files, "column": corpus.text_column, "skipped": skipped},
        )
    except DatasetGenerationError as error:  # what it wraps says which line, or that a disk is full
        raise error.__cause__ or error from None
    assert isinstance(made, Dataset)
    return made


def _good(dataset: Dataset, corpus: Corpus, skipped: Path | None) -> Dataset:
    """The rows of a Hub data set that hold a text."""
    bad, left_out = _bad(skipped), []
    for row, text in enumerate(dataset["text"]):
        if not _is_text(text):
            bad(DataError(f"{corpus.hub}, row {row}: {corpus.text_column!r} is {NO_TEXT}"))
            left_out.append(row)
    return dataset.select(np.delete(np.arange(len(dataset)), left_out)) if left_out else dataset


def _all_texts(files: list[Path], column: str, skipped: Path | None) -> Iterator[dict[str, str]]:
    for file in files:
        for text in _texts(file, column, _bad(skipped)):
            yield {"text": text}


def _bad(skipped: Path | None) -> Bad:
    """Stop at a bad record, or note it in a file."""

    def note(error: DataError) -> None:
        assert skipped is not None
        with skipped.open("a", encoding="utf-8") as listing:
            listing.write(" ".join(str(error).split()) + "\n")

    return note if skipped else stop


def _texts(file: Path, column: str, bad: Bad) -> Iterator[str]:
    for where, record in read_records(file, bad, [column]):
        text = record.get(column)
        if column not in record:
            bad(no_column(str(file), where, record, column, KEY))
        elif not _is_text(text):
            bad(DataError(f"{file}, {where}: {column!r} is {NO_TEXT}"))
        else:
            yield text


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is a text, and has more than marks, spaces and control characters."""
    return isinstance(value, str) and any(unicodedata.category(c)[0] not in "CMZ" for c in value)
