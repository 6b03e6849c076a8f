"""Prepared examples to masked batches, in the order of `opfa.order`.

Masking and order are functions of (seed, epoch, example), so ranks, micro-batches, workers and a
resume change neither. Shape letters: B sequences, T tokens.
"""

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from opfa.models import load_tokenizer
from opfa.order import MicroBatches, Order, Place
from opfa.recipe import DataError, RecipeError
from opfa.upstream.corpus import FORMAT, tokenizer_digest
from opfa.upstream.masking import IGNORED, Masker
from opfa.upstream.recipe import Corpus, Masking

# What another machine may call otherwise, and what examples that are there no longer depend on.
PATHS = {"documents", "tokenizer", "bad_records"}


class Batch(NamedTuple):
    """One micro-batch: model inputs [B, T], MLM labels [B, T], next-sentence labels [B] (-100:
    none).
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    next_sentence: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        inputs = {
            name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()
        }
        return Batch(inputs, self.labels.to(device), self.next_sentence.to(device))

    def counts(self) -> tuple[int, int, int]:
        """How many tokens are predicted, how many are real, and how many sequences there are."""
        num_masked = int((self.labels != IGNORED).sum())
        return num_masked, int(self.inputs["attention_mask"].sum()), len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A directory that `opfa prepare` wrote."""

    train: Dataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase
    summary: dict[str, Any]

    @classmethod
    def open(cls, directory: Path, corpus: Corpus) -> "Prepared":
        """Open a prepared directory and check that it was made from the recipe's corpus section."""
        try:
            summary = json.loads((directory / "corpus.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(
                f"data = {str(directory)!r}: not a directory of `opfa prepare` "
                f"({error.__class__.__name__}); make one with: opfa prepare RECIPE --output DIR"
            ) from error
        found = summary["format"] if isinstance(summary, dict) and "format" in summary else None
        if found != FORMAT:
            raise DataError(f"{directory}: format {found!r}, and this version reads {FORMAT!r}")
        made_with = summary["corpus"]
        for key, value in corpus.model_dump(mode="json", exclude=PATHS).items():
            if made_with[key] != value:
                raise RecipeError(
                    f"corpus.{key} = {value!r}: but {directory} was prepared with "
                    f"{made_with[key]!r}"
                )
        tokenizer = load_tokenizer(str(directory / "tokenizer"))
        if tokenizer_digest(tokenizer) != summary["tokenizer_sha256"]:
            raise DataError(
                f"{directory}/tokenizer: its vocabulary is not the one that the examples had"
            )
        return cls(
            train=_split(directory / "train"),
            validation=_split(directory / "validation"),
            tokenizer=tokenizer,
            summary=summary,
        )


def _split(directory: Path) -> Dataset:
    split = load_from_disk(str(directory)).with_format("numpy")
    assert isinstance(split, Dataset)
    return split


def masker(tokenizer: PreTrainedTokenizerBase, masking: Masking, seed: int) -> Masker:
    """The masking that a recipe asks for, over this tokenizer's vocabulary."""
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert isinstance(vocabulary, list)
    if not isinstance(tokenizer.mask_token_id, int):
        raise DataError("the tokenizer has no mask token, and masked language modelling needs one")
    marks_starts = any(token.startswith(("Ġ", "▁")) for token in vocabulary)
    continues = [
        not t.startswith(("Ġ", "▁")) if marks_starts else t.startswith("##") for t in vocabulary
    ]
    special = np.isin(np.arange(len(vocabulary)), tokenizer.all_special_ids)
    return Masker(
        seed=seed,
        probability=masking.probability,
        whole_word=masking.whole_word,
        mask_id=tokenizer.mask_token_id,
        is_special=special,
        is_continuation=np.array(continues) & ~special,
    )


class MaskedExamples(torch.utils.data.Dataset):
    """Examples by (epoch, index), masked for that epoch."""

    def __init__(self, examples: Dataset, mask: Masker) -> None:
        """Examples as `opfa prepare` wrote them, in numpy format."""
        self.examples = examples
        self.mask = mask

    def __getitem__(self, place: Place) -> dict[str, Any]:
        """One example: its columns, with masked `input_ids` and `labels`."""
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[Place]) -> list[dict[str, Any]]:
        """A batch of them, which is what a `DataLoader` asks for: rows are read together."""
        columns = self.examples[[index for _, index in places]]
        examples = []
        for row, (epoch, index) in enumerate(places):
            example = {name: column[row] for name, column in columns.items()}
            ids = np.asarray(example["input_ids"], dtype=np.int64)
            inputs, labels = self.mask(ids, epoch, index)
            examples.append({**example, "input_ids": inputs, "labels": labels})
        return examples


def collate(
    examples: list[dict[str, Any]], *, pad_id: int, has_pairs: bool, most: int, multiple: int = 8
) -> Batch:
    """Pad examples to the longest of the batch, rounded up to a multiple of tokens, but to `most`
    at most, since a model may have no position for more.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), min(-(-longest // multiple) * multiple, most))
    ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    attention, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        ids[row, :length] = example["input_ids"]
        labels[row, :length] = example["labels"]
        attention[row, :length] = 1
        types[row, int(example["second_segment"]) : length] = 1
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(attention)}
    if has_pairs:
        inputs["token_type_ids"] = torch.from_numpy(types)
    next_sentence = torch.tensor([int(example["next_sentence_label"]) for example in examples])
    return Batch(inputs, torch.from_numpy(labels), next_sentence)


def training_steps(
    prepared: Prepared, mask: Masker, order: Order, *, steps: range, has_pairs: bool, workers: int
) -> Iterator[list[Batch]]:
    """This rank's micro-batches, one list for each step of `steps`."""
    loader = DataLoader(
        MaskedExamples(prepared.train, mask),
        batch_sampler=MicroBatches(order, steps),
        collate_fn=_collate(prepared, has_pairs),
        num_workers=workers,
        worker_init_fn=_ignore_signals,
    )
    micro_batches = iter(loader)
    while step := list(islice(micro_batches, order.accumulation)):
        yield step


def _ignore_signals(_: int) -> None:
    """A signal to the whole process group asks the trainer to save, which needs its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def validation_batches(
    prepared: Prepared, mask: Masker, *, batch: int, num_examples: int, has_pairs: bool
) -> Iterator[Batch]:
    """The first held-out examples, always masked in the same way."""
    examples = MaskedExamples(prepared.validation, mask)
    size = min(len(prepared.validation), num_examples)
    pad = _collate(prepared, has_pairs)
    for start in range(0, size, batch):
        yield pad(examples.__getitems__([(0, i) for i in range(start, min(start + batch, size))]))


def _collate(prepared: Prepared, has_pairs: bool) -> Callable[[list[dict[str, Any]]], Batch]:
    pad_id, most = prepared.tokenizer.pad_token_id, prepared.summary["corpus"]["sequence_tokens"]
    assert isinstance(pad_id, int), "the tokenizer has no padding token"
    return partial(collate, pad_id=pad_id, has_pairs=has_pairs, most=most)
