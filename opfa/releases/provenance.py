"""Where a model comes from: the runs on the way to it and their results, read from directories."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RunError, opening, redacted
from opfa.hub.publish import is_name
from opfa.recipe import Recipe
from opfa.storage import seal
from opfa.storage.runs import MODEL, model_in, shortened
from opfa.training import finished, metrics
from opfa.upstream.recipe import PretrainRecipe

Facts = Mapping[str, Any]  # what JSON files of runs hold


@dataclass(frozen=True, kw_only=True)
class Step:
    """One finished run on the way to a model, its files read once, without anyone's directories."""

    run: Path
    done: dict[str, Any]  # done.json, checked against the files that describe the run
    recipe: Facts  # resolved, as in recipe.toml
    toml: str
    sha256: str  # of the recipe as it was run
    environment: Facts
    start: str  # where its model came from, as it was run; empty if from scratch

    @property
    def steps(self) -> int:
        """How many steps it took."""
        return self.done["step"]

    @property
    def kind(self) -> str | None:
        """The kind of task; None for pre-training."""
        return self.recipe.get("task", {}).get("kind")

    @property
    def splits(self) -> Mapping[str, Facts]:
        """Digests of its training and validation data, upstream with their sizes."""
        data = self.environment["data"]
        return data["splits"] if self.kind is None else {k: {"sha256": v} for k, v in data.items()}

    @property
    def data(self) -> str:
        """Digest of what its metrics were measured on."""
        return self.splits["validation"]["sha256"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One line of the results: a model's metrics, means where there are several seeds."""

    label: str
    metrics: Mapping[str, float]
    deviations: Mapping[str, float | None] = field(default_factory=dict)
    num_seeds: int = 1
    sparsity: float
    data: str  # digest of what they were measured on


def step_of(run: Path) -> Step:
    """A finished run; raises `RunError` where its files are not those that it wrote."""
    path = run / "recipe.toml"
    if not path.is_file():
        raise RunError(f"{run}: not a run, it has no recipe.toml")
    done, values = finished.read(run), seal.read_toml(path)
    kind: type[Recipe] = FinetuneRecipe if "task" in values else PretrainRecipe
    public = kind.check(shortened(values), str(path))
    step = Step(
        run=run,
        done=done,
        recipe=redacted(public.model_dump(mode="json", exclude_none=True)),
        toml=public.to_toml(),
        sha256=kind.check(values, str(path)).sha256(),
        environment=redacted(shortened(seal.read_json(run / "environment.json"))),
        start=values["model"].get("init", ""),
    )
    with opening(run / "environment.json", RunError, "is damaged"):  # what a card shows of it
        machine, _ = step.environment["machine"], (step.data, step.environment["world_size"])
        _ = dict(step.environment["versions"]), machine["processors"], list(machine["accelerators"])
    return step


def steps(run: Path) -> Iterator[Step]:
    """This run, and those that its model was made from, as far as they are here."""
    step = step_of(run)
    yield step
    while (before := _run_of(step.start)) is not None:
        later, step = step, step_of(before)
        _check_start(later, step)
        yield step


def _run_of(start: str) -> Path | None:
    """The finished run that a model came from, by its directory or by RUN/model."""
    if not start:
        return None
    directory = model_in(Path(start))
    is_run = directory.name == MODEL and (directory.parent / finished.FILE).is_file()
    return directory.parent if is_run else None


def _check_start(step: Step, before: Step) -> None:
    known, wrote = step.environment.get("start_sha256"), finished.model_files(before.done)
    began = step.environment.get(seal.FILES, {}).get("model.init", {})
    if known and known != before.done["model_sha256"]:
        raise RunError(f"{step.run}: began with another model than {step.start} is now")
    if began and wrote and (found := seal.differences(wrote, began)):
        what = f"began with another model than {step.start} was when it was made: {found}"
        raise RunError(f"{step.run}: {what}")


def own_rows(step: Step) -> list[Measurement]:
    """The results of a run, and the mean over the seeds of its recipe where there are several."""
    rows = [_row("this model", step)]
    run = step.run.absolute()  # the parent of a single relative name is "."
    for sweep in (run.parent, run.parent.parent):  # SWEEP/seed-42, SWEEP/learning_rate-.../seed-42
        for row in _rates(sweep):
            runs = [sweep / one["run"] for one in row["runs"]]
            if len(runs) > 1 and run in runs:
                rows.append(_mean("its recipe", row, sweep))
    return rows


def row_of(label: str, run: Path) -> Measurement:
    """The results of a run, or of the best learning rate of several."""
    if rates := [row for row in _rates(run) if row["score"] is not None]:
        return _mean(label, max(rates, key=lambda row: row["score"]), run)
    return _row(label, step_of(run))


def _row(label: str, step: Step) -> Measurement:
    """The results of a run; of a pre-training its loss on held-out text."""
    path = step.run / ("results.json" if step.kind else finished.FILE)
    found = seal.read_json(path) if step.kind else step.done
    with opening(path, RunError, "is damaged"):
        if step.kind:
            values = dict(found["metrics"])
        else:
            metric = PretrainRecipe.check(step.recipe).metric
            values = {metric: last_evaluation(step.run)[metric]}
        return Measurement(label=label, metrics=values, sparsity=found["sparsity"], data=step.data)


def last_evaluation(run: Path) -> Facts:
    """What a pre-training logged of its last evaluation; raises `RunError` if there was none."""
    for row in reversed(metrics.read(run)):
        if row.get("eval"):
            return row
    raise RunError(f"{run}: has no results to show, its metrics.jsonl has no evaluation")


def _rates(sweep: Path) -> list[dict[str, Any]]:
    """The rows of several runs' results.json, one for each learning rate; none for one run."""
    path = sweep / "results.json"
    return seal.read_json(path).get("rows", []) if path.is_file() else []


def _mean(label: str, row: dict[str, Any], sweep: Path) -> Measurement:
    runs = row["runs"]
    return Measurement(
        label=label,
        metrics=row["mean"],
        deviations=row["std"],
        num_seeds=len(runs),
        sparsity=runs[0]["sparsity"],
        data=step_of(sweep / runs[0]["run"]).data,
    )


def check_comparable(rows: Sequence[Measurement]) -> None:
    """Refuse rows that were measured on other data than the first."""
    for row in rows[1:]:
        if row.data != rows[0].data:
            what = "was measured on other data than this model; they don't belong into one table"
            raise RunError(f"--compare {row.label}: {what}")


def base_model(path: Sequence[Step]) -> str | None:
    """The Hub's model that all began with; None where it was a local one, or from scratch."""
    start = path[-1].start
    is_local = not is_name(start) or start.endswith("/model") or Path(start).exists()
    has_digest = path[-1].environment.get("start_sha256")  # only what lay in a directory has one
    return None if is_local or has_digest else start
