"""Examples without labels, for predictions: rows of any source, checked, in chunks that fit memory.

The kind of task says what a row asks (`Kind.ask`) and what stands in the place of its label.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from opfa.data.json_records import Record
from opfa.data.records import no_column
from opfa.errors import DataError, ModelError
from opfa.models.encoders import HEADS, head_of
from opfa.tasks import features
from opfa.tasks.checks import Asked, ColumnError
from opfa.tasks.examples import Examples, size_of
from opfa.tasks.features import CHUNK, CHUNK_CHARACTERS, Split
from opfa.tasks.kinds import KINDS
from opfa.tasks.recipe import Task
from opfa.tasks.rows import Rows

Numbered = Iterable[tuple[str, Record]]  # where a row stands ("line 7"), and the row
ONE_OF_TWO = "SequenceClassification"  # the head of two kinds; how many outputs it has says which


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows, and what a model is called with for them."""

    rows: list[Record]
    split: Split
    num_misfits: int  # examples that are cut


def kind_of(config: PretrainedConfig) -> str:
    """The kind of task that a model's head is for; `ModelError` where it has none."""
    head = head_of(config)
    if config.problem_type == "multi_label_classification":
        what = "may give a text several classes at once (multi_label_classification)"
        raise ModelError(f"a model that {what}; predictions are of one class")
    if head == ONE_OF_TWO:
        return "regression" if config.num_labels == 1 else "classification"
    return next(name for name, kind in KINDS.items() if kind.head is HEADS[head])


def asked(task: Task, source: str, where: str, row: Record) -> Asked:
    """What a row asks; raises `DataError` that names its place."""
    try:
        return KINDS[task.kind].ask(task, row)
    except ColumnError as error:
        raise no_column(source, where, row, str(error), "every row needs it") from None
    except ValueError as error:
        raise DataError(f"{source}, {where}: {error}") from None


def chunks(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    classes: tuple[str, ...],
    source: str,
    rows: Numbered,
) -> Iterator[Chunk]:
    """All rows in their order. The tokenizer is one that `fit_padding` has seen."""
    places: list[str] = []
    held: list[Record] = []
    questions: list[Asked] = []
    num_bytes = 0
    make = partial(_chunk, task, tokenizer, classes, source)
    for where, row in rows:
        num = size_of(row)
        if held and (len(held) == CHUNK or num_bytes + num > CHUNK_CHARACTERS):
            yield make(places, held, questions)
            places, held, questions, num_bytes = [], [], [], 0
        places.append(where)
        held.append(row)
        questions.append(asked(task, source, where, row))
        num_bytes += num
    if held:
        yield make(places, held, questions)


def _chunk(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    classes: tuple[str, ...],
    source: str,
    places: list[str],
    rows: list[Record],
    questions: list[Asked],
) -> Chunk:
    kind = KINDS[task.kind]
    texts, pairs = ([question[i] for question in questions] for i in (0, 1))
    labels = [kind.blank(text) for text in texts]
    examples = Examples(
        source=source,
        places=places,
        texts=texts,
        pairs=None if pairs[0] is None else pairs,
        labels=labels,
        names=(),
    )
    columns, num_misfits = kind.build(task, tokenizer, examples, slice(0, len(rows)), labels)
    pad_token_id = tokenizer.pad_token_id
    assert isinstance(pad_token_id, int), "`fit_padding` has looked"
    split = Split(
        features=Rows.of([dict(columns)]),
        examples=examples,
        classes=classes,
        collate=partial(features.collate, pad_token_id),
    )
    return Chunk(rows=rows, split=split, num_misfits=num_misfits)
