"""What an uneven model has lost of its shape, and how much faster that makes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from opfa.models import trained
from opfa.models.configs import load_config
from opfa.models.costs import FIRST_ID, medians
from opfa.models.encoders import ENCODER
from opfa.models.removal import layers_of, matrices_of
from opfa.models.skeleton import num_positions
from opfa.sparsity.units import HEADS, NEURONS, without_layers_of_their_own
from opfa.training.machine import processor

TOKENS = 128  # of the one sequence that is timed, or as many as the model takes
Counts = tuple[int, int]  # what is left, and of how many


@dataclass(frozen=True)
class Shape:
    """What is left of the encoder's layers. A card shows it, as nn_pruning's models did."""

    heads: Counts
    neurons: Counts
    weights: Counts  # of the matrices; left are those that are not zero
    speedup: float  # of the encoder in torch, against one with all heads and neurons
    measured: str  # how


@torch.inference_mode()
def shape_of(directory: Path) -> Shape | None:
    """The shape of a model whose layers differ; None for any other. It times both, in turns."""
    config: Any = load_config(str(directory))  # Any: of a family
    if not config.is_heterogeneous:
        return None
    model = trained.load(directory, exact=False)
    whole = ENCODER.from_config(without_layers_of_their_own(config)).eval()
    left = sum(int(linear.weight.count_nonzero()) for linear in matrices_of(model))
    tokens = min(TOKENS, num_positions(model, config) or TOKENS)
    ids = torch.randint(FIRST_ID, config.vocab_size, (1, tokens))
    tasks = {
        "whole": lambda: whole(input_ids=ids),
        "small": lambda: model.base_model(input_ids=ids),
    }
    times = medians(tasks)
    threads = torch.get_num_threads()
    return Shape(
        heads=(_units(model, HEADS), _units(whole, HEADS)),
        neurons=(_units(model, NEURONS), _units(whole, NEURONS)),
        weights=(left, sum(linear.weight.numel() for linear in matrices_of(whole))),
        speedup=times["whole"] / times["small"],
        measured=f"torch, fp32, 1 x {tokens} tokens, {threads} thread(s) of {processor()}",
    )


def _units(model: PreTrainedModel, kind: str) -> int:
    return sum(units[kind].count for _, units in layers_of(model))
