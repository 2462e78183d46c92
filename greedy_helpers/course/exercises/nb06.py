"""Checkers of notebook 06, reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .common import expect, is_tensor, same


def _draw(seed: int, n: int, d_x: int, d_y: int) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs with means, targets with an offset, and a current weight. Float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_x, generator=generator).double() @ torch.randn(d_x, d_x, generator=generator).double() + 1.5
    w0 = torch.randn(d_y, d_x, generator=generator).double()
    y = x @ torch.randn(d_x, d_y, generator=generator).double() + torch.randn(n, d_y, generator=generator).double() - 2
    return x, y, w0


def _augmented(x: Tensor, y: Tensor, toward: Tensor, lam: float) -> Tensor:
    """min ||Y - X W'||^2 + lam ||W - toward||^2 by plain least squares with sqrt(lam) I stacked below X: [d_y, d_x]."""
    above = torch.cat([x, math.sqrt(lam) * torch.eye(x.shape[1]).double()])
    below = torch.cat([y, math.sqrt(lam) * toward.T])
    return torch.linalg.lstsq(above, below).solution.T


def check_ridge_toward(ridge_toward: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> str:
    """Notebook 06: `ridge_toward(x, y, w0, lam)` -> W [d_y, d_x] near the targets and near the current weight."""
    for n, lam in ((40, 0.0), (40, 3.0), (3, 0.5)):
        given = _draw(0, n, 5, 2)
        before = [tensor.clone() for tensor in given]
        x, y, w0 = before
        what = f"{n} tokens, lam = {lam}"
        found = is_tensor(ridge_toward(*given, lam), (2, 5), what)
        expect(same(given, before), "ridge_toward: changed one of its arguments; work on copies")
        right = _augmented(x, y, w0, lam)
        toward_zero = _augmented(x, y, torch.zeros_like(w0), lam)
        expect(
            lam == 0 or not torch.allclose(found, toward_zero, rtol=1e-6),
            f"{what}: this W is pulled toward zero. Solve for the *change* of the weight: its target is what the "
            "current weight leaves over, Y - X W0'",
        )
        expect(
            torch.allclose(found, right, rtol=1e-6, atol=1e-8),
            f"{what}: least squares with sqrt(lam) I stacked below X gives\n{right}\nfound\n{found}",
        )
    x, y, w0 = _draw(1, 4, 5, 2)
    silent = torch.zeros_like(x)
    found = ridge_toward(silent, y, w0, 0.1)
    expect(
        torch.allclose(found, w0, rtol=1e-6),
        "inputs that are always zero teach nothing: W has to stay W0, however large lam is",
    )
    return "correct: near the targets where data speak, near the current weight where they do not"


ErrorFromMoments = Callable[[Tensor, Tensor, Tensor, Tensor], float | Tensor]


def check_error_from_moments(error_from_moments: ErrorFromMoments) -> str:
    """Notebook 06: `error_from_moments(xx, xy, yy, w)` -> ||Y - X W'||^2 / ||Y||^2 from X'X, X'Y and ||Y||^2."""
    for seed, n in ((2, 30), (3, 4)):
        x, y, w = _draw(seed, n, 6, 3)
        given = (x.T @ x, x.T @ y, y.square().sum(), w)
        before = [tensor.clone() for tensor in given]
        found = error_from_moments(*given)
        expect(found is not None, "error_from_moments: expected a number, found None")
        found = torch.as_tensor(found)
        expect(found.numel() == 1, f"error_from_moments: expected one number, found shape {list(found.shape)}")
        expect(same(given, before), "error_from_moments: changed one of its arguments; work on copies")
        found, total = found.item(), y.square().sum().item()
        left = (y - x @ w.T).square().sum().item()
        right, hint = left / total, ""
        if math.isclose(found, left, rel_tol=1e-6):
            hint = ". That is the error itself: divide by the energy of the targets"
        elif math.isclose(found, math.sqrt(right), rel_tol=1e-6):
            hint = ". Here errors are squared: no root"
        elif math.isclose(found, right + (w.T * (x.T @ y)).sum().item() / total, rel_tol=1e-6):
            hint = ". The mixed term stands there twice: (a - b)^2 = a^2 - 2ab + b^2"
        expect(math.isclose(found, right, rel_tol=1e-6), f"{n} tokens: expected {right:.6f}, found {found:.6f}{hint}")
    x, _, w = _draw(4, 20, 6, 3)
    y = x @ w.T
    found = float(error_from_moments(x.T @ x, x.T @ y, y.square().sum(), w))
    expect(abs(found) < 1e-9, f"targets that the layer meets exactly: expected an error of 0, found {found}")
    found = float(error_from_moments(x.T @ x, x.T @ y, y.square().sum(), torch.zeros_like(w)))
    expect(abs(found - 1) < 1e-9, f"a layer that says nothing: expected an error of 1, found {found}")
    return "correct: no activation was needed"


CentredSolve = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def check_centred_solve(centred_solve: CentredSolve) -> str:
    """Notebook 06: `centred_solve(n, xx, xy, x, y, w0, lam)` -> (W, b), from sums over n tokens; b is not damped."""
    for lam in (0.0, 2.0, 1e9):
        data, targets, w0 = _draw(5, 50, 4, 3)
        given = (data.T @ data, data.T @ targets, data.sum(0), targets.sum(0), w0)
        before = [tensor.clone() for tensor in given]
        found = centred_solve(50, *given, lam)
        what = f"lam = {lam:g}"
        expect(isinstance(found, tuple | list) and len(found) == 2, f"{what}: expected a pair (W, b)")
        weight, bias = is_tensor(found[0], (3, 4), f"{what}: W"), is_tensor(found[1], (3,), f"{what}: b")
        expect(same(given, before), "centred_solve: changed one of its arguments; work on copies")
        middle, aim = data.mean(0), targets.mean(0)
        right = _augmented(data - middle, targets - aim, w0, lam)
        uncentred = _augmented(data, targets, w0, lam)
        expect(
            not torch.allclose(weight, uncentred, rtol=1e-6) or torch.allclose(uncentred, right, rtol=1e-6),
            f"{what}: this W solves the problem without a bias. Centre first: X'X - x x' / n with x the sum over "
            "tokens, and X'Y alike",
        )
        expect(
            torch.allclose(weight, right, rtol=1e-5, atol=1e-8),
            f"{what}: W: least squares on the centred data gives\n{right}\nfound\n{weight}",
        )
        best = aim - right @ middle
        expect(
            torch.allclose(bias, best, rtol=1e-5, atol=1e-6),
            f"{what}: b: expected mean(y) - W mean(x) = {best}, found {bias}. Take the new W, and means, not sums",
        )
    return "correct: the weight explains what varies, the bias what does not"


def check_bias_remedy(bias_remedy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Notebook 06: `bias_remedy(w, z, gone)` -> the constant [d] that best replaces the removed channels of z."""
    for gone in ([1], [4, 0, 2]):
        z, _, w = _draw(6, 25, 6, 3)
        given = (w, z, torch.tensor(gone))
        before = [tensor.clone() for tensor in given]
        what = f"channels {gone}"
        found = is_tensor(bias_remedy(*given), (3,), what)
        expect(same(given, before), "bias_remedy: changed one of its arguments; work on copies")
        lost = z[:, gone] @ w[:, gone].T
        right, hint = lost.mean(0), ""
        stays = [c for c in range(6) if c not in gone]
        if torch.allclose(found, lost.sum(0)):
            hint = ". That is the sum over tokens: a constant is added at every token, so take the mean"
        elif torch.allclose(found, z.mean(0) @ w.T):
            hint = ". That is the mean of the whole output: only what was removed is missing"
        elif torch.allclose(found, (z[:, stays] @ w[:, stays].T).mean(0)):
            hint = ". That is the mean of what stays: it is still there"
        elif torch.allclose(found, -right):
            hint = ". The sign: what was lost has to be put back"
        expect(torch.allclose(found, right), f"{what}: expected {right}, found {found}{hint}")
    w, z = torch.ones(3, 2).double(), torch.ones(4, 2).double()
    found = is_tensor(bias_remedy(w, z, torch.tensor([], dtype=torch.long)), (3,), "nothing removed")
    expect(bool((found == 0).all()), f"nothing removed: expected zeros, found {found}")
    return "correct: the mean of what was removed"
