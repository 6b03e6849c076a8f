"""What a search finds out before its first evaluation, in DIR/prepared: the model with its units in
order, the fits of all slices, what a slice costs, and what the whole and the least model are worth.

A resume reads it, so that costs and orders are the same for every evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from opfa.compression.fisher import removal
from opfa.downstream.evaluate import Ready
from opfa.downstream.examples import batches_of, fisher_of, num_rows
from opfa.errors import RunError, opening
from opfa.models.encoders import write_model
from opfa.models.gates import LayerGates, UnitGates
from opfa.models.removal import groups_of, layers_of
from opfa.search.costs import Prices
from opfa.search.material import Material
from opfa.search.recipe import SearchRecipe
from opfa.search.seeds import Worth, greedy_front
from opfa.search.shapes import Shape, Space
from opfa.search.slices import Slices, in_order, write_fits
from opfa.search.supernet import train_supernet
from opfa.storage import seal
from opfa.storage.files import new_directory
from opfa.tasks import kinds as tasks

FOLDER, MODEL, FITS, FACTS = "prepared", "model", "fits.safetensors", "facts.json"
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Prepared:
    """What all evaluations of a search share."""

    directory: Path
    space: Space
    prices: Prices
    seeds: list[Shape]
    whole: Metrics  # of the whole model on the held-out examples
    least: Metrics  # of the smallest one
    examples: int  # that units were valued by

    @property
    def model(self) -> Path:
        """The model whose units are in order."""
        return self.directory / MODEL

    @property
    def fits(self) -> Path:
        """The output matrices of slices."""
        return self.directory / FITS

    @classmethod
    def read(cls, recipe: SearchRecipe, output: Path) -> Self:
        """What `prepare` wrote; raises `RunError` where it is damaged."""
        directory = output / FOLDER
        facts = seal.read_json(directory / FACTS)
        with opening(directory / FACTS, RunError, "is damaged"):
            heads, neurons = (tuple(facts[name]) for name in ("heads", "neurons"))
            space = Space(heads, neurons, facts["kept"], recipe.search.space)
            return cls(
                directory,
                space,
                Prices.read(facts["costs"]),
                [Shape.model_validate_json(each) for each in facts["seeds"]],
                facts["whole"],
                facts["least"],
                facts["examples"],
            )


def prepare(recipe: SearchRecipe, material: Material, output: Path) -> Prepared:
    """Find it out, unless that was done, and write it whole or not at all."""
    if not (output / FOLDER / FACTS).exists():
        held_out = material.held_out
        model = material.load(held_out.classes)
        ready = material.ready(model, material.training, held_out)
        with new_directory(output / FOLDER) as work:
            seal.write_sealed(work / FACTS, _found(ready, recipe, material, work))
    return Prepared.read(recipe, output)


def _found(ready: Ready, recipe: SearchRecipe, material: Material, work: Path) -> dict[str, Any]:
    """Fill a directory; returns the facts."""
    model, search = ready.model, recipe.search
    prices = Prices.measured(model, search, ready.task.sequence_tokens)  # while nothing else runs
    batches = batches_of(ready)
    units = fisher_of(UnitGates(groups_of(model)), model, ready.task, batches)
    layers = [layer for layer, _ in layers_of(model)]
    (of_layers,) = fisher_of(LayerGates(layers), model, ready.task, batches)
    orders, losses = zip(*map(removal, units), strict=True)
    gone, lost = removal(of_layers)
    space = Space.of(model, search.space, _worth(gone))
    in_order(model, orders)
    if search.supernet is not None:
        train_supernet(model, ready.task, material.everything(), space, recipe)
    whole = ready.evaluate()
    with torch.inference_mode():
        write_fits(model, ready.task, batches, space, work / FITS)
    write_model(model, ready.tokenizer, work / MODEL)
    tasks.write_more(ready.task, model, work / MODEL)
    slices = Slices(model, space, work / FITS)
    worth = Worth([loss.flip(0).numpy() for loss in losses], lost.tolist(), gone.tolist())
    seeds = greedy_front(space, prices.costs[search.aims[0]], worth, search.seeds)
    return {
        "heads": list(space.heads),
        "neurons": list(space.neurons),
        "kept": space.kept,
        "costs": prices.values(),
        "seeds": [seed.model_dump_json() for seed in seeds],
        "whole": whole,
        "least": ready.evaluate(slices.cut(space.least)),
        "examples": num_rows(batches),
    }


def _worth(gone: Tensor) -> list[float]:
    """What each layer is worth: the later it goes, the more."""
    return gone.argsort().double().tolist()
