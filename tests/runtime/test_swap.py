"""Kernels under the linear layers of any model, and what `explain` says."""

import copy

import pytest
import torch
from networks import CONFIGS, batch, sparse
from torch import nn
from transformers import AlbertConfig, AutoModel

from opfa import runtime
from opfa.errors import RunError
from opfa.runtime.encoder import with_kernels
from opfa.runtime.library import level
from opfa.runtime.swap import KernelLinear


def test_a_model_of_another_family_gives_the_same() -> None:
    config = AlbertConfig(
        vocab_size=200, embedding_size=128, hidden_size=128, num_attention_heads=4
    )
    model = sparse(AutoModel, config)
    found = runtime.swap(copy.deepcopy(model), threads=1)
    assert any(isinstance(m, KernelLinear) for m in found.modules())
    with torch.no_grad():
        for lengths in ([1], [40, 12]):
            inputs = batch(lengths, 0)
            torch.testing.assert_close(found(**inputs)[0], model(**inputs)[0], atol=1e-4, rtol=0)


def test_only_layers_that_gain_are_swapped() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(8, 8)]
    layers[1].weight.data *= torch.rand(256, 256) > 0.6
    layers[2].weight.data.zero_()
    model = nn.Sequential(*layers)
    expected = copy.deepcopy(model)
    found = runtime.swap(model, threads=1)
    assert [type(m) for m in found] == [nn.Linear, KernelLinear, nn.Linear]
    assert "density=0.4" in repr(found[1])
    input = torch.randn(3, 5, 256)
    layer = found[1]
    assert isinstance(layer, KernelLinear)
    assert layer(input[:0]).shape == (0, 5, 256)
    with torch.no_grad():
        torch.testing.assert_close(layer(input), expected[1](input), atol=1e-4, rtol=0)


def test_gradients_and_other_shapes_are_refused() -> None:
    layer = nn.Linear(128, 128)
    layer.weight.data *= torch.rand(128, 128) > 0.9
    found = runtime.swap(nn.Sequential(layer), threads=1)
    with pytest.raises(RunError, match="no gradient"):
        found(torch.randn(2, 128, requires_grad=True))
    with pytest.raises(RunError, match=r"is \[2, 64\], and its end must be 128"):
        found(torch.randn(2, 64))
    with pytest.raises(RunError, match="no linear layer of Sequential is sparse enough"):
        runtime.swap(nn.Sequential(nn.Linear(128, 128)))


def test_explain_names_the_kernel_of_each_layer() -> None:
    model = sparse(AutoModel, CONFIGS["distilbert"])
    dense = model.get_submodule("transformer.layer.1.ffn.lin1")
    assert isinstance(dense, nn.Linear)
    dense.weight.data = torch.randn_like(dense.weight)
    found = runtime.explain(with_kernels(model, 1), tokens=20)
    kernels = {row.layer: row.kernel for row in found.layers}
    assert len(kernels) == 8
    assert kernels["transformer.layer.0.attention.out_lin"] == "sparse fp32"
    assert kernels["transformer.layer.1.ffn.lin1"] == "dense fp32: more than 50% lives"
    assert found.level == level()
    assert all(0 < row.peak_share < 1 for row in found.layers)
    assert "sparse fp32" in str(found)
    with pytest.raises(RunError, match=r"must come from opfa\.runtime\.load"):
        runtime.explain(nn.Linear(2, 2))
