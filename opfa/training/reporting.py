"""RUN/report: a finished run's page and, where matplotlib is installed, its pictures."""

from collections.abc import Mapping
from typing import Any

from opfa.compression.pruner import Pruner
from opfa.compression.schedules import LearningRate
from opfa.extras import has
from opfa.report.curves import Plan
from opfa.report.run_page import write_run_page
from opfa.training.run import Run


def write_report(
    run: Run,
    rates: LearningRate,
    pruner: Pruner | None,
    sparsity: Mapping[str, Any],  # Any: as in sparsity.json
    metric: str | None = None,
) -> None:
    """Show rows, schedules and zeros of a run; `metric` is what a pre-training is judged by."""
    rows, directory = run.rows(), run.directory / "report"
    sparsities = pruner.planned(rates.steps) if pruner else ()
    plan = Plan(learning_rate=rates.rates(), sparsity=sparsities)
    if has("matplotlib"):
        from opfa.report import pictures

        if metric is None:
            pictures.finetuning_pictures(rows, sparsity, directory, plan)
        else:
            pictures.pretraining_pictures(rows, metric, sparsity, directory, plan)
    write_run_page(run.directory, rows, plan, sparsity)
