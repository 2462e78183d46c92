"""Least squares from moments equals least squares from the data."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from greedy_helpers import Moments, solve, weight_of
from greedy_helpers.reconstruct import add_to_bias, refit


def data(n=200, d_x=12, d_y=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(n, d_x, generator=generator, dtype=torch.float64)
        @ torch.randn(d_x, d_x, generator=generator).double()
    )
    y = x[:, :d_y].tanh() + 0.5 + 0.1 * torch.randn(n, d_y, generator=generator, dtype=torch.float64)
    w0 = torch.randn(d_y, d_x, generator=generator, dtype=torch.float64)
    b0 = torch.randn(d_y, generator=generator, dtype=torch.float64)
    return x, y, w0, b0


def moments_of(x, y, batch=None):
    moments = Moments("layer")
    for a, b in zip(x.split(batch or len(x)), y.split(batch or len(y)), strict=True):
        moments.update(a, b)
    return moments


@pytest.mark.parametrize(("n", "damp"), [(200, 0.0), (200, 1e-2), (200, 1.0), (8, 1e-2)])
@pytest.mark.filterwarnings("ignore:.*calibration tokens")
def test_ridge_equals_lstsq_on_the_augmented_system(n, damp):
    """min ||Y - X W'||^2 + lam ||W - W0||^2 is plain least squares with sqrt(lam) I stacked below X."""
    x, y, w0, _ = data(n)
    moments = moments_of(x, y)
    found = solve(moments, w0, damp=damp)
    lam = damp * moments.xx.diagonal().mean()
    above = torch.cat([x, lam.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    below = torch.cat([y, lam.sqrt() * w0.T])
    torch.testing.assert_close(found.weight, torch.linalg.lstsq(above, below).solution.T, rtol=1e-7, atol=1e-9)
    assert found.bias is None


def test_with_bias_equals_lstsq_with_a_column_of_ones():
    x, y, w0, b0 = data()
    moments = moments_of(x, y)
    found = solve(moments, w0, b0, damp=1e-2)
    centred = x - x.mean(0)
    lam = 1e-2 * centred.square().sum() / x.shape[1]
    ones, zeros = torch.ones(len(x), 1, dtype=x.dtype), torch.zeros(x.shape[1], 1, dtype=x.dtype)
    # the ones column is centred out of x so that the ridge on W says nothing about b
    above = torch.cat([torch.cat([centred, ones], 1), torch.cat([lam.sqrt() * torch.eye(12).double(), zeros], 1)])
    solution = torch.linalg.lstsq(above, torch.cat([y, lam.sqrt() * w0.T])).solution
    torch.testing.assert_close(found.weight, solution[:-1].T, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.bias, solution[-1] - found.weight @ x.mean(0), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("damp", [1e-6, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("n", [5, 13, 200])
@pytest.mark.filterwarnings("ignore:.*calibration tokens")
def test_a_refit_never_raises_the_error(n, damp, with_bias):
    x, y, w0, b0 = data(n)
    moments = moments_of(x, y)
    bias = b0 if with_bias else None
    found = solve(moments, w0, bias, damp)
    assert moments.relative_error(found.weight, found.bias) <= moments.relative_error(w0, bias) * (1 + 1e-9)


def test_endless_damping_changes_nothing():
    x, y, w0, _ = data()
    found = solve(moments_of(x, y), w0, damp=1e12)
    torch.testing.assert_close(found.weight, w0, rtol=1e-6, atol=1e-6)


def test_too_few_tokens():
    x, y, w0, b0 = data(8)
    with pytest.raises(ValueError, match="layer: 8 calibration tokens for 12 input features; expected at least"):
        solve(moments_of(x, y), w0, damp=0.0)
    with pytest.warns(UserWarning, match="layer: 8 calibration tokens for 12 input features"):
        solve(moments_of(x, y), w0, b0, damp=1e-2)
    with pytest.raises(ValueError, match="damp >= 0"):
        solve(moments_of(x, y), w0, damp=-1.0)


def test_dead_and_duplicate_features():
    x, y, w0, _ = data()
    dead = torch.zeros_like(x)
    assert torch.equal(solve(moments_of(dead, y), w0).weight, w0)
    x[:, 1] = x[:, 0]
    found = solve(moments_of(x.mul_(1e6), y), w0, damp=0.0)  # falls back on eigenvectors
    assert (found.method, found.rank, found.features) == ("eigen", 11, 12)
    best = torch.linalg.lstsq(x, y - x @ w0.T, driver="gelsd").solution  # the smallest change of W0
    torch.testing.assert_close(found.weight, w0 + best.T, rtol=1e-6, atol=1e-12)


def test_rank_and_condition_are_those_of_the_matrix():
    x, y, w0, b0 = data()
    x[:, 3] = 0
    for bias, damp in ((None, 1e-2), (b0, 1e-4), (None, 1.0)):
        found = solve(moments_of(x, y), w0, bias, damp)
        rows = x - x.mean(0) if bias is not None else x
        assert (found.method, found.rank, found.tokens) == ("cholesky", 11, 200)
        exact = torch.linalg.cond(rows.T @ rows + found.lam * torch.eye(12).double()).item()
        assert 0.7 * exact <= found.condition <= exact * (1 + 1e-9)
        assert found.lam == pytest.approx(damp * rows.square().sum().item() / 12)
    with pytest.warns(UserWarning, match="8 calibration tokens for 12"):
        assert solve(moments_of(x[:8], y[:8]), w0, damp=1e-2).rank == 8


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Linear(4, 3, bias=False), Conv1D(3, 4)])
def test_adding_to_a_bias_shifts_the_outputs(layer):
    x, shift = torch.randn(5, 4), torch.tensor([1.0, -2.0, 0.5])
    before = layer(x)
    add_to_bias(layer, shift.double())
    torch.testing.assert_close(layer(x), before + shift)
    assert layer.bias.dtype == torch.float32


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("damp", [0.0, 1e-2, 1.0])
def test_through_a_layer_equals_computing_its_outputs(damp, with_bias):
    """y is what the layer reads in the dense model; its outputs there, computed, are the same targets."""
    x, _, w0, b0 = data()
    dense = x.tanh() + 0.2 * x.roll(1, 0)
    bias = b0 if with_bias else None
    y = dense @ w0.T + (b0 if with_bias else 0)
    found = solve(moments_of(x, dense), w0, bias, damp, through=True)
    expected = solve(moments_of(x, y), w0, bias, damp)
    torch.testing.assert_close(found.weight, expected.weight)
    assert not torch.allclose(found.weight, w0, rtol=1e-2)
    assert (found.bias is None) == (not with_bias)
    if with_bias:
        torch.testing.assert_close(found.bias, expected.bias)


@pytest.mark.parametrize("with_bias", [False, True])
def test_through_several_linears_at_once_equals_one_by_one(with_bias):
    x, *_ = data()
    dense = x.tanh() + 0.2 * x.roll(1, 0)
    together, alone = ([nn.Linear(12, d_y, with_bias).double() for d_y in (5, 3, 8)] for _ in range(2))
    with torch.no_grad():
        for a, b in zip(together, alone, strict=True):
            b.load_state_dict(a.state_dict())
            refit([b], moments_of(x, b(dense)))
    refit(together, moments_of(x, dense), through=True)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.state_dict(), b.state_dict())


def test_refit_several_linears_at_once_equals_one_by_one():
    x, *_ = data()
    x = x.float()
    torch.manual_seed(0)
    targets = [nn.Linear(12, 5), nn.Linear(12, 3)]
    y = torch.cat([target(x).tanh() for target in targets], 1).detach()
    together, alone = [nn.Linear(12, 5), nn.Linear(12, 3)], [nn.Linear(12, 5), nn.Linear(12, 3)]
    for a, b in zip(together, alone, strict=True):
        b.load_state_dict(a.state_dict())
    refit(together, moments_of(x, y))
    refit(alone[:1], moments_of(x, y[:, :5]))
    refit(alone[1:], moments_of(x, y[:, 5:]))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.weight, b.weight)
        torch.testing.assert_close(a.bias, b.bias)


def test_conv1d_and_linear_are_refitted_alike():
    x, y, *_ = data()
    linear, conv = nn.Linear(12, 7).double(), Conv1D(7, 12).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    for layer in (linear, conv):
        refit([layer], moments_of(x, y))
    torch.testing.assert_close(weight_of(conv), linear.weight)
    torch.testing.assert_close(conv(x), linear(x))
