"""What a request asks and how it is answered, in JSON: read strictly, and described for OpenAPI.

    {"inputs": ROW or text, or a list of them, "parameters": {"probabilities": false}}
    or the list alone

A row has the columns that `opfa predict` reads; a text stands for a row of it alone, and a list of
two for a pair. One input gets one object, a list a list, with predict's new columns.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from opfa.errors import DataError, OpfaError, brief, first_line
from opfa.inference import rows as rowing
from opfa.serving.batching import Row
from opfa.tasks import predictions as answers
from opfa.tasks.predictions import ALL, Prediction
from opfa.tasks.recipe import Task
from opfa.tasks.unlabelled import asked

Fields = dict[str, Any]  # Any: pydantic's pairs of a type and a default
ANSWERS: dict[str, type[Prediction]] = {
    "classification": answers.ClassPrediction,
    "regression": answers.NumberPrediction,
    "question-answering": answers.AnswerPrediction,
    "token-classification": answers.TagsPrediction,
    "multiple-choice": answers.ChoicePrediction,
    "embedding": answers.VectorPrediction,
}
WRITER = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="null"))  # Any: JSON
SHAPE = 'give {"inputs": ...}, or a list of inputs'


class MalformedError(OpfaError):
    """A body that is no JSON."""


class Parameters(BaseModel):
    """What else a request may say."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    probabilities: bool = Field(
        default=False, description="Also those of all classes, tags or choices."
    )


class _Body(BaseModel):
    """The keys of a request; its inputs are checked as `opfa predict` checks rows."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    inputs: Any  # by kind of task
    parameters: Parameters = Parameters()


@dataclass(frozen=True)
class Asking:
    """Checked rows of a request, and how it wants its answers."""

    rows: Sequence[Row]
    is_single: bool
    has_all: bool

    def answered(self, predictions: Sequence[Prediction]) -> bytes:
        """The JSON for predictions in the order of the rows; null for what is not finite."""
        found = [each.columns(has_all=self.has_all) for each in predictions]
        return WRITER.dump_json(found[0] if self.is_single else found)


def read(task: Task, body: bytes) -> Asking:
    """A request for a task. Raises `MalformedError`, and `DataError` for what can't be answered."""
    value = _parsed(body)
    if isinstance(value, list):
        value = {"inputs": value}
    if not isinstance(value, dict):
        raise DataError(f"the body is neither an object nor a list; {SHAPE}")
    try:
        given = _Body.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = brief(".".join(map(str, first["loc"])))
        raise DataError(f"{where}: {first['msg']}; {SHAPE}") from None
    is_single = not isinstance(given.inputs, list)
    rows = _rows(task, [given.inputs] if is_single else given.inputs)
    return Asking(rows, is_single, given.parameters.probabilities)


def _rows(task: Task, items: list[Any]) -> list[Row]:  # Any: unchecked
    if not items:
        raise DataError("inputs: is empty; give at least one")
    if task.kind != "token-classification":  # whose lists are words
        items = [tuple(item) if isinstance(item, list) else item for item in items]
    rows = list(rowing.of_items(items, task).rows())
    for where, row in rows:
        asked(task, "inputs", where, row)
    return rows


def _parsed(body: bytes) -> Any:  # Any: JSON
    """Strict JSON: UTF-8, no key twice in an object, no NaN, no half of a surrogate pair."""
    try:
        text = body.decode()
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
        if "\\ud" in text or "\\uD" in text:  # valid JSON, and perhaps no text
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is {body[error.start]:#04x}"
        raise MalformedError(f"the body is not UTF-8: {what}") from None
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"malformed JSON: {first_line(error)}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"the key {brief(name)!r} stands twice in one object")
        made[name] = value
    return made


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def example(task: Task) -> Any:  # Any: a text, or a row
    """An input that the task can answer, for those who try."""
    if task.kind == "question-answering":
        text, pair = "Who won?", "Rome beat Paris in May."
    elif task.kind == "token-classification":
        return "Rome beat Paris in May ."
    else:
        text, pair = "A good film.", "The film is good."
    if task.kind == "multiple-choice":
        text, pair = "Which one is a film?", "It is"
    row: dict[str, Any] = {task.text: text}
    if task.text_pair is not None:
        row[task.text_pair] = pair
    listed = ["a good film", "a city in May"]
    if len(task.choices) == 1:
        row[task.choices[0]] = listed
    else:
        row |= {column: listed[index % 2] for index, column in enumerate(task.choices)}
    return text if len(row) == 1 else row


def schemas(task: Task) -> tuple[type[BaseModel], type[BaseModel]]:
    """Types of a request and of one answer, for OpenAPI."""
    row = create_model("Row", __doc__="An example, by column.", **_columns(task))
    one: Any = row if _needs_row(task) else str | row
    body: Fields = {
        "inputs": (one | list[one], Field(description="One input, or a list.")),
        "parameters": (Parameters, Parameters()),
    }
    asked_for = {"json_schema_extra": {"example": {"inputs": example(task)}}, "extra": "forbid"}
    request = create_model("Request", __config__=ConfigDict(**asked_for), **body)  # pyright: ignore[reportArgumentType]
    kind = ANSWERS[task.kind]
    if task.kind == "embedding" and task.text_pair is not None:
        kind = answers.NumberPrediction  # the cosine
    given: Fields = {name: (form, ...) for name, form in get_type_hints(kind).items()}
    if ALL in given:
        given[ALL] = (given[ALL][0] | None, None)
    return request, create_model("Answer", __doc__=kind.__doc__, **given)


def _columns(task: Task) -> Fields:
    is_words = task.kind == "token-classification"
    columns: Fields = {task.text: (str | list[str] if is_words else str, ...)}
    if task.text_pair is not None:
        columns[task.text_pair] = (str, ...)
    is_list = len(task.choices) == 1
    return columns | {name: (list[str] if is_list else str, ...) for name in task.choices}


def _needs_row(task: Task) -> bool:
    return task.text_pair is not None or bool(task.choices)
