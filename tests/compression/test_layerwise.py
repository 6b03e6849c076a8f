"""Least squares of what is left, and masks by ADMM: against numpy, and on problems written out."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from opfa.compression import layerwise
from opfa.compression.layerwise import RIDGE, Admm, Inputs, System, fit
from opfa.compression.selection import magnitude_mask, num_zeros
from opfa.errors import RunError
from opfa.sparsity.layers import MaskedLinear, mask_layers

OUT, IN, TOKENS = 7, 12, 300


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int = TOKENS, width: int = IN, seed: int = 1) -> Tensor:
    """Inputs that depend on each other, far from zero."""
    return draw(tokens, width, seed=seed) @ draw(width, width, seed=seed + 1) + 3


def masks() -> Tensor:
    """Supports of many sizes: all of a row, none of it."""
    mask = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(3)) > 0.6
    mask[0], mask[1] = True, False
    return mask


def linear(*, bias: bool = True) -> MaskedLinear:
    model = nn.Sequential(nn.Linear(IN, OUT, bias=bias))
    for index, parameter in enumerate(model.parameters()):
        parameter.data = draw(*parameter.shape, seed=5 + index)
    return mask_layers(model, ["0"])["0"]


def inputs_of(ours: Tensor, theirs: Tensor, batch: int = 64) -> Inputs:
    found = Inputs(ours.shape[1], ours.device)
    for pair in zip(ours.split(batch), theirs.split(batch), strict=True):
        found.add(*pair)
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_each_row_is_numpys_least_squares_on_its_own_support(bias: bool) -> None:
    theirs = correlated()
    ours = theirs + 0.3 * draw(TOKENS, IN, seed=4)
    layer = linear(bias=bias)
    dense, offset = layer.weight.detach().double().numpy(), np.zeros(OUT)
    if bias:
        offset = layer.bias.detach().double().numpy()
    layer.mask.copy_(masks())
    fit({"w": layer}, inputs_of(ours, theirs), None, 0.5)

    x, y = ours.double().numpy(), theirs.double().numpy() @ dense.T + offset
    means = (x.mean(0), y.mean(0)) if bias else (0 * x[0], 0 * y[0])
    x, y = x - means[0], y - means[1]
    ridge = RIDGE * (x**2).mean()
    for row, mask in enumerate(masks().numpy()):
        # the ridge as more examples, whose answer is the dense weight
        more = np.sqrt(ridge * TOKENS) * np.eye(IN)[mask]
        left = np.concatenate([x[:, mask], more[:, mask]])
        right = np.concatenate([y[:, row], more @ dense[row]])
        expected = np.linalg.lstsq(left, right, rcond=None)[0]
        found = layer.weight[row].detach().numpy()
        np.testing.assert_allclose(found[mask], expected, rtol=2e-4, atol=2e-5)
        assert (found[~mask] == 0).all()
        if bias:
            constant = means[1][row] - expected @ means[0][mask]
            np.testing.assert_allclose(float(layer.bias[row]), constant, rtol=1e-3, atol=1e-4)


def test_nothing_changes_where_nothing_is_pruned() -> None:
    layer, theirs = linear(), correlated()
    before = [each.detach().clone() for each in layer.parameters()]
    fit({"w": layer}, inputs_of(theirs, theirs), None, 0.0)
    for each, old in zip(layer.parameters(), before, strict=True):
        torch.testing.assert_close(each.detach(), old, rtol=1e-5, atol=1e-5)


def test_inputs_far_from_zero_lose_nothing() -> None:
    theirs = 1e-2 * correlated() + 1e3 * draw(IN, seed=9)
    found = inputs_of(theirs, theirs).system(draw(OUT, IN), has_bias=True)
    wide = theirs.double() - theirs.double().mean(0)
    gram = wide.T @ wide / TOKENS
    gram += RIDGE * gram.diagonal().mean() * torch.eye(IN)
    torch.testing.assert_close(found.gram, gram, rtol=1e-3, atol=1e-6)


def test_rows_are_solved_in_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = correlated()
    system = inputs_of(theirs, theirs).system(draw(OUT, IN), has_bias=True)
    whole = system.solve(masks())
    monkeypatch.setattr(layerwise, "CHUNK", 2 * IN * IN)
    pieces = [
        len(rows) * columns.shape[1] ** 2 for rows, columns, _ in layerwise._supports(masks())
    ]
    assert len(pieces) > 2 and max(pieces) <= 2 * IN * IN
    torch.testing.assert_close(system.solve(masks()), whole)


@pytest.mark.parametrize("score", ["given", "admm"])
def test_inputs_that_repeat_or_never_change_are_no_failure(score: str) -> None:
    theirs = correlated()
    theirs[:, 6:] = theirs[:, :6]
    theirs[:, 5] = theirs[:, 11] = 2.0
    for given in (theirs, torch.full_like(theirs, 2.0)):
        layer = linear()
        layer.mask.copy_(masks())
        fit({"w": layer}, inputs_of(given, given), Admm() if score == "admm" else None, 0.5)
        assert bool(layer.weight.isfinite().all() and layer.bias.isfinite().all())


def error(system: System, weight: Tensor) -> float:
    return float((weight @ system.gram * weight - 2 * weight * system.wanted).sum())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.97])
def test_admm_counts_exactly_and_beats_the_mask_of_magnitude(sparsity: float) -> None:
    dense = draw(20, 30)
    theirs = correlated(width=30)
    system = inputs_of(theirs, theirs).system(dense, has_bias=True)
    mask = Admm().mask(system, dense, sparsity)
    assert int((~mask).sum()) == num_zeros(sparsity, 600)
    by_magnitude = magnitude_mask(dense, num_zeros(sparsity, 600))
    ours, other = (error(system, system.solve(each)) for each in (mask, by_magnitude))
    assert ours < other or sparsity == 0.0
    assert torch.equal(mask, Admm().mask(system, dense, sparsity))


def test_admm_is_its_formula() -> None:
    dense = draw(20, 30)
    theirs = correlated(width=30)
    system = inputs_of(theirs, theirs).system(dense, has_bias=True)
    gram, wanted = system.gram.numpy(), system.wanted.numpy()
    scale = np.sqrt(gram.diagonal())
    h, hw = gram / scale / scale[:, None], (wanted / scale).T
    w, u = dense.double().numpy().T * scale[:, None], np.zeros((30, 20))
    kept = np.ones(w.shape, dtype=bool)
    for iteration in range(1, 21):  # the dual, the projection, the ridge regression
        if iteration <= 15:
            zeros = round(0.8 * (1 - (1 - iteration / 15) ** 3) * w.size)
            lowest = np.argsort(np.abs(w + u), axis=None)[:zeros]
            kept = np.ones(w.size, dtype=bool)
            kept[lowest] = False
            kept = kept.reshape(w.shape)
        z = (w + u) * kept
        u = u + w - z
        w = np.linalg.solve(h + np.eye(30), hw + (z - u))
    assert np.array_equal(Admm().mask(system, dense, 0.8).numpy(), kept.T)


def test_admm_of_independent_inputs_is_weight_times_size_of_input() -> None:
    scale = torch.linspace(0.1, 3, 30, dtype=torch.float64)
    dense = draw(20, 30).double()
    gram = (scale**2).diag()
    mask = Admm().mask(System(gram, dense @ gram), dense, 0.5)
    assert torch.equal(mask, magnitude_mask((dense * scale).float(), 300))


def test_without_iterations_left_the_mask_is_that_of_the_end_of_the_ramp() -> None:
    dense, theirs = draw(20, 30), correlated(width=30)
    system = inputs_of(theirs, theirs).system(dense, has_bias=True)
    first = Admm(iterations=1, ramp=1).mask(system, dense, 0.5)
    norms = system.gram.diagonal().sqrt()
    assert torch.equal(first, magnitude_mask((dense * norms).float(), 300))
    assert not torch.equal(first, Admm().mask(system, dense, 0.5))
    with pytest.raises(ValidationError, match=r"ramp = 15: must be at most iterations = 3"):
        Admm(iterations=3)


def test_inputs_that_are_not_finite_are_named() -> None:
    theirs = correlated()
    theirs[7, 3] = float("inf")
    with pytest.raises(RunError, match=r"^w: its inputs on this text are not finite"):
        fit({"w": linear()}, inputs_of(theirs, theirs), None, 0.5)


@pytest.mark.parametrize("admm", [None, Admm()])
def test_products_that_are_singular_are_named(
    admm: Admm | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gram = 2 * torch.eye(IN).double() - torch.ones(IN, IN).double()  # not positive definite
    system = System(gram, torch.ones(OUT, IN).double())
    monkeypatch.setattr(Inputs, "system", lambda *_, **__: system)
    theirs = correlated()
    with pytest.raises(
        RunError, match=r"^w: the products of its inputs .* are singular; give more"
    ):
        fit({"w": linear()}, inputs_of(theirs, theirs), admm, 0.5)
