"""`opfa recipes` and `opfa new`: what is listed, written and refused."""

import json
import shlex
import tomllib
from pathlib import Path

import pytest

from opfa.commands import app as cli
from opfa.storage.shipped import recipe_files

SCHEMA = Path(__file__).parents[2] / "recipes/schema"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(list(arguments)) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(list(arguments)) == 2
    return capsys.readouterr().err


def test_all_recipes_are_listed_ones_own_first(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(said(capsys, "recipes", "--json"))["recipes"]
    assert {row["name"]: row["file"] for row in rows} == {
        name: str(path) for name, path in recipe_files().items()
    }
    assert [row["name"] for row in rows][:2] == ["my-csv", "my-embeddings"]
    commands = {row["name"]: row["command"] for row in rows}
    assert (commands["sst2"], commands["bert-base-90"]) == ("finetune", "pretrain")
    shown = said(capsys, "recipes")
    assert "SST-2: is a sentence of a film" in shown
    heads = ["your own data", "tasks", "8 bits", "pre-training"]
    assert sorted(heads, key=shown.index) == heads
    assert max(map(len, shown.splitlines())) <= 80


def test_new_without_a_name_lists_those_for_ones_own_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = json.loads(said(capsys, "new", "--json"))["recipes"]
    assert {row["name"] for row in rows} >= {"my-csv", "my-encoder", "my-qa", "my-tags"}
    assert all(Path(row["file"]).parent.name == "own" for row in rows)


def test_new_writes_a_recipe_with_settings_and_says_what_is_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["task.train=reviews.csv", "training.epochs=5", "quantization.bits=8"]
    shown = said(capsys, "new", "my-csv", "sub/mine.toml", *settings)
    assert "sub/mine.toml: a recipe made of my-csv" in shown
    assert "  opfa finetune sub/mine.toml --output runs/mine\n" in shown
    text = Path("sub/mine.toml").read_text()
    values = tomllib.loads(text)
    assert values["name"] == "mine" and values["task"]["train"] == "reviews.csv"
    assert (values["training"]["epochs"], values["quantization"]["bits"]) == (5, 8)
    assert len(text.splitlines()) < 40
    assert 'a dense one needs zeros = "free"' in text
    assert said(capsys, "check", "sub/mine.toml").startswith("# accepted, for opfa finetune")


SCHEMAS = {"corpus": "pretrain", "search": "search"}  # by a section that only this kind has


@pytest.mark.parametrize("name", [name for name, p in recipe_files().items()])
def test_any_recipe_can_be_a_beginning(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "new", name, "mine.toml", "--json"))
    assert found["file"] == "mine.toml" and found["next"][0] == "opfa check mine.toml"
    before = tomllib.loads(recipe_files()[name].read_text())
    after = tomllib.loads(Path("mine.toml").read_text())
    assert after["name"] == "mine"
    assert {**after, "name": 0, "data": 0} == {**before, "name": 0, "data": 0}
    schema = Path("mine.toml").read_text().splitlines()[0].removeprefix("#:schema ")
    kind = next((k for key, k in SCHEMAS.items() if key in after), "finetune")
    assert Path(schema).samefile(SCHEMA / f"{kind}.json")


@pytest.mark.parametrize("stem", ["2024", "true", "two words", 'a"b', "c\\d", "é"])
def test_any_name_of_a_file_is_a_name(stem: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "new", "my-encoder", f"{stem}.toml", "--json"))
    values = tomllib.loads(Path(f"{stem}.toml").read_text())
    assert (values["name"], values["data"]) == (stem, f"prepared/{stem}")
    words = shlex.split(found["next"][1])
    assert words == ["opfa", "prepare", f"{stem}.toml", "--output", f"prepared/{stem}"]
    assert "is called NAME.toml" in refused(capsys, "new", "my-csv", f"{stem}\n.toml")


