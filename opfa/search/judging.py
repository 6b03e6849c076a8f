"""Candidates judged: each one cut out and answered for the held-out examples, by one thread.

Several are judged at a time in processes of their own. A judgement depends on its shape alone, so
neither their number nor their order changes what a search finds.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from opfa.downstream.evaluate import evaluate
from opfa.errors import RunError
from opfa.extras import importing
from opfa.models.costs import threads
from opfa.search.material import CPU, Material
from opfa.search.prepared import FACTS, FOLDER, Prepared
from opfa.search.recipe import SearchRecipe
from opfa.search.shapes import Shape
from opfa.search.slices import Slices
from opfa.storage import seal
from opfa.storage.runs import RECIPE

with importing("opfa search", "opfa[search]"):
    import joblib
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

BATCH = 64


def cores() -> int:
    """How many cores this process may use."""
    return joblib.cpu_count()


class Judge:
    """Judges shapes by the examples of a search."""

    def __init__(self, output: Path) -> None:
        """Read what the search in this directory prepared."""
        recipe = SearchRecipe.read(output / RECIPE)
        prepared = Prepared.read(recipe, output)
        self._material = Material(recipe, str(prepared.model))
        model = self._material.load(self._material.held_out.classes)
        self._slices = Slices(model, prepared.space, prepared.fits)

    def metrics(self, shape: Shape, *, is_fresh: bool = False) -> dict[str, float]:
        """The task's metrics of a slice, on the held-out examples or on fresh ones."""
        material = self._material
        split = material.fresh if is_fresh else material.held_out
        with threads(1):  # so the last bits of sums don't depend on the machine's cores
            return evaluate(self._slices.cut(shape), material.task, split, batch=BATCH, device=CPU)


def judged(
    output: Path, shapes: Sequence[Shape], workers: int, *, is_fresh: bool = False
) -> Iterator[dict[str, float]]:
    """The metrics of shapes, in their order, by so many processes at a time."""
    stamp = seal.digest(output / FOLDER / FACTS)
    if workers == 1:
        yield from (_judged(output, stamp, shape, is_fresh) for shape in shapes)
        return
    parallel = Parallel(n_jobs=workers, return_as="generator", pre_dispatch="n_jobs")
    calls: Any = (delayed(_judged)(output, stamp, shape, is_fresh) for shape in shapes)
    try:
        answers: Any = parallel(calls)  # its types don't know what is called
        yield from answers
    except TerminatedWorkerError as error:
        what = "a worker was ended, perhaps for its memory; --resume goes on, with fewer --workers"
        raise RunError(f"{output}: {what}") from error


def _judged(output: Path, stamp: str, shape: Shape, is_fresh: bool) -> dict[str, float]:
    return _judge(output, stamp).metrics(shape, is_fresh=is_fresh)


@lru_cache(maxsize=1)  # of a process
def _judge(output: Path, stamp: str) -> Judge:
    """Of the search that is in this directory now, which the stamp of its facts tells."""
    return Judge(output)
