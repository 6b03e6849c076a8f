"""What a search writes of its front: front.json, results.json, recipes, table, picture and page.

front.json holds what the recipe decides, so it is the same after any interruption. Measured times
are in results.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opfa.extras import has_or_says
from opfa.report.search_page import COSTS, write_search_page
from opfa.search.judging import judged
from opfa.search.material import Material
from opfa.search.prepared import Prepared
from opfa.search.recipe import Point, SearchRecipe
from opfa.search.results import FILE, Judged, SearchResult
from opfa.search.shapes import Shape
from opfa.search.slices import Slices
from opfa.search.study import Evaluation
from opfa.search.timing import measured
from opfa.storage import seal
from opfa.storage.files import new_directory, write_json, write_text

FRONT, RECIPES, TABLE = "front.json", "front", "table.md"
PICTURE = "report/front.png"


def already_written(
    recipe: SearchRecipe, output: Path, num: int, best: Sequence[Evaluation]
) -> SearchResult | None:
    """The result of this very search, where it was written before."""
    if not (output / FILE).exists():
        return None
    values = seal.read_json(output / FILE)
    same = values["evaluations"] == num and values["recipe_sha256"] == recipe.sha256()
    return SearchResult.model_validate({"directory": output, **values}) if same else None


def write_findings(
    recipe: SearchRecipe,
    prepared: Prepared,
    output: Path,
    evaluations: Sequence[Evaluation],
    best: Sequence[Evaluation],
    volume: float,
    workers: int,
) -> SearchResult:
    """Judge the front by fresh examples, measure its times, and write everything."""
    metric = recipe.task.metrics[0]
    space = prepared.space
    even = space.even if recipe.search.point is None else []
    known = {each.shape: each.metrics[metric] for each in evaluations}
    more = [shape for shape in even if shape not in known]
    known |= zip(more, (found[metric] for found in judged(output, more, workers)), strict=True)
    shapes = [space.whole, *even, *(each.shape for each in best)]
    held_out = [prepared.whole[metric]]
    held_out += [known[shape] for shape in shapes[1:]]
    fresh = [found[metric] for found in judged(output, shapes, workers, is_fresh=True)]
    times = _times(recipe, prepared, shapes)
    numbers = [*[-1] * (1 + len(even)), *(each.place for each in best)]
    rows = [
        Judged(
            number=number,
            shape=shape,
            held_out=one,
            fresh=other,
            costs=prepared.prices.of(shape),
            measured=time,
        )
        for number, shape, one, other, time in zip(
            numbers, shapes, held_out, fresh, times, strict=True
        )
    ]
    found = {
        "task": recipe.name,
        "metric": metric,
        "evaluations": len(evaluations),
        "hypervolume": None if recipe.search.point else volume,
        "whole": rows[0],
        "front": rows[1 + len(even) :],
        "even": rows[1 : 1 + len(even)],
        "taken": [],
        "recipe_sha256": recipe.sha256(),
    }
    if recipe.search.point is None:
        _write_front(recipe, output, _checked(output, found), evaluations)
    return write_result(output, found)  # the last one: what is there is complete


def write_result(output: Path, values: Mapping[str, Any]) -> SearchResult:
    """Write results.json."""
    written = seal.write_sealed(output / FILE, _checked(output, values).model_dump(mode="json"))
    return SearchResult.model_validate({"directory": output, **written})


def _checked(output: Path, values: Mapping[str, Any]) -> SearchResult:
    return SearchResult.model_validate({"directory": output, "sealed": "", **values})


def _times(recipe: SearchRecipe, prepared: Prepared, shapes: Sequence[Shape]) -> list[float]:
    """Milliseconds of slices, which take turns."""
    material = Material(recipe, str(prepared.model))
    model = material.load(material.held_out.classes)
    slices = Slices(model, prepared.space, prepared.fits)
    return measured(slices, shapes, recipe.search, material.task.sequence_tokens)


def _write_front(
    recipe: SearchRecipe,
    output: Path,
    result: SearchResult,
    evaluations: Sequence[Evaluation],
) -> None:
    """The front as the recipe decides it, a recipe of each point, a table, a picture and a page."""
    same = [point.model_dump(mode="json", exclude={"measured"}) for point in result.front]
    write_json(output / FRONT, {"metric": result.metric, "front": same})
    with new_directory(output / RECIPES, is_new=False) as work:
        for point in result.front:
            of_point = {"point": Point(**point.shape.model_dump())}
            search = recipe.search.model_copy(update=of_point)
            text = recipe.model_copy(update={"search": search}).to_toml()
            write_text(work / f"{point.number:04}.toml", text)
    write_text(output / TABLE, result.table().markdown() + "\n")
    tried = [(each.costs, each.metrics[result.metric]) for each in evaluations]
    aim, values = recipe.search.aims[0], result.model_dump(mode="json")
    write_search_page(output, values, tried, result.table(), aim, recipe.to_toml())
    if has_or_says(f"drawing {output / 'report'}", "opfa[plots]", "matplotlib"):
        from opfa.report.pictures import front_picture

        label, unit = COSTS[aim]
        front_picture(values, tried, aim, output / PICTURE, unit, label)
