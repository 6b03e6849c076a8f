"""One-shot pruning that looks at text: scores that ask for it, layer-wise reconstruction, and how
far hidden states move on texts that were held out.

    dense model, text -> masks by a score -> least squares, layer by layer -> distance
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opfa.compression.calibration import ROWS, Calibration, Text, hidden_states
from opfa.compression.grains import Grain, Weight
from opfa.compression.layerwise import Admm, fit
from opfa.compression.measured import FromText
from opfa.compression.oneshot import OneShot, prune_once
from opfa.compression.scores import Magnitude, Score
from opfa.errors import ModelError, RecipeError
from opfa.inference.sequences import Sequences, read_sequences
from opfa.inference.texts import Texts
from opfa.models.reconstruct import Layers, check_stack, distance, reconstruct
from opfa.report.bars import Bar


@dataclass(frozen=True, kw_only=True)
class Moved:
    """How far the hidden states of held-out sequences moved: mean squared differences of a value,
    in the last layer, and in all layers and the embeddings; and how long pruning took.
    """

    final_distance: float
    mean_distance: float
    held_out: int  # sequences
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which texts are read, how many sequences of them, and whether what is left is fitted."""

    texts: Texts
    sequences: int
    reconstruct: bool


def prune_by_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: OneShot,
    reading: Reading,
    *,
    score: Score | Admm | None,
    grain: Grain | None,
) -> tuple[dict[str, Any], Moved]:
    """`prune_once`, in place, with what texts say; and how far hidden states moved.

    `score` and `grain` replace those of the settings. One of the settings measures fewer sequences
    where there are fewer. After any error the model is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{type(model).__name__}: texts are for a model of transformers")
    if model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__}: texts are for an encoder, without a decoder")
    layers = settings.layers(model)
    admm = _admm(score, settings, grain)
    own = Magnitude() if isinstance(score, Admm) else score
    if reading.reconstruct or isinstance(own or settings.score, FromText):
        check_stack(model, [f"{name}.weight" for name in layers])
    sequences = read_sequences(reading.texts, tokenizer, model, reading.sequences)
    start = time.monotonic()
    with _as_it_was(model, layers.values()) as before:
        report = prune_once(
            model,
            settings,
            score=_measuring(own, settings, len(sequences.fitted)),
            grain=grain,
            calibration=Calibration(
                model, Text(partial(sequences.first, size=ROWS), hidden_states)
            ),
            fit=partial(_fit, model, sequences, admm, settings.sparsity, before)
            if reading.reconstruct
            else None,
        )
        seconds = time.monotonic() - start
        named = model.base_model.named_parameters()
        dense = {name: before[id(each)] for name, each in named if id(each) in before}
        final, mean = distance(model, dense, sequences.batches(sequences.held))
    held = len(sequences.held)
    return report, Moved(
        final_distance=final, mean_distance=mean, held_out=held, seconds=round(seconds, 3)
    )


def _measuring(own: Score | None, settings: OneShot, num: int) -> Score:
    """The score, on no more sequences than there are; one that was made for it stays as it is."""
    if own is not None or not isinstance(settings.score, FromText):
        return own or settings.score
    sequences = min(settings.score.sequences, num)
    return settings.score.model_copy(update={"sequences": sequences})


@contextlib.contextmanager
def _as_it_was(model: nn.Module, layers: Iterable[nn.Linear]) -> Iterator[dict[int, Tensor]]:
    """In evaluation mode; gives weights and biases of the layers, by the identity of parameters,
    and puts them back after an error or Ctrl-C.
    """
    parameters = {id(each): each for layer in layers for each in layer.parameters()}
    before = {key: each.detach().clone() for key, each in parameters.items()}
    was_training = model.training
    model.eval()
    try:
        yield before
    except BaseException:
        for key, each in parameters.items():
            each.data.copy_(before[key])
        raise
    finally:
        model.train(was_training)


def _fit(
    model: PreTrainedModel,
    sequences: Sequences,
    admm: Admm | None,
    sparsity: float,
    dense: Mapping[int, Tensor],
    targets: Layers,
) -> None:
    for layer in targets.values():  # a score may have changed them
        layer.weight.data.copy_(dense[id(layer.weight)])
    texts = []
    for batch in sequences.batches(sequences.fitted):
        texts.append((batch["attention_mask"], partial(model.base_model, **batch)))
    work = reconstruct(model, targets, texts, partial(fit, admm=admm, sparsity=sparsity))
    with Bar("least squares", model.config.num_hidden_layers) as bar:
        for layer in work:
            bar.move_to(layer + 1)


def _admm(score: Score | Admm | None, settings: OneShot, grain: Grain | None) -> Admm | None:
    """ADMM, if it is the score; raises `RecipeError` for what it can't do."""
    if not isinstance(score, Admm):
        return None
    if settings.scope == "global":
        raise RecipeError('prune: scope = "global": score = "admm" counts by matrix: "layer"')
    if not isinstance(grain or settings.grain, Weight):
        what = 'score = "admm" finds single weights: "weight"'
        raise RecipeError(f"prune: grain: {what}")
    return score
