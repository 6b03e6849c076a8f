"""Predictions for examples without labels: of values in memory, or of a file, row by row.

    opfa.predict("runs/sst2", ["A fine film.", "Dull."])    # -> [ClassPrediction(...), ...]

A file is read twice: first every row is checked, so that a mistake in the last one is found before
hours of work. Then chunks of rows are answered in batches of similar length, and written in order.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from opfa.data.json_records import Record
from opfa.data.lines import check_plain
from opfa.inference import rows as rowing
from opfa.inference.predictor import Options, Predictor
from opfa.inference.rows import Csv, InputFormat, Item, JsonLines, OutputFormat, Source
from opfa.report.bars import Bar
from opfa.report.tables import Result, Table
from opfa.storage.files import check_new, new_file
from opfa.tasks.kinds import KINDS
from opfa.tasks.predictions import Prediction
from opfa.tasks.recipe import Task
from opfa.tasks.unlabelled import Numbered, asked

log = logging.getLogger(__name__)


class Predicted(Result):
    """What was predicted, and where it is."""

    model: str
    kind: str
    examples: int
    cut: int  # examples that were longer than the limit
    sequence_tokens: int  # the limit
    runs_in: str  # what computed: kernels, torch and why, a GPU, ONNX Runtime
    output: str | None  # None: a stream

    def parts(self, *, is_long: bool = False) -> Iterable[Table | str]:
        """One line for each fact."""
        rows = [("model", f"{self.model} ({self.kind})"), ("examples", f"{self.examples:,}")]
        rows.append((f"cut at {self.sequence_tokens} tokens", f"{self.cut:,}"))
        rows.append(("computed in", self.runs_in))
        rows.append(("written to", self.output or "a stream"))
        yield Table(("predictions", ""), rows)


def predict(
    model: str | Path,
    inputs: Sequence[Item] | Path,
    *,
    kind: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    choices: Sequence[str] = (),
    recipe: Path | None = None,
    tokenizer: str | None = None,
    sequence_tokens: int | None = None,
    batch: int = 64,
) -> list[Prediction]:
    """The predictions for texts, or for the rows of a file, in their order.

    `model` is a run, a directory of any form, an ONNX file or a Hub name. `inputs` are texts,
    tuples of a text and its pair (question and context; text and choices), lists of words, mappings
    by column, or the `Path` of a file. `text`, `text_pair` and `choices` name columns. What is None
    comes from the run's recipe, else from the model. Raises `OpfaError`.
    """
    options = Options(
        kind=kind,
        text=text,
        text_pair=text_pair,
        choices=choices,
        recipe=recipe,
        tokenizer=tokenizer,
        sequence_tokens=sequence_tokens,
        batch=batch,
    )
    if isinstance(inputs, Path):
        check_plain(inputs)
    predictor = Predictor(str(model), options)
    if isinstance(inputs, Path):
        source = rowing.of_file(inputs, None, predictor.task)
    else:
        source = rowing.of_items(inputs, predictor.task)
    found: list[Prediction] = []
    for _, predictions, _ in _predicted(predictor, source, has_bar=True):
        found += predictions
    return found


def predict_file(
    model: str | Path,
    file: Path | None,
    output: Path | TextIO,
    *,
    options: Options | None = None,
    input_form: InputFormat | None = None,
    form: OutputFormat | None = None,
    prefix: str = "",
    has_all: bool = False,
) -> Predicted:
    """Write the rows of a file (None: standard input) with their predictions beside them.

    The output is a new file, written whole or not at all, or a stream. New columns have the names
    of the fields of the kind's `Prediction`, with `prefix` before them. `has_all` adds the
    probabilities of everything that wasn't chosen. Raises `OpfaError`.
    """
    path = output if isinstance(output, Path) else None
    form = rowing.output_format(path, form)
    if path is not None:
        check_new(path, "file")
    if file is not None:
        check_plain(file)
    predictor = Predictor(str(model), options or Options())
    source = rowing.of_file(file, input_form, predictor.task)
    num_rows = num_cut = 0
    with _opened(output) as stream:
        writer: JsonLines | Csv = rowing.WRITERS[form](stream)
        has_bar = path is not None or not stream.isatty()
        for chunk_rows, predictions, num_misfits in _predicted(predictor, source, has_bar=has_bar):
            for row, prediction in zip(chunk_rows, predictions, strict=True):
                num_rows += 1
                where = f"{source.name}, row {num_rows}"
                new = prediction.columns(has_all=has_all)
                writer.write(rowing.joined(row, new, prefix, where), where)
            num_cut += num_misfits
            stream.flush()
    task = predictor.task
    return Predicted(
        model=str(model),
        kind=task.kind,
        examples=num_rows,
        cut=num_cut,
        sequence_tokens=task.sequence_tokens,
        runs_in=predictor.runs_in,
        output=None if path is None else str(path),
    )


@contextlib.contextmanager
def _opened(output: Path | TextIO) -> Iterator[TextIO]:
    if not isinstance(output, Path):
        yield output
        return
    with new_file(output) as work, work.open("x", encoding="utf-8", newline="") as stream:
        yield stream


def _predicted(
    predictor: Predictor, source: Source, *, has_bar: bool
) -> Iterator[tuple[list[Record], Sequence[Prediction], int]]:
    """Chunks of rows, their predictions, and how many of them were cut; all are checked first."""
    task, num_rows, num_cut = predictor.task, 0, 0
    total = sum(1 for _ in _checked(task, source)) if source.is_lasting else None
    with Bar("predict", total, is_wanted=has_bar) as bar:
        rows = source.rows() if source.is_lasting else _checked(task, source)
        for chunk, predictions in predictor.answers(source.name, rows, bar.advance):
            num_rows += len(chunk.rows)
            num_cut += chunk.num_misfits
            yield chunk.rows, predictions, chunk.num_misfits
    if num_cut:
        what = KINDS[task.kind].misfit.format(task)
        log.warning("%s: %d of %d examples %s", source.name, num_cut, num_rows, what)


def _checked(task: Task, source: Source) -> Numbered:
    """The rows of a source; raises `DataError` at the first one that can't be answered."""
    for index, (where, row) in enumerate(source.rows()):
        if index == 0:
            rowing.check_columns(task, source, row)
        asked(task, source.name, where, row)
        yield where, row
