"""Moments stream what the data says; least squares from moments equals least squares from the data."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from greedy_helpers import Moments, least_squares, solve, weight_of
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


def test_batches_do_not_matter():
    x, y, *_ = data()
    once, often = moments_of(x, y), moments_of(x, y, 7)
    assert often.n == 200
    for key in ("xx", "xy", "x", "y", "yy"):
        torch.testing.assert_close(getattr(often, key), getattr(once, key), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(once.mean_square, x.square().mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_are_accumulated_in_full(dtype):
    x, y = torch.full((4096, 3), 3.0, dtype=dtype), torch.full((4096, 2), 2.0, dtype=dtype)
    moments = moments_of(x, y, 64)
    assert moments.xx.dtype == torch.float64
    assert moments.xx[0, 1].item() == 9 * 4096  # float16 cannot even count to 4,096 in ones


@pytest.mark.parametrize(("n", "damp"), [(200, 0.0), (200, 1e-2), (200, 1.0), (8, 1e-2)])
@pytest.mark.filterwarnings("ignore:.*calibration tokens")
def test_ridge_equals_lstsq_on_the_augmented_system(n, damp):
    """min ||Y - X W'||^2 + lam ||W - W0||^2 is plain least squares with sqrt(lam) I stacked below X."""
    x, y, w0, _ = data(n)
    moments = moments_of(x, y)
    found, bias = least_squares(moments, w0, damp=damp)
    lam = damp * moments.xx.diagonal().mean()
    above = torch.cat([x, lam.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    below = torch.cat([y, lam.sqrt() * w0.T])
    torch.testing.assert_close(found, torch.linalg.lstsq(above, below).solution.T, rtol=1e-7, atol=1e-9)
    assert bias is None


def test_with_bias_equals_lstsq_with_a_column_of_ones():
    x, y, w0, b0 = data()
    moments = moments_of(x, y)
    weight, bias = least_squares(moments, w0, b0, damp=1e-2)
    centred = x - x.mean(0)
    lam = 1e-2 * centred.square().sum() / x.shape[1]
    ones, zeros = torch.ones(len(x), 1, dtype=x.dtype), torch.zeros(x.shape[1], 1, dtype=x.dtype)
    # the ones column is centred out of x so that the ridge on W says nothing about b
    above = torch.cat([torch.cat([centred, ones], 1), torch.cat([lam.sqrt() * torch.eye(12).double(), zeros], 1)])
    solution = torch.linalg.lstsq(above, torch.cat([y, lam.sqrt() * w0.T])).solution
    torch.testing.assert_close(weight, solution[:-1].T, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(bias, solution[-1] - weight @ x.mean(0), rtol=1e-7, atol=1e-9)


def test_relative_error_from_moments_equals_measured():
    x, y, w0, b0 = data()
    moments = moments_of(x, y, 9)
    for bias in (None, b0):
        residual = y - x @ w0.T - (0 if bias is None else bias)
        measured = (residual.square().sum() / y.square().sum()).item()
        assert moments.relative_error(w0, bias) == pytest.approx(measured, rel=1e-9)


def test_selected_moments_equal_moments_of_selected_channels():
    x, y, w0, _ = data()
    channels = torch.tensor([1, 4, 9])
    some, again = moments_of(x, y).select(channels), moments_of(x[:, channels], y)
    for key in ("xx", "xy", "x", "y", "yy"):
        torch.testing.assert_close(getattr(some, key), getattr(again, key))
    assert some.relative_error(w0[:, channels]) == pytest.approx(again.relative_error(w0[:, channels]))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("damp", [1e-6, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("n", [5, 13, 200])
@pytest.mark.filterwarnings("ignore:.*calibration tokens")
def test_a_refit_never_raises_the_error(n, damp, with_bias):
    x, y, w0, b0 = data(n)
    moments = moments_of(x, y)
    bias = b0 if with_bias else None
    weight, new_bias = least_squares(moments, w0, bias, damp)
    assert moments.relative_error(weight, new_bias) <= moments.relative_error(w0, bias) * (1 + 1e-9)


def test_endless_damping_changes_nothing():
    x, y, w0, _ = data()
    weight, _ = least_squares(moments_of(x, y), w0, damp=1e12)
    torch.testing.assert_close(weight, w0, rtol=1e-6, atol=1e-6)


def test_too_few_tokens():
    x, y, w0, b0 = data(8)
    with pytest.raises(ValueError, match="layer: 8 calibration tokens for 12 input features; expected at least"):
        least_squares(moments_of(x, y), w0, damp=0.0)
    with pytest.warns(UserWarning, match="layer: 8 calibration tokens for 12 input features"):
        least_squares(moments_of(x, y), w0, b0, damp=1e-2)
    with pytest.raises(ValueError, match="damp >= 0"):
        least_squares(moments_of(x, y), w0, damp=-1.0)


def test_dead_and_duplicate_features():
    x, y, w0, _ = data()
    dead = torch.zeros_like(x)
    weight, _ = least_squares(moments_of(dead, y), w0)
    assert torch.equal(weight, w0)
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


def test_aiming_at_a_layer_equals_running_it():
    x, _, w0, b0 = data()
    for bias in (None, b0):
        y = x @ w0.T + (0 if bias is None else bias)
        found, measured = moments_of(x, y).aim_at(w0, bias), moments_of(x, y)
        for key in ("xy", "y", "yy"):
            torch.testing.assert_close(getattr(found, key), getattr(measured, key))
        assert found.relative_error(w0, bias) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Linear(4, 3, bias=False), Conv1D(3, 4)])
def test_adding_to_a_bias_shifts_the_outputs(layer):
    x, shift = torch.randn(5, 4), torch.tensor([1.0, -2.0, 0.5])
    before = layer(x)
    add_to_bias(layer, shift.double())
    torch.testing.assert_close(layer(x), before + shift)
    assert layer.bias.dtype == torch.float32


@pytest.mark.parametrize(("where", "message"), [("x", "layer: NaN or Inf in the activations"), ("y", "target outputs")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_name_the_layer(where, message, value):
    x, y, *_ = data(20)
    {"x": x, "y": y}[where][3, 2] = value
    moments = moments_of(*data(20)[:2])
    with pytest.raises(FloatingPointError, match=message):
        moments.update(x, y)
    assert moments.n == 20  # what was there before is still good


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
