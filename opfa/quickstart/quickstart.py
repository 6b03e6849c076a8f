"""The whole method on a small model: four novelists, one teacher, one sparse student, four
fine-tunings, one table. The task is "which author wrote this passage?". Chapters that are held out
are used neither to pre-train nor to fine-tune.
"""

import json
import logging
import math
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from opfa.compression.pruner import Pruner
from opfa.compression.quant import FILE as QUANTIZATION
from opfa.compression.schedules import Gradual
from opfa.data.order import generator
from opfa.data.records import read_records
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RunError
from opfa.extras import has_or_says
from opfa.models.pretraining import load_pretraining_model
from opfa.report.tables import Result, Row, Table, column
from opfa.storage import seal
from opfa.storage.files import check_directory, new_directory, write_json, write_text
from opfa.storage.shipped import shipped
from opfa.storage.temporary import INCOMPLETE
from opfa.training.distributed import Stopped, Supervisor
from opfa.upstream.batches import masker, validation_batches
from opfa.upstream.corpus import prepare
from opfa.upstream.objective import Objective
from opfa.upstream.prepared import Prepared
from opfa.upstream.pretrain import pretrain
from opfa.upstream.progress import mean_losses
from opfa.upstream.recipe import PretrainRecipe
from opfa.weights.inspection import inspect_checkpoint

PASSAGE_WORDS = 24
NUM_LABELLED = 4_000  # passages to fine-tune on: labels are scarcer than text
ONE_SHOT, PRUNE_ONCE = "90 % one-shot", "90 % prune-once"
VARIANTS = {  # row of the table: (recipe, model to start from)
    "dense": ("finetune-dense", "teacher"),
    ONE_SHOT: ("finetune-one-shot", "teacher"),
    PRUNE_ONCE: ("finetune", "student"),
    "90 % prune-once, 8 bits": ("finetune-qat", "student"),
}
RESULT = "quickstart.json"  # written last
FILES = {"data", "prepared", "teacher", "student", *(recipe for recipe, _ in VARIANTS.values())}
FILES |= {RESULT, "table.md", "quickstart.png"}
log = logging.getLogger(__name__)


class Model(Row, extra="allow"):
    """A fine-tuned model: its metrics, and its encoder's matrices."""

    model: str
    accuracy: float = column("accuracy", ".3f")
    mlm_loss: float | None = column("MLM loss", ".2f", default=None)  # before fine-tuning
    sparsity: float | None = column("sparsity", ".4f", default=None)
    nonzero: int | None = column("non-zero", ",", default=None)
    bytes: int | None = column("bytes", ",", default=None)
    run: str | None = None


class Summary(Result):
    """What `opfa quickstart` prints and writes."""

    rows: list[Model]
    zeros_held: bool
    seconds: float = 0.0  # of the launch that finished it
    is_resumed: bool = False
    directory: Path | None = Field(default=None, exclude=True)

    def parts(self, *, is_long: bool = False) -> Iterator[Table | str]:
        """The table, and how to read it."""
        yield self.table()
        since = "since it went on" if self.is_resumed else "in all"
        held = "the same" if self.zeros_held else "NOT the same"
        yield (
            "Which author wrote this passage? (held-out chapters)\n"
            "MLM loss: of the encoder before fine-tuning, on held-out text.\n"
            "Sparsity and bytes: encoder matrices only; values and one bit a weight.\n"
            f"Zeros after fine-tuning: {held} as upstream. {self.seconds:.0f} s {since}."
        )
        if self.directory is not None:
            yield f"Runs, recipes and pictures: {self.directory}"
            model = shlex.quote(str(self.directory / "finetune-qat/model"))
            yield f"    next  opfa inspect {model}"

    def table(self) -> Table:
        """One line for each model."""
        return Table.of("model", {row.model: row for row in self.rows})

    def values(self) -> dict[str, Any]:
        """What is written: a row has the keys that it was given."""
        return self.model_dump(exclude_unset=True)


def quickstart(output: Path) -> Summary:
    """Run what isn't finished yet in a directory; return what came out.

    Raises `RunError` for a directory with other files, `Stopped` when a signal ended it.
    """
    check_directory(output)
    _upstream("teacher", []).check_packages()
    is_resumed = _check_output(output)
    if (output / RESULT).exists():
        log.info("%s: is finished already", output)
        return Summary.model_validate({**seal.read_json(output / RESULT), "directory": output})
    start = time.monotonic()
    with Supervisor(math.inf) as supervisor:
        supervisor.save_on_signals()
        try:
            rows = _run_all(output, supervisor)
        except Stopped as stopped:
            raise Stopped(f"{output}: stopped; the same command goes on from there") from stopped
    seconds = round(time.monotonic() - start, 1)
    held = _zeros_held(output)
    summary = Summary(
        rows=rows, zeros_held=held, seconds=seconds, is_resumed=is_resumed, directory=output
    )
    write_text(output / "table.md", summary.table().markdown() + "\n")
    if has_or_says("drawing quickstart.png", "opfa[plots]", "matplotlib"):
        from opfa.report import pictures

        pictures.quickstart_picture(summary.values()["rows"], output / "quickstart.png")
    write_json(output / RESULT, summary.values())
    return summary


