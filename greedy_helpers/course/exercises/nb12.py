"""Checkers of notebook 12, neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .common import ask, call, compare, draw, parts


def check_remove_jointly(remove_jointly: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Notebook 12: `remove_jointly(w, inverse, gone)`: the row [n] without the weights `gone`, the others refitted."""
    causes, mix, noise, w = draw(0, (40, 4), (4, 8), (40, 8), (8,))
    x = causes @ mix + 0.5 * noise  # columns that can stand in for each other
    inverse = torch.linalg.inv(x.T @ x)
    for gone in ([3], [1, 4, 6], [7, 0], []):
        rest = [j for j in range(8) if j not in gone]
        right = torch.zeros_like(w)
        right[rest] = torch.linalg.lstsq(x[:, rest], x @ w).solution
        zeroed = w.clone()
        zeroed[gone] = 0
        one_by_one = w - (w[gone] / inverse.diagonal()[gone]) @ inverse[gone]
        masked = one_by_one.clone()
        masked[gone] = 0
        alone = "As if each went alone: [H^-1]_PP is a matrix, solve with all of it"
        found = ask(f"remove_jointly, gone = {gone}", remove_jointly, w, inverse, torch.tensor(gone).long())
        found.must_be(
            right,
            (zeroed, "The survivors did not move; they are solved again"),
            (2 * w - right, "The sign: the change is subtracted from the row"),
            (one_by_one, alone),
            (masked, alone),
            atol=1e-7,
        )
    return "correct: as if the rest had been solved again"


def check_drop_and_refit(drop_and_refit: Callable[..., tuple[Tensor, Tensor]]) -> str:
    """Notebook 12: `drop_and_refit(w, s, mask, j)` -> (alpha, mu) of mask * (alpha sign(w - mean) + mu) without j."""
    x, w, mix = draw(1, (50, 8), (8,), (8, 8))
    x, w = x @ mix, w + 0.3
    b = torch.sign(w - w.mean())
    for mask, j in (([1, 1, 1, 1, 1, 1, 1, 1], 2), ([1, 0, 1, 1, 0, 1, 1, 1], 5), ([0, 1, 1, 1, 1, 0, 1, 0], 1)):
        before = torch.tensor(mask, dtype=torch.float64)
        after = before.clone()
        after[j] = 0

        def solved(m: Tensor, target: Tensor, columns: Tensor = b) -> Tensor:
            return torch.linalg.lstsq(torch.stack([x @ (m * columns), x @ m], 1), x @ target).solution

        right = solved(after, w)
        apart = torch.stack([(x @ v) @ (x @ w) / (x @ v).square().sum() for v in (after * b, after)])
        plain = torch.linalg.lstsq(torch.stack([after * b, after], 1), w).solution
        what = f"drop_and_refit, mask {mask}, j = {j}"
        found = parts(what, call(what, drop_and_refit, w, x.T @ x, before, j), "alpha, mu")
        compare(
            f"{what}: alpha, mu",
            torch.stack([torch.as_tensor(number, dtype=torch.float64).detach().reshape(()) for number in found]),
            right,
            (solved(before, w), "Element j is still in the mask"),
            (solved(after, after * w), "The target is the output of the whole row, removed weights included"),
            (apart, "Each was solved as if the other were zero; the off-diagonal b'Sm couples them"),
            (plain, "That is best for the weights; `s` makes it best for the output"),
            (right.flip(0), "Give (alpha, mu), alpha first"),
            atol=1e-7,
        )
    return "correct: two numbers, solved again for what is left"


def check_least_responsive(least_responsive: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    """Notebook 12: `least_responsive(w, s, share)` -> bool [rows, columns], by |w| sqrt(max(s, 0)) in every row."""
    (w,) = draw(2, (3, 10))
    mixed = torch.tensor([4.0, -9.0, 2.0, 0.5, 3.0, -0.1, 6.0, 1.0, 5.0, 0.7], dtype=torch.float64)
    for what, s, share in (
        ("no column fell", mixed.abs(), 0.3),
        ("two columns fell", mixed, 0.4),
        ("a share that is no whole number", mixed, 0.55),
        ("nothing to remove", mixed, 0.0),
    ):
        n = int(share * 10)
        order = [sorted(range(10), key=lambda j, row=row, s=s: abs(row[j]) * max(s[j], 0) ** 0.5) for row in w]
        right = torch.zeros(3, 10, dtype=torch.bool)
        for i, columns in enumerate(order):
            right[i, columns[:n]] = True

        def lowest(score: Tensor, n: int = n) -> Tensor:
            found = torch.zeros(3, 10, dtype=torch.bool)
            return found.scatter(1, score.argsort(dim=1, stable=True)[:, :n], True)

        score = w.abs() * s.clamp(min=0).sqrt()
        flat = torch.zeros(30, dtype=torch.bool)
        flat[score.flatten().argsort()[: 3 * n]] = True
        ask(f"least_responsive, {what}", least_responsive, w, s, share).must_be(
            right,
            (lowest(w.abs() * s.sqrt()), "The root of a negative number is NaN, which sorts last: max(s, 0) first"),
            (lowest(w.abs() * s.abs().sqrt()), "Falling by much is not rising by much: max(s, 0), not |s|"),
            (lowest(-score), "These are the weights that respond most"),
            (~right, "True is for what goes"),
            (flat.view(3, 10), "The share is taken in every row, not in the whole matrix"),
            (lowest(s.clamp(min=0).sqrt().expand(3, 10)), "The weights count as well: |w_ij| times the root"),
        )
    return "correct: columns that fell go first"


def check_fair_rival(fair_rival: Callable[[int, int, int, int], int]) -> str:
    """Notebook 12: `fair_rival(d, kept, rank, matrices)`: channels that cost at most what `kept` and a branch cost."""
    cases = (256, 576, 9, 3), (256, 576, 8, 3), (64, 100, 5, 2), (64, 100, 1, 3), (32, 48, 0, 3)
    for d, kept, rank, matrices in cases:
        weights = kept * matrices * d + 2 * d * rank
        right = max(n for n in range(kept, kept + 2 * rank + 1) if n * matrices * d <= weights)
        what = f"fair_rival{(d, kept, rank, matrices)}"
        ask(what, fair_rival, d, kept, rank, matrices).must_be(
            right,
            (kept + rank, "The branch has two matrices, [d, r] and [r, d]; a channel has one vector in each matrix"),
            (kept + rank // matrices, "The branch has two matrices, [d, r] and [r, d]"),
            (lambda n, most=weights, each=matrices * d: n * each > most, "It has more weights than the other"),
            (lambda n, kept=kept: n < kept, "It may keep at least as many channels"),
            "One more channel fits",
        )
    return "correct: the same weights, spent on channels"
