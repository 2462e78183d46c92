"""Checkers of notebook 09, beyond the paper."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .common import expect, is_index, same


def _problem(seed: int, channels: int = 6, tokens: int = 40, d_y: int = 3, lam: float = 0.5) -> tuple[Tensor, ...]:
    """Correlated channels z, targets y, and the normal equations' H and solution B. Float64."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, channels, generator=generator).double()
    z = z @ torch.randn(channels, channels, generator=generator).double()
    y = z @ torch.randn(channels, d_y, generator=generator).double()
    y = y + torch.randn(tokens, d_y, generator=generator).double()
    h = z.T @ z + lam * torch.eye(channels).double()
    return z, y, h, torch.linalg.solve(h, z.T @ y)


def _ridge(z: Tensor, y: Tensor, channels: Sequence[int], lam: float = 0.5) -> tuple[float, Tensor]:
    """min ||Y - Z_S B||^2 + lam ||B||^2 by plain least squares on the augmented system: no shortcut."""
    z = z[:, list(channels)]
    above = torch.cat([z, math.sqrt(lam) * torch.eye(z.shape[1]).double()])
    below = torch.cat([y, y.new_zeros(z.shape[1], y.shape[1])])
    solution = torch.linalg.lstsq(above, below).solution
    return (below - above @ solution).square().sum().item(), solution


