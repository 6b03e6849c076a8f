"""A search for models by several aims: as good as can be, and as cheap.

    model -> units in order, prices, fits -> generations of slices, judged -> front -> models

The directory has the recipe, what was `prepared`, the journal of evaluations, the front as recipes,
table, picture and page, and what was `taken` of it.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from opfa.errors import OpfaError, RunError
from opfa.report.bars import Bar
from opfa.search.front import front, hypervolume
from opfa.search.judging import cores, judged
from opfa.search.material import Material
from opfa.search.outputs import already_written, write_findings, write_result
from opfa.search.prepared import Metrics, Prepared, prepare
from opfa.search.recipe import SearchRecipe
from opfa.search.results import FILE, SearchResult
from opfa.search.shapes import Shape, Space
from opfa.search.study import JOURNAL, Evaluation, Study
from opfa.search.taken import take as take_point
from opfa.search.taken import to_take
from opfa.storage import seal
from opfa.storage.files import write_text
from opfa.storage.runs import RECIPE
from opfa.storage.temporary import lock
from opfa.training import began, launch, machine
from opfa.training.distributed import Stopped, Supervisor
from opfa.training.run import check_output

log = logging.getLogger(__name__)


def search(
    recipe: SearchRecipe,
    output: Path,
    *,
    workers: int | None = None,
    take: int = 0,
    resume: bool = False,
) -> SearchResult:
    """Search, write the front, and train `take` of its points on. Each step is done once, whatever
    interrupts it. A recipe with a point makes this point's model. By default as many workers judge
    as there are cores.

    Raises `RunError` where no shape keeps to the limits.
    """
    launch.refuse_several("opfa search")
    check_output(output, recipe, resume)
    workers = workers or cores()
    material = Material(recipe, recipe.model.init)
    with _alone(output, is_new=not resume), Supervisor(math.inf) as supervisor:
        supervisor.beat("searching")
        _describe(recipe, material, output)
        prepared = prepare(recipe, material, output)
        check_limits(recipe, prepared)
        check_point(recipe, prepared.space)
        evaluations = evaluate(recipe, prepared, output, workers)
        best = best_of(recipe, evaluations)
        volume = hypervolume_of(recipe, prepared, evaluations)
        result = already_written(recipe, output, len(evaluations), best)
        if result is None:
            result = write_findings(recipe, prepared, output, evaluations, best, volume, workers)
        for point in to_take(recipe, result, take):
            taken = take_point(recipe, prepared, output, point)
            result = write_result(output, {**result.values(), "taken": [*result.taken, taken]})
        return result


def evaluate(
    recipe: SearchRecipe, prepared: Prepared, output: Path, workers: int
) -> list[Evaluation]:
    """Judge what isn't judged yet; returns all evaluations."""
    search = recipe.search
    if search.point is not None:
        point = search.point
        units = point.heads, point.neurons, point.layers
        shape = prepared.space.clean(*units, point.zeros, point.bits)
        (metrics,) = judged(output, [shape], 1)
        return [_evaluation(recipe, prepared, 0, shape, metrics)]
    study = Study(output, search, prepared.space, prepared.seeds, recipe.seed)

    def done() -> list[Evaluation]:
        rows = sorted(study.done().items())
        return [_evaluation(recipe, prepared, place, *found) for place, found in rows]

    with Bar(output.name, search.evaluations) as bar:
        bar.move_to(len(done()))
        for generation in study.generations():
            answers = judged(output, [asked.shape for asked in generation], workers)
            for asked, metrics in zip(generation, answers, strict=True):
                found = _evaluation(recipe, prepared, asked.place, asked.shape, metrics)
                study.tell(asked, found, recipe.task.metrics[0])
                bar.advance(1)
            _say(recipe, prepared, output, done())
    if study.is_exhausted:
        log.warning("%s: no more than %d different models come up", output, len(done()))
    return done()


def _evaluation(
    recipe: SearchRecipe, prepared: Prepared, place: int, shape: Shape, metrics: Metrics
) -> Evaluation:
    costs, limits = prepared.prices.of(shape), recipe.search.limits
    excess = {aim: costs[aim] / most - 1 for aim, most in limits.of_costs().items()}
    if limits.metric is not None:
        excess["metric"] = 1 - metrics[recipe.task.metrics[0]] / limits.metric
    return Evaluation(place, shape, metrics, costs, excess)


def _say(
    recipe: SearchRecipe, prepared: Prepared, output: Path, evaluations: Sequence[Evaluation]
) -> None:
    size = len(_best(recipe, evaluations))
    volume = hypervolume_of(recipe, prepared, evaluations)
    what = f"{size} on the front, hypervolume {volume:.4f}"
    log.info("%s: %d of %d judged, %s", output, len(evaluations), recipe.search.evaluations, what)


