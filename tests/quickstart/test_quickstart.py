"""The quickstart, with its recipes cut down to a few steps; its data and its table as they are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from opfa.data.records import read_records
from opfa.errors import RunError
from opfa.quickstart import quickstart as module
from opfa.training.distributed import Stopped
from opfa.upstream.recipe import PretrainRecipe

SHORT = {
    r"^steps = .*": "steps = 3",
    r"^warmup_steps = .*": "warmup_steps = 0",
    r"^end = 500": "end = 2",
    r"^hold_until = .*": "hold_until = 2",
    r"^every = .*": "every = 1",
    r"^epochs = .*": "epochs = 0.02",
    r"^evaluate_steps": "evaluate_examples = 8\nevaluate_steps",
}


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped recipes with few steps, and few passages to score."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for path in module._recipe_path("teacher").parent.glob("*.toml"):
        text = path.read_text()
        for pattern, replacement in SHORT.items():
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        (recipes / path.name).write_text(text)
    monkeypatch.setattr(module, "_recipe_path", lambda name: recipes / f"{name}.toml")
    return tmp_path / "out"


def test_a_stopped_quickstart_goes_on_and_ends_with_a_table_and_pictures(
    short: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretrain(recipe: PretrainRecipe, output: Path, **options: Any) -> None:
        if output.name == "student":
            raise Stopped("SIGTERM")
        real(recipe, output, **options)

    real = module.pretrain
    with monkeypatch.context() as patch:
        patch.setattr(module, "pretrain", pretrain)
        with pytest.raises(Stopped, match="out: stopped; the same command goes on from there"):
            module.quickstart(short)
    done = {path: path.read_bytes() for path in short.glob("*/*.json")}
    assert short / "teacher/done.json" in done and short / "prepared/corpus.json" in done
    summary = module.quickstart(short)
    assert {path: path.read_bytes() for path in done} == done
    assert module.quickstart(short) == summary  # of a finished one only the table is shown
    names = ["majority class", *module.VARIANTS]
    assert [row.model for row in summary.rows] == names
    printed = str(summary)
    assert all(name in printed for name in names)
    assert f"Runs, recipes and pictures: {short}" in printed and not capsys.readouterr().out
    assert summary.zeros_held
    assert (short / "quickstart.png").stat().st_size > 1000
    assert json.loads((short / "quickstart.json").read_text()) == summary.values()
    assert (short / "table.md").read_text().count("\n") == 2 + len(names)
    _, dense, one_shot, sparse, quantized = summary.rows
    size = 3 * (3 * 128 * 128 + 128 * 128 + 2 * 256 * 128 + 256 * 128)  # 3 layers, gated MLP
    assert dense.nonzero == size and dense.bytes == 4 * size
    assert sparse.nonzero is not None and quantized.nonzero is not None
    for row in (one_shot, sparse, quantized):
        assert row.nonzero == pytest.approx(0.1 * size, rel=1e-3)
    assert sparse.bytes == size // 8 + 4 * sparse.nonzero
    rows_of_all = 3 * (3 * 128 + 128 + 2 * 256 + 128)  # one scale for each output channel
    assert quantized.bytes == size // 8 + quantized.nonzero + 4 * rows_of_all


def test_held_out_chapters_are_in_no_training_file(tmp_path: Path) -> None:
    majority = module.write_data(tmp_path / "data")
    documents = (tmp_path / "data/documents.jsonl").read_text()
    held_out = [record for _, record in read_records(tmp_path / "data/validation.jsonl")]
    train = [record["text"] for _, record in read_records(tmp_path / "data/train.jsonl")]
    assert len(train) == module.NUM_LABELLED == len(set(train))
    assert not set(train) & {record["text"] for record in held_out}
    for record in held_out[::25]:
        assert " ".join(record["text"].split()[5:15]) not in " ".join(documents.split())
    assert 0.25 <= majority < 0.3
    assert len({record["author"] for record in held_out}) == 4


def test_quickstart_refuses_a_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(RunError, match="is not empty"):
        module.quickstart(tmp_path)
