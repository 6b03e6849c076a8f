"""What `reproduce.py` found: results/ with tables, pictures, and what the finished runs say of
themselves.
"""

import textwrap
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ablations import ABLATIONS
from answers import FILE, differences, recoveries, right_of
from pictures import TASKS, accuracy_picture, cost_of, cost_picture, standard_error
from split import VALIDATION

from opfa.data.records import read_records
from opfa.releases import provenance
from opfa.report.pictures import inspection_picture, loss_picture
from opfa.report.tables import Table, figure
from opfa.storage import seal
from opfa.storage.files import write_json, write_text
from opfa.training import finished, metrics
from opfa.upstream.recipe import PretrainRecipe
from opfa.weights.inspection import inspect

METHODS = [
    *(("dense", 0), ("dense-fp32", 0), ("dense-8bit", 0)),
    *((method, percent) for method in ("one-shot", "gradual") for percent in (85, 90)),
    ("gradual-early", 90),
    *((f"prune-once{form}", percent) for form in ("", "-fp32", "-8bit") for percent in (85, 90)),
]
NOTES = {  # below the table, each where a row's method or task is its key
    "dense": """\
± is the sample deviation over fine-tuning seeds; it has neither the sampling error of the examples
measured (*standard error*: of the dense model) nor, for *prune-once*, that of its students, one at
each sparsity. In brackets: the share of the dense mean, which says little near the most frequent
class. Sparsity is that of the encoder's linear weights. All methods take as many steps, *8bit* and
*fp32* a fifth more, with a learning rate chosen at 90 % with one seed, in shorter runs or with
fewer examples, by examples held out. Dropout is 0.1 for *dense* and none for the others, which on
the whole is better for these by what is held out of SST-2. What upstream training cost is not
counted: see cost.png. *dense*, *one-shot* and *gradual* start from the original model, which had
been trained on NLI and SQuAD pairs.""",
    "gradual": "*gradual* prunes from 10 to 60 % of the steps, without a teacher.",
    "gradual-early": "*gradual-early* prunes from 10 to 30 % of them.",
    "prune-once": """\
*prune-once* starts from a student of that model, pruned while it learnt the hidden states, which
read more text but lost the pooler.""",
    "dense-8bit": """\
*8bit*: each seed's model is trained for a fifth as many more steps, with 8-bit quantization;
*fp32*: without it, as a control.""",
    "mnli": "MNLI is measured without full stops, if its training pairs have none.",
}
DIFFERENCE_NOTE = """\
Points of accuracy, means of the seeds, with the standard error over examples, each of which all
methods answer."""
RECOVERY_NOTE = """\
Shares of the dense model's mean. *Above the most frequent class*: of what it has more than that
class; with 95 % intervals by bootstrap over examples and seeds where each answer was kept."""
ABLATION_NOTE = """\
One seed each: an accuracy on so few sentences has a standard error of one point, so none of these
differs from another for sure. The loss hardly varies with the seed; it is left out where the head
for masked tokens was not trained."""
EXPORTS = ("fp32", "8bit", "calibrated")
EXPORT_NOTE = """\
*prune-once* at 90 %, the first seed: in torch and in ONNX Runtime on the validation split, the
largest difference of a logit, the share of equal predictions, and that share between torch and
torch with every layer's output disturbed by 1e-7. *8bit* and *fp32* are the rows of that name;
*calibrated*: 8 bits of the latter without training, its embeddings too. Bytes: of the model's
weights, and of the ONNX file."""
MARKS = ("finished", "done.json")  # of a command, and of each run
METRICS = "metrics.jsonl"
RECORDS = (*MARKS, "recipe.toml", "environment.json", "results.json", METRICS)
Row = dict[str, Any]


