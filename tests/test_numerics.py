"""Solves that have to hold at the sizes and scales of real models: wide units, several threads, loud channels."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import calibration, threads
from tiny import tiny_model
from torch import nn

import greedy_helpers
from greedy_helpers import Moments, Seen, depth2_modules, exact_greedy, prune, solve
from greedy_helpers.criteria import obs_cost, removal_costs, weighted_square
from greedy_helpers.greedy import eliminate, swap

N_UNITS, WIDTH, D_Y = 3, 192, 64  # heads of 192 channels: where batched LU is wrong on some processors
INDEX = torch.arange(N_UNITS * WIDTH).view(N_UNITS, WIDTH)


@pytest.fixture(autouse=True)
def two_threads():
    with threads(2):
        yield


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
    module = SimpleNamespace(n_units=N_UNITS, n_sets=1, level2=SimpleNamespace(linear=linear, index=INDEX))
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


def module_of(linear, width=1):
    index = torch.arange(linear.in_features).view(-1, width)
    return SimpleNamespace(n_units=len(index), n_sets=1, level2=SimpleNamespace(linear=linear, index=index))


@pytest.mark.parametrize(
    ("features", "agree", "loud", "bias"),
    [
        (256, "at one token", 70, True),
        (256, "at one token", 1000, False),
        (2048, "at one token", 300, False),
        (2048, "always", 1000, True),
    ],
)
def test_single_precision_beside_loud_channels_that_agree(features, agree, loud, bias):
    """Massive activations are on together, at the first token: float32 alone cannot tell such channels apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * features, features, generator=generator)
    x[:, 1:] += 0.5 * x[:, :-1]
    if agree == "always":
        x[:, 7] *= loud
        x[:, 40] = 0.8 * x[:, 7]
    else:
        first = torch.arange(0, len(x), 128)
        for channel, share in ((7, 1), (40, 0.8), (100, 0.5)):
            x[first, channel] = 10 * loud * share * (1 + 0.01 * torch.randn(len(first), generator=generator))
    y = x[:, :16].tanh()
    torch.manual_seed(0)
    linear = nn.Linear(features, 16, bias).requires_grad_(False)
    wide, narrow = Moments("wide"), Moments("narrow", dtype=torch.float32)
    for batch_x, batch_y in zip(x.split(500), y.split(500), strict=True):
        wide.update(batch_x, batch_y)
        narrow.update(batch_x, batch_y)
    solutions = [solve(moments, linear.weight, linear.bias) for moments in (wide, narrow)]
    errors = [wide.relative_error(solution.weight, solution.bias) for solution in solutions]
    assert errors[1] == pytest.approx(errors[0], rel=0.001)
    exact, single = (obs_cost(module_of(linear), Seen(None, moments)) for moments in (wide, narrow))
    torch.testing.assert_close(single, exact, rtol=0.01, atol=0)
    if features == 256:
        exact, single = (exact_greedy(module_of(linear), Seen(None, moments)) for moments in (wide, narrow))
        torch.testing.assert_close(single, exact, rtol=0.01, atol=0)


