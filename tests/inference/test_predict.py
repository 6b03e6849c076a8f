"""Predictions for examples without labels: what is read, what is written, and what is refused."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import finetune_recipe, sentences
from same_predictions import compare, differences, run_of, tags_by_pipeline
from snippets import run_snippets
from words import MODELS, write_models

import opfa
from opfa import runtime
from opfa.commands import app as cli
from opfa.downstream.evaluate import measure
from opfa.errors import DataError, ModelError, OpfaError, Redacting, RunError
from opfa.inference import rows
from opfa.inference.predict import predict_file
from opfa.inference.predictor import Options, Predictor
from opfa.tasks import unlabelled
from opfa.tasks.predictions import (
    AnswerPrediction,
    ChoicePrediction,
    ClassPrediction,
    NumberPrediction,
    TagsPrediction,
)

QUESTION = ("who won ?", "rome beat paris . in may")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def write_lines(path: Path, *values: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, path.read_text().splitlines()))


# what is predicted


def test_the_likeliest_class_comes_with_the_probabilities_of_all(models: Path) -> None:
    (found,) = opfa.predict(models / "classes", ["good film"])
    assert isinstance(found, ClassPrediction)
    assert list(found.probabilities) == ["bad", "good"]
    assert sum(found.probabilities.values()) == pytest.approx(1.0)
    assert found.score == max(found.probabilities.values()) == found.probabilities[found.prediction]


def test_a_number_is_a_number(models: Path) -> None:
    one, other = opfa.predict(models / "number", [("good", "film"), ("bad", "")], text_pair="other")
    assert isinstance(one, NumberPrediction) and isinstance(other, NumberPrediction)
    assert one.prediction != other.prediction


def test_an_answer_is_where_it_says_also_in_a_later_window(models: Path) -> None:
    question, context = QUESTION
    texts = [context, "film good bad " * 40 + context]
    together = opfa.predict(models / "answers", [(question, text) for text in texts])
    for text, one in zip(texts, together, strict=True):
        (found,) = opfa.predict(models / "answers", [(question, text)])
        assert isinstance(found, AnswerPrediction) and isinstance(one, AnswerPrediction)
        assert text[found.start : found.end] == found.prediction != ""
        assert 0 < found.score <= 1
        assert one.score == pytest.approx(found.score, rel=1e-5)  # padding can't be an answer


def test_no_answer_is_empty_and_at_0_where_the_recipe_knows_of_it(
    models: Path, tmp_path: Path
) -> None:
    found = []
    for threshold in (-1000.0, 1000.0):
        task = {"kind": "question-answering", "text": "q", "text_pair": "c", "label": "a"}
        task |= {"has_unanswerable": True, "no_answer_threshold": threshold, "stride_tokens": 4}
        task |= {"metrics": ["squad_f1"]}
        recipe = finetune_recipe(models / "answers", tmp_path, task=task)
        (tmp_path / "recipe.toml").write_text(recipe.to_toml())
        found += opfa.predict(models / "answers", [QUESTION], recipe=tmp_path / "recipe.toml")
    none, some = found
    assert (none.prediction, none.start, none.end) == ("", 0, 0)
    assert 0 < none.score < 1
    assert some.prediction


def test_every_word_gets_a_tag_also_those_that_were_cut(models: Path) -> None:
    words = ["good", "film"] * 20
    first, second, third = opfa.predict(models / "tags", [words, "good film", ["good", "film"]])
    assert isinstance(first, TagsPrediction) and isinstance(second, TagsPrediction)
    assert len(first.prediction) == len(first.score) == len(first.probabilities) == 40
    assert first.prediction[30:] == ["O"] * 10 and first.score[30:] == [0.0] * 10  # 32 positions
    assert all(first.score[:30])
    assert second == third  # a text is cut at its blanks


def test_a_choice_is_a_position(models: Path) -> None:
    asked = [("who won ?", ["rome", "paris", "film"]), {"text": "who", "choices": ["a b", "good"]}]
    for one, num_choices in zip(asked, (3, 2), strict=True):
        (found,) = opfa.predict(models / "choices", [one])
        assert isinstance(found, ChoicePrediction)
        assert len(found.probabilities) == num_choices
        assert found.probabilities[found.prediction] == found.score == max(found.probabilities)


EXAMPLES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "classes": (
        {"kind": "classification", "metrics": ["accuracy"]},
        [{"text": text, "label": "good"} for text in ("good film", "bad", "who won ?")],
    ),
    "number": (
        {"kind": "regression", "metrics": ["pearson"]},
        [{"text": text, "label": 1.5} for text in ("good film", "bad", "who won ?")],
    ),
    "answers": (
        {"kind": "question-answering", "text_pair": "c", "stride_tokens": 4}
        | {"metrics": ["squad_f1"]},
        [
            {"text": "who won ?", "c": text, "label": {"text": ["rome"], "answer_start": [0]}}
            for text in ("rome beat paris", "rome . in may " * 20)
        ],
    ),
    "tags": (
        {"kind": "token-classification", "metrics": ["accuracy"]},
        [
            {"text": ["good", "film"], "label": ["O", "B-X"]},
            {"text": ["bad"] * 40, "label": ["O"] * 40},
        ],
    ),
    "choices": (
        {"kind": "multiple-choice", "choices": ["choices"], "metrics": ["accuracy"]},
        [{"text": "who", "choices": ["rome", text], "label": 0} for text in ("good", "bad")],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_evaluate(
    models: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "speed_up", lambda _: "torch")  # equal to the last bit
    task, examples = EXAMPLES[name]
    file = write_lines(tmp_path / "a.jsonl", *examples)
    recipe = finetune_recipe(models / name, tmp_path, task={**task, "validation": str(file)})
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    measure(str(models / name), recipe, tmp_path / "answers.jsonl")
    found = opfa.predict(models / name, file, recipe=tmp_path / "recipe.toml")
    expected = [row["prediction"] for row in read_lines(tmp_path / "answers.jsonl")]
    assert [one.prediction for one in found] == expected


# what is read and written


def test_new_columns_come_after_the_input_s_and_rows_keep_their_order(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlabelled, "CHUNK", 3)  # several chunks, the last one not full
    texts = ["good " * (1 + i * 5 % 7) + "film" for i in range(11)]
    asked = write_lines(tmp_path / "a.jsonl", *({"n": i, "text": t} for i, t in enumerate(texts)))
    result = predict_file(
        models / "classes", asked, tmp_path / "out.jsonl", options=Options(batch=2)
    )
    found = read_lines(tmp_path / "out.jsonl")
    assert (result.examples, result.cut, result.kind) == (11, 0, "classification")
    assert [list(row) for row in found] == [["n", "text", "prediction", "score"]] * 11
    assert [row["text"] for row in found] == texts
    alone = [opfa.predict(models / "classes", [text])[0] for text in texts[:4]]
    for row, one in zip(found, alone, strict=False):
        assert isinstance(one, ClassPrediction)
        assert row["prediction"] == one.prediction
        assert row["score"] == pytest.approx(one.score, abs=1e-6)


def test_only_one_chunk_of_rows_is_held(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlabelled, "CHUNK", 2)
    predictor, num_read = Predictor(str(models / "classes"), Options()), 0

    def counted() -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal num_read
        for index in range(100):
            num_read += 1
            yield f"[{index}]", {"text": "good film"}

    next(predictor.answers("here", counted(), lambda _: None))
    assert num_read == 3  # the chunk, and the row that didn't fit


def test_csv_has_a_column_for_each_class_and_lists_as_json(models: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,more\n"good, film",1\nbad,2\n')
    predict_file(models / "classes", tmp_path / "a.csv", tmp_path / "out.csv", has_all=True)
    with (tmp_path / "out.csv").open() as file:
        one, other = csv.DictReader(file)
    new = ["prediction", "score", "probabilities.bad", "probabilities.good"]
    assert list(one) == ["text", "more", *new]
    assert (one["text"], one["more"], other["more"]) == ("good, film", "1", "2")
    assert float(one["score"]) == float(one[f"probabilities.{one['prediction']}"])
    (tmp_path / "a.txt").write_text("good film\nbad\n\n \n")
    predict_file(models / "tags", tmp_path / "a.txt", tmp_path / "tags.csv")
    with (tmp_path / "tags.csv").open() as file:
        tagged = list(csv.DictReader(file))
    assert [row["tokens"] for row in tagged] == [
        "good film",
        "bad",
    ]  # blank lines at the end are none
    assert [len(json.loads(row["prediction"])) for row in tagged] == [2, 1]


def test_a_column_that_is_there_already_is_kept_by_a_prefix(models: Path, tmp_path: Path) -> None:
    asked = write_lines(tmp_path / "a.jsonl", {"text": "good", "score": 3})
    with pytest.raises(DataError, match="row 1: has a column 'score' already; --prefix"):
        predict_file(models / "classes", asked, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    predict_file(models / "classes", asked, tmp_path / "out.jsonl", prefix="mine_")
    (row,) = read_lines(tmp_path / "out.jsonl")
    assert list(row) == ["text", "score", "mine_prediction", "mine_score"]
    assert row["score"] == 3


def test_standard_input_is_what_its_first_line_or_an_option_says(
    models: Path, monkeypatch: Any
) -> None:
    def given(content: str, **values: Any) -> list[dict[str, Any]]:
        read, write = os.pipe()
        os.write(write, content.encode())
        os.close(write)
        monkeypatch.setattr(rows, "STDIN", Path(f"/dev/fd/{read}"))
        stream = io.StringIO()
        predict_file(models / "classes", None, stream, **values)
        os.close(read)
        return list(map(json.loads, stream.getvalue().splitlines()))

    assert [row["text"] for row in given("good film\nbad\n")] == ["good film", "bad"]
    for form in ("jsonl", None):
        (row,) = given('{"text": "good", "n": 1}\n', input_form=form)
        assert list(row) == ["text", "n", "prediction", "score"]
    (row,) = given("n,text\n1,good\n", input_form="csv")
    assert list(row) == ["n", "text", "prediction", "score"]
    for table in ("n,text\n1,good\n", '"text";n\ngood;1\n', "text\ngood\n"):
        with pytest.raises(DataError, match="looks like the header of a table.*--input-format csv"):
            given(table)
    assert [row["text"] for row in given("n,text\n", input_form="lines")] == ["n,text"]
    assert [row["text"] for row in given("{good\n")] == ["{good"]
    with pytest.raises(DataError, match="no column 'text' .--text names"):
        given('{"review": "good"}\n')
    with pytest.raises(DataError, match="line 2: malformed JSON"):
        given('{"text": "good"}\n{"tex\n', input_form="jsonl")


def test_no_number_in_json_is_infinite(models: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good", "x": NaN, "y": [Infinity, 1.5]}\n')
    predict_file(models / "classes", tmp_path / "a.jsonl", tmp_path / "out.jsonl")
    (row,) = read_lines(tmp_path / "out.jsonl")
    assert row["x"] is None and row["y"] == [None, 1.5]


def test_texts_beyond_the_limit_are_counted_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unlabelled, "CHUNK", 2)
    (tmp_path / "a.txt").write_text("good film\n" * 3 + "bad film " * 40 + "\n" + "good " * 50)
    result = predict_file(models / "classes", tmp_path / "a.txt", tmp_path / "out.csv")
    assert (result.examples, result.cut, result.sequence_tokens) == (5, 2, 32)
    (said,) = [record.message for record in caplog.records if "longer" in record.message]
    assert said.endswith(
        "2 of 5 examples are longer than sequence_tokens = 32; the rest of them is cut off"
    )


def test_a_run_s_recipe_says_columns_and_length(models: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").parent.mkdir()
    (run / "model").symlink_to(models / "classes")
    task = {"text": "review", "sequence_tokens": 9}
    (run / "recipe.toml").write_text(finetune_recipe(run, tmp_path, task=task).to_toml())
    (tmp_path / "a.csv").write_text("review\ngood film\n")
    for name, model in (("run", run), ("model", run / "model")):
        result = predict_file(model, tmp_path / "a.csv", tmp_path / f"{name}.csv")
        assert (result.sequence_tokens, result.examples) == (9, 1)
    assert opfa.predict(run, ["good film"]) == opfa.predict(models / "classes", ["good film"])


def test_the_python_of_the_page_runs(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/sst2").symlink_to(models / "classes")
    Path("runs/squad").symlink_to(models / "answers")
    Path("reviews.csv").write_text("review\ngood film\n")
    run_snippets("opfa/inference/README.md", "opfa.predict(")


# what is refused


@pytest.mark.parametrize(
    ("model", "content", "name", "message"),
    [
        ("classes", "review\ngood\n", "a.csv", "a.csv, header: no column 'text' \\(--text"),
        (
            "answers",
            "good\n",
            "a.txt",
            "a line is one text, and question-answering needs 'context'",
        ),
        ("choices", "text\nx\n", "a.csv", "no column 'choices' \\(--choices names another\\)"),
        ("classes", "", "a.csv", "a.csv: is empty"),
        ("classes", "", "a.txt", "a.txt: is empty"),
        ("classes", "text\n", "a.csv", "a.csv: has a header but no rows"),
        ("classes", '{"text": "good"}\n{"tex', "a.jsonl", "a.jsonl, line 2: malformed JSON"),
        ("classes", '{"text": "good"}\n{"text": 3}\n', "a.jsonl", "line 2: 'text' is not a text"),
        ("classes", "text,b\ngood\n", "a.csv", "line 2: 1 value, and the header has 2"),
        ("classes", "good\n\n \nbad\n", "a.txt", "a.txt, line 2: is blank, and each line is"),
        ("classes", "good", "a.xml", "a.xml: unknown kind of file; known are .jsonl"),
        (
            "bare",
            "text\ngood\n",
            "a.csv",
            "bare: a model for BertModel has no head of a task; fine-tune.*or --kind embedding",
        ),
    ],
)
def test_bad_input_is_one_message_and_no_file(
    models: Path, tmp_path: Path, model: str, content: str, name: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(OpfaError, match=message):
        predict_file(models / model, tmp_path / name, tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("good", "give a list of texts, or a pathlib.Path"),
        (pandas.DataFrame({"text": ["good"]}), "inputs: is a DataFrame; give a list of texts"),
        (pandas.Series(["good", None]), r"inputs, \[1\]: 'text' is"),
        (["good", 3], r"inputs, \[1\]: 'text' is not a text \(got 3\)"),
        ([("a", "b")], "a tuple is a text and its pair, and this task has single texts"),
        ([""], "'text' is empty"),
    ],
)
def test_bad_values_are_named_by_their_place(models: Path, inputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opfa.predict(models / "classes", inputs)


def test_no_texts_have_no_predictions_and_a_column_of_texts_is_a_list(models: Path) -> None:
    assert opfa.predict(models / "classes", []) == []
    texts = ["good film", "bad"]
    found = opfa.predict(models / "classes", texts)
    columns: list[Any] = [np.array(texts), pandas.Series(texts)]
    assert all(opfa.predict(models / "classes", column) == found for column in columns)


def test_what_fails_late_leaves_no_file(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(unlabelled, "CHUNK", 1)
    asked = write_lines(tmp_path / "a.jsonl", {"text": "good"}, {"text": "bad", "other": 1})
    with pytest.raises(DataError, match="row 2: the column 'other' isn't in the first row"):
        predict_file(models / "classes", asked, tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_output_is_a_new_file_and_has_a_known_ending(models: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\ngood\n")
    with pytest.raises(RunError, match="a.csv: exists already; give a new file"):
        predict_file(models / "classes", tmp_path / "a.csv", tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "text\ngood\n"
    with pytest.raises(RunError, match=r"ends neither with \.jsonl nor with \.csv; say --format"):
        predict_file(models / "classes", tmp_path / "a.csv", tmp_path / "a.xml")
    with pytest.raises(RunError, match="--kind cats: known are classification"):
        opfa.predict(models / "classes", ["good"], kind="cats")
    with pytest.raises(ModelError, match="needs one, and this model has 2 output"):
        opfa.predict(models / "classes", ["good"], kind="regression")
    with pytest.raises(ModelError, match="--sequence-tokens = 33: this model has only 32 pos"):
        opfa.predict(models / "classes", ["good"], sequence_tokens=33)


def changed(models: Path, tmp_path: Path, name: str, **values: Any) -> Path:
    """A copy of a model with other values in its configuration."""
    target = tmp_path / "changed"
    target.mkdir()
    for path in (models / name).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


def test_classes_without_names_are_said_once(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": None}
    (found,) = opfa.predict(changed(models, tmp_path, "classes", **config), ["good film"])
    assert found.prediction in ("LABEL_0", "LABEL_1")
    (said,) = [record.message for record in caplog.records if "names no classes" in record.message]
    assert "task.classes of a --recipe names them" in said


def test_a_model_of_several_classes_at_once_is_refused(models: Path, tmp_path: Path) -> None:
    model = changed(models, tmp_path, "classes", problem_type="multi_label_classification")
    with pytest.raises(ModelError, match="several classes at once"):
        opfa.predict(model, ["good film"])


# the command


def test_the_command_writes_a_file_and_a_short_table(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.csv").write_text("review\ngood film\ntoken=abcdefgh12345\n")
    words = ["predict", str(models / "classes"), str(tmp_path / "a.csv"), "--text", "review"]
    assert cli.run([*words, "--output", str(tmp_path / "out.csv")]) == 0
    assert "out.csv" in capsys.readouterr().out
    assert cli.run([*words, "--output", str(tmp_path / "out.csv"), "--json"]) == 2
    assert "out.csv: exists already" in capsys.readouterr().err
    assert cli.run([*words, "--output", str(tmp_path / "again.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 2
    assert cli.run([*words, "--json"]) == 2
    assert "--json is about --output FILE" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", Redacting(sys.stdout))  # as `opfa` does
    assert cli.run([*words, "--format", "csv"]) == 0
    out = capsys.readouterr().out  # the user's own data, so nothing is hidden
    assert out == (tmp_path / "out.csv").read_text() and "token=abcdefgh12345" in out


# the same from every form, and from other programs


@pytest.fixture(scope="module")
def work(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("work")
    (directory / "encoder").symlink_to(sparse)
    return directory


SAME: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "classification": (
        {"text": "text", "label": "label"},
        [{"text": text, "label": text.split()[1]} for text in list(sentences())[:40]],
    ),
    "question-answering": (
        {"text": "q", "text_pair": "c", "label": "a", "metrics": ["squad_f1"], "stride_tokens": 4},
        [
            {"q": "who?", "c": f"{text} {text}", "a": {"text": ["the"], "answer_start": [place]}}
            for text in list(sentences())[:40]
            if (place := text.find("the")) >= 0
        ],
    ),
}


@pytest.mark.parametrize(("kind", "bits"), [("classification", 32), ("question-answering", 8)])
def test_every_form_and_program_says_the_same(
    work: Path, kind: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, asked = SAME[kind]
    task = {**task, "sequence_tokens": 24}
    run = run_of(work, kind, task, asked, asked, bits=bits)
    found = {row["who"]: row for row in compare(work, kind, task, run, asked)}
    if kind == "classification":
        (work / "mine").symlink_to(f"{run.name}-onnx")
        monkeypatch.chdir(work)
        named = run_snippets("opfa/inference/README.md", '"logits"')
        ours = opfa.predict(run, named["asked"])
        assert named["classes"] == [each.prediction for each in ours]
    exact = "compact, other weights as they are"
    others = ["onnxruntime by hand", "pipeline"] if kind == "classification" else [exact]
    assert bits == 32 or found[exact]["largest"] == 0
    assert list(found) == ["RUN/model", "compact", "ONNX", "packed", *others]
    for row in found.values():
        assert row["equal"] == row["of"] == len(asked)
        assert row["largest"] < (1e-5 if bits == 32 else 1e-2)


@pytest.mark.parametrize("kind", [*MODELS, "embedding"])
def test_a_packed_model_says_the_same(models: Path, tmp_path: Path, kind: str) -> None:
    name = "classes" if kind == "embedding" else kind  # the encoder below its head
    examples = [{"text": "who won ?"}] if kind == "embedding" else EXAMPLES[kind][1]
    file = write_lines(tmp_path / "a.jsonl", *examples)
    columns = {"answers": {"text": "text", "text_pair": "c"}, "tags": {"text": "text"}}
    options: dict[str, Any] = columns.get(kind, {"kind": "embedding"} if name != kind else {})
    opfa.pack(models / name, tmp_path / "packed")
    expected = opfa.predict(models / name, file, **options)
    found = opfa.predict(tmp_path / "packed", file, **options)
    if kind == "embedding":
        vectors = [torch.tensor(each.prediction) for each in (*found, *expected)]
        torch.testing.assert_close(vectors[0], vectors[1], atol=1e-5, rtol=0)
        return
    equal, largest = differences(found, expected)
    is_tie = kind == "choices"  # 0.5 and 0.5 to six digits: which one wins depends on the CPU
    assert largest < 1e-5 and (is_tie or equal == len(examples))


def test_a_packed_run_keeps_its_recipe_and_says_how_it_computes(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(models / "classes")
    task = {"text": "review", "sequence_tokens": 9}
    (run / "recipe.toml").write_text(finetune_recipe(run, tmp_path, task=task).to_toml())
    opfa.pack(run, tmp_path / "packed")
    assert str(tmp_path) not in (tmp_path / "packed/recipe.toml").read_text()
    (tmp_path / "a.csv").write_text("review\ngood film\n")
    result = predict_file(tmp_path / "packed", tmp_path / "a.csv", tmp_path / "b.csv")
    assert result.sequence_tokens == 9
    assert result.runs_in.startswith("opfa's kernels (fp32, ")
    capsys.readouterr()
    assert cli.run(["inspect", str(tmp_path / "packed")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "give the model that it was made from" in said
    assert "`opfa predict`" in said and "`opfa inspect --runtime`" in said


def test_tags_are_those_of_pipeline(models: Path) -> None:
    sentences = [["good", "film", "?"], ["who", "won"]]
    found = opfa.predict(models / "tags", sentences)
    theirs = tags_by_pipeline(models / "tags", [{"words": words} for words in sentences])
    for one, other in zip(found, theirs, strict=True):
        assert isinstance(one, TagsPrediction)
        assert one.prediction == [tag for tag, _ in other]
        assert one.score == pytest.approx([score for _, score in other], abs=1e-6)