def write_table(output: Path) -> None:
    """Write what is there under `output`; raises `RunError`, and writes nothing, where a run began
    with a model that was made anew since.
    """
    trace = trace_table(output)
    rows = [row for task in TASKS for row in task_rows(output, task)]
    tasks = {task: examples_of(output, task) for task in dict.fromkeys(row["task"] for row in rows)}
    ablations = ablation_rows(output)
    results = output / "results"
    results.mkdir(exist_ok=True)
    rates = rate_rows(output)
    found = {"tasks": tasks, "rows": rows, "ablations": ablations, "learning_rates": rates}
    found["exports"] = export_rows(output)
    asked = sorted((output / "runs").rglob(FILE))
    right = {str(file.parent.relative_to(output)): right_of(file.parent) for file in asked}
    found["differences"] = differences(rows, right)
    found["recoveries"] = recoveries(rows, tasks, right)
    write_json(results / "answers.json", right)
    write_json(results / "table.json", found)
    write_json(results / "runs.json", records(output))
    parts = [*tables(found), trace]
    write_text(results / "table.md", "\n\n".join(part for part in parts if part) + "\n")
    if rows:
        examples = {task: about["examples"] for task, about in tasks.items()}
        accuracy_picture(rows, examples, results / "accuracy.png")
    students = {
        run: metrics.read(run)
        for run in (output / f"runs/sparse-{percent}" for percent in (85, 90))
        if (run / "done.json").exists()
    }
    for run, logged in students.items():
        metric = PretrainRecipe.read(run / "recipe.toml").metric
        loss_picture(logged, metric, results / f"{run.name}-loss.png")
    if students:
        cost_picture(students, results / "cost.png")
    run = output / "runs/ablations/global"
    if (run / "done.json").exists():
        name, inspected = "one threshold for all layers", inspect(run / "model")
        inspection_picture(name, inspected, results / "global-sparsity.png")


def tables(found: Mapping[str, Any]) -> list[str]:
    """What table.json holds, to be read: methods, ablations and learning rates, each with notes."""
    methods = methods_table(found["tasks"], found["rows"])
    present = {row["method"] for row in found["rows"]} | set(found["tasks"])
    notes = " ".join(note for key, note in NOTES.items() if key in present)
    trained = (
        f"{task} trains on {about['train_examples']:,} examples, {about['epochs']:g} times each."
        for task, about in found["tasks"].items()
    )
    parts = [methods, _wrapped(" ".join([notes, *trained]))]
    if found["differences"]:
        parts += [differences_table(found["differences"]), _wrapped(DIFFERENCE_NOTE)]
    if found["recoveries"]:
        parts += [recoveries_table(found["recoveries"]), _wrapped(RECOVERY_NOTE)]
    if found["exports"]:
        parts += [exports_table(found["exports"]), _wrapped(EXPORT_NOTE)]
    if found["ablations"]:
        parts += [ablations_table(found["ablations"]), _wrapped(ABLATION_NOTE)]
    return [part for part in [*parts, rates_table(found["learning_rates"])] if part]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def records(output: Path) -> dict[str, str]:
    """What each finished run says of itself: by path, the text of its small files, and the
    evaluations among its metrics.
    """
    runs = {path.parent for mark in MARKS for path in (output / "runs").rglob(mark)}
    files = [run / name for run in sorted(runs) for name in RECORDS if (run / name).exists()]
    files += sorted(output.glob("exports/*/*.json"))
    return {str(file.relative_to(output)): _said(file) for file in files}


def _said(file: Path) -> str:
    text = file.read_text()
    if file.name != METRICS:
        return text
    pairs = zip(text.splitlines(keepends=True), metrics.read(file.parent), strict=False)
    return "".join(line for line, row in pairs if row.get("eval"))


def task_rows(output: Path, task: str) -> list[Row]:
    """One row for each method and sparsity of which a seed is finished."""
    rows: list[Row] = []
    dense: float | None = None
    for method, percent in METHODS:
        run = f"runs/{task}/{method}-{percent}"
        files = sorted((output / run).glob("seed-*/results.json"))
        found = [seal.read_json(file) for file in files]
        if not found:
            continue
        values = [results["metrics"][TASKS[task]] for results in found]
        mean = fmean(values)
        dense = mean if method == "dense" else dense
        rows.append(
            {
                "task": task,
                "method": method,
                "percent": percent,
                "mean": mean,
                "std": stdev(values) if len(values) > 1 else None,
                "recovery": mean / dense if dense else None,
                "values": values,
                "seeds": [results["seed"] for results in found],
                "recipes_sha256": [results["recipe_sha256"] for results in found],
                "models_sha256": [results["model_sha256"] for results in found],
                "run": run,
            }
        )
    return rows


