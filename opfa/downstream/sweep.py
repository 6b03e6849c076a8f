"""Several fine-tunings of one recipe, compared: other seeds, and the values of a sweep.

Values are compared by the mean over seeds of what [selection] looked at, else of the task's first
metric. A value of which a run diverged can win only if every other has such a run too. Deviations
are of a sample (n - 1).
"""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.results import (
    FILE,
    FinetuneResult,
    Rate,
    Results,
    SweepResult,
    SweepRun,
    rates_table,
)
from opfa.errors import DivergedError, OpfaError, RunError
from opfa.extras import has_or_says
from opfa.report.sweep_page import write_sweep_page
from opfa.storage import seal
from opfa.storage.files import write_text
from opfa.training import finished, launch
from opfa.training.distributed import Stopped, Supervisor
from opfa.training.run import check_output

log = logging.getLogger(__name__)


def sweep(
    recipe: FinetuneRecipe, output: Path, *, num_seeds: int = 1, resume: bool = False
) -> SweepResult:
    """Run everything that isn't finished yet, one after the other; write and return the comparison.

    A resume may ask for more seeds or learning rates than before.
    """
    launch.refuse_several("opfa finetune")
    check_output(output, recipe, resume, has_several=True)
    seeds = range(recipe.seed, recipe.seed + num_seeds)
    _check_seeds(output, seeds)
    output.mkdir(parents=True, exist_ok=True)
    (output / "stopped").unlink(missing_ok=True)
    write_text(output / "recipe.toml", recipe.to_toml())
    rates = recipe.sweep.learning_rate if recipe.sweep else (recipe.training.learning_rate,)
    with _nothing_left(output, is_new=not resume), Supervisor(math.inf) as supervisor:
        supervisor.save_on_signals()
        draws = has_or_says(f"drawing {output / 'report'}", "opfa[plots]", "matplotlib")
        titles = _titles(len(rates) * len(seeds))
        rows = [_run_all(recipe, rate, seeds, output, supervisor, titles) for rate in rates]
    ended = [row for row in rows if row.runs]
    if not ended:
        raise RunError(f"{output}: every run diverged; lower learning rates may help")
    result = _written(recipe, rows, ended, output, draws=draws)
    rates = [row.learning_rate for row in ended]
    if len(rates) > 1 and (rate := result.learning_rate) in (min(rates), max(rates)):
        what = "with more of them in sweep.learning_rate and --resume runs only those"
        log.info("the best learning rate, %s, is at an edge; the same command %s", rate, what)
    return result


def _written(
    recipe: FinetuneRecipe, rows: list[Rate], ended: list[Rate], output: Path, *, draws: bool
) -> SweepResult:
    """Compare, and write results.json, the table and the picture."""
    steady = [row for row in ended if not row.num_diverged]
    best = max(steady or ended, key=lambda row: row.score or 0.0)
    found = {
        "task": recipe.name,
        "metrics": best.mean,
        "std": best.std,
        "learning_rate": best.learning_rate,
        "best_run": max(best.runs, key=lambda run: _score(recipe, run)).run,
        "sparsity": best.runs[0].sparsity,
        "quantized": best.runs[0].quantized,
        "recipe_sha256": recipe.sha256(),
        "rows": [row.model_dump(exclude_unset=True) for row in rows],
    }
    sealed = seal.write_sealed(output / FILE, found)
    best_line = f"\nBest: learning rate {best.learning_rate}, {found['best_run']}\n"
    write_text(output / "table.md", table(rows) + (best_line if len(rows) > 1 else ""))
    if len(ended) > 1 and draws:
        from opfa.report import pictures

        picture = output / "report/sweep.png"
        pictures.sweep_picture([row.model_dump() for row in ended], recipe.task.metrics[0], picture)
    write_sweep_page(output, sealed)
    return SweepResult.model_validate({"directory": output, **sealed})


