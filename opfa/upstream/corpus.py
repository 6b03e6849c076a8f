"""Documents to pre-training examples, each a pure function of (corpus, seed, document)."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow.compute import call_function
from tokenizers import BertWordPieceTokenizer
from transformers import PreTrainedTokenizerBase

from opfa.data.order import HELD_OUT, generator
from opfa.errors import DataError, blaming
from opfa.extras import importing
from opfa.models.configs import (
    load_config,
    load_tokenizer,
    quiet_transformers,
    wordpiece_tokenizer,
)
from opfa.models.encoders import skeleton
from opfa.models.fit import check_fit
from opfa.models.skeleton import check_positions
from opfa.storage import seal
from opfa.storage.files import check_new, new_directory
from opfa.storage.foreign import CONFIG
from opfa.storage.runs import MODEL
from opfa.upstream.documents import documents_of
from opfa.upstream.recipe import Corpus, TokenizerTraining
from opfa.upstream.results import PrepareResult
from opfa.upstream.segments import EXAMPLE, packed, segment_pairs
from opfa.upstream.sentences import sentences_of

with importing("pre-training", "opfa[pretrain]"):
    import datasets
    from datasets import Dataset, Features, List, Value

FORMAT = "opfa-corpus/2"
# The same files, but sentences and pairs were cut otherwise (CHANGELOG).
OLD_FORMAT = "opfa-corpus/1"
SUMMARY = "corpus.json"
CHARACTERS = 32 << 20  # that are tokenized at once, if documents are long; takes about 2 GB
GROUP = 64  # documents that one call cuts into examples; part of the result
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
log = logging.getLogger(__name__)


def prepare(corpus: Corpus, output: Path, init: str | None = None) -> PrepareResult:
    """Write a corpus's examples and tokenizer to a new directory; returns its summary.

    Raises `ModelError` first where they wouldn't fit the model `init` that is to learn from them.
    """
    check_new(output)
    if init is not None:
        _check_model(corpus, init)
    with _bars(), new_directory(output) as work:
        summary = _prepare(corpus, work)
    return PrepareResult.model_validate({"directory": output, **summary})


def _check_model(corpus: Corpus, init: str) -> None:
    """Refuse what `opfa pretrain` would, unless that model is only made from these examples."""
    is_here = any((Path(init) / place / CONFIG).is_file() for place in ("", MODEL))
    if not (is_here or init == corpus.tokenizer):
        return
    with blaming("model.init", init):
        config = load_config(init)
    tokens, key = corpus.sequence_tokens, "corpus.sequence_tokens"
    if corpus.tokenizer is None:  # it is trained on the documents
        check_positions(skeleton(config), config, tokens, key)
    else:
        check_fit(config, _given_tokenizer(corpus.tokenizer), tokens, key)


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """Let `datasets` draw progress bars on a terminal only."""
    had_bars = not datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _prepare(corpus: Corpus, work: Path) -> dict[str, Any]:
    skipped = work / "skipped.txt" if corpus.bad_records == "skip" else None
    documents = documents_of(corpus, work / "cache", skipped)
    num_skipped = 0
    if skipped is not None and skipped.exists():
        num_skipped = len(skipped.read_text(encoding="utf-8").splitlines())
    log.info("%d documents read, %d bad records skipped", len(documents), num_skipped)
    tokenizer = _tokenizer(corpus, documents)
    tokenizer.save_pretrained(work / "tokenizer")
    tokenized = documents.map(
        _tokenize,
        batched=True,
        batch_size=_num_at_once(documents),
        remove_columns=documents.column_names,
        fn_kwargs={"tokenizer": tokenizer, "by_sentence": corpus.objective == "mlm+nsp"},
        features=Features({"segments": List(List(Value("int32")))}),
        desc="Tokenizing",
    )
    is_held_out = _is_held_out(len(tokenized), corpus)
    splits = {}
    for name, chosen in (("train", ~is_held_out), ("validation", is_held_out)):
        part = tokenized.select(np.flatnonzero(chosen))
        if len(part) < 2:
            few = f"{len(documents)} documents leave only {len(part)} for {name}"
            raise DataError(f"{few}; at least 2 are needed")
        examples = _examples(part, tokenizer, corpus, work / "cache" / name)
        if len(examples) == 0:
            raise DataError(f"the {name} documents are too short: not one example came out")
        examples.save_to_disk(work / name)
        splits[name] = {"documents": len(part), **measure(examples)}
        log.info("%s: %s", name, splits[name])
    shutil.rmtree(work / "cache", ignore_errors=True)
    return write_summary(work, corpus, splits, tokenizer, num_skipped)


def write_summary(
    directory: Path,
    corpus: Corpus,
    splits: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    num_skipped: int = 0,
) -> dict[str, Any]:
    """Write corpus.json, the last file; returns it without its list of files."""
    summary = {
        "format": FORMAT,
        "corpus": corpus.model_dump(mode="json"),
        "skipped_records": num_skipped,
        "splits": splits,
        "tokenizer_sha256": tokenizer_digest(tokenizer),
    }
    seal.write_sealed(directory / SUMMARY, {**summary, seal.FILES: seal.files_of(directory)})
    return summary


def _tokenizer(corpus: Corpus, documents: Dataset) -> PreTrainedTokenizerBase:
    if corpus.train_tokenizer is None:
        assert corpus.tokenizer is not None
        return _given_tokenizer(corpus.tokenizer)
    wanted, tokens = corpus.train_tokenizer, corpus.sequence_tokens
    vocabulary = _vocabulary(wanted, documents)
    return wordpiece_tokenizer(vocabulary, lowercase=wanted.lowercase, tokens=tokens)


def _given_tokenizer(name: str) -> PreTrainedTokenizerBase:
    with blaming("corpus.tokenizer", name):
        return load_tokenizer(name)


def _vocabulary(wanted: TokenizerTraining, documents: Dataset) -> dict[str, int]:
    """A WordPiece vocabulary, the same on every run; README.md says why it takes two passes."""
    vocabulary: dict[str, int] = {}
    size = _num_at_once(documents)
    for num_tokens in (1, wanted.vocabulary):
        trainer = BertWordPieceTokenizer(lowercase=wanted.lowercase, strip_accents=wanted.lowercase)
        trainer.train_from_iterator(
            (documents[i : i + size]["text"] for i in range(0, len(documents), size)),
            vocab_size=num_tokens,
            min_frequency=wanted.min_frequency,
            show_progress=False,
            special_tokens=[*SPECIAL, *sorted(t for t in vocabulary if t.startswith("##"))],
        )
        vocabulary = trainer.get_vocab()
    return vocabulary


def _num_at_once(documents: Dataset) -> int:
    """How many neighbouring documents the tokenizer gets: fewer where they are long."""
    lengths = call_function("binary_length", [documents.data.column("text")])
    sizes = np.nan_to_num(lengths.to_numpy())
    for num in (1000, 100, 10):
        if np.add.reduceat(sizes, np.arange(0, len(sizes), num)).max(initial=0) <= CHARACTERS:
            return num
    return 1


def _tokenize(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, by_sentence: bool
) -> dict[str, list[list[list[int]]]]:
    texts = [sentences_of(text) if by_sentence else [text] for text in batch["text"]]
    flat = [sentence for sentences in texts for sentence in sentences]
    with quiet_transformers():  # a document is longer than a model's positions, and that is fine
        encoded = tokenizer(flat, add_special_tokens=False, return_attention_mask=False)
    ids = iter(encoded["input_ids"])
    segments = [[s for s in (next(ids) for _ in sentences) if s] for sentences in texts]
    for text, document in zip(batch["text"], segments, strict=True):
        if not document:
            raise DataError(f"a document has no tokens, only invisible characters: {text[:40]!r}")
    return {"segments": segments}


def _is_held_out(size: int, corpus: Corpus) -> np.ndarray:
    num_held_out = max(2, round(corpus.validation * size))
    chosen = generator(corpus.seed, HELD_OUT).permutation(size)[:num_held_out]
    return np.isin(np.arange(size), chosen)


def _examples(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, cache: Path
) -> Dataset:
    cache.mkdir(parents=True)  # else `map` keeps the examples in memory
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
        cache_file_name=str(cache / "examples.arrow"),
        num_proc=min(num_groups, os.cpu_count() or 1),
        desc="Cutting examples",
    )


def _cut_group(
    batch: dict[str, list[int]], documents: Dataset, corpus: Corpus, special: tuple[int, int]
) -> dict[str, list]:
    (group,) = batch["group"]
    members = range(group * GROUP, min((group + 1) * GROUP, len(documents)))
    if corpus.objective == "mlm":
        streams = [documents[m]["segments"] for m in members]
        examples = packed(streams, corpus.sequence_tokens, special)
    else:
        pairs = (segment_pairs(documents, m, corpus, special) for m in members)
        examples = list(chain.from_iterable(pairs))
    return {name: [example[i] for example in examples] for i, name in enumerate(EXAMPLE)}


def measure(examples: Dataset) -> dict[str, Any]:
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
