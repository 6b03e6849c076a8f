"""`opfa bench finetune`: what is compared is the same step, and ratios follow from it."""

import pytest
import torch
from torch import Tensor

from opfa.bench import finetune
from opfa.bench.finetune import VARIANTS, OneStep, bench_finetune

SHAPE = {
    "model_type": "bert",
    "vocab_size": 1100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(finetune.SHAPES, "small", SHAPE)
    monkeypatch.setattr(finetune, "in_a_process", lambda measure, *given: measure(*given))


def weights_after(name: str) -> dict[str, Tensor]:
    step = OneStep(name, "small", 0.8, (3, 20))
    for _ in range(3):
        step.take()
    return {key: value.detach() for key, value in step.model.state_dict().items()}


def test_ways_with_zeros_are_the_same_training() -> None:
    wanted = weights_after("plain loop")
    for name in ("ours", "no kernels"):
        for key, value in weights_after(name).items():
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=4e-5)
            if "layer.0" in key and value.ndim == 2:
                assert torch.equal(value == 0, wanted[key] == 0)
                assert float((value == 0).float().mean()) == pytest.approx(0.8, abs=0.05)
    assert not bool((weights_after("torch, fp32")["bert.pooler.dense.weight"] == 0).any())


def test_ratios_are_of_the_fastest_steps(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        found = bench_finetune("small", sparsity=0.8, batch=2, tokens=10, rounds=1)
    said = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert said == [f"round 1 of 1, {name}" for name in VARIANTS]  # as soon as each is known
    assert tuple(found.variants) == VARIANTS
    ours, other = found.variants["ours"], found.variants["torch, fp32"]
    assert found.ratios["ours / torch, fp32, time"] == ours.seconds / other.seconds
    assert found.ratios["ours / torch, fp32, peak memory"] == ours.peak_bytes / other.peak_bytes
    assert "whole step" in found.markdown()
    assert all(step.forward + step.backward <= step.median for step in found.variants.values())