@contextlib.contextmanager
def _nothing_left(output: Path, *, is_new: bool) -> Iterator[None]:
    """Remove a new directory again if an error comes before its first run begins."""
    try:
        yield
    except Stopped:
        raise  # it can be resumed
    except OpfaError:
        if is_new and [path.name for path in output.iterdir()] == ["recipe.toml"]:
            shutil.rmtree(output)
        raise


def _titles(num_runs: int) -> Iterator[str]:
    """What the bars and log lines of each run begin with."""
    return (f"run {number} of {num_runs}" for number in range(1, num_runs + 1))


def _run_all(
    recipe: FinetuneRecipe,
    rate: float,
    seeds: Sequence[int],
    output: Path,
    supervisor: Supervisor,
    titles: Iterator[str],
) -> Rate:
    """The row of a learning rate, after whatever of it isn't finished yet was run."""
    runs = []
    for seed in seeds:
        name = f"learning_rate-{rate}/seed-{seed}" if recipe.sweep else f"seed-{seed}"
        training = recipe.training.model_copy(update={"learning_rate": rate})
        changes = {"sweep": None, "seed": seed, "training": training}
        _stop_if_told(output, name, supervisor)
        title = next(titles)
        log.info("%s: %s", title, name)
        try:
            found = _finished(recipe, changes, output, name, title).values()
            runs.append(SweepRun.model_validate({"run": name, **found}))
        except DivergedError as error:
            log.warning("%s: %s", output / name, error)
    return _row(recipe, rate, runs, len(seeds) - len(runs))


def _stop_if_told(output: Path, name: str, supervisor: Supervisor) -> None:
    """Between two runs: answer a signal, or a `stop` that came too late for the last one."""
    what = f"{output}: stopped before {name}; continue with the same command and --resume"
    stops = [path for rule in ("", "seed-*/", "*/seed-*/") for path in output.glob(f"{rule}stop")]
    for stop in stops:
        os.replace(stop, stop.with_name("stopped"))
    supervisor.stop_if_told(what)
    if stops:
        raise Stopped(what)


def _check_seeds(output: Path, seeds: Sequence[int]) -> None:
    """Refuse a comparison that would leave out runs that are there."""
    paths = (path for rule in ("seed-*", "*/seed-*") for path in output.glob(f"{rule}/recipe.toml"))
    numbers = (path.parent.name.removeprefix("seed-") for path in paths)
    lost = sorted({int(number) for number in numbers if number.isdecimal()} - set(seeds))
    if lost:
        what = f"and it holds seed-{lost[0]} too; say --seeds as before, or more"
        raise RunError(f"{output}: --resume with {len(seeds)} seed(s), {what}")


def _finished(
    recipe: FinetuneRecipe, changes: dict[str, Any], output: Path, name: str, title: str
) -> FinetuneResult:
    """The results of a run, from its files or by running it. Its resume points go."""
    directory = output / name
    if not (directory / "done.json").exists():
        has_begun = (directory / "recipe.toml").exists()
        changed = recipe.model_copy(update=changes)
        finetune(changed, directory, resume=has_begun, within=output, title=title)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    finished.check(directory)
    return FinetuneResult.read(directory)


def _score(recipe: FinetuneRecipe, run: Results) -> float:
    return (run.selected or run.metrics)[recipe.task.metrics[0]]


def _row(recipe: FinetuneRecipe, rate: float, runs: list[SweepRun], num_diverged: int) -> Rate:
    names = runs[0].metrics if runs else ()
    values = {name: [run.metrics[name] for run in runs] for name in names}
    return Rate(
        learning_rate=rate,
        score=fmean(_score(recipe, run) for run in runs) if runs else None,
        mean={name: fmean(found) for name, found in values.items()},
        std={name: stdev(found) if len(found) > 1 else None for name, found in values.items()},
        runs=runs,
        num_diverged=num_diverged,
    )


def table(rows: Sequence[Rate]) -> str:
    """A Markdown table: learning rate, number of seeds, mean and deviation of every metric."""
    return rates_table(rows).markdown() + "\n"
