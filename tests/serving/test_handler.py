"""What answers in a container against `opfa predict`: the same answers, the same refusals."""

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toys import TASKS, recipe_of, toy

import opfa
from opfa.errors import DataError
from opfa.inference import rows
from opfa.serving import handler
from opfa.serving.archive import KEYS
from opfa.serving.handler.asking import ASK, row_of
from opfa.serving.handler.model import WORKERS, threads
from opfa.tasks import unlabelled
from opfa.tasks.recipe import Task

CONTEXT = "rome beat paris . in may"
LONG = "film good bad " * 30
ROWS: dict[str, list[Any]] = {
    "classes": ["good film", "bad", "who won ?", LONG, "Rome,  beat\tpäris …", {"text": "in"}],
    "pairs": [["good", "bad film"], ["good", ""], {"one": "", "other": LONG}, [LONG, LONG]],
    "numbers": [["good", "bad film"], ["good", ""], [LONG, "bad"]],
    "answers": [
        ["who won ?", CONTEXT],
        {"question": "who beat paris", "context": f"{LONG}{CONTEXT}"},
        ["won", "Rome  beat\n\nPARIS."],
    ],
    "tags": [
        ["good", "film"],
        "who won ?",
        ["good", " film "] * 20,
        {"words": ["…", "\u200b", "rome-paris", "x" * 3_000]},
    ],
    "choices": [
        ["who won ?", ["rome", LONG, "bad"]],
        {"question": "in", "choices": ["may", "?", "."]},
    ],
    "columns of choices": [{"q": "who", "begin": "good", "a": "rome", "b": "paris won"}],
    "vectors": ["good film", LONG, "may", "who won ?"],
}
ROWS["perhaps no answers"] = ROWS["answers"]
WRONG: dict[str, list[Any]] = {
    "classes": ["", "  ", 7, None, ["good", "bad"], {"sentence": "good"}, {"text": None}],
    "pairs": ["good", ["", " "], ["good", 7], ["a", "b", "c"]],
    "answers": ["who", ["who", ""], ["who " * 30, CONTEXT], [CONTEXT, "a" * ((1 << 20) + 1)]],
    "tags": ["", [], ["good", ""], ["good", 7], {"words": 7}],
    "choices": ["who", ["who", ["one"]], ["who", ["one", 7]], ["", ["one", "two"]], ["who", "or"]],
    "vectors": ["", ["good", "bad"]],
}
Toys = Callable[..., Path]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, family: str = "bert") -> Path:
        key = (name, family)
        if key not in made:
            made[key] = toy(tmp_path_factory.mktemp("toys") / "model", *key)
        return made[key]

    return get


def asked(directory: Path, inputs: list[Any], **parameters: Any) -> list[dict[str, Any]]:
    """What the four functions say, from text to text."""
    model = handler.model_fn(str(directory))
    body = json.dumps({"inputs": inputs, "parameters": parameters})
    data = handler.input_fn(body, "application/json")
    return json.loads(handler.output_fn(handler.predict_fn(data, model), "application/json"))


def predicted(directory: Path, inputs: list[Any]) -> list[dict[str, Any]]:
    """What `opfa predict` says of the same."""
    is_words = json.loads((directory / "opfa.json").read_text())["kind"] == "token-classification"
    items = [tuple(i) if isinstance(i, list) and not is_words else i for i in inputs]
    found = opfa.predict(directory / "model.onnx", items)
    return [each.columns(has_all=hasattr(each, "probabilities")) for each in found]


