"""Shrink: a model whose heads or neurons are dead -> a smaller model that computes the same.

even         one number of neurons for all layers; any transformers loads it
uneven       each layer its own number of heads and neurons; needs `import opfa`
onnx         the same, as an ONNX file
same-shape   matrices keep their size; what is dead is zero throughout
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opfa.downstream.recipe import recipe_of
from opfa.downstream.results import Kept
from opfa.errors import ModelError, RunError
from opfa.inference.export import export
from opfa.models import trained
from opfa.models.configs import checked_directory, load_tokenizer
from opfa.models.encoders import write_model
from opfa.models.removal import (
    Dead,
    find_dead,
    fold,
    matrices_of,
    remove,
    tell_shapes,
)
from opfa.models.sentences import copy_files
from opfa.models.skeleton import num_positions
from opfa.report.outcome import Outcome, Place
from opfa.report.tables import Table
from opfa.sparsity.units import HEADS, NEURONS
from opfa.storage.files import check_new, new_directory, write_text
from opfa.storage.runs import RECIPE

Form = Literal["even", "uneven", "onnx", "same-shape"]
ONNX = "model.onnx"
TOLERANCE = 1e-4  # of a hidden state, by the largest
TOKENS = (2, 16)  # that both are compared on


class ShrinkResult(Outcome):
    """A smaller model. Sizes are numbers of weights, `difference` is of a hidden state."""

    directory: Place
    form: Form
    layers: list[Kept]  # what is alive of each
    averaging: int  # heads that stay, though their queries or keys are dead
    encoder: int  # weights of the layers' matrices
    of_encoder: int
    parameters: int  # of the whole model
    of_parameters: int
    difference: float

    def table(self) -> Table:
        """Heads and neurons of each layer."""
        return Table.of("layer", {str(i): kept for i, kept in enumerate(self.layers)})

    def notes(self) -> Sequence[str]:
        """Sizes, and how it is loaded."""
        encoder, whole = self.encoder / self.of_encoder, self.parameters / self.of_parameters
        heads = sum(kept.heads for kept in self.layers)
        of_heads = sum(kept.of_heads for kept in self.layers)
        sizes = f"{encoder:.1%} of the encoder's weights, {whole:.1%} of all parameters"
        lines = [
            f"left: {heads} of {of_heads} heads, {sizes}",
            f"hidden states differ by {self.difference:.1e}",
        ]
        if self.averaging:
            what = "still average their values with dead queries or keys, so they stay"
            lines.append(f"{self.averaging} heads {what}")
        if self.form == "uneven":
            lines.append("In Python: import opfa, then from_pretrained as always")
        return lines

    def places(self) -> Mapping[str, Path | str]:
        """The model."""
        return {"model": self.directory}


def shrink(name: str, output: Path, form: Form) -> ShrinkResult:
    """Write the new directory `output` in a form; raises `ModelError` where nothing is dead."""
    check_new(output)
    if form not in get_args(Form):
        raise RunError(f"form = {form!r}: must be one of {', '.join(get_args(Form))}")
    if trained.ranges_of(name) is not None:
        raise ModelError(f"{name}: is in 8 bits; shrink the model that it was made from")
    tokenizer, model = load_tokenizer(name), trained.load(name)
    found, before = find_dead(model), _sizes(model)
    if not any(bool(dead.any()) for each in found for dead in each.dead.values()):
        raise ModelError(f"{name}: no head and no neuron is dead, so it can't be smaller")
    inputs = _inputs(model)
    expected = _states(model, inputs)
    fold(found)
    layers = [Kept.of_gone(each.dead[HEADS], each.dead[NEURONS]) for each in found]
    if form != "same-shape":
        most = max(kept.neurons for kept in layers)
        _remove(model, found, most if form == "even" else None)
        if form == "even" and model.config.is_heterogeneous:
            raise ModelError(f"{name}: layers have lost different heads, so it can't be even")
    difference = float((_states(model, inputs) - expected).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):  # NaN isn't
        raise ModelError(f"{name}: not written, a hidden state differs by {difference:.1e}")
    after = _sizes(model)
    with new_directory(output) as work, tempfile.TemporaryDirectory() as aside:
        plain = Path(aside, "model") if form == "onnx" else work
        write_model(model, tokenizer, plain)
        copy_files(checked_directory("model", name), plain)
        if (recipe := recipe_of(name)) is not None:
            write_text(plain / RECIPE, recipe.to_public_toml())
        if form == "onnx":
            export(str(plain), work / ONNX)
    return ShrinkResult(
        directory=output,
        form=form,
        layers=layers,
        averaging=sum(int(each.averaging.sum()) for each in found),
        encoder=after[0],
        of_encoder=before[0],
        parameters=after[1],
        of_parameters=before[1],
        difference=difference,
    )


def _remove(model: PreTrainedModel, found: list[Dead], even_neurons: int | None) -> None:
    """Make matrices smaller, and the configuration say so; with `even_neurons` neurons alone."""
    if even_neurons is not None:
        found = [replace(each, dead={NEURONS: each.dead[NEURONS]}) for each in found]
    remove(found, even_neurons or 0)
    tell_shapes(model)


def _sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Weights of the matrices of heads and neurons, and parameters of the whole model."""
    weights = sum(linear.weight.numel() for linear in matrices_of(model))
    return weights, sum(each.numel() for each in model.parameters())


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    config: Any = model.config  # of a family
    positions = num_positions(model, config)
    shape = TOKENS[0], TOKENS[1] if positions is None else min(TOKENS[1], positions)
    ids = torch.randint(4, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, shape[1] // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _states(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model.base_model(**inputs)[0][inputs["attention_mask"].bool()]
