"""The whole method on a small model: four novelists, one teacher, one sparse student, four
fine-tunings, one table.

The text is inside the package: chapters of seventeen public-domain novels. Chapters that are held
out are used neither to pre-train nor to fine-tune. The task is "which author wrote this passage?".
All numbers come from this run.
"""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opfa.compression.pruner import Pruner
from opfa.compression.quant import FILE as QUANTIZATION
from opfa.compression.schedules import Gradual
from opfa.data.order import generator
from opfa.data.records import read_records
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RunError
from opfa.models.pretraining import load_pretraining_model
from opfa.report import pictures as report
from opfa.storage.files import check_directory, new_directory, write_json, write_text
from opfa.storage.shipped import shipped
from opfa.training.distributed import Supervisor
from opfa.upstream.batches import masker, validation_batches
from opfa.upstream.corpus import prepare
from opfa.upstream.objective import Objective
from opfa.upstream.prepared import Prepared
from opfa.upstream.pretrain import pretrain
from opfa.upstream.progress import mean_losses
from opfa.upstream.recipe import PretrainRecipe
from opfa.weights.inspection import inspect

PASSAGE_WORDS = 24
NUM_LABELLED = 4_000  # passages to fine-tune on: labels are scarcer than text
ONE_SHOT, PRUNE_ONCE = "90 % one-shot", "90 % prune-once"
VARIANTS = {  # row of the table: (recipe, model to start from)
    "dense": ("finetune-dense", "teacher"),
    ONE_SHOT: ("finetune-one-shot", "teacher"),
    PRUNE_ONCE: ("finetune", "student"),
    "90 % prune-once, 8 bits": ("finetune-qat", "student"),
}
COLUMNS = ("model", "accuracy", "MLM loss", "sparsity", "non-zero", "bytes")
log = logging.getLogger(__name__)


def quickstart(output: Path) -> dict[str, Any]:
    """Run everything into a new directory; print and return what came out."""
    check_directory(output)
    if output.exists() and any(output.iterdir()):
        raise RunError(f"{output}: is not empty; give a new directory")
    start = time.monotonic()
    with Supervisor(math.inf) as supervisor:
        supervisor.save_on_signals()
        summary = _run_all(output, supervisor)
    summary["seconds"] = round(time.monotonic() - start, 1)
    write_json(output / "quickstart.json", summary)
    write_text(output / "table.md", markdown(summary))
    report.quickstart_picture(summary["rows"], output / "quickstart.png")
    Console().print(_table(summary, output))
    return summary


def _run_all(output: Path, supervisor: Supervisor) -> dict[str, Any]:
    majority = write_data(output / "data")
    corpus = [f"corpus.documents={json.dumps([str(output / 'data/documents.jsonl')])}"]
    data = [*corpus, f"data={output / 'prepared'}"]
    with _stage("1/7  tokenizer and pre-training examples", supervisor):
        prepare(_upstream("teacher", data).corpus, output / "prepared")
    with _stage("2/7  teacher: a small dense encoder", supervisor):
        pretrain(_upstream("teacher", data), output / "teacher")
    teacher = output / "teacher/model"
    with _stage("3/7  student: pruned to 90 % under the teacher", supervisor):
        models = [f"model.init={teacher}", f"distillation.teacher={teacher}"]
        pretrain(_upstream("student", [*data, *models]), output / "student")
    rows: list[dict[str, Any]] = [{"model": "majority class", "accuracy": majority}]
    language = language_losses(_upstream("student", [*data, *models]), output)
    for number, (name, (recipe, origin)) in enumerate(VARIANTS.items(), 4):
        with _stage(f"{number}/7  fine-tuning: {name}", supervisor):
            run = output / recipe
            results = finetune(_downstream(recipe, output, origin), run)
            facts = {**_storage(run / "model"), "mlm_loss": language.get(name)}
            rows.append({"model": name, **results["metrics"], **facts, "run": str(run)})
    return {"rows": rows, "zeros_held": _zeros_held(output)}


def write_data(directory: Path) -> float:
    """Cut the books into documents and labelled passages; the share of the most frequent class
    among those held out.
    """
    chapters = [record for _, record in read_records(Path(__file__).with_name("books.jsonl.zst"))]
    train = [chapter for chapter in chapters if chapter["split"] == "train"]
    held_out = [chapter for chapter in chapters if chapter["split"] == "heldout"]
    passages, validation = _passages(train), _passages(held_out)
    order = generator(0).permutation(len(passages))[:NUM_LABELLED]
    with new_directory(directory) as aside:
        _write(aside / "documents.jsonl", ({"text": chapter["text"]} for chapter in train))
        _write(aside / "train.jsonl", (passages[index] for index in order))
        _write(aside / "validation.jsonl", validation)
    counts = Counter(passage["author"] for passage in validation)
    return max(counts.values()) / len(validation)