def ablation_rows(output: Path) -> list[Row]:
    """One row for each change of the short pruning's recipe."""
    rows = []
    for name, (question, changes) in ABLATIONS.items():
        run = output / "runs/ablations" / name
        after = run.with_name(f"{name}-sst2")
        if (after / "finished").exists():
            results = seal.read_json(after / "results.json")
            rows.append(
                {
                    "name": name,
                    "question": question,
                    "changes": changes,
                    "mlm_loss": provenance.last_evaluation(run).get("mlm_loss"),
                    "held_out_accuracy": results["metrics"]["accuracy"],
                    "operations": cost_of(run)[1],
                    "seed": results["seed"],
                    "run": str(run.relative_to(output)),
                }
            )
    return rows


def export_rows(output: Path) -> list[Row]:
    """What `opfa export` said of each ONNX file that it wrote."""
    places = [(task, form) for task in TASKS for form in EXPORTS]
    reports = {place: output / "exports/{}/{}.json".format(*place) for place in places}
    rows = [
        {"task": task, "form": form, **seal.read_json(report)}
        for (task, form), report in reports.items()
        if report.exists()
    ]
    return [row for row in rows if not row["problems"]]


def rate_rows(output: Path) -> list[Row]:
    """One row for each task and method, with dropout and without: what examples held out say of
    each learning rate.
    """

    @cache
    def num_held(task: str) -> int:
        return sum(1 for _ in read_records(output / f"split/{task}/held.jsonl.gz"))

    rows = []
    for task in TASKS:
        for method, form in product(dict(METHODS), ("", "-no-dropout")):
            path = output / f"runs/{task}/{method}{form}-rates/results.json"
            if path.exists():
                found = seal.read_json(path)
                scores = {row["learning_rate"]: row["score"] for row in found["rows"]}
                chosen = found["learning_rate"]
                facts = {"chosen": chosen, "scores": scores, "examples": num_held(task)}
                dropout = dropout_of(output, path.parent)
                place = {"task": task, "method": method, "dropout": dropout}
                rows.append({**place, **facts, "run": str(path.parent.relative_to(output))})
    return rows


def dropout_of(output: Path, run: Path) -> float:
    """What a fine-tuning was told, or what the configuration says that it began with."""
    recipe = seal.read_toml(run / "recipe.toml")
    config = seal.read_json(output / recipe["model"]["init"] / "config.json")
    return recipe["training"].get("dropout", config["hidden_dropout_prob"])


def rates_table(rows: Sequence[Row]) -> str:
    """Which learning rate each method was given, and why."""
    lines = []
    for row in rows:
        scores = [
            f"{float(rate):g}: {'diverged' if score is None else figure(score, None)}"
            for rate, score in row["scores"].items()
        ]
        cells = [f"{row['chosen']:g}", f"{row['examples']:,}", "; ".join(scores)]
        lines.append([row["task"], row["method"], f"{row['dropout']:g}", *cells])
    head = [
        "task",
        "method",
        "dropout",
        "learning rate",
        "examples held out",
        "what they say of each",
    ]
    return Table(head, lines).markdown() if rows else ""


def examples_of(output: Path, task: str) -> Row:
    """How many examples train, for how many epochs, and are measured; and the share of the most
    frequent class.
    """
    train = read_records(output / f"data/{task}/train.jsonl.gz")
    recipe = tomllib.loads((output / f"recipes/minilm-{task}.toml").read_text())
    file = output / f"data/{task}/{VALIDATION.get(task, 'validation')}.jsonl.gz"
    labels = [record.get("label") for _, record in read_records(file)]
    most = Counter(labels).most_common(1)[0][1] / len(labels)
    return {
        "train_examples": sum(1 for _ in train),
        "epochs": recipe["training"]["epochs"],
        "examples": len(labels),
        "majority": None if task == "squad" else most,
    }