def check_removal_cost(removal_cost: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """Notebook 09: `removal_cost(h, b, j)` -> the rise of the error when channel j goes and the rest is refitted."""
    z, y, h, b = _problem(0)
    before = h.clone(), b.clone()
    everything = _ridge(z, y, range(6))[0]
    for j in range(6):
        found = removal_cost(h, b, j)
        expect(found is not None, "removal_cost: expected a number, found None")
        found = torch.as_tensor(found)
        expect(found.numel() == 1, f"removal_cost: expected one number, found shape {list(found.shape)}")
        right = _ridge(z, y, [c for c in range(6) if c != j])[0] - everything
        energy = (h[j, j] * b[j].square().sum()).item()
        expect(
            not math.isclose(found.item(), energy, rel_tol=1e-6),
            f"channel {j}: {energy:.4f} is what its removal costs when nobody is refitted. Divide by a diagonal entry "
            "of the inverse of H instead of multiplying by one of H",
        )
        expect(
            math.isclose(found.item(), right, rel_tol=1e-6),
            f"channel {j}: solving again without it raises the error by {right:.4f}, found {found.item():.4f}",
        )
    expect(same((h, b), before), "removal_cost: changed its argument; work on a copy")
    lonely = removal_cost(torch.diag(torch.tensor([4.0, 9.0])).double(), torch.eye(2).double(), 1)
    expect(
        math.isclose(float(lonely), 9.0, rel_tol=1e-6),
        f"uncorrelated channels: nobody can step in, so the cost is the energy 9.0; found {float(lonely):.4f}",
    )
    return "correct: as if the rest had been solved again"


def check_downdate(downdate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> str:
    """Notebook 09: `downdate(inverse, b, g)` -> H^-1 and B on the channels that are left when `g` go."""
    z, y, h, b = _problem(1)
    inverse = torch.linalg.inv(h)
    for g in (torch.tensor([2]), torch.tensor([4, 1])):
        before = inverse.clone(), b.clone()
        found = downdate(inverse, b, g)
        expect(
            isinstance(found, tuple | list) and len(found) == 2,
            "downdate: expected a pair, the new inverse and B",
        )
        new_inverse, new_b = found
        expect(same((inverse, b), before), "downdate: changed its argument; work on a copy")
        rest = [c for c in range(6) if c not in g.tolist()]
        n, what = len(rest), f"without channels {g.tolist()}"
        expect(
            tuple(new_inverse.shape) == (n, n) and tuple(new_b.shape) == (n, 3),
            f"{what}: expected shapes [{n}, {n}] and [{n}, 3], found {list(new_inverse.shape)} and "
            f"{list(new_b.shape)}; the rows and columns of what went have to go as well",
        )
        expect(
            not torch.allclose(new_inverse, inverse[rest][:, rest]),
            f"{what}: these are rows and columns of the old inverse. The inverse of a part is not the part of the "
            "inverse: subtract what H^-1 knew through the removed channels",
        )
        right = torch.linalg.inv(h[rest][:, rest])
        expect(torch.allclose(new_inverse, right), f"{what}: expected the inverse\n{right}\nfound\n{new_inverse}")
        expect(
            not torch.allclose(new_b, b[rest]),
            f"{what}: the survivors' rows of B did not move; they have to take over the work of what went",
        )
        solution = _ridge(z, y, rest)[1]
        expect(
            torch.allclose(new_b, solution),
            f"{what}: solving again gives B =\n{solution}\nfound\n{new_b}"
            + "\n(with two channels their block of H^-1 is a matrix: invert it, do not divide by its diagonal)"
            * (len(g) > 1),
        )
    return "correct: one channel or several, without solving again"


def check_residual_refit(
    residual_refit: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor],
) -> str:
    """Notebook 09: `residual_refit(z, y, x, x_hat, w0, lam)` -> W [d, channels] that also repairs the stream."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
    z, x, w0 = draw(50, 4), draw(50, 3), draw(3, 4)
    x_hat, y = x + 0.5 * z @ draw(4, 3), z @ w0.T + draw(50, 3)
    everything = (z, y, x, x_hat, w0)
    before = [tensor.clone() for tensor in everything]

    def ridge(target: Tensor, lam: float, toward: Tensor) -> Tensor:
        above = torch.cat([z, math.sqrt(lam) * torch.eye(4).double()])
        return torch.linalg.lstsq(above, torch.cat([target, math.sqrt(lam) * toward.T])).solution.T

    found = residual_refit(*everything, 0.0)
    expect(same(everything, before), "residual_refit: changed its argument; work on a copy")
    expect(isinstance(found, Tensor), f"residual_refit: expected a tensor, found {type(found).__name__}")
    expect(
        tuple(found.shape) == (3, 4),
        f"residual_refit: expected W of shape [3, 4] (outputs, channels), found {list(found.shape)}",
    )
    expect(
        not torch.allclose(found, ridge(y, 0.0, w0)),
        "residual_refit: this W only imitates the dense module (target Y); the stream's error is still there",
    )
    expect(
        not torch.allclose(found, ridge(y + x_hat - x, 0.0, w0)),
        "residual_refit: the sign. The stream has X_hat and should have X, so what it lacks is X - X_hat",
    )
    right = ridge(y + x - x_hat, 0.0, w0)
    expect(torch.allclose(found, right), f"residual_refit, lam = 0: expected\n{right}\nfound\n{found}")
    damped, right = residual_refit(*everything, 20.0), ridge(y + x - x_hat, 20.0, w0)
    expect(
        not torch.allclose(damped, ridge(y + x - x_hat, 20.0, torch.zeros_like(w0))),
        "residual_refit, lam = 20: this damping pulls toward zero; it has to pull toward the current weight w0",
    )
    expect(torch.allclose(damped, right), f"residual_refit, lam = 20: expected\n{right}\nfound\n{damped}")
    return "correct: it repairs the stream, and stays near the current weight where data say nothing"


def check_greedy_keep(greedy_keep: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """Notebook 09: `greedy_keep(h, b, n_keep)` -> sorted channels that survive the backward elimination."""
    for seed, n_keep in ((5, 5), (3, 3), (4, 2), (6, 6)):
        z, y, h, b = _problem(seed)
        before = h.clone(), b.clone()
        found = is_index(greedy_keep(h, b, n_keep), (n_keep,), f"greedy_keep, {n_keep} of 6")
        expect(same((h, b), before), "greedy_keep: changed its argument; work on a copy")
        expect(torch.equal(found, found.unique()), f"greedy_keep: expected sorted, distinct channels, found {found}")
        left = list(range(6))
        while len(left) > n_keep:
            trials = {j: _ridge(z, y, [c for c in left if c != j])[0] for j in left}
            left.remove(min(trials, key=trials.get))
        one_shot = b.square().sum(1) / torch.linalg.inv(h).diagonal()
        shortcut = torch.sort(one_shot.argsort(descending=True)[:n_keep]).values.tolist()
        expect(
            found.tolist() == left,
            f"greedy_keep, {n_keep} of 6: solving again after every removal leaves {left}, found {found.tolist()}"
            + (
                ". These are the dearest by the costs before anything went: after each removal the costs change"
                if found.tolist() == shortcut
                else ""
            ),
        )
    twins = torch.tensor([[1.0, 0.99, 0], [0.99, 1.0, 0], [0, 0, 0.5]]).double()
    kept = greedy_keep(twins, torch.eye(3).double(), 2).tolist()
    expect(kept in ([0, 2], [1, 2]), f"twins: one of channels 0 and 1 can stand in for the other; found {kept} kept")
    return "correct: the costs follow what is left"


def check_rising_prices(rising_prices: Callable[[Sequence[float]], Sequence[float]]) -> str:
    """Notebook 09: `rising_prices(prices)` -> the nearest sequence that never falls (pool adjacent violators)."""
    cases = ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [1.0, 5.0, 3.0, 1.0, 9.0], [4.0, 3.0, 2.0, 1.0], [2.0], [])
    for prices in cases:
        given = list(prices)
        found = rising_prices(given)
        expect(found is not None, "rising_prices: expected a list, found None")
        expect(given == prices, "rising_prices: changed its argument; work on a copy")
        found = [float(price) for price in found]
        expect(len(found) == len(prices), f"{prices}: expected {len(prices)} prices, found {len(found)}")
        falls = [i for i, (a, b) in enumerate(itertools.pairwise(found)) if b < a - 1e-9]
        expect(not falls, f"{prices}: {found} still falls; a merged pool may be dearer than the next one, look back")
        expect(
            math.isclose(sum(found), sum(prices), abs_tol=1e-9),
            f"{prices}: the sum must stay {sum(prices)}; {found} sums to {sum(found)}. Average, do not clip",
        )
        # the nearest one is unique: max over starts of min over ends of the averages
        right = [
            max(min(sum(prices[a:b]) / (b - a) for b in range(i + 1, len(prices) + 1)) for a in range(i + 1))
            for i in range(len(prices))
        ]
        close = all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(found, right, strict=True))
        expect(close, f"{prices}: expected {right}, found {found}; average only where a price falls")
    return "correct: rising, and the same in total"
