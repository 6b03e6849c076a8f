"""A directory of `opfa prepare`, checked before anything is computed from it.

`corpus.json` is sealed and lists SHA-256 of every file; older versions have digests of tokens.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from opfa.errors import DataError, RecipeError, opening, redacted
from opfa.extras import importing
from opfa.models.configs import load_tokenizer
from opfa.report.bars import Bar
from opfa.storage import seal
from opfa.training import distributed, launch
from opfa.upstream.corpus import FORMAT, OLD_FORMAT, SUMMARY, measure, tokenizer_digest
from opfa.upstream.recipe import Corpus

with importing("pre-training", "opfa[pretrain]"):
    from datasets import Dataset, load_from_disk

# What another machine may call otherwise, and what examples that are there no longer depend on.
PATHS = {"documents", "tokenizer", "bad_records"}
SPLITS = ("train", "validation")
LARGE = 1 << 30  # bytes of examples; to check more takes so long that a bar is shown
AGAIN = "prepare it again, or get it again"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A directory that `opfa prepare` wrote."""

    train: Dataset
    validation: Dataset  # in Arrow's own format, which reads 10 times faster than numpy's
    tokenizer: PreTrainedTokenizerBase
    summary: dict[str, Any]

    @classmethod
    def open(cls, directory: Path, corpus: Corpus) -> "Prepared":
        """Open a directory; checks that it was made from this corpus section and is unchanged."""
        summary = summary_of(directory, corpus)
        for name in _with_bar(directory, _examples_of(summary)):
            _check_examples(directory, summary, name)
        return cls.load(directory, summary)

    @classmethod
    def load(cls, directory: Path, summary: dict[str, Any]) -> "Prepared":
        """Open what was checked."""
        tokenizer = load_tokenizer(str(directory / "tokenizer"))
        if tokenizer_digest(tokenizer) != summary["tokenizer_sha256"]:
            what = "its vocabulary is not the one that the examples had"
            raise DataError(f"{directory}/tokenizer: {what}")
        train, validation = (_split(directory / name) for name in SPLITS)
        return cls(train=train, validation=validation, tokenizer=tokenizer, summary=summary)

    def lengths(self) -> np.ndarray:
        """Of all training examples in tokens, [N]."""
        column = self.train.data.column("input_ids")
        return np.concatenate([chunk.value_lengths().to_numpy() for chunk in column.chunks])


def open_together(
    directory: Path, corpus: Corpus, *, trust_data: bool, beat: Callable[[str], None]
) -> Prepared:
    """Open a directory on every rank; one process of each machine checks it. Collective."""
    summary = distributed.on_every_rank(lambda: summary_of(directory, corpus))
    if len(set(distributed.gather_texts(str(summary)))) > 1:
        raise DataError(f"{directory}: holds other examples on one machine than on another")
    is_checking = launch.place().local_rank == 0

    def check(name: str) -> None:
        if is_checking:
            _check_examples(directory, summary, name)

    names = () if trust_data else _examples_of(summary)
    for name in _with_bar(directory, names):
        beat(f"checking {directory / name}")
        distributed.on_every_rank(lambda name=name: check(name))
    return distributed.on_every_rank(lambda: Prepared.load(directory, summary))


def summary_of(directory: Path, corpus: Corpus) -> dict[str, Any]:
    """What `corpus.json` says, checked against the recipe and all files but the examples."""
    path = directory / SUMMARY
    if not path.is_file():
        raise DataError(
            f"data = {str(directory)!r}: not a directory of `opfa prepare`, it has no {SUMMARY}; "
            "make one with: opfa prepare RECIPE --output DIR"
        )
    summary = seal.read_json(path, DataError)
    found = summary.get("format")
    if found not in (FORMAT, OLD_FORMAT):
        raise DataError(f"{directory}: format {found!r}, and this version reads {FORMAT!r}")
    with opening(path, DataError, "is damaged"):
        made_with, known = summary["corpus"], summary.get(seal.FILES)
        digests = [summary["tokenizer_sha256"], *(summary["splits"][s]["sha256"] for s in SPLITS)]
        assert all(isinstance(digest, str) for digest in digests)
        for key, value in redacted(corpus.model_dump(mode="json", exclude=PATHS)).items():
            if made_with[key] != value:
                other = f"but {directory} was prepared with {made_with[key]!r}"
                raise RecipeError(f"corpus.{key} = {value!r}: {other}")
    if known is not None:
        _check_small(directory, known)
    if found == OLD_FORMAT and corpus.objective == "mlm+nsp":
        log.warning(
            "%s: was prepared by an earlier version, which cut sentences and pairs otherwise; "
            "to train on what this version makes, prepare it anew",
            directory,
        )
    return summary


def _check_small(directory: Path, known: seal.Files) -> None:
    """Refuse files that are missing, new or changed; examples are there and not looked into."""
    with opening(directory, DataError):
        now = {
            name: known.get(name, "") if _has_examples(name) else seal.digest(directory / name)
            for name in seal.names_of(directory)
            if name in known or "/" in name  # nobody reads other files beside corpus.json
        }
    if found := seal.differences(known, now):
        raise DataError(f"{directory}: not as `opfa prepare` wrote it: {found}; {AGAIN}")


def _has_examples(name: str) -> bool:
    return name.endswith(".arrow")


def _examples_of(summary: dict[str, Any]) -> tuple[str, ...]:
    """What is checked one by one: files, or whole splits of an older version."""
    return tuple(filter(_has_examples, summary.get(seal.FILES, ()))) or SPLITS


def _check_examples(directory: Path, summary: dict[str, Any], name: str) -> None:
    """Raise `DataError` unless these examples are those that were written."""
    with opening(directory / name, DataError):
        if name in SPLITS:
            found = measure(_split(directory / name))["sha256"]
            known = summary["splits"][name]["sha256"]
        else:
            found, known = seal.digest(directory / name), summary[seal.FILES][name]
    if found != known:
        raise DataError(f"{directory}: not as `opfa prepare` wrote it: {name} has changed; {AGAIN}")


def _with_bar(directory: Path, names: Iterable[str]) -> Iterator[str]:
    """These names; on a terminal with a progress bar, where their files are large."""
    names = list(names)
    sizes = [path.stat().st_size if (path := directory / name).is_file() else 0 for name in names]
    is_wanted = sum(sizes) >= LARGE and launch.place().rank == 0
    with Bar("checking the data", sum(sizes), counts=False, is_wanted=is_wanted) as bar:
        for name, size in zip(names, sizes, strict=True):
            yield name
            bar.advance(size)


def _split(directory: Path) -> Dataset:
    with opening(directory, DataError):
        split = load_from_disk(str(directory)).with_format("arrow")
        assert isinstance(split, Dataset)
        return split