def same(ours: Any, theirs: Any) -> bool:
    """Equal but for the last bits of a float, which depend on how a batch is cut."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return math.isclose(ours, theirs, abs_tol=2e-6) if isinstance(theirs, float) else ours == theirs


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("name", TASKS)
def test_answers_are_those_of_opfa_predict(toys: Toys, name: str, family: str) -> None:
    directory = toys(name, family)
    ours, theirs = (
        asked(directory, ROWS[name], probabilities=True),
        predicted(directory, ROWS[name]),
    )
    assert same(ours, theirs), (ours, theirs)
    few = asked(directory, ROWS[name])
    assert few == [{k: v for k, v in row.items() if k != "probabilities"} for row in ours]
    assert (
        len({str(row["prediction"]) for row in ours}) > 1 or len(ours) == 1 or family == "roberta"
    )


def test_any_number_of_inputs_is_answered_in_their_order(toys: Toys) -> None:
    texts = [f"{'good ' * (i % 14)}{'bad ' * (i % 3)}film" for i in range(150)]
    directory = toys("classes")
    assert same(asked(directory, texts, probabilities=True), predicted(directory, texts))
    assert asked(directory, []) == []


@pytest.mark.parametrize(("name", "row"), [(name, row) for name in WRONG for row in WRONG[name]])
def test_what_opfa_predict_refuses_is_refused_and_named(toys: Toys, name: str, row: Any) -> None:
    directory, good = toys(name), ROWS[name][0]
    with pytest.raises(DataError):
        predicted(directory, [good, row])
    with pytest.raises(ValueError, match=r"^inputs\[1\]: .{10}") as error:
        asked(directory, [good, row])
    assert len(str(error.value)) < 400


TEXTS = ["", " ", "good", "good \t film ", "\u200b", "a" * ((1 << 20) + 1)]
LISTS = [[], ["good"], ["good", "bad", "film"]]
LISTS += [["good", second] for second in ("bad", "", " ", 7, None, [])]
VALUES = [*TEXTS, *LISTS, None, 7, 0.5, True, {}, {"text": "good"}]


def inputs_of(task: Task) -> Iterator[Any]:
    """Right and wrong in every way: any value alone, two in a list, and any two columns of a row,
    each of which may be missing too.
    """
    yield from VALUES
    yield from map(list, itertools.product(VALUES, repeat=2))
    columns = [name for name in (task.text, task.text_pair, *task.choices) if name is not None]
    for first, second in itertools.product(columns, repeat=2):
        for one, other in itertools.product([*VALUES, ...], repeat=2):
            row = {**dict.fromkeys(columns, "good"), first: one, second: other}
            yield {name: value for name, value in row.items() if value is not ...}


def read_by_opfa(task: Task, item: Any) -> Any:
    """What opfa predict understands, or why it doesn't."""
    is_pair = isinstance(item, list) and task.kind != "token-classification"
    try:
        ((where, row),) = rows.of_items([tuple(item) if is_pair else item], task).rows()
        return unlabelled.asked(task, "inputs", where, row)
    except DataError as error:
        return str(error)


def read_by_handler(task: SimpleNamespace, item: Any) -> Any:
    try:
        return ASK[task.kind](task, row_of(task, item))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", TASKS)
def test_whatever_is_asked_is_understood_or_refused_as_opfa_predict_does(name: str) -> None:
    """The handler has these checks a second time, since opfa is not where it runs."""
    task = recipe_of(Path("nowhere"), name).task
    values = task.model_dump(mode="json")
    space = SimpleNamespace(**{key: values[key] for key in KEYS})
    refused = set()
    for item in inputs_of(task):
        ours, theirs = read_by_handler(space, item), read_by_opfa(task, item)
        if not isinstance(theirs, str):
            assert ours == theirs, item
            continue
        assert isinstance(ours, str), item
        if "a tuple" in theirs:  # in JSON it is a list
            assert "a list has two parts" in ours or "give a text, or an object" in ours
        else:
            reason, _, _ = ours.removeprefix("has ").partition(" (got ")
            assert reason.partition("; there are")[0] in theirs, item
            refused.add(reason)
    assert len(refused) >= 4


