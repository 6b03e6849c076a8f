"""PNG pictures: titles and units, the learning rate of every step, few points as points."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from opfa.report import pictures
from opfa.report.curves import Plan

REPORT = {
    "total": {"zeros": 9, "size": 10, "sparsity": 0.9},
    "tensors": {"layer.0.query.weight": {"sparsity": 0.9}},
}
RATES = [1e-3, 2e-3, 3e-3, 1e-3, 3e-3] * 20  # it rewinds


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.update({path.name: figure}))
    return figures


@pytest.mark.parametrize("kind", ["upstream", "downstream"])
def test_pictures_have_titles_and_units_and_every_learning_rate(
    kind: str, drawn: dict[str, Figure], tmp_path: Path
) -> None:
    key = "mlm_loss" if kind == "upstream" else "loss"
    rows = [{"step": step, key: 1.0, "sparsity": 0.9} for step in range(10, 101, 10)]
    rows.append({"step": 100, "eval": True, key: 1.5, "accuracy": 0.5})
    if kind == "upstream":
        plan = Plan(learning_rate=RATES)
        pictures.pretraining_pictures(rows, key, REPORT, tmp_path / "report", plan)
    else:
        pictures.finetuning_pictures(rows, REPORT, tmp_path / "report", Plan(learning_rate=RATES))
    assert set(drawn) == {"loss.png", "learning_rate.png", "sparsity.png"}
    for figure in drawn.values():
        assert figure.axes[0].get_title("left") and figure.axes[0].get_xlabel()
    (line,) = drawn["learning_rate.png"].axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), np.column_stack([range(1, 101), RATES]))
    assert line.get_marker() == "None"  # a hundred points
    assert drawn["loss.png"].axes[0].lines[0].get_marker() == "o"  # ten
    assert "%" in drawn["sparsity.png"].axes[0].get_xlabel()
    pyplot.close("all")
