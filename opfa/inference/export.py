"""Export: a fine-tuned model -> FILE.onnx, with its configuration and tokenizer beside it.

A file gets its name only when it has the model's zeros and, if data are given, when ONNX Runtime
answers as torch does.
"""

import logging
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from opfa.compression import quant
from opfa.downstream.recipe import recipe_of
from opfa.errors import ModelError, RunError
from opfa.hub.place import place_of
from opfa.inference import onnx_graph
from opfa.inference.parity import parity, problems
from opfa.inference.results import ExportResult, Fingerprints, Sides, Zeros
from opfa.models import sentences
from opfa.models.configs import load_config, load_tokenizer
from opfa.models.encoders import has_head, load_finetuned_model
from opfa.models.trained import as_trained, ranges_of
from opfa.sparsity import masks
from opfa.storage.files import (
    check_file,
    check_new,
    sync_all,
    work_directory,
    write_json,
    write_text,
)
from opfa.storage.runs import RECIPE, recipe_beside
from opfa.tasks import kinds as tasks
from opfa.tasks.embeddings import settled
from opfa.tasks.recipe import Task
from opfa.weights.inspection import check_stated
from opfa.weights.sources import directory_of

log = logging.getLogger(__name__)


def export(
    name: str,
    output: Path,
    *,
    is_int8: bool | None = None,
    task: Task | None = None,
    report: Path | None = None,
) -> ExportResult:
    """Write FILE.onnx and return what is in it; in 8 bits if the model has them, by default.

    With a task, its validation split goes through torch and ONNX Runtime. Raises `ModelError`, and
    leaves only the report, when the two don't agree.
    """
    check_new(output, "file")
    if report is not None:
        check_file(report)
        if report.absolute() == output.absolute():
            raise RunError(f"--report {report}: is the output too; give another file")
    has_ranges = ranges_of(name) is not None
    is_int8 = has_ranges if is_int8 is None else is_int8
    if is_int8 and not has_ranges:
        raise ModelError(
            f"{name}: has no {quant.FILE}, so it can't be exported to 8 bits; fine-tune it with "
            "[quantization], or use `opfa calibrate`"
        )
    with work_directory(output) as aside:
        check_new(output, "file")  # again: another process may have just made it
        stated = check_stated(name)
        tokenizer, pooling = load_tokenizer(name), _pooling_of(name)
        model = load_finetuned_model(name, is_encoder=pooling is not None)
        model.config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        _write_recipe(name, aside, output)
        if pooling is not None:
            sentences.copy_files(directory_of(name), aside)
        if (aside / output.name).exists():
            raise RunError(f"{output}: is the name of one of the model's files; give FILE.onnx")
        _check_others(aside, output)
        split = None
        if task is not None:
            task = _task_of(task, name, model, pooling)
            split = tasks.load_validation(task, tokenizer, model.config)
        log.info("%s: tracing", name)
        inputs = onnx_graph.input_names(model, tokenizer.model_input_names)
        graph = onnx_graph.trace(model, inputs, pooling)
        if is_int8:
            as_trained(model, name)
            onnx_graph.quantize(graph, model)
        onnx_graph.write(graph, aside / output.name)
        found, wrong = _zeros(stated, model, aside / output.name)
        found |= {"precision": "int8" if is_int8 else "fp32", "opset": onnx_graph.OPSET}
        if task is not None and split is not None:
            log.info("%s: comparing %d examples", name, len(split.examples.texts))
            found["parity"] = parity(model, aside / output.name, task, split, is_int8=is_int8)
            wrong += problems(found["parity"], task, is_int8=is_int8)
        result = ExportResult(file=output, **found)
        if report is not None:
            write_json(report, {**result.values(), "problems": wrong})
        if wrong:
            raise ModelError(f"{output}: not written, it is not the model: {'; '.join(wrong)}")
        _move(aside, output)
    return result


def _write_recipe(name: str, aside: Path, output: Path) -> None:
    """The recipe of the model's run, which tells `opfa predict` columns and lengths."""
    recipe, there = recipe_of(name), recipe_beside(place_of(name))
    is_beside = there is not None and there.absolute().parent == output.absolute().parent
    if recipe is not None and not is_beside:
        write_text(aside / RECIPE, recipe.to_public_toml())


def _pooling_of(name: str) -> sentences.Pooling | None:
    """How a model's vectors are made; None for one with a head, whatever files lie beside it."""
    return None if has_head(load_config(name)) else sentences.read_pooling(name)


def _task_of(
    task: Task, name: str, model: PreTrainedModel, pooling: sentences.Pooling | None
) -> Task:
    """The task that both are compared on, as the model does it."""
    if task.kind == "embedding" and pooling is None:
        raise ModelError(f"task.kind = 'embedding': {name} is no sentence encoder")
    tasks.check_head(task, model.config)
    return settled(task, name, is_own=True)


def _without_pooler(stated: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """The zeros that a file has: an encoder's pooler is not in it, as vectors don't need it."""
    names = [name for name in stated["tensors"] if not name.startswith("pooler.")]
    if len(names) == len(stated["tensors"]):
        return stated
    return {**stated, **masks.report({n: model.get_parameter(n) != 0 for n in names})}


def _zeros(
    stated: dict[str, Any], model: PreTrainedModel, path: Path
) -> tuple[dict[str, Any], list[str]]:
    """Zeros and bytes of a file and of the model; and what is wrong with the zeros."""
    stated = _without_pooler(stated, model)
    rounded = onnx_graph.rounded_to_zero(model)
    found = onnx_graph.nonzeros(path, stated["tensors"])
    counted = masks.report(found)["total"]["zeros"]
    live = found | {name: found[name] | rounded[name] for name in found.keys() & rounded.keys()}
    num_rounded = sum(int(rounded[n].sum()) for n in found if n in rounded)
    fingerprint = Fingerprints(model=stated["fingerprint"], onnx=masks.fingerprint(live))
    zeros = Zeros(model=stated["total"]["zeros"], onnx=counted, rounded=num_rounded)
    wrong = []
    if counted != zeros.model + num_rounded or fingerprint.model != fingerprint.onnx:
        wrong.append(f"it has {counted} zeros, or elsewhere; the model has {zeros.model}")
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    sizes = Sides(model=stated["bytes"], onnx=size)
    return {"bytes": sizes, "zeros": zeros, "fingerprint": fingerprint}, wrong


def _check_others(aside: Path, output: Path) -> None:
    """Refuse to replace different files beside the output."""
    for path in _files(aside):
        other = output.parent / path.relative_to(aside)
        if path.name != output.name and os.path.lexists(other):
            check_file(other)
            if other.read_bytes() != path.read_bytes():
                raise RunError(f"{other}: is there and is different; give a directory of its own")


def _move(aside: Path, output: Path) -> None:
    """Let the files appear, `output` last."""
    _check_others(aside, output)
    sync_all(aside)
    for path in sorted(_files(aside), key=lambda path: path.name == output.name):
        other = output.parent / path.relative_to(aside)
        other.parent.mkdir(exist_ok=True)
        os.replace(path, other)


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if not path.is_dir()]
