"""All that is around the loop: the run directory, the watchdog, a resume, what is written of it."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opfa.compression.schedules import in_steps
from opfa.errors import RunError
from opfa.extras import has_or_says
from opfa.training import began, distributed, finished, points
from opfa.training.concerns import Logging, Saving, Stopping
from opfa.training.distributed import SHARED, Supervisor
from opfa.training.loop import Concern, Progress, Trainer, train
from opfa.training.run import Run, check_output

log = logging.getLogger(__name__)


def run_to_end(
    recipe: Any,  # Any: either recipe; both have the same keys of [logging]
    output: Path,
    load: Callable[[Supervisor], Trainer],
    *,
    resume: bool,
    timeout_seconds: float,
    concerns: Sequence[Concern] = (),
    within: Path | None = None,
    title: str = "",
) -> None:
    """Train what `load` loads, in the directory `output`, unless it is done. Collective."""
    check_output(output, recipe, resume)
    with Supervisor(timeout_seconds) as supervisor:
        trainer = load(supervisor)
        steps, is_writer = trainer.schedule.steps, trainer.rank == 0
        options = {"is_writer": is_writer, "within": within, "title": title}
        with Run(output, recipe, steps=steps, **options) as run:
            # Rank 0 decides: machines may look at the run directory at different times.
            if distributed.on_first_rank(lambda: run.is_done):
                distributed.on_first_rank(lambda: finished.check(output))
                log.info("%s: is finished already", output)
                return
            at = Progress(run=run, model=trainer.student, engine=trainer.engine, steps=steps)
            at.concerns = _concerns(recipe.logging, trainer, supervisor, concerns)
            _begin(trainer, at, resume)
            if within is None:
                has_or_says(f"drawing {output / 'report'}", "opfa[plots]", "matplotlib")
            run.start_wandb(recipe.logging.wandb, recipe.logging.wandb_project, recipe.name)
            run.advance(at.step)
            at.model.train()  # a model that was loaded is in evaluation mode
            train(trainer, at)
            trainer.finish(at)


def _concerns(
    settings: Any, trainer: Trainer, supervisor: Supervisor, more: Sequence[Concern]
) -> list[Concern]:  # Any: [logging] of either recipe
    """In this order every concern sees what those before it did to the model."""
    changing, evaluating = trainer.concerns()
    rows, saves = (
        in_steps(every, trainer.schedule.steps, 1)
        for every in (settings.every_steps, settings.checkpoint_steps)
    )
    return [
        *changing,
        *more,
        Logging(rows, trainer.row),
        evaluating,
        Stopping(supervisor),
        Saving(saves, settings.keep_checkpoints, supervisor),
    ]


def _begin(trainer: Trainer, at: Progress, resume: bool) -> None:
    """Go back to the newest resume point, and write what this launch is."""
    directory = at.run.directory
    resumes = distributed.on_first_rank(lambda: resume)
    if not distributed.eventually((directory / "recipe.toml").exists):
        what = f"rank 0 made this directory, and rank {trainer.rank} can't see it; {SHARED}"
        raise RunError(f"{directory}: {what}")
    facts = distributed.on_first_rank(trainer.facts)
    if resumes:
        distributed.on_first_rank(lambda: began.check(directory, facts))
        points.resume(at)
    at.run.describe(facts, {"from_step": at.step, **trainer.launched})