def _check_output(output: Path) -> bool:
    """Whether an earlier launch began here; refuses a directory of something else."""
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    others = {name for name in names - FILES if not name.endswith(INCOMPLETE)}
    if others:
        what = f"is not empty, and {min(others)} is not of a quickstart; give a new directory"
        raise RunError(f"{output}: {what}")
    if names:
        log.info("%s: goes on where it was stopped", output)
    return bool(names)


def _run_all(output: Path, supervisor: Supervisor) -> list[Model]:
    """Each stage begins, goes on or is done already."""
    majority = write_data(output / "data")
    corpus = [f"corpus.documents={json.dumps([str(output / 'data/documents.jsonl')])}"]
    data = [*corpus, f"data={output / 'prepared'}"]
    with _stage("1/7  tokenizer and pre-training examples", supervisor):
        if not (output / "prepared").exists():  # whole or not at all
            prepare(_upstream("teacher", data).corpus, output / "prepared")
    with _stage("2/7  teacher: a small dense encoder", supervisor):
        run = output / "teacher"
        pretrain(_upstream("teacher", data), run, resume=_has_begun(run))
    teacher = output / "teacher/model"
    with _stage("3/7  student: pruned to 90 % under the teacher", supervisor):
        models = [f"model.init={teacher}", f"distillation.teacher={teacher}"]
        run = output / "student"
        pretrain(_upstream("student", [*data, *models]), run, resume=_has_begun(run))
    rows = [Model.model_validate({"model": "majority class", "accuracy": majority})]
    language = language_losses(_upstream("student", [*data, *models]), output)
    for number, (name, (recipe, origin)) in enumerate(VARIANTS.items(), 4):
        with _stage(f"{number}/7  fine-tuning: {name}", supervisor):
            run = output / recipe
            results = finetune(_downstream(recipe, output, origin), run, resume=_has_begun(run))
            facts = {**_storage(run / "model"), "mlm_loss": language.get(name), "run": str(run)}
            rows.append(Model.model_validate({"model": name, **results.metrics, **facts}))
    return rows


def _has_begun(run: Path) -> bool:
    return (run / "recipe.toml").exists()


def write_data(directory: Path) -> float:
    """Cut the books into documents and passages, unless that is done; the largest class's share of
    those held out.
    """
    chapters = [record for _, record in read_records(Path(__file__).with_name("books.jsonl.zst"))]
    train = [chapter for chapter in chapters if chapter["split"] == "train"]
    held_out = [chapter for chapter in chapters if chapter["split"] == "heldout"]
    passages, validation = _passages(train), _passages(held_out)
    order = generator(0).permutation(len(passages))[:NUM_LABELLED]
    if not directory.exists():  # whole or not at all
        with new_directory(directory) as aside:
            _write(aside / "documents.jsonl", ({"text": chapter["text"]} for chapter in train))
            _write(aside / "train.jsonl", (passages[index] for index in order))
            _write(aside / "validation.jsonl", validation)
    counts = Counter(passage["author"] for passage in validation)
    return max(counts.values()) / len(validation)


def language_losses(recipe: PretrainRecipe, output: Path) -> dict[str, float]:
    """The masked-token loss on held-out text, before fine-tuning, by row of the table."""
    prepared = Prepared.open(Path(recipe.data), recipe.corpus)
    mask = masker(prepared.tokenizer, recipe.masking, recipe.seed)
    assert recipe.pruning is not None
    patterns, sparsity = recipe.pruning.patterns, recipe.pruning.schedule.target
    losses = {}
    for name, origin in (("dense", "teacher"), (ONE_SHOT, "teacher"), (PRUNE_ONCE, "student")):
        model = load_pretraining_model(str(output / origin / "model"), recipe.corpus.objective)
        if name == ONE_SHOT:
            Pruner(model, Gradual(end=0, target=sparsity), patterns).after_step(0)
        num = len(prepared.validation)
        batches = validation_batches(prepared, mask, batch=64, num_examples=num)
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
    """Sparsity of the encoder's matrices, and the bytes they need: values, and one bit a weight."""
    found = inspect_checkpoint(str(model))
    if not found.tensors:  # dense: the same matrices, none of them in the report
        size = sum(n for name, n in found.dense.items() if ".layers." in name)
        return {"sparsity": 0.0, "nonzero": size, "bytes": 4 * size}
    total = found.total
    nonzero = total.size - total.zeros
    values = 4 * nonzero
    if (model / QUANTIZATION).exists():  # a byte each, and a scale for each output channel
        values = nonzero + 4 * sum(tensor.shape[0] for tensor in found.tensors.values())
    return {"sparsity": total.sparsity, "nonzero": nonzero, "bytes": values + total.size // 8}


def _zeros_held(output: Path) -> bool:
    names = ["student", *(recipe for recipe, origin in VARIANTS.values() if origin == "student")]
    models = [str(output / name / "model") for name in names]
    return len({inspect_checkpoint(model).fingerprint for model in models}) == 1


@contextmanager
def _stage(title: str, supervisor: Supervisor) -> Iterator[None]:
    supervisor.stop_if_told(f"stopped before {title}")
    started = time.monotonic()
    log.info("%s", title)
    yield
    log.info("%s: done in %.0f s", title, time.monotonic() - started)
