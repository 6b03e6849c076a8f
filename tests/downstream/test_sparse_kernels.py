"""Fine-tuning in the sparse kernels, against the same run in dense products."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import break_off, finetune_recipe
from safetensors.torch import load_file

from opfa.downstream import finetune as module
from opfa.downstream.finetune import finetune
from opfa.errors import RecipeError
from opfa.runtime.training import SparseProduct
from opfa.sparsity.layers import masked_layers
from opfa.training.checkpoint import model_digest
from opfa.weights.inspection import inspect

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"training": {"precision": "bf16"}},
    "accumulated": {"training": {"micro_batch": 2, "weight_decay": 0.1}},
    "quantized": {"quantization": {"start": 0.3}},
}


def both(sparse: Path, examples: Path, sections: dict[str, Any]) -> list[Any]:
    """The recipe with the kernels everywhere, and without."""
    found = []
    for kernels in (True, False):
        training = {**sections.get("training", {}), "sparse_kernels": kernels}
        found.append(finetune_recipe(sparse, examples, **{**sections, "training": training}))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_ends_with_the_weights_and_zeros_of_the_dense_path(
    sparse: Path, examples: Path, tmp_path: Path, variant: str
) -> None:
    runs = [tmp_path / "with", tmp_path / "without"]
    for recipe, run in zip(both(sparse, examples, VARIANTS[variant]), runs, strict=True):
        finetune(recipe, run)
    ours, plain = (load_file(run / "model/model.safetensors") for run in runs)
    assert inspect(runs[0] / "model")["fingerprint"] == inspect(sparse)["fingerprint"]
    start = load_file(sparse / "model.safetensors")
    for name, wanted in plain.items():
        torch.testing.assert_close(ours[name], wanted, rtol=0, atol=3e-3)
        if name in start and "layer.0.attention.self.query.weight" in name:
            moved = (wanted - start[name]).norm()
            assert moved > 0 and (ours[name] - wanted).norm() < 0.05 * moved


@pytest.mark.parametrize("variant", ["plain", "bf16", "quantized"])
def test_a_resumed_run_equals_an_unbroken_one(
    sparse: Path, examples: Path, tmp_path: Path, variant: str
) -> None:
    recipe, _ = both(sparse, examples, VARIANTS[variant])
    finetune(recipe, tmp_path / "unbroken")
    break_off(6, finetune, recipe, tmp_path / "broken")
    finetune(recipe, tmp_path / "broken", resume=True)
    assert model_digest(tmp_path / "broken/model") == model_digest(tmp_path / "unbroken/model")


def stepped(recipe: Any, steps: int) -> module.Trainer:
    """A trainer after some steps."""
    trainer = module.Trainer(recipe)
    trainer.student.train()
    batches = trainer.batches(0)
    for _ in range(steps):
        (batch,) = next(batches)
        torch.manual_seed(0)
        trainer.losses(batch, trainer.counts([batch]))[0].backward()
        trainer.engine.step(1e-3)
    return trainer


def test_the_optimizer_holds_live_weights_and_its_state_is_saved_whole(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    ours, plain = (stepped(recipe, 3) for recipe in both(sparse, examples, {}))
    layers = masked_layers(ours.student)
    products = {name: layer.product for name, layer in layers.items()}
    for name, product in products.items():
        assert isinstance(product, SparseProduct)
        assert product.live is not None
        assert product.live.numel() == int(layers[name].mask.sum())
        assert layers[name].weight.grad is None
    held = {id(p) for group in ours.engine._optimizer.param_groups for p in group["params"]}
    assert not held & {id(layer.weight) for layer in layers.values()}

    for trainer, name in ((ours, "ours"), (plain, "plain")):
        (tmp_path / name).mkdir()
        trainer.engine.save(tmp_path / name)
    files = [load_file(tmp_path / name / "state-00000.safetensors") for name in ("ours", "plain")]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    for key, wanted in files[1].items():
        if "key.bias@" in key:  # its gradient is rounding alone, which Adam scales
            continue
        scale = float(wanted.abs().max()) + 1e-12
        torch.testing.assert_close(files[0][key] / scale, wanted / scale, rtol=0, atol=2e-2)
    plain.engine.load(tmp_path / "ours")  # either reads the other's
    ours.engine.load(tmp_path / "plain")
    for name, product in products.items():
        assert product is not None and product.live is not None
        assert torch.equal(product.take(layers[name], layers[name].weight), product.live)
    ours.engine.save(tmp_path / "ours")
    again = load_file(tmp_path / "ours/state-00000.safetensors")
    assert all(torch.equal(again[key], value) for key, value in files[1].items())


def test_masks_that_move_train_dense_weights(sparse: Path, examples: Path, tmp_path: Path) -> None:
    pruning = {"schedule": {"end": 6, "target": 0.8, "every": 2}}
    sections = {"model": {"init": str(sparse), "zeros": "free"}, "pruning": pruning}
    recipe = finetune_recipe(sparse, examples, training={"sparse_kernels": True}, **sections)
    assert finetune(recipe, tmp_path / "run").sparsity == pytest.approx(0.8, abs=1e-3)


def test_recipes_of_before_the_key_keep_their_digest(sparse: Path, examples: Path) -> None:
    plain = finetune_recipe(sparse, examples)
    without = finetune_recipe(sparse, examples, training={"sparse_kernels": False})
    auto = finetune_recipe(sparse, examples, training={"sparse_kernels": "auto"})
    assert plain.sha256() == without.sha256() != auto.sha256()


def test_what_the_key_can_not_be_is_refused(sparse: Path, examples: Path) -> None:
    with pytest.raises(RecipeError, match="sparse_kernels"):
        finetune_recipe(sparse, examples, training={"sparse_kernels": "fast"})
    free = {"init": str(sparse), "zeros": "free"}
    with pytest.raises(RecipeError, match=r"sparse_kernels = true: needs zeros that are held"):
        finetune_recipe(sparse, examples, training={"sparse_kernels": True}, model=free)