def test_an_archive_s_code_answers_alone_without_opfa_transformers_and_torch(
    toys: Toys, tmp_path: Path
) -> None:
    directories = {name: str(toys(name)) for name in TASKS}
    program = (
        "import json, sys\n"
        "sys.modules.update(dict.fromkeys(('opfa', 'torch', 'transformers', 'huggingface_hub')))\n"
        "found = {}\n"
        "for name, directory in json.loads(sys.argv[1]).items():\n"
        "    sys.path.insert(0, directory + '/code')\n"
        "    import inference\n"
        "    model = inference.model_fn(directory)\n"
        "    data = {'inputs': json.loads(sys.argv[2])[name]}\n"
        "    found[name] = json.loads(inference.output_fn(inference.predict_fn(data, model), ''))\n"
        "    sys.path.pop(0)\n"
        "    assert inference.__file__.startswith(directory), inference.__file__\n"
        "    for module in [m for m in sys.modules if m.startswith(('inference', 'opfa_'))]:\n"
        "        del sys.modules[module]\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-I", "-c", program, json.dumps(directories), json.dumps(ROWS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {name: asked(toys(name), ROWS[name]) for name in TASKS}


def test_one_input_gets_one_answer_and_a_list_a_list(toys: Toys) -> None:
    model = handler.model_fn(str(toys("classes")))
    for body in ('{"inputs": "good film"}', '"good film"', '{"text": "good film"}'):
        data = handler.input_fn(body.encode(), "application/json; charset=utf-8")
        assert [handler.predict_fn(data, model)] == asked(toys("classes"), ["good film"])
    data = handler.input_fn('["good film"]', "application/json")
    assert handler.predict_fn(data, model) == asked(toys("classes"), ["good film"])


def test_json_lines_and_csv_come_and_go(toys: Toys) -> None:
    model = handler.model_fn(str(toys("pairs")))
    rows = [{"one": "good, film", "other": "bad\u2028"}, {"one": 'so "good"', "other": ""}]
    expected = asked(toys("pairs"), rows)
    table = 'one,other\n"good, film",bad\u2028\n"so ""good""",\n'
    raw = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    for form, body in (("application/jsonlines", raw), ("text/csv", table)):
        assert handler.predict_fn(handler.input_fn(body, form), model) == expected
    written = handler.output_fn(expected, "application/jsonlines")
    assert [json.loads(line) for line in written.splitlines()] == expected
    head, *cells = handler.output_fn(expected, "text/csv").splitlines()
    assert head == "prediction,score"
    assert [cell.split(",")[0] for cell in cells] == [row["prediction"] for row in expected]
    assert handler.output_fn(expected[0], "text/csv").splitlines() == [head, cells[0]]


def test_an_answer_in_json_has_no_number_that_is_none() -> None:
    found = handler.output_fn([{"prediction": math.nan, "more": [math.inf, 1.5]}], "*/*")
    assert json.loads(found) == [{"prediction": None, "more": [None, 1.5]}]


def test_a_strange_request_is_one_message(toys: Toys) -> None:
    model = handler.model_fn(str(toys("classes")))
    with pytest.raises(ValueError, match="Content-Type 'image/png': must be one of application/j"):
        handler.input_fn(b"", "image/png")
    with pytest.raises(ValueError, match="Accept 'image/png': must be one of"):
        handler.output_fn([], "image/png")
    for parameters in ({"top_k": 2}, "top_k"):
        with pytest.raises(ValueError, match="parameters: 'top_k': there is only probabilities"):
            handler.predict_fn({"inputs": "a", "parameters": parameters}, model)
    for value in ("false", 1, None):
        with pytest.raises(ValueError, match=f"'probabilities = {value}': there is only probabil"):
            handler.predict_fn({"inputs": "a", "parameters": {"probabilities": value}}, model)
    three = {"question": "in", "choices": ["may", "?", "."]}
    two = {"question": "in", "choices": ["may", "?"]}
    with pytest.raises(ValueError, match=r"inputs\[1\]: has 2 choices, the first one 3"):
        asked(toys("choices"), [three, two])


def test_threads_of_all_processes_of_the_server_are_as_many_as_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    for workers, expected in (("", 1), ("8", 1), ("2", 4), ("1", 8), ("99", 1)):
        monkeypatch.setenv(WORKERS, workers)
        assert threads() == expected
