"""Texts as sequences of tokens: a sample for measuring and fitting, and some that are held out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opfa.compression.calibration import check_enough
from opfa.errors import DataError, RunError, blaming
from opfa.inference.texts import Texts
from opfa.models.configs import quiet_transformers
from opfa.models.fit import fit_padding
from opfa.models.skeleton import num_positions
from opfa.report.bars import Bar

TOKENS = 128  # of a sequence, or as many as the model has positions
POOL = 16  # sequences are read for each that is drawn, so that long texts give more than beginnings
FEWEST = 2  # sequences: one is held out
BATCH = 32


@dataclass(frozen=True)
class Sequences:
    """Token ids of the sequences, in the order of the texts; the last tenth is held out."""

    fitted: Sequence[Sequence[int]]
    held: Sequence[Sequence[int]]
    padding: int
    device: torch.device

    def batches(
        self, ids: Sequence[Sequence[int]], size: int = BATCH
    ) -> Iterator[dict[str, Tensor]]:
        """What a model is called with, so many sequences at a time; padding is to the right."""
        for start in range(0, len(ids), size):
            rows = [torch.tensor(row) for row in ids[start : start + size]]
            given = {"input_ids": rows, "attention_mask": [torch.ones_like(row) for row in rows]}
            values = {"input_ids": self.padding, "attention_mask": 0}
            yield {
                name: torch.nn.utils.rnn.pad_sequence(
                    rows, batch_first=True, padding_value=values[name]
                ).to(self.device)
                for name, rows in given.items()
            }

    def first(self, num: int, size: int) -> Iterator[Mapping[str, Tensor]]:
        """Batches of the first ones to measure on; raises `DataError` where there are fewer."""
        check_enough("score.sequences", num, len(self.fitted))
        yield from self.batches(self.fitted[:num], size)


def read_sequences(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, num: int
) -> Sequences:
    """A sample of `num` sequences, the same each time.

    Texts are cut to consecutive sequences, and the sample is drawn of the first texts: of `num`, or
    fewer if these give enough. Raises `RunError` and `DataError` where there are too few.
    """
    if num < FEWEST:
        raise RunError(f"sequences = {num}: must be {FEWEST} or more, as a tenth is held out")
    tokens = min(TOKENS, num_positions(model, model.config) or TOKENS)
    with blaming("model", model.config.name_or_path or type(model).__name__):
        padding = fit_padding(model.config, tokenizer, tokens)
    pool: list[list[int]] = []
    with Bar("reading texts", None, counts=False) as bar:
        for num_texts, found in enumerate(_cut(tokenizer, texts, tokens), 1):
            pool += found
            bar.say(f"{len(pool):,} sequences")
            if num_texts == num or len(pool) >= POOL * num:
                break
    if len(pool) < num:
        what = f"the texts give only {len(pool):,}, each of up to {tokens} tokens"
        raise DataError(f"sequences = {num:,}: {what}; give more text, or ask for fewer")
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:num]
    sample = [pool[index] for index in drawn.sort().values.tolist()]
    held = max(1, num // 10)
    return Sequences(sample[:-held], sample[-held:], padding, model.device)


def _cut(
    tokenizer: PreTrainedTokenizerBase, texts: Texts, tokens: int
) -> Iterator[list[list[int]]]:
    """The consecutive sequences of each text that has tokens, special ones around each."""
    num_special = tokenizer.num_special_tokens_to_add()
    for _, chunk in texts.chunks():
        with quiet_transformers():
            found = tokenizer(
                list(chunk), truncation=True, max_length=tokens, return_overflowing_tokens=True
            )
        of_texts: list[list[list[int]]] = [[] for _ in chunk]
        for text, ids in zip(found["overflow_to_sample_mapping"], found["input_ids"], strict=True):
            if len(ids) > num_special:
                of_texts[text].append(ids)
        yield from filter(None, of_texts)
