"""Solves that have to hold at the sizes and scales of real models: wide units, several threads, loud channels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from greedy_helpers import Moments, Seen, exact_greedy, solve
from greedy_helpers.criteria import obs_cost, removal_costs, weighted_square
from greedy_helpers.greedy import eliminate, swap

N_UNITS, WIDTH, D_Y = 3, 192, 64  # heads of 192 channels: where batched LU is wrong on some processors
INDEX = torch.arange(N_UNITS * WIDTH).view(N_UNITS, WIDTH)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wide():
    """(h, solution) of correlated channels, in float64."""
    generator = torch.Generator().manual_seed(0)
    n = N_UNITS * WIDTH
    x = torch.randn(2000, n, generator=generator, dtype=torch.float64) @ torch.randn(n, n, generator=generator).double()
    return x.T @ x / 2000 + torch.eye(n), torch.randn(n, D_Y, generator=generator, dtype=torch.float64)


def cost_of(h, solution, channels):
    """tr(B_g' ([H^-1]_gg)^-1 B_g) in numpy, one matrix at a time."""
    h, b = h.numpy(), solution.numpy()[channels]
    block = np.linalg.inv(h)[np.ix_(channels, channels)]
    return float(np.trace(b.T @ np.linalg.solve(block, b)))


def costs_of(h, solution):
    return pytest.approx([cost_of(h, solution, channels.numpy()) for channels in INDEX], rel=1e-8)


def test_costs_of_wide_units(wide):
    h, solution = wide
    inverse = torch.from_numpy(np.linalg.inv(h.numpy()))
    assert removal_costs(inverse, solution, INDEX).tolist() == costs_of(h, solution)
    blocks = inverse[INDEX[:, :, None], INDEX[:, None, :]]
    assert weighted_square(blocks, solution[INDEX]).tolist() == costs_of(h, solution)


def error_without(h, solution, gone):
    """By how much the error rises without these units: (B_g refitted away), in numpy."""
    return cost_of(h, solution, INDEX[list(gone)].flatten().numpy())


def test_elimination_and_trades_of_wide_units(wide):
    h, solution = wide
    path = eliminate(h, solution, INDEX, 1)
    first, second = path.order.tolist()
    singles = [error_without(h, solution, [unit]) for unit in range(N_UNITS)]
    assert first == int(np.argmin(singles))
    assert path.costs.sum().item() == pytest.approx(error_without(h, solution, [first, second]), rel=1e-8)
    pairs = {unit: error_without(h, solution, {0, 1, 2} - {unit}) for unit in range(N_UNITS)}
    best = min(pairs, key=pairs.get)
    for start in range(N_UNITS):
        keep, trades = swap(h, h @ solution, INDEX, torch.tensor([start]))
        assert keep.tolist() == [best]
        assert (trades > 0) == (start != best)


@pytest.mark.parametrize("bias", [False, True])
def test_criteria_on_wide_units(bias):
    generator = torch.Generator().manual_seed(1)
    n = N_UNITS * WIDTH
    x = torch.randn(1500, n, generator=generator, dtype=torch.float64) + 0.5
    linear = nn.Linear(n, D_Y, bias).double()
    module = SimpleNamespace(n_units=N_UNITS, level2=SimpleNamespace(linear=linear, index=INDEX))
    moments = Moments("wide")
    moments.update(x)
    centred = (x - x.mean(0) if bias else x).numpy()
    h = centred.T @ centred
    h += np.eye(n) * 0.02 * np.trace(h) / n
    solution = linear.weight.detach().T
    expected = np.array([cost_of(torch.from_numpy(h), solution, channels.numpy()) for channels in INDEX]) / 1500
    assert obs_cost(module, Seen(None, moments, damp=0.02)).tolist() == pytest.approx(expected.tolist(), rel=1e-8)
    scores = exact_greedy(module, Seen(None, moments, damp=0.02))
    first = int(expected.argmin())
    assert scores.argmin() == first
    assert scores[first].item() == pytest.approx(expected[first], rel=1e-8)
    middle = int(scores.argsort()[1])
    both = error_without(torch.from_numpy(h), solution, [first, middle]) / 1500
    assert scores[middle].item() == pytest.approx(both, rel=1e-8)


@pytest.mark.parametrize(("features", "loud"), [(512, 1), (512, 70), (512, 1000), (2048, 70), (2048, 1000)])
def test_single_precision_solves_beside_loud_channels(features, loud):
    """One channel far louder than the rest, as in real activations: float32 costs less than 1% of the error."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * features, features, generator=generator)
    x[:, 1:] += 0.5 * x[:, :-1]
    x[:, 7] *= loud
    y = x[:, :16].tanh() + 0.1 * torch.randn(len(x), 16, generator=generator)
    w0 = 0.02 * torch.randn(16, features, generator=generator)
    wide, narrow = Moments("wide"), Moments("narrow", dtype=torch.float32)
    for batch_x, batch_y in zip(x.split(500), y.split(500), strict=True):
        wide.update(batch_x, batch_y)
        narrow.update(batch_x, batch_y)
    for bias in (None, torch.zeros(16)):
        exact, single = solve(wide, w0, bias, 1e-3), solve(narrow, w0, bias, 1e-3)
        assert (exact.method, single.method) == ("cholesky", "cholesky")
        assert single.weight.dtype == torch.float32
        errors = [wide.relative_error(found.weight, found.bias) for found in (exact, single)]
        assert errors[1] == pytest.approx(errors[0], rel=0.01)
        assert errors[0] < wide.relative_error(w0, bias)
