"""8-bit layers against scales and roundings worked out by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opfa.compression import quant
from opfa.compression.quant import (
    QuantEmbedding,
    QuantLinear,
    activation_scale,
    extremes,
    int8_weight,
    prepare,
    start,
    weight_scale,
)
from opfa.errors import ModelError
from opfa.sparsity.layers import fuse, lock, masks_of


def net(momentum: float = 0.5) -> tuple[nn.Sequential, list[QuantLinear]]:
    """Two locked layers, half of their weights zero, ready to observe."""
    random = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
        if parameter.ndim == 2:
            parameter.data[torch.rand(parameter.shape, generator=random) < 0.5] = 0
    lock(model)
    return model, list(prepare(model, momentum).values())


def one(weight: Tensor, momentum: float = 0.5, **options: Any) -> tuple[nn.Sequential, QuantLinear]:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight
    lock(model)
    return model, prepare(model, momentum, **options)["0"]


def batch(seed: int = 1) -> Tensor:
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(seed))


# weights


def test_a_row_s_scale_is_its_largest_magnitude_over_127() -> None:
    weight = torch.tensor([[127.0, -1.0], [-2.54, 1.0]])
    torch.testing.assert_close(weight_scale(weight), torch.tensor([1.0, 0.02]))


def test_weights_are_rounded_to_steps_of_the_scale() -> None:
    model, layer = one(torch.tensor([[127.0, -3.4, 3.6, 0.0], [0.0, 12.7, -0.36, 0.04]]))
    start(model)
    expected = torch.tensor([[127.0, -3.0, 4.0, 0.0], [0.0, 12.7, -0.4, 0.0]])
    torch.testing.assert_close(layer.effective_weight(), expected)
    assert int8_weight(layer)[0].tolist() == [[127, -3, 4, 0], [0, 127, -4, 0]]


def test_the_zeros_of_the_mask_are_zeros_in_8_bits() -> None:
    model, layers = net()
    start(model)
    for layer in layers:
        assert not layer.mask.all()
        assert (int8_weight(layer)[0][~layer.mask] == 0).all()
        assert (layer.effective_weight()[~layer.mask] == 0).all()


def test_a_row_without_a_live_weight_is_zero() -> None:
    model, layer = one(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    start(model)
    assert layer.effective_weight()[0].tolist() == [0.0, 0.0]
    assert int8_weight(layer)[0][0].tolist() == [0, 0]


def test_int8_times_scale_is_what_the_layer_computes_with() -> None:
    model, layers = net()
    start(model)
    for layer in layers:
        weight, scale = int8_weight(layer)
        torch.testing.assert_close(weight * scale[:, None], layer.effective_weight())


# activations


def test_the_range_of_an_activation_maps_to_0_and_255() -> None:
    scale, zero_point = activation_scale(torch.tensor(-1.0), torch.tensor(4.1))
    torch.testing.assert_close(scale, torch.tensor(0.02))
    assert zero_point.item() == 50


@pytest.mark.parametrize("low, high", [(-1.0, 4.1), (0.0, 3.0), (-2.0, 0.0), (-0.3, 0.7), (0, 0)])
def test_zero_maps_to_zero(low: float, high: float) -> None:
    scale, zero_point = activation_scale(torch.tensor(low), torch.tensor(high))
    rounded = torch.fake_quantize_per_tensor_affine(torch.zeros(2), scale, zero_point, 0, 255)
    assert rounded.tolist() == [0.0, 0.0]


def test_inputs_are_rounded_to_steps_and_cut_to_the_range() -> None:
    model, layer = one(torch.eye(3) * 127)  # a weight without rounding error
    model(torch.tensor([[0.0, 0.0, 2.55]]))  # observes 0 .. 2.55: steps of 0.01
    model.eval()
    start(model)
    found = model(torch.tensor([[0.014, 2.549, 9.0]])) / 127
    torch.testing.assert_close(found, torch.tensor([[0.01, 2.55, 2.55]]))


def test_the_first_batch_sets_the_range_and_later_ones_move_it() -> None:
    model, layer = one(torch.tensor([[1.0, 0.0]]), momentum=0.25)
    for values in ([-1.0, 3.0], [-5.0, 1.0], [2.0, 11.0]):
        model(torch.tensor([values]))
    # low:  -1, then -1 + (-5 + 1) / 4 = -2,   then -2 + (0 + 2) / 4    = -1.5
    # high:  3, then  3 + (1 - 3) / 4  = 2.5,  then 2.5 + (11 - 2.5) / 4 = 4.625
    assert (layer.low.item(), layer.high.item()) == (-1.5, 4.625)


def test_evaluation_does_not_observe() -> None:
    model, layer = one(torch.tensor([[1.0, 0.0]]))
    model.eval()(torch.ones(1, 2))
    assert (layer.low.item(), layer.high.item()) == (0.0, 0.0)


def test_before_the_start_a_layer_only_observes() -> None:
    model, layers = net()
    inputs = batch()
    effective = [(layer.weight * layer.mask, layer.bias) for layer in layers]
    hidden = torch.tanh(nn.functional.linear(inputs, *effective[0]))
    torch.testing.assert_close(model(inputs), nn.functional.linear(hidden, *effective[1]))
    assert (layers[0].low.item(), layers[0].high.item()) == (inputs.min(), inputs.max())


def test_after_the_start_outputs_are_rounded_but_close() -> None:
    model, layers = net()
    before = model(batch())
    start(model)
    after = model(batch())
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, atol=0.1, rtol=0.05)


# gradients


def test_gradients_pass_straight_through_the_rounding() -> None:
    model, layer = one(torch.tensor([[127.0, -3.4, 0.0], [0.0, 12.7, -0.36]]))
    inputs = torch.tensor([[1.0, 2.0, 2.55]], requires_grad=True)
    model(inputs)
    start(model)
    model(inputs).backward(torch.tensor([[1.0, 10.0]]))
    rounded = torch.tensor([[127.0, -3.0, 0.0], [0.0, 12.7, -0.4]])
    torch.testing.assert_close(inputs.grad, torch.tensor([[1.0, 10.0]]) @ rounded)
    expected = torch.tensor([[1.0, 2.0, 0.0], [0.0, 20.0, 25.5]])  # 0 where masked
    torch.testing.assert_close(layer.weight.grad, expected)


def test_zeros_stay_through_quantized_training() -> None:
    model, layers = net()
    masks = {name: mask.clone() for name, mask in masks_of(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(6):
        if step == 2:
            start(model)
        model(batch(step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())


# schemes


def test_one_scale_for_the_whole_tensor() -> None:
    model, layer = one(torch.tensor([[127.0, -3.4, 0.0], [0.0, 12.7, -0.36]]), weights="tensor")
    start(model)
    expected = torch.tensor([[127.0, -3.0, 0.0], [0.0, 13.0, 0.0]])
    torch.testing.assert_close(layer.effective_weight(), expected)
    weight, scale = int8_weight(layer)
    assert weight.tolist() == expected.int().tolist() and scale.tolist() == 1.0


def test_a_percentile_cuts_off_outliers_on_both_sides() -> None:
    model, layer = one(torch.tensor([[1.0, 0.0]]), percentile=99.0)
    values = torch.arange(-500.0, 500.0).view(-1, 2)  # 1000 of them: 10 lie beyond on either side
    model(values[torch.randperm(500, generator=torch.Generator().manual_seed(0))])
    assert (layer.low.item(), layer.high.item()) == (-490.0, 489.0)


def test_the_percentile_of_few_values_is_their_extreme_and_zero_stays_inside() -> None:
    model, layer = one(torch.tensor([[1.0, 0.0]]), percentile=99.99)
    model(torch.tensor([[2.0, 5.0]]))
    assert (layer.low.item(), layer.high.item()) == (0.0, 5.0)


def test_percentiles_of_more_values_than_quantile_takes() -> None:
    values = torch.zeros((1 << 24) + 100)
    values[:3000] = torch.arange(3000.0)  # 0.01 % of them: 1677, so the 1678th largest
    assert extremes(values, 99.99) == (torch.tensor(0.0), torch.tensor(2999.0 - 1677))


def test_percentiles_are_averaged_over_batches() -> None:
    model, layer = one(torch.tensor([[1.0, 0.0]]), momentum=0.25, percentile=75.0)
    for scale in (1.0, 5.0):
        model(torch.tensor([[-2.0, 1.0], [2.0, 3.0]]) * scale)  # one of four lies beyond
    assert (layer.low.item(), layer.high.item()) == (0.0, 2.0 + (10 - 2) / 4)


def test_frozen_ranges_no_longer_move() -> None:
    model, layer = one(torch.tensor([[1.0, 0.0]]))
    model(torch.tensor([[-1.0, 3.0]]))
    quant.freeze(model)
    model(torch.tensor([[-9.0, 9.0]]))
    assert (layer.low.item(), layer.high.item()) == (-1.0, 3.0)


# embeddings


def embedded() -> tuple[nn.Sequential, QuantEmbedding]:
    """An embedding whose padding row is zero, and a locked layer."""
    model = nn.Sequential(nn.Embedding(3, 4, padding_idx=0), nn.Linear(4, 2))
    table = [[0.0, 0.0, 0.0, 0.0], [127.0, -3.4, 3.6, 0.4], [12.7, 0.6, 0.0, -1.4]]
    model[0].weight.data = torch.tensor(table)
    model[1].weight.data = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 3.0]])
    lock(model)
    prepare(model, 0.5, embeddings=True)
    return model, quant.quant_embeddings(model)["0"]


def test_embeddings_are_rounded_by_the_scale_of_the_table() -> None:
    model, embedding = embedded()
    assert torch.equal(embedding(torch.tensor([1, 2])), embedding.weight[1:])
    start(model)
    expected = torch.tensor([[127.0, -3.0, 4.0, 0.0], [13.0, 1.0, 0.0, -1.0]])
    torch.testing.assert_close(embedding(torch.tensor([1, 2])), expected)
    assert embedding(torch.tensor([0])).tolist() == [[0.0] * 4]
    weight, scale = int8_weight(embedding)
    assert weight[1:].tolist() == expected.int().tolist() and scale.tolist() == 1.0


def test_gradients_of_embeddings_pass_and_the_padding_row_gets_none() -> None:
    model, embedding = embedded()
    start(model)
    embedding(torch.tensor([0, 1, 1])).sum().backward()
    expected = torch.tensor([[0.0] * 4, [2.0] * 4, [0.0] * 4])
    torch.testing.assert_close(embedding.weight.grad, expected)


def test_embeddings_stay_fp32_unless_asked_for() -> None:
    model, layer = one(torch.tensor([[1.0, 0.0]]))
    model.append(nn.Embedding(2, 2))
    prepare(model, 0.5)
    start(model)
    assert type(model[1]) is nn.Embedding


@pytest.mark.parametrize("scheme", ["channel", "tensor"])
def test_a_file_says_scheme_and_embeddings(tmp_path: Path, scheme: quant.Scheme) -> None:
    model, _ = embedded()
    for layer in quant.quant_layers(model).values():
        layer.scheme = scheme
    ids = torch.tensor([[0, 1, 2]])
    model(ids)
    start(model)
    expected = model.eval()(ids)
    quant.save(model, tmp_path / quant.FILE)
    fuse(model)
    plain = nn.Sequential(nn.Embedding(3, 4, padding_idx=0), nn.Linear(4, 2))
    plain.load_state_dict(model.state_dict())
    quant.load(plain, tmp_path / quant.FILE)
    assert torch.equal(plain(ids), expected)  # in training mode too: loaded ranges don't move
    assert torch.equal(plain(ids), expected)


# files and the way back


def trained(tmp_path: Path) -> tuple[nn.Sequential, Tensor]:
    """A model after some quantized batches, its file, and what it answers in evaluation."""
    model, layers = net()
    model(batch(1))
    start(model)
    model(batch(2))
    quant.save(model, tmp_path / quant.FILE)
    return model, model.eval()(batch(3))


def test_saved_ranges_give_a_plain_model_the_same_outputs(tmp_path: Path) -> None:
    model, expected = trained(tmp_path)
    fuse(model)
    assert not torch.equal(model(batch(3)), expected)
    quant.load(model, tmp_path / quant.FILE)
    assert torch.equal(model.eval()(batch(3)), expected)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1.0])
def test_a_range_that_no_training_gives_is_refused(tmp_path: Path, value: float) -> None:
    model, _ = trained(tmp_path)
    fuse(model)
    values = load_file(tmp_path / quant.FILE)
    save_file(values | {"2.input_low": torch.tensor(value)}, tmp_path / quant.FILE)
    with pytest.raises(ModelError, match="2: its inputs have no range with zero in it"):
        quant.load(model, tmp_path / quant.FILE)


def test_fuse_leaves_plain_layers_without_traces(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    fuse(model)
    assert type(model[0]) is nn.Linear
    assert vars(model[0]).keys() == vars(nn.Linear(6, 8)).keys()
    assert not dict(model.named_buffers())


def test_observers_are_not_in_the_state_dict() -> None:
    model, _ = net()
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_ranges_can_be_put_back() -> None:
    model, layers = net()
    model(batch())
    twin, twins = net()
    quant.set_ranges(twin, quant.ranges(model))
    assert [t.high for t in twins] == [layer.high for layer in layers]
    assert [t.low for t in twins] == [layer.low for layer in layers]


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ModelError, match=f"{quant.FILE}: the model has no layer 2"):
        quant.load(nn.Sequential(nn.Linear(6, 8)), tmp_path / quant.FILE)


def test_a_model_without_masks_is_refused() -> None:
    with pytest.raises(ModelError, match="no layer to quantize: mask or lock"):
        prepare(nn.Sequential(nn.Linear(2, 2)), 0.5)
