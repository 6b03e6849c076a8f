"""A point of the front as a model: cut out, fitted layer by layer, and trained on."""

import copy
from pathlib import Path

from opfa.downstream.examples import batches_of
from opfa.downstream.finetune import finetune
from opfa.downstream.structured import fit_again
from opfa.models.encoders import write_model
from opfa.search.front import spread
from opfa.search.material import Material
from opfa.search.prepared import Prepared
from opfa.search.recipe import SearchRecipe
from opfa.search.results import Judged, SearchResult, Taken
from opfa.search.shapes import Shape
from opfa.search.slices import Slices
from opfa.storage.files import new_directory
from opfa.tasks import kinds as tasks

FOLDER, SLICE, RUN = "taken", "slice", "run"


def take(recipe: SearchRecipe, prepared: Prepared, output: Path, point: Judged) -> Taken:
    """The run that trains a point on, whose validation split is measured at its end. What an
    interrupted one has done is not done again.
    """
    place = output / FOLDER / f"{point.number:04}"
    if not (place / SLICE).exists():
        write_slice(recipe, prepared, point.shape, place / SLICE)
    run = place / RUN
    found = finetune(
        recipe.finetuning(str(place / SLICE)),
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
    small = copy.deepcopy(Slices(whole, prepared.space, prepared.fits).cut(shape))  # to be fitted
    batches = batches_of(material.ready(whole, training, training))
    fit_again(small, whole, material.task, batches, shape.gone)
    with new_directory(directory) as work:
        write_model(small, material.tokenizer, work)
        tasks.write_more(material.task, small, work)
