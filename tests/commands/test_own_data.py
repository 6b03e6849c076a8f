"""The recipes for one's own data and encoder, from `opfa new` to a finished model, on tiny ones.

What a user sets is `SETTINGS`: at most three for a task, four for an encoder. The rest makes it
small.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_BERT, sentences
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from opfa.commands import app as cli
from opfa.storage.shipped import shipped

SMALL = ["task.sequence_tokens=24", "training.epochs=1", "training.batch=8"]
LINES = list(sentences())[:60]
OWN = sorted(path.stem for path in shipped("recipes/own").glob("*.toml"))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def animal(line: str) -> str:
    return "cat" if "cat" in line else "dog" if "dog" in line else "other, too"


def reviews(path: Path) -> None:
    write_csv(path, [{"id": i, "review": t, "verdict": animal(t)} for i, t in enumerate(LINES)])


def pairs(path: Path) -> None:
    rows = [{"text1": t, "text2": LINES[i // 2], "label": i % 2} for i, t in enumerate(LINES)]
    write_csv(path, rows)


def stars(path: Path) -> None:
    write_csv(path, [{"text": text, "score": len(text) / 10} for text in LINES])


def tags(path: Path) -> None:
    def tag(word: str) -> str:
        return "B-ANIMAL" if word in ("cat", "dog", "bird") else "O"

    words = [line.rstrip(".").split() for line in LINES]
    path.write_text("\n\n".join("\n".join(f"{w}\t{tag(w)}" for w in line) for line in words))


def questions(path: Path) -> None:
    rows = []
    for line in LINES:
        answer = line.rstrip(".").split()[-1]
        answers = {"text": [answer], "answer_start": [line.rindex(answer)]}
        rows.append({"question": "what ?", "context": line, "answers": answers})
    write_lines(path, rows)


# the data, what a user sets (the model is another of these), and what makes it small
TASKS: dict[str, tuple[Any, str, list[str], list[str]]] = {
    "my-csv": (reviews, "reviews.csv", ["task.text=review", "task.label=verdict"], []),
    "my-pairs": (pairs, "pairs.csv", [], []),
    "my-embeddings": (pairs, "pairs.csv", [], []),
    "my-scores": (stars, "stars.csv", [], []),
    "my-tags": (tags, "words.conll", [], []),
    "my-qa": (questions, "questions.jsonl", [], ["task.stride_tokens=4"]),
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_every_recipe_for_ones_own_is_tried_here() -> None:
    assert {*TASKS, "my-encoder"} == set(OWN)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_of_ones_own(
    name: str,
    sparse: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write, file, settings, small = TASKS[name]
    write(Path(file))
    settings = [f"task.train={file}", *settings]
    assert len(settings) <= 3
    run(capsys, "new", name, "mine.toml", *settings, f"model.init={sparse}", *SMALL, *small)
    shown = run(capsys, "finetune", "mine.toml", "--output", "runs/mine", "--json")
    results = json.loads(shown)
    assert round(results["sparsity"], 2) == 0.9 and results["task"] == "mine"
    again = run(capsys, "evaluate", "runs/mine", "--json")
    # hardly trained, numbers differ in the fourth digit: so little rounding shows in a correlation
    same = pytest.approx(results["metrics"], abs=1e-3, nan_ok=True)
    assert json.loads(again)["metrics"] == same
    if name == "my-csv":
        config = json.loads(Path("runs/mine/model/config.json").read_text())
        assert list(config["id2label"].values()) == ["cat", "dog", "other, too"]


def test_an_encoder_of_ones_own_on_a_text_of_ones_own(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**{**TINY_BERT, "vocab_size": len(tokenizer)}))
    model.save_pretrained("encoder")
    tokenizer.save_pretrained("encoder")
    write_lines(Path("text.jsonl"), [{"text": " ".join(LINES[i : i + 2])} for i in range(40)])
    settings = [
        'corpus.documents=["*.jsonl"]',
        "model.init=encoder",
        "distillation.teacher=encoder",
    ]
    assert len(settings) <= 4
    small = ["corpus.sequence_tokens=24", "corpus.validation=0.1", "training.precision=fp32"]
    run(capsys, "new", "my-encoder", "mine.toml", *settings, *small, "training.steps=10")
    assert "# Then fine-tune runs/mine/model, by" in Path("mine.toml").read_text()
    shown = run(capsys, "prepare", "mine.toml", "--output", "prepared/mine", "launch.workers=0")
    words = "opfa pretrain mine.toml --output runs/mine launch.workers=0 data=prepared/mine"
    assert f"  next      {words}\n" in shown
    shown = run(capsys, "pretrain", "mine.toml", "--output", "runs/mine", "--check")
    assert shown.startswith("accepted: mine.toml can run in runs/mine; SHA-256 ")
    assert not Path("runs").exists()
    caplog.set_level("INFO", "opfa")
    run(capsys, "pretrain", "mine.toml", "--output", "runs/mine")
    sizes = json.loads(Path("prepared/mine/corpus.json").read_text())["splits"]["train"]
    times = f"each example comes {40 / sizes['examples']:.1f} times"
    (said,) = [record.getMessage() for record in caplog.records if times in record.getMessage()]
    assert said.startswith(f"{sizes['tokens']:,} tokens are prepared and the run takes ")
    rows = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    ramp = {row["step"]: row["sparsity"] for row in rows if "sparsity" in row}
    assert ramp[2] < ramp[4] < ramp[5] == ramp[10] == pytest.approx(0.9, abs=1e-3)  # end = 0.5
    found = json.loads(run(capsys, "inspect", "runs/mine/model", "--json"))
    assert found["total"]["sparsity"] == pytest.approx(0.9, abs=1e-3)


def test_a_run_by_shares_goes_on_by_the_same_recipe_and_not_by_another(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    reviews(Path("train.csv"))
    words = ["finetune", "my-csv", "--output", "run", "task.text=review", "task.label=verdict"]
    words += [f"model.init={sparse}", *SMALL, "logging.checkpoint_steps=0.3"]
    Path("run").mkdir()
    Path("run/stop").write_text("")
    assert cli.run(words) == 75
    assert cli.run([*words, "--resume", "task.validation=0.2"]) == 2
    assert "task.validation was 0.1 and is 0.2" in capsys.readouterr().err
    assert cli.run([*words, "--resume"]) == 0
    assert round(json.loads(Path("run/results.json").read_text())["sparsity"], 2) == 0.9
    points = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert points == ["step-00000004", "step-00000006"]  # of 7 steps every second, the newest two
