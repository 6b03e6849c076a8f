"""Pre-training in the sparse kernels, while masks move and afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import pretrain_recipe
from safetensors.torch import load_file

from opfa.runtime import products, training
from opfa.upstream.pretrain import pretrain
from opfa.weights.inspection import inspect


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_losses_and_zeros_are_those_of_the_dense_products(
    prepared: Path, tmp_path: Path, precision: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, densities = [], []

    def counted(*inputs: Any) -> Any:
        pattern = inputs[3]
        densities.append(pattern.num_live / (pattern.rows * pattern.columns))
        return products.sparse_linear(*inputs)

    monkeypatch.setattr(training, "sparse_linear", counted)
    for kernels in (True, False):
        run = tmp_path / str(kernels)
        recipe = pretrain_recipe(
            prepared,
            training={"precision": precision, "sparse_kernels": kernels},
            pruning={"schedule": {"end": 4, "every": 2, "target": 0.8}},
        )
        pretrain(recipe, run)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["split"] == "training"])
        assert inspect(run / "model")["stated"] == "matches"
    assert losses[0] == pytest.approx(losses[1], rel=limit)
    assert densities[0] > 0.9 and densities[-1] == pytest.approx(0.2, abs=0.01)  # masks moved
    sizes = [(load_file(tmp_path / f"{k}/model/model.safetensors")) for k in (True, False)]
    assert {n: int((t != 0).sum()) for n, t in sizes[0].items() if "layer.0" in n} == {
        n: int((t != 0).sum()) for n, t in sizes[1].items() if "layer.0" in n
    }


def test_recipes_of_before_the_key_keep_their_digest(prepared: Path) -> None:
    plain = pretrain_recipe(prepared)
    without = pretrain_recipe(prepared, training={"sparse_kernels": False})
    assert plain.sha256() == without.sha256()
    assert "sparse_kernels" not in plain.to_toml()