def test_the_file_is_called_after_the_recipe_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "new", "my-csv", "task.train=a=b.csv")
    assert tomllib.loads(Path("my-csv.toml").read_text())["task"]["train"] == "a=b.csv"


def test_new_refuses_what_is_there_and_what_would_not_be_accepted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine.toml").write_text("mine")
    assert "mine.toml: exists already; give a new file" in refused(
        capsys, "new", "my-csv", "mine.toml"
    )
    assert Path("mine.toml").read_text() == "mine"
    wrong = refused(capsys, "new", "my-csv", "a.toml", "task.tren=x.csv")
    assert "a.toml:\n  task.tren: unknown key; did you mean 'train'?" in wrong
    assert "section.key=value" in refused(capsys, "new", "my-csv", "a.toml", "b.toml")
    assert "is called NAME.toml" in refused(capsys, "new", "my-csv", "a.csv")
    assert "did you mean 'my-csv'" in refused(capsys, "new", "my-cvs", "a.toml")
    assert [path.name for path in Path.cwd().iterdir()] == ["mine.toml"]


def test_a_command_takes_a_recipe_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "check", "my-csv", "task.train=x.csv")
    assert tomllib.loads(shown)["task"]["train"] == "x.csv"
    assert "did you mean 'sst2'" in refused(capsys, "finetune", "sst", "--output", "run")
    assert "for opfa pretrain" in refused(capsys, "finetune", "bert-base-90", "--output", "run")
    assert "did you mean" in refused(capsys, "evaluate", "run/model", "--recipe", "sst")
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("columns", "settings", "found"),
    [
        ("review,verdict", [], {"text": "review", "label": "verdict"}),
        ("verdict,review", [], {"text": "review", "label": "verdict"}),
        ("review,label", [], {"text": "review"}),
        ("review,verdict", ["task.label=verdict"], {"text": "review"}),
        ("text,label", [], {}),
    ],
)
def test_new_finds_the_columns_that_go_without_saying(
    columns: str, settings: list[str], found: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("pos", "good film"), ("neg", "bad film"), ("pos", "well made")]
    is_first = columns.startswith("verdict")
    lines = [",".join(row if is_first else row[::-1]) for row in rows]
    Path("train.csv").write_text("\n".join([columns, *lines]))
    shown = json.loads(
        said(capsys, "new", "my-csv", "a.toml", "--json", "task.train=train.csv", *settings)
    )
    assert (shown["columns"], shown["problems"]) == (found, [])
    task = tomllib.loads(Path("a.toml").read_text())["task"]
    assert {task["text"], task["label"]} == set(columns.split(","))


def test_two_columns_of_embeddings_are_the_pair(capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.csv").write_text("question,answer\nwho,me\n")
    said(capsys, "new", "my-embeddings", "a.toml", "task.train=train.csv")
    task = tomllib.loads(Path("a.toml").read_text())["task"]
    assert (task["text"], task["text_pair"]) == ("question", "answer")


@pytest.mark.parametrize(
    ("columns", "settings", "problem"),
    [
        ("id,review", [], "to be edited: task.label = 'label': train.csv has 'id', 'review'"),
        ("text,id,review", [], "task.label = 'label': train.csv has 'id', 'review'"),
        ("id,review", ["task.text=revue"], "task.text = 'revue': train.csv has 'id', 'review'"),
    ],
)
def test_new_says_which_columns_there_are_where_it_can_not_know(
    columns: str, settings: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("train.csv").write_text(columns + "\n" + ",".join("abc"[: columns.count(",") + 1]))
    assert problem in said(capsys, "new", "my-csv", "a.toml", "task.train=train.csv", *settings)


def test_new_reads_no_data_that_are_not_there_yet_and_refuses_broken_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "edited" not in said(capsys, "new", "my-csv", "a.toml", "task.train=later.csv")
    Path("train.csv").write_text("")
    assert "train.csv: is empty" in refused(
        capsys, "new", "my-csv", "b.toml", "task.train=train.csv"
    )
    assert not Path("b.toml").exists()