@pytest.mark.parametrize(("offset", "within"), [(30, 1e-3), (100, 1e-3), (1000, 0.03), (1e4, 0.03)])
@pytest.mark.parametrize("through", [False, True])
def test_single_precision_beside_a_channel_with_a_large_mean(offset, within, through):
    """About the mean, single precision knows little or nothing of it: then its weights stay, and harm no other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 256, generator=generator)
    x[:, 1:] += 0.5 * x[:, :-1]
    x[:, 7] += offset
    y = x + 0.3 * torch.randn(1024, 256, generator=generator) if through else x[:, :16].tanh()
    torch.manual_seed(0)
    linear = nn.Linear(256, 16).requires_grad_(False)
    narrow, exact = Moments("narrow", dtype=torch.float32), Moments("exact")
    narrow.update(x, y)
    exact.update(x.double(), y.double())
    found, best = (solve(m, linear.weight, linear.bias, through=through) for m in (narrow, exact))
    wanted = linear(y).double() if through else y.double()

    def error(solution):
        return (wanted - x.double() @ solution.weight.double().T - solution.bias.double()).square().sum().item()

    assert error(found) == pytest.approx(error(best), rel=within)
    if offset <= 100 and not through:
        costs = (obs_cost(module_of(linear), Seen(None, moments)) for moments in (narrow, exact))
        torch.testing.assert_close(*costs, rtol=0.01, atol=0)


@pytest.mark.parametrize("loud", [1, 30, 1000])
def test_a_model_with_loud_channels_pruned_in_single_precision(loud):
    """The recommended recipe keeps the same units, and the same weights to what float32 rounds."""
    models = [tiny_model("gpt2"), tiny_model("gpt2")]
    for model, precision in zip(models, (torch.float64, torch.float32), strict=True):
        for module in depth2_modules(model, kinds={"ffn"}):
            module.level1["c_fc"].linear.weight.data[:, [3, 50]] *= loud
        model.keep = [
            s.keep.tolist() for s in prune(model, calibration(24), 0.25, precision=precision, progress=False).steps
        ]
    assert models[0].keep == models[1].keep
    with torch.no_grad():
        exact, single = (model(calibration(4, seed=8)).logits for model in models)
    assert (exact - single).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("case", ["never on", "equal", "constant"])
def test_without_damping_dependent_channels_are_refused_by_name(case, width, bias, dtype):
    """A pseudo-inverse would price them wrongly, by up to 1e26; `solve` may use one, its outputs are the same."""
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    x[:, 5] = {"never on": torch.zeros(400), "equal": x[:, 20], "constant": torch.full((400,), 3.0)}[case]
    moments = Moments("block.down", dtype=dtype)
    moments.update(x)
    linear = nn.Linear(32, 8, bias).requires_grad_(False)
    module, seen = module_of(linear, width), Seen(None, moments, damp=0.0)
    for criterion in (obs_cost, exact_greedy, partial(exact_greedy, swaps=3)):
        if case == "constant" and not bias:  # nothing is taken off: independent of the others
            assert criterion(module, seen).isfinite().all()
            continue
        with pytest.raises(ValueError, match=r"block\.down: the 32 channels are not independent .* found 0"):
            criterion(module, seen)
    solution = solve(moments, linear.weight, linear.bias, 0.0)  # without targets: the layer's own outputs
    torch.testing.assert_close(solution.weight, linear.weight.to(solution.weight))
    if bias:
        torch.testing.assert_close(solution.bias, linear.bias.to(solution.bias), rtol=1e-4, atol=1e-4)


def test_trades_in_single_precision():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    linear = nn.Linear(24, 4, False).requires_grad_(False)
    linear.weight.copy_(torch.randn(4, 24, generator=generator))
    scores = []
    for dtype in (torch.float64, torch.float32):
        moments = Moments("m", dtype=dtype)
        moments.update(x)
        for seed in range(8):  # some of them trade
            y = x @ torch.randn(24, 4, generator=torch.Generator().manual_seed(seed))
            paired = Moments("m", dtype=dtype)
            paired.update(x, y)
            scores.append(exact_greedy(module_of(linear, 2), Seen(None, paired, n_keep=4), swaps=5, dtype=dtype))
    for exact, single in zip(scores[:8], scores[8:], strict=True):
        torch.testing.assert_close(single, exact, rtol=1e-3, atol=1e-3)


def test_no_batched_lu_in_the_package():
    """Where it is wrong it raises nothing. The exercises invert single matrices."""
    package = Path(greedy_helpers.__file__).parent
    texts = {
        path.name: path.read_text(encoding="utf-8") for path in package.rglob("*.py") if "course" not in path.parts
    }
    assert len(texts) > 20
    for name, text in texts.items():
        assert not re.search(r"linalg\.(solve|inv|lu\w*|lstsq|pinv)\(|\.inverse\(\)\s*@|torch\.inverse", text), name
