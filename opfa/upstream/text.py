"""The training text, as scores of weights are measured on it."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from opfa.compression.calibration import (
    ROWS,
    Batch,
    Calibration,
    Text,
    check_enough,
    hidden_states,
)
from opfa.upstream.batches import Batches
from opfa.upstream.masking import Masker
from opfa.upstream.prepared import Prepared


def calibration_of(
    encoder: nn.Module,
    prepared: Prepared,
    mask: Masker,
    device: torch.device,
    beat: Callable[[str], object],
) -> Calibration:
    """Measures scores by the hidden states of all layers, on the first examples of the training
    split, masked as in the first epoch. `beat` hears of each batch.
    """
    examples = Batches(prepared, prepared.train, mask)

    def batches(sequences: int) -> Iterator[Batch]:
        check_enough("pruning.pattern.score.sequences", sequences, len(prepared.train))
        for start in range(0, sequences, ROWS):
            beat(f"measuring the score, sequence {start + 1} of {sequences}")
            places = [(0, index) for index in range(start, min(start + ROWS, sequences))]
            inputs = examples.__getitems__(places).to(device).inputs
            yield {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}

    return Calibration(encoder, Text(batches, hidden_states))
