"""Checkers of notebook 09: a right answer passes, and each typical mistake gets a message that helps."""

import pytest
import torch

from greedy_helpers import eliminate
from greedy_helpers.allocation import _rising_prices
from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import NotYet


def removal_cost(h, b, j):
    return b[j].square().sum() / torch.linalg.inv(h)[j, j]


def test_removal_cost():
    assert exercises.check_removal_cost(removal_cost).startswith("correct")

    def in_place(h, b, j):
        cost = removal_cost(h, b, j)
        b[j] = 0
        return cost

    for wrong, message in [
        (lambda h, b, j: None, "found None"),
        (lambda h, b, j: b[j].square() / torch.linalg.inv(h)[j, j], "expected one number"),
        (lambda h, b, j: b[j].square().sum() * h[j, j], "nobody is refitted"),
        (lambda h, b, j: b[j].square().sum(), "solving again without it"),
        (in_place, "changed its argument"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_removal_cost(wrong)


def downdate(inverse, b, g):
    rest = [c for c in range(len(b)) if c not in g.tolist()]
    move = inverse[:, g] @ torch.linalg.inv(inverse[g][:, g])
    return (inverse - move @ inverse[g])[rest][:, rest], (b - move @ b[g])[rest]


def test_downdate():
    assert exercises.check_downdate(downdate).startswith("correct")

    def whole(inverse, b, g):
        move = inverse[:, g] @ torch.linalg.inv(inverse[g][:, g])
        return inverse - move @ inverse[g], b - move @ b[g]

    def part(inverse, b, g):
        rest = [c for c in range(len(b)) if c not in g.tolist()]
        return inverse[rest][:, rest], b[rest]

    def lazy(inverse, b, g):
        return downdate(inverse, b, g)[0], part(inverse, b, g)[1]

    def diagonal(inverse, b, g):
        rest = [c for c in range(len(b)) if c not in g.tolist()]
        new, _ = downdate(inverse, b, g)
        return new, (b - inverse[:, g] / inverse[g, g] @ b[g])[rest]

    def in_place(inverse, b, g):
        found = downdate(inverse, b, g)
        inverse[g] = 0
        return found

    for wrong, message in [
        (lambda inverse, b, g: inverse, "expected a pair"),
        (whole, r"expected shapes \[5, 5\] and \[5, 3\], found \[6, 6\]"),
        (part, "the part of the inverse"),
        (lazy, "did not move"),
        (diagonal, "do not divide by its diagonal"),
        (in_place, "changed its argument"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_downdate(wrong)


def residual_refit(z, y, x, x_hat, w0, lam):
    target = y + x - x_hat
    h = z.T @ z + lam * torch.eye(z.shape[1]).to(z)
    return w0 + torch.linalg.solve(h, z.T @ (target - z @ w0.T)).T


def test_residual_refit():
    assert exercises.check_residual_refit(residual_refit).startswith("correct")

    def toward_zero(z, y, x, x_hat, w0, lam):
        h = z.T @ z + lam * torch.eye(z.shape[1]).to(z)
        return torch.linalg.solve(h, z.T @ (y + x - x_hat)).T

    def in_place(z, y, x, x_hat, w0, lam):
        found = residual_refit(z, y, x, x_hat, w0, lam)
        y += x - x_hat
        return found

    for wrong, message in [
        (lambda *a: None, "found NoneType"),
        (lambda *a: residual_refit(*a).T, r"expected W of shape \[3, 4\]"),
        (lambda z, y, x, x_hat, w0, lam: residual_refit(z, y, x, x, w0, lam), "only imitates"),
        (lambda z, y, x, x_hat, w0, lam: residual_refit(z, y, x_hat, x, w0, lam), "the sign"),
        (toward_zero, "pulls toward zero"),
        (in_place, "changed its argument"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_residual_refit(wrong)


def greedy_keep(h, b, n_keep):
    return eliminate(h, b, torch.arange(len(h))[:, None], n_keep).keep


def test_greedy_keep():
    assert exercises.check_greedy_keep(greedy_keep).startswith("correct")

    def one_shot(h, b, n_keep):
        cost = b.square().sum(1) / torch.linalg.inv(h).diagonal()
        return torch.sort(cost.argsort(descending=True)[:n_keep]).values

    def in_place(h, b, n_keep):
        keep = greedy_keep(h, b, n_keep)
        h.zero_()
        return keep

    for wrong, message in [
        (lambda h, b, n: [0, 1], "expected a torch tensor, found list"),
        (lambda h, b, n: torch.arange(6), r"expected shape \[5\], found \[6\]"),
        (lambda h, b, n: greedy_keep(h, b, n).flip(0), "expected sorted"),
        (lambda h, b, n: torch.arange(n), "solving again after every removal"),
        (one_shot, "after each removal the costs change"),
        (in_place, "changed its argument"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_greedy_keep(wrong)


def test_rising_prices():
    assert exercises.check_rising_prices(_rising_prices).startswith("correct")

    def running_maximum(prices):
        return [max(prices[: i + 1]) for i in range(len(prices))]

    def one_pass(prices):
        prices = list(prices)
        for i in range(len(prices) - 1):
            if prices[i] > prices[i + 1]:
                prices[i] = prices[i + 1] = (prices[i] + prices[i + 1]) / 2
        return prices

    def in_place(prices):
        found = _rising_prices(prices)
        prices.sort()
        return found

    for wrong, message in [
        (lambda prices: None, "found None"),
        (lambda prices: list(prices)[:-1], "expected 3 prices, found 2"),
        (running_maximum, "Average, do not clip"),
        (one_pass, "look back"),
        (lambda prices: [sum(prices) / len(prices)] * len(prices) if prices else [], "average only where"),
        (in_place, "changed its argument"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_rising_prices(wrong)