def language_losses(recipe: PretrainRecipe, output: Path) -> dict[str, float]:
    """The masked-token loss on held-out text of the encoders that are going to be fine-tuned, by
    row of the table.
    """
    prepared = Prepared.open(Path(recipe.data), recipe.corpus)
    mask = masker(prepared.tokenizer, recipe.masking, recipe.seed)
    assert recipe.pruning is not None
    pattern, sparsity = recipe.pruning.pattern, recipe.pruning.schedule.target
    losses = {}
    for name, origin in (("dense", "teacher"), (ONE_SHOT, "teacher"), (PRUNE_ONCE, "student")):
        model = load_pretraining_model(str(output / origin / "model"), recipe.corpus.objective)
        if name == ONE_SHOT:
            Pruner(model, Gradual(end=0, target=sparsity), pattern).after_step(0)
        batches = validation_batches(
            prepared, mask, batch=64, num_examples=len(prepared.validation)
        )
        losses[name] = mean_losses(Objective(model, None), batches)["mlm_loss"]
    return losses


def _passages(chapters: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    passages = []
    for chapter in chapters:
        words = chapter["text"].split()
        for start in range(0, len(words) - PASSAGE_WORDS + 1, PASSAGE_WORDS):
            text = " ".join(words[start : start + PASSAGE_WORDS])
            passages.append({"text": text, "author": chapter["author"]})
    return passages


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _recipe_path(name: str) -> Path:
    return shipped(f"recipes/quickstart/{name}.toml")


def _upstream(name: str, overrides: list[str]) -> PretrainRecipe:
    return PretrainRecipe.read(_recipe_path(name), overrides)


def _downstream(name: str, output: Path, origin: str) -> FinetuneRecipe:
    overrides = [
        f"model.init={output / origin / 'model'}",
        f"task.train={output / 'data/train.jsonl'}",
        f"task.validation={output / 'data/validation.jsonl'}",
    ]
    return FinetuneRecipe.read(_recipe_path(name), overrides)


def _storage(model: Path) -> dict[str, Any]:
    """Sparsity of the encoder's matrices, and the bytes they need: values, and one bit a weight to
    say where.
    """
    found = inspect(model)
    shapes = [tensor["shape"] for tensor in found["tensors"].values()]
    if not shapes:  # dense: the same matrices, none of them in the report
        size = sum(n for name, n in found["dense"].items() if ".layers." in name)
        return {"sparsity": 0.0, "nonzero": size, "bytes": 4 * size}
    total = found["total"]
    nonzero = total["size"] - total["zeros"]
    is_int8 = (model / QUANTIZATION).exists()
    values = nonzero + 4 * sum(rows for rows, _ in shapes) if is_int8 else 4 * nonzero
    return {
        "sparsity": total["sparsity"],
        "nonzero": nonzero,
        "bytes": values + total["size"] // 8,
    }


def _zeros_held(output: Path) -> bool:
    names = ["student", *(recipe for recipe, origin in VARIANTS.values() if origin == "student")]
    return len({inspect(output / name / "model")["fingerprint"] for name in names}) == 1


def _table(summary: dict[str, Any], output: Path) -> Table:
    held = "the same" if summary["zeros_held"] else "NOT the same"
    table = Table(
        title="Which author wrote this passage? (held-out chapters)",
        caption="MLM loss: of the encoder before fine-tuning, on held-out text.\n"
        "Sparsity and bytes: encoder matrices only; values and one bit a weight. "
        f"Zeros after fine-tuning: {held} as upstream.\n"
        f"{summary['seconds']:.0f} s in all. Runs, recipes and pictures: {output}",
    )
    table.add_column("model", no_wrap=True)
    for name in COLUMNS[1:]:
        table.add_column(name, justify="right")
    for row in summary["rows"]:
        table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["model"], f"{row['accuracy']:.3f}", "", "", "", ""]
    if row.get("mlm_loss") is not None:
        cells[2] = f"{row['mlm_loss']:.2f}"
    if "bytes" in row:
        cells[3:] = [f"{row['sparsity']:.4f}", f"{row['nonzero']:,}", f"{row['bytes']:,}"]
    return cells


def markdown(summary: dict[str, Any]) -> str:
    """The table for a README."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in summary["rows"]]
    return "\n".join(lines) + "\n"


@contextmanager
def _stage(title: str, supervisor: Supervisor) -> Iterator[None]:
    supervisor.stop_if_told(f"stopped before {title}; begin again with a new directory")
    started = time.monotonic()
    log.info("%s", title)
    yield
    log.info("%s: done in %.0f s", title, time.monotonic() - started)
