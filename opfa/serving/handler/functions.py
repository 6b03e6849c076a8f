"""The four functions that the server calls, and the formats of requests and answers."""

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .answering import ALL, ANSWER
from .model import Model

JSON, LINES, CSV = "application/json", "application/jsonlines", "text/csv"
FORMATS = {JSON: JSON, LINES: LINES, "application/x-jsonlines": LINES, CSV: CSV}


def model_fn(model_dir: str) -> Model:
    """Load the model of an unpacked archive."""
    return Model(Path(model_dir))


def input_fn(body: str | bytes, content_type: str) -> dict[str, Any]:
    """A request: `inputs`, one or a list of them, and perhaps `parameters`."""
    form = _format(content_type, "Content-Type")
    text = body if isinstance(body, str) else bytes(body).decode("utf-8")
    if form == CSV:
        return {"inputs": list(csv.DictReader(io.StringIO(text, newline="")))}
    if form == LINES:
        return {"inputs": [json.loads(line) for line in text.split("\n") if line.strip()]}
    values = json.loads(text)
    is_request = isinstance(values, dict) and values.keys() <= {"inputs", "parameters"}
    return values if is_request and "inputs" in values else {"inputs": values}


def predict_fn(data: Mapping[str, Any], model: Model) -> Any:  # Any: an answer, or a list of them
    """An answer for one input, or one for each of a list. With `parameters.probabilities` it has
    the probabilities of all that could have been.
    """
    inputs, has_all = data["inputs"], _has_all(data.get("parameters") or {})
    is_several = isinstance(inputs, list)
    asked = model.asked(inputs if is_several else [inputs])
    answers = ANSWER[model.task.kind](model, asked, has_all) if asked else []
    return answers if is_several else answers[0]


def _has_all(parameters: Any) -> bool:  # Any: unchecked
    """Whether all probabilities are asked for, which is all that parameters can say."""
    what = parameters
    if isinstance(parameters, dict):
        has_all = parameters.get(ALL, False)
        if isinstance(has_all, bool) and parameters.keys() <= {ALL}:
            return has_all
        what = min(parameters.keys() - {ALL}, default=f"{ALL} = {has_all}")
    raise ValueError(f"parameters: {str(what)[:100]!r}: there is only {ALL}, true or false")


def output_fn(prediction: Any, accept: str) -> str:  # Any: as above
    """Answers as JSON, JSON Lines or CSV."""
    form, answers = _format(accept, "Accept"), _plain(prediction)
    if form == JSON:
        return _json(answers)
    rows = answers if isinstance(answers, list) else [answers]
    if form == LINES:
        return "".join(f"{_json(row)}\n" for row in rows)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str) else _json(v) for k, v in row.items()})
    return stream.getvalue()


def _json(value: Any) -> str:  # Any: what JSON can hold
    return json.dumps(value, ensure_ascii=False)


def _format(header: str | None, name: str) -> str:
    kind = (header or JSON).partition(";")[0].strip().lower()
    kind = JSON if kind == "*/*" else kind
    if kind not in FORMATS:
        raise ValueError(f"{name} {kind[:100]!r}: must be one of {', '.join(FORMATS)}")
    return FORMATS[kind]


def _plain(value: Any) -> Any:  # Any: what answers hold
    """What JSON can hold: no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
