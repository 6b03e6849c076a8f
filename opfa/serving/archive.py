"""An archive for a SageMaker endpoint: model.tar.gz with everything that answers at its root.

    model.onnx  config.json  tokenizer.json ...  recipe.toml  opfa.json   what the model is
    code/inference.py  code/opfa_handler/  code/requirements.txt         what answers with it

The same model gives the same bytes: files go by name, and nobody's times, names or rights are in
it. Pruning and shrinking come first, on the machine that packs: in `predict_fn` they would be done
again by each process on each instance, and nobody would see what they cost in the metrics.
"""

import gzip
import json
import logging
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opfa.downstream.budget import Budget
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.structured import prune_structured
from opfa.errors import RunError
from opfa.inference.export import export
from opfa.inference.predictor import Options, Predictor
from opfa.inference.shrink import ONNX, shrink
from opfa.serving.results import ArchiveResult
from opfa.storage.files import check_new, new_file, write_text
from opfa.tasks.recipe import Task

HANDLER = Path(__file__).parent / "handler"
NAME = "opfa_handler"  # of the same folder in an archive
TASK_FILE = "opfa.json"  # what the handler reads
INFERENCE = f'''"""What the server calls."""

from {NAME} import input_fn, model_fn, output_fn, predict_fn

__all__ = ["input_fn", "model_fn", "output_fn", "predict_fn"]
'''
REQUIREMENTS = "onnxruntime>=1.22,<2\ntokenizers>=0.22\nnumpy>=1.26\n"
KEYS = (  # of a task, that the handler needs
    "kind",
    "text",
    "text_pair",
    "choices",
    "sequence_tokens",
    "stride_tokens",
    "answer_tokens",
    "n_best",
    "has_unanswerable",
    "no_answer_threshold",
)
MOST_GB = 5.0  # unpacked: the disk of a serverless endpoint, by Amazon's documentation
GB = 10**9
LEVEL = 6  # of gzip
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Making:
    """What happens to a model before it is exported. `keep` prunes on the task of `recipe`."""

    precision: Literal["int8", "fp32"] | None = None  # None: as the model has it
    keep: float | None = None  # prune to this share of multiply-adds, then shrink
    has_shrunk: bool = False  # shrink
    recipe: FinetuneRecipe | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning together."""
        if self.precision == "int8" and (self.keep is not None or self.has_shrunk):
            raise RunError("dtype = 'int8': a shrunk model has no 8 bits")


def archive(
    name: str, output: Path, making: Making | None = None, *, most_gb: float = MOST_GB
) -> ArchiveResult:
    """Write the new file `output`. Raises `RunError` for files of more than `most_gb` GB, and what
    pruning, shrinking and exporting raise.
    """
    check_new(output, "file")
    if not most_gb > 0:
        raise RunError(f"most_gb = {most_gb:g}: must be above 0")
    with tempfile.TemporaryDirectory() as aside:
        work = Path(aside, "model")
        facts = fill(name, work, making)
        files = write_archive(work, output, most_gb)
        unpacked = _bytes(work, files)
    return ArchiveResult(
        file=output, bytes=output.stat().st_size, unpacked=unpacked, files=files, **facts
    )


def write_archive(directory: Path, output: Path, most_gb: float = MOST_GB) -> list[str]:
    """Write all files of a directory as the new file `output`, and return their names."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    files = sorted(path.relative_to(directory).as_posix() for path in paths)
    unpacked = _bytes(directory, files)
    if unpacked > most_gb * GB:
        what = f"the files for it have {unpacked / GB:,.3g} GB, and most_gb is {most_gb:g}"
        raise RunError(f"{output}: not written: {what}; keep, shrink or 8 bits make it less")
    with new_file(output) as file:
        _write(directory, files, file)
    return files


def _bytes(directory: Path, files: Sequence[str]) -> int:
    return sum((directory / each).stat().st_size for each in files)


def fill(name: str, work: Path, making: Making | None = None) -> dict[str, Any]:
    """Put what an archive holds into a new directory; returns what there is to tell of it."""
    making, facts = making or Making(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as aside:
        if making.keep is not None:
            assert making.recipe is not None, "`keep` comes with the recipe of a task"
            log.info("%s: pruning to %g of its multiply-adds", name, making.keep)
            budget = Budget.check({"keep": making.keep}, "pack")
            pruned = prune_structured(name, making.recipe, Path(aside, "pruned"), budget)
            name = str(pruned.directory)
            facts["metrics"] = {k: (pruned.before[k], pruned.after[k]) for k in pruned.before}
        if making.keep is not None or making.has_shrunk:
            log.info("%s: shrinking", name)
            layers = shrink(name, work, "onnx").layers
            facts["heads"] = sum(k.heads for k in layers), sum(k.of_heads for k in layers)
            facts["neurons"] = sum(k.neurons for k in layers), sum(k.of_neurons for k in layers)
            facts["precision"] = "fp32"
        else:
            is_int8 = None if making.precision is None else making.precision == "int8"
            work.mkdir()
            facts["precision"] = export(name, work / ONNX, is_int8=is_int8).precision
    return {**facts, "kind": complete(work)}


def complete(directory: Path) -> str:
    """Put what answers beside an exported model, and return the kind of its task."""
    predictor = Predictor(str(directory / ONNX), Options())
    write_text(directory / TASK_FILE, json.dumps(_task_values(predictor), indent=2) + "\n")
    _write_code(directory / "code")
    return predictor.task.kind


def _task_values(predictor: Predictor) -> dict[str, Any]:
    """What the handler must know of a task, its classes and its tokenizer."""
    task, tokenizer = predictor.task, predictor.tokenizer
    return {
        "file": ONNX,
        **_of_task(task),
        "classes": list(predictor.classes),
        "pad_token_id": tokenizer.pad_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "truncation_side": tokenizer.truncation_side,
    }


def _of_task(task: Task) -> dict[str, Any]:
    values = task.model_dump(mode="json")
    return {key: values[key] for key in KEYS}


def _write_code(directory: Path) -> None:
    package = directory / NAME
    package.mkdir(parents=True)
    for path in HANDLER.glob("*.py"):
        (package / path.name).write_bytes(path.read_bytes())
    write_text(directory / "inference.py", INFERENCE)
    write_text(directory / "requirements.txt", REQUIREMENTS)


def _write(directory: Path, files: Sequence[str], output: Path) -> None:
    """A tar of plain files in gzip, without anything of this machine or moment."""
    with (
        output.open("xb") as raw,
        gzip.GzipFile("", "wb", LEVEL, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for name in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = (directory / name).stat().st_size, 0o644
            with (directory / name).open("rb") as file:
                tar.addfile(entry, file)
