"""What launch/quickstart.sh ends with, on a tiny encoder."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).parents[2] / "recipes/quickstart"


@pytest.fixture
def quickstart(examples: Path, tmp_path: Path) -> Path:
    """The data of a quickstart."""
    data = tmp_path / "quick/data"
    data.mkdir(parents=True)
    for name in ("train", "validation"):
        rows = map(json.loads, (examples / f"{name}.jsonl").read_text().splitlines())
        lines = (json.dumps({"text": row["text"], "author": row["label"]}) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path / "quick"


def test_it_ends_with_a_table_and_goes_on(
    sparse: Path,
    quickstart: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    script = importlib.import_module("released")
    changes = (f"model.init={sparse}", "task.sequence_tokens=24", "training.learning_rate=1e-3")
    rows: list[Any] = []
    for _ in range(2):
        script.main(str(quickstart), *changes)
        rows = json.loads(Path(f"{quickstart}-released/results.json").read_text())
        assert capsys.readouterr().out.strip().endswith(script.table(rows))
    torch, ours = rows
    assert torch["accuracy"] == pytest.approx(ours["accuracy"], abs=0.05)
    assert ours["bytes"] < torch["bytes"] and ours["milliseconds"] > 0