def best_of(recipe: SearchRecipe, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The front, the best metric first; raises `RunError` where nothing keeps to the limits."""
    if found := _best(recipe, evaluations):
        return found
    nearest = min(evaluations, key=lambda each: max(each.excess.values()))
    missed = max(nearest.excess, key=lambda name: nearest.excess[name])
    metric = recipe.task.metrics[0]
    value = nearest.metrics[metric] if missed == "metric" else nearest.costs[missed]
    what = f"the nearest has {metric if missed == 'metric' else missed} = {value:.6g}"
    limit = f"search.limits.{missed} = {recipe.search.limits.model_dump()[missed]:g}"
    raise RunError(f"{limit}: none of {len(evaluations)} models keeps to all limits; {what}")


def _best(recipe: SearchRecipe, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    search, metric = recipe.search, recipe.task.metrics[0]
    feasible = [each for each in evaluations if each.is_feasible]
    found = [feasible[i] for i in front([each.values(search, metric) for each in feasible])]
    return sorted(found, key=lambda each: -each.metrics[metric])


def hypervolume_of(
    recipe: SearchRecipe, prepared: Prepared, evaluations: Sequence[Evaluation]
) -> float:
    """What the feasible dominate: costs as shares of the whole model's, from there down, and the
    metric from that of the least model up.
    """
    search, metric = recipe.search, recipe.task.metrics[0]
    whole = prepared.prices.of(prepared.space.whole)
    sizes = (*(whole[aim] for aim in search.aims), 1.0)
    points = [
        [value / size for value, size in zip(each.values(search, metric), sizes, strict=True)]
        for each in evaluations
        if each.is_feasible
    ]
    return hypervolume(points, [*(1.0 for _ in search.aims), -prepared.least[metric]])


def check_limits(recipe: SearchRecipe, prepared: Prepared) -> None:
    """Refuse limits that no shape of the space can keep to."""
    limits, metric = recipe.search.limits, recipe.task.metrics[0]
    least = (prepared.prices.of(shape) for shape in prepared.space.in_all_forms)
    cheapest = [*least]
    for aim, most in limits.of_costs().items():
        if (cost := min(costs[aim] for costs in cheapest)) > most:
            what = f"the cheapest model of this space has {cost:.6g}"
            raise RunError(f"search.limits.{aim} = {most:g}: {what}")
    if limits.metric is not None and limits.metric > prepared.whole[metric]:
        what = f"the whole model has only {prepared.whole[metric]:.4f} on the held-out examples"
        raise RunError(f"search.limits.metric = {limits.metric:g}: {metric}: {what}")


def check_point(recipe: SearchRecipe, space: Space) -> None:
    """Refuse a point that is none of this model's."""
    if (point := recipe.search.point) is None:
        return
    for name, counts, most in (
        ("heads", point.heads, space.heads),
        ("neurons", point.neurons, space.neurons),
    ):
        if len(counts) != len(most):
            raise RunError(f"search.point.{name}: has {len(counts)} layers, the model {len(most)}")
        for layer, (count, there) in enumerate(zip(counts, most, strict=True)):
            if count > there:
                what = f"layer {layer} of the model has only {there}"
                raise RunError(f"search.point.{name}.{layer} = {count}: {what}")
    bits = {form.bits for form in space.forms}
    shares = {form.zeros for form in space.forms}
    if point.bits not in bits:
        raise RunError(f"search.point.bits = {point.bits}: needs search.space.eight_bits = true")
    if other := set(point.zeros) - shares:
        known = ", ".join(f"{share:g}" for share in sorted(shares))
        what = f"{min(other):g} is none of 0 and search.space.zeros ({known})"
        raise RunError(f"search.point.zeros = {list(point.zeros)}: {what}")


@contextlib.contextmanager
def _alone(output: Path, *, is_new: bool) -> Iterator[None]:
    """Hold the directory. A new one goes again if an error comes before anything is judged."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        file = lock(output / ".lock")
    except BlockingIOError:
        raise RunError(f"{output}: is being searched already, by another process") from None
    try:
        yield
    except Stopped:
        raise
    except OpfaError:
        if is_new and not any((output / name).exists() for name in (JOURNAL, FILE)):
            shutil.rmtree(output)
        raise
    finally:
        file.close()


def _describe(recipe: SearchRecipe, material: Material, output: Path) -> None:
    """Write the recipe, software and machine; refuse another model or other examples."""
    facts = {"data": material.digests(), **began.models({"model.init": recipe.model.init})}
    began.check(output, facts)
    write_text(output / RECIPE, recipe.to_toml())
    if not (output / began.FILE).exists():
        seal.write_sealed(output / began.FILE, {**machine.environment(), **facts})
