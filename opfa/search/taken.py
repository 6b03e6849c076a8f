"""A point of the front as a model: cut out, fitted layer by layer, and trained on. Zeros and 8 bits
come while it is trained.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opfa.downstream.examples import batches_of
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.structured import fit_again
from opfa.models.configs import load_config
from opfa.models.encoders import write_model
from opfa.search.front import spread
from opfa.search.material import Material
from opfa.search.prepared import Prepared
from opfa.search.recipe import SearchRecipe
from opfa.search.results import Judged, SearchResult, Taken
from opfa.search.shapes import INT8, KINDS, Shape
from opfa.search.slices import Slices
from opfa.sparsity.units import FAMILIES
from opfa.storage.files import new_directory
from opfa.tasks import kinds as tasks

FOLDER, SLICE, RUN = "taken", "slice", "run"
SCHEDULE = {"start": 0.02, "end": 0.5, "every": 0.01}  # where the recipe has none
OF_PRUNING = ("rewind_learning_rate", "cyclic_learning_rate", "sparse_kernels")  # need zeros
QUANTIZATION = {"start": 0.7, "freeze": 0.9}


def take(recipe: SearchRecipe, prepared: Prepared, output: Path, point: Judged) -> Taken:
    """The run that trains a point on, whose validation split is measured at its end. What an
    interrupted one has done is not done again.
    """
    place = output / FOLDER / f"{point.number:04}"
    if not (place / SLICE).exists():
        write_slice(recipe, prepared, point.shape, place / SLICE)
    run = place / RUN
    found = finetune(
        finetuning(recipe, point.shape, str(place / SLICE)),
        run,
        resume=(run / "recipe.toml").exists(),
        title=f"point {point.number:04}",
    )
    return Taken(number=point.number, run=run.relative_to(output).as_posix(), metrics=found.metrics)


def to_take(recipe: SearchRecipe, result: SearchResult, num: int) -> list[Judged]:
    """So many points of the front that aren't taken yet, spread evenly over it. Of one, the best;
    where the metric alone has a limit, the cheapest. Of a recipe with a point, this one.
    """
    points, limits = result.front, recipe.search.limits
    places = spread(len(points), num)
    if num == 1 and limits.metric is not None and not limits.of_costs():
        places = [len(points) - 1]
    if recipe.search.point is not None:
        places = [0]
    taken = {each.number for each in result.taken}
    return [points[place] for place in places if points[place].number not in taken]


def write_slice(recipe: SearchRecipe, prepared: Prepared, shape: Shape, directory: Path) -> None:
    """Write a shape's model, fitted to the whole one on training examples, as a new directory."""
    material = Material(recipe, str(prepared.model))
    training = material.training
    whole = material.load(training.classes)
    small = Slices(whole, prepared.space, prepared.fits).cut(shape.dense)
    small = copy.deepcopy(small)  # to be fitted
    batches = batches_of(material.ready(whole, training, training))
    fit_again(small, whole, material.task, batches, shape.gone)
    with new_directory(directory) as work:
        write_model(small, material.tokenizer, work)
        tasks.write_more(material.task, small, work)


def finetuning(recipe: SearchRecipe, shape: Shape, init: str) -> FinetuneRecipe:
    """The recipe that trains a shape's model on. Targets of `[pruning]` are the shape's zeros.

    A shape without zeros isn't pruned, and one in fp32 isn't quantized.
    """
    values, space = recipe.model_dump(mode="json", exclude_none=True), recipe.search.space
    del values["search"]
    values["model"] = {**values["model"], "init": init}
    values["model"].pop("tokenizer", None)
    if space.zeros:
        pruning = values.pop("pruning", {"schedule": SCHEDULE, "pattern": {}})
        if any(shape.zeros):
            values["pruning"] = _towards(shape, pruning, init)
        else:
            for key in OF_PRUNING:
                values["training"].pop(key, None)
    if space.eight_bits:
        settings = values.pop("quantization", QUANTIZATION)
        if shape.bits == INT8:
            values["quantization"] = settings
    return FinetuneRecipe.check(values)


def _towards(shape: Shape, pruning: Mapping[str, Any], init: str) -> dict[str, Any]:
    """`[pruning]` of a shape's zeros: one part for attention and one for neurons."""
    family = FAMILIES[load_config(init).model_type]
    own = {name: value for name, value in pruning["pattern"].items() if name != "exclude"}
    parts = [
        {**own, "include": [family.matrices(kind)], "target": zeros}
        for kind, zeros in zip(KINDS, shape.zeros, strict=True)
        if zeros
    ]
    return {"schedule": {**pruning["schedule"], "target": max(shape.zeros)}, "parts": parts}