def methods_table(tasks: Mapping[str, Row], rows: Sequence[Row]) -> str:
    """Methods against tasks: mean, deviation and recovery."""
    cells = {}
    for row in rows:
        recovery = "" if row["recovery"] is None else f" ({row['recovery']:.1%})"
        seeds = len(row["seeds"])
        num_seeds = f", {seeds} seed{'s' if seeds > 1 else ''}" if seeds != 3 else ""
        place = row["method"], row["percent"], row["task"]
        cells[place] = figure(row["mean"], row["std"]) + recovery + num_seeds
    head = ["method", "sparsity"]
    majority, errors = ["most frequent class", ""], ["standard error", ""]
    dense = {row["task"]: row["mean"] for row in rows if row["method"] == "dense"}
    for task, about in tasks.items():
        head.append(f"{task}, {TASKS[task]}, {about['examples']:,} examples")
        share, mean = about["majority"], dense.get(task)
        majority.append("" if share is None else figure(share, None))
        if mean is None or share is None:  # not a mean of right and wrong
            errors.append("")
        else:
            errors.append(figure(standard_error(mean, about["examples"]), None))
    lines = [majority, errors]
    for method, percent in METHODS:
        line = [cells.get((method, percent, task), "") for task in tasks]
        if any(line):
            lines.append([method, f"{percent} %", *line])
    return Table(head, lines).markdown() if rows else ""


def differences_table(rows: Sequence[Row]) -> str:
    """One method against another on the same examples, in points."""
    lines = []
    for row in rows:
        points = f"{100 * row['mean']:+.1f} ± {100 * row['error']:.1f}"
        names = f"{row['method']} minus {row['other']}"
        lines.append([row["task"], f"{row['percent']} %", names, points])
    return Table(["task", "sparsity", "difference", "points"], lines).markdown()


def recoveries_table(rows: Sequence[Row]) -> str:
    """What sparse methods keep, by task and sparsity."""
    lines = []
    for row in rows:
        above = f"{row['above']:.1%}"
        if row["interval"]:
            above += " ({:.1%} to {:.1%})".format(*row["interval"])
        place = [row["task"], f"{row['percent']} %", row["method"]]
        lines.append([*place, f"{row['share']:.1%}", above])
    head = ["task", "sparsity", "method", "of the accuracy", "above the most frequent class"]
    return Table(head, lines).markdown()


def exports_table(rows: Sequence[Row]) -> str:
    """Each ONNX file: what it answers, beside the model, and its size."""
    lines = []
    for row in rows:
        found, metric = row["parity"], TASKS[row["task"]]
        metrics = [figure(found["metrics"][where][metric], None) for where in ("torch", "onnx")]
        equal = [found.get(key) for key in ("equal_predictions", "repeated_predictions")]
        shares = ["" if share is None else f"{share:.2%}" for share in equal]
        sizes = [f"{row['bytes'][where]:,}" for where in ("model", "onnx")]
        cells = [*metrics, f"{found['max_difference']:.2g}", *shares, *sizes]
        lines.append([row["task"], row["form"], *cells])
    head = ["task", "form", "in torch", "in ONNX Runtime", "largest difference"]
    return Table([*head, "equal", "torch with itself", "model", "ONNX"], lines).markdown()


def ablations_table(rows: Sequence[Row]) -> str:
    """What each change gives after a short pruning to 90 %."""
    lines = []
    for row in rows:
        changes = " ".join(f"`{change}`" for change in row["changes"])
        has_head = row["mlm_loss"] is not None and "model.init=model" not in row["changes"]
        loss = f"{row['mlm_loss']:.3f}" if has_head else ""
        accuracy = f"{row['held_out_accuracy']:.4f}"
        cost = f"{row['operations'] / 1e12:.1f}"
        lines.append([row["name"], row["question"], changes, cost, loss, accuracy])
    head = ["short pruning to 90 %", "question", "changes", "operations, 10¹²"]
    head += ["MLM loss", "sst2: accuracy on sentences held out"]
    return Table(head, lines).markdown()


def trace_table(output: Path) -> str:
    """Every finished run: its place, seed, rate, recipe and model; raises `RunError` where one
    began with a model that was made anew since.
    """
    lines = []
    for file in sorted((output / "runs").rglob("done.json")):
        step, *_ = provenance.steps(file.parent)
        rate = step.recipe["training"]["learning_rate"]
        model = finished.read(file.parent)["model_sha256"]
        place = f"`{file.parent.relative_to(output)}`"
        line = [place, str(step.recipe["seed"]), f"{rate:.2g}", f"{step.steps:,}"]
        start = str(step.environment.get("start_sha256") or "not recorded")
        lines.append([*line, *(f"`{digest[:12]}`" for digest in (step.sha256, start, model))])
    head = ["run", "seed", "learning rate", "steps", "recipe (SHA-256)", "began with", "model"]
    return Table(head, lines).markdown() if lines else ""
