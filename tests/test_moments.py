"""Moments stream what the data says, and can be read, restricted and aimed without another pass."""

import pytest
import torch
from test_reconstruct import data, moments_of

from greedy_helpers import Moments

SUMS = ("xx", "xy", "x", "y", "yy")


def assert_same_sums(one, other, **close):
    for key in SUMS:
        torch.testing.assert_close(getattr(one, key), getattr(other, key), **close, msg=key)


def test_batches_do_not_matter():
    x, y, *_ = data()
    once, often = moments_of(x, y), moments_of(x, y, 7)
    assert often.n == 200
    assert_same_sums(often, once, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(once.mean_square, x.square().mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_are_accumulated_in_full(dtype):
    x, y = torch.full((4096, 3), 3.0, dtype=dtype), torch.full((4096, 2), 2.0, dtype=dtype)
    moments = moments_of(x, y, 64)
    assert moments.xx.dtype == torch.float64
    assert moments.xx[0, 1].item() == 9 * 4096  # float16 cannot even count to 4,096 in ones


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
    assert_same_sums(some, again)
    assert some.relative_error(w0[:, channels]) == pytest.approx(again.relative_error(w0[:, channels]))


def test_aiming_at_a_layer_equals_running_it():
    x, _, w0, b0 = data()
    for bias in (None, b0):
        y = x @ w0.T + (0 if bias is None else bias)
        found, measured = moments_of(x, y).aim_at(w0, bias), moments_of(x, y)
        assert_same_sums(found, measured)
        assert found.relative_error(w0, bias) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("d_x", [511, 512, 513, 1200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_inputs_are_summed_in_strips(d_x, dtype):
    """X'X equals the whole product, symmetric to the last bit, however often it is read on the way."""
    x = torch.randn(90, d_x, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    moments = Moments()
    for batch in x.split(40):
        moments.update(batch)
        moments.update(batch)
        assert moments.xx.shape == (d_x, d_x)
    close = {"rtol": 1e-12, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(moments.xx, 2 * x.double().T @ x.double(), **close)
    assert torch.equal(moments.xx, moments.xx.T)


def test_moments_made_from_others_share_no_fate():
    """Neither making them, nor more tokens on either side, changes the other."""
    x, y, w0, b0 = data()
    made = {"select": lambda m: m.select(torch.arange(12)), "aim_at": lambda m: m.aim_at(w0, b0)}
    for make in made.values():
        moments = moments_of(x, y, 50)
        other = make(moments)
        before = {key: getattr(other, key).clone() for key in SUMS}
        assert_same_sums(moments, moments_of(x, y))
        moments.update(x, y)
        assert_same_sums(moments, moments_of(torch.cat([x, x]), torch.cat([y, y])))
        assert all(torch.equal(getattr(other, key), value) for key, value in before.items())
        other.update(x, y)
        assert_same_sums(moments, moments_of(torch.cat([x, x]), torch.cat([y, y])))
        torch.testing.assert_close(other.xx, 2 * before["xx"])
        assert (moments.n, other.n) == (400, 400)


@pytest.mark.parametrize(("where", "message"), [("x", "layer: NaN or Inf in the activations"), ("y", "target outputs")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_name_the_layer_whenever_a_sum_is_read(where, message, value):
    x, y, *_ = data(20)
    {"x": x, "y": y}[where][3, 2] = value
    moments = moments_of(*data(20)[:2])
    moments.update(x, y)
    for key in (*SUMS, "mean_square", "xx"):
        with pytest.raises(FloatingPointError, match=message):
            getattr(moments, key)
