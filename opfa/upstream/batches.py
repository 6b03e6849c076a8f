"""Prepared examples to masked batches, B sequences of T tokens, by (seed, epoch, example)."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from opfa.data.order import MicroBatches, Order, Place
from opfa.errors import DataError
from opfa.extras import importing
from opfa.upstream.masking import Masker
from opfa.upstream.prepared import Prepared as Prepared
from opfa.upstream.recipe import Masking

with importing("pre-training", "opfa[pretrain]"):
    from datasets import Dataset

MULTIPLE = 8  # of tokens, to which a batch is padded: what tensor cores like


class Batch(NamedTuple):
    """One micro-batch; positions are found here so that the trainer needn't wait for a GPU."""

    inputs: dict[str, Tensor]  # of the model, [B, T]
    predicted: Tensor  # flat positions in [B * T] of the tokens to predict, [M]
    others: Tensor  # those of all other real tokens, [O]
    labels: Tensor  # of masked language modelling, [M]
    next_sentence: Tensor  # labels [B]; -100: none

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        inputs = {name: t.to(device, non_blocking=True) for name, t in self.inputs.items()}
        return Batch(inputs, *(t.to(device, non_blocking=True) for t in self[1:]))

    def counts(self) -> tuple[int, int, int]:
        """How many tokens are predicted, how many are real, and how many sequences there are."""
        num_predicted = len(self.predicted)
        return num_predicted, num_predicted + len(self.others), len(self.next_sentence)


def masker(tokenizer: PreTrainedTokenizerBase, masking: Masking, seed: int) -> Masker:
    """The masking that a recipe asks for, over this tokenizer's vocabulary."""
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert isinstance(vocabulary, list)
    if not isinstance(tokenizer.mask_token_id, int):
        raise DataError("the tokenizer has no mask token, and masked language modelling needs one")
    rests = [token.startswith("##") for token in vocabulary]  # of words; others mark the start
    starts = [token.startswith(("Ġ", "▁")) for token in vocabulary]
    continues = rests if any(rests) or not any(starts) else [not is_start for is_start in starts]
    special = np.isin(np.arange(len(vocabulary)), tokenizer.all_special_ids)
    return Masker(
        seed=seed,
        probability=masking.probability,
        whole_word=masking.whole_word,
        mask_id=tokenizer.mask_token_id,
        is_special=special,
        is_continuation=np.array(continues) & ~special,
    )


class Batches(torch.utils.data.Dataset):
    """Batches of (epoch, index), masked for that epoch; rows are padded to `MULTIPLE` tokens."""

    def __init__(self, prepared: Prepared, examples: Dataset, mask: Masker) -> None:
        """`examples` are a split of `prepared`."""
        self._examples, self._mask = examples, mask
        self._pad_id = prepared.tokenizer.pad_token_id
        self._most = prepared.summary["corpus"]["sequence_tokens"]
        self._has_pairs = prepared.summary["corpus"]["objective"] == "mlm+nsp"
        assert isinstance(self._pad_id, int), "the tokenizer has no padding token"

    def __getitems__(self, places: list[Place]) -> Batch:
        """What a `DataLoader` asks for. Rows are read together, from memory-mapped files."""
        table = self._examples[[index for _, index in places]]
        column = table["input_ids"].combine_chunks()
        lengths = column.value_lengths().to_numpy()
        width = min(-(-lengths.max() // MULTIPLE) * MULTIPLE, self._most)
        positions = np.arange(width)
        is_real = positions < lengths[:, None]
        ids = np.full(is_real.shape, self._pad_id, dtype=np.int64)
        ids[is_real] = column.flatten().to_numpy()
        inputs, predicted = self._mask(ids, lengths, np.array(places))
        is_other = is_real.reshape(-1).copy()
        is_other[predicted] = False
        tensors = {"input_ids": torch.from_numpy(inputs)}
        if not is_real.all():
            tensors["attention_mask"] = torch.from_numpy(is_real.astype(np.int64))
        if self._has_pairs:
            types = is_real & (positions >= table["second_segment"].to_numpy()[:, None])
            tensors["token_type_ids"] = torch.from_numpy(types.astype(np.int64))
        return Batch(
            tensors,
            torch.from_numpy(predicted),
            torch.from_numpy(np.flatnonzero(is_other)),
            torch.from_numpy(ids.reshape(-1)[predicted]),
            torch.from_numpy(table["next_sentence_label"].to_numpy().astype(np.int64)),
        )


def training_steps(
    prepared: Prepared, mask: Masker, order: Order, *, steps: range, workers: int
) -> Iterator[list[Batch]]:
    """This rank's micro-batches, one list for each step of `steps`, the next one loaded ahead."""
    loader = DataLoader(
        Batches(prepared, prepared.train, mask),
        batch_sampler=MicroBatches(order, steps),
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    micro_batches = iter(loader)  # here, since it draws a number from torch's generator
    return _ahead(lambda: list(islice(micro_batches, order.accumulation)))


def _ahead(load: Callable[[], list[Batch]]) -> Iterator[list[Batch]]:
    """What `load` returns until that is empty, the next one loaded by a thread."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(load)
        while step := future.result():
            future = thread.submit(load)
            yield step


def _as_it_is(batch: Any) -> Any:  # Any: torch believes that it is a list
    return batch


def _ignore_signals(_: int) -> None:
    """A signal to the whole process group asks the trainer to save, which needs its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def validation_batches(
    prepared: Prepared, mask: Masker, *, batch: int, num_examples: int
) -> Iterator[Batch]:
    """The first held-out examples, always masked in the same way."""
    batches = Batches(prepared, prepared.validation, mask)
    size = min(len(prepared.validation), num_examples)
    for start in range(0, size, batch):
        yield batches.__getitems__([(0, i) for i in range(start, min(start + batch, size))])
