"""The training text, as scores of weights are measured on it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from opfa.compression.calibration import ROWS, Batch, Calibration, Call, Text
from opfa.errors import DataError
from opfa.upstream.batches import Batches
from opfa.upstream.masking import Masker
from opfa.upstream.prepared import Prepared


def calibration_of(
    encoder: nn.Module, prepared: Prepared, mask: Masker, device: torch.device
) -> Calibration:
    """Of scores, on the first examples of the training split, masked as in the first epoch: the
    hidden states of all layers.
    """
    examples = Batches(prepared, prepared.train, mask)

    def batches(sequences: int) -> Iterator[Batch]:
        if sequences > len(prepared.train):
            what = (
                f"the score measures {sequences:,} sequences, and {len(prepared.train):,} are there"
            )
            raise DataError(f"pruning.pattern.score.sequences: {what}")
        for start in range(0, sequences, ROWS):
            places = [(0, index) for index in range(start, min(start + ROWS, sequences))]
            inputs = examples.__getitems__(places).to(device).inputs
            yield {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}

    return Calibration(encoder, Text(batches, _hidden_states))


def _hidden_states(encoder: Call, batch: Batch) -> Sequence[Tensor]:
    real = batch["attention_mask"].bool()
    states = encoder(**batch, output_hidden_states=True).hidden_states
    return [state[real] for state in states[1:]]
