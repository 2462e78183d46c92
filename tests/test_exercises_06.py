"""Notebook 06's checkers: each accepts a right answer, and refuses the usual mistakes with a message that helps."""

import pytest
import torch

from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import NotYet


def refuses(check, cases):
    for wrong, message in cases:
        with pytest.raises(NotYet, match=message):
            check(wrong)


def ridge(x, y, w0, lam):
    h = x.T @ x + lam * torch.eye(x.shape[1]).double()
    return w0 + torch.linalg.solve(h, x.T @ (y - x @ w0.T)).T


def test_ridge_toward():
    assert exercises.check_ridge_toward(ridge).startswith("correct")

    def in_place(x, y, w0, lam):
        y -= x @ w0.T
        return w0 + ridge(x, y, torch.zeros_like(w0), lam)

    refuses(
        exercises.check_ridge_toward,
        [
            (lambda *a: None, "expected a torch tensor, found NoneType"),
            (lambda *a: ridge(*a).T, r"expected shape \[2, 5\], found \[5, 2\]"),
            (lambda x, y, w0, lam: ridge(x, y, torch.zeros_like(w0), lam), "pulled toward zero"),
            (lambda x, y, w0, lam: ridge(x, y, w0, 0.0) if len(x) > 5 else w0, r"40 tokens, lam = 3.0: least squares"),
            (in_place, "changed one of its arguments"),
            (lambda x, y, w0, lam: ridge(x, y, w0, lam) + (x == 0).all(), "teach nothing"),
        ],
    )


def error(xx, xy, yy, w):
    return (yy - 2 * (w.T * xy).sum() + (w @ xx * w).sum()) / yy


def test_error_from_moments():
    assert exercises.check_error_from_moments(error).startswith("correct")

    def in_place(xx, xy, yy, w):
        found = error(xx, xy, yy, w)
        xy *= 2
        return found

    refuses(
        exercises.check_error_from_moments,
        [
            (lambda *a: None, "found None"),
            (lambda xx, xy, yy, w: error(xx, xy, yy, w) * xx, r"one number, found shape \[6, 6\]"),
            (lambda xx, xy, yy, w: error(xx, xy, yy, w) * yy, "divide by the energy"),
            (lambda *a: error(*a) ** 0.5, "no root"),
            (lambda xx, xy, yy, w: error(xx, xy, yy, w) + (w.T * xy).sum() / yy, "stands there twice"),
            (in_place, "changed one of its arguments"),
            (lambda *a: error(*a) if error(*a) > 1e-9 else 1.0, "meets exactly"),
        ],
    )


def centred(n, xx, xy, x, y, w0, lam):
    h = xx - torch.outer(x, x) / n + lam * torch.eye(len(x)).double()
    cross = xy - torch.outer(x, y) / n
    w = w0 + torch.linalg.solve(h, cross - (xx - torch.outer(x, x) / n) @ w0.T).T
    return w, (y - w @ x) / n


def test_centred_solve():
    assert exercises.check_centred_solve(centred).startswith("correct")

    def no_centring(n, xx, xy, x, y, w0, lam):
        w = w0 + torch.linalg.solve(xx + lam * torch.eye(len(x)).double(), xy - xx @ w0.T).T
        return w, (y - w @ x) / n

    def toward_zero(n, xx, xy, x, y, w0, lam):
        return centred(n, xx, xy, x, y, torch.zeros_like(w0), lam)

    def sums(n, xx, xy, x, y, w0, lam):
        w, _ = centred(n, xx, xy, x, y, w0, lam)
        return w, y - w @ x

    def in_place(n, xx, xy, x, y, w0, lam):
        found = centred(n, xx, xy, x, y, w0, lam)
        xx -= torch.outer(x, x) / n
        return found

    refuses(
        exercises.check_centred_solve,
        [
            (lambda *a: centred(*a)[0], "expected a pair"),
            (lambda *a: (centred(*a)[0].T, centred(*a)[1]), r"W: expected shape \[3, 4\], found \[4, 3\]"),
            (no_centring, "Centre first"),
            (toward_zero, "lam = 2: W: least squares on the centred data"),
            (sums, "means, not sums"),
            (in_place, "changed one of its arguments"),
        ],
    )


def remedy(w, z, gone):
    return w[:, gone] @ z[:, gone].mean(0)


def test_bias_remedy():
    assert exercises.check_bias_remedy(remedy).startswith("correct")

    def in_place(w, z, gone):
        found = remedy(w, z, gone)
        w[:, gone] = 0
        return found

    def stays(gone):
        return [c for c in range(6) if c not in gone.tolist()]

    refuses(
        exercises.check_bias_remedy,
        [
            (lambda w, z, gone: 0.0, "expected a torch tensor, found float"),
            (lambda w, z, gone: z[:, gone] @ w[:, gone].T, r"expected shape \[3\], found \[25, 3\]"),
            (lambda w, z, gone: len(z) * remedy(w, z, gone), "sum over tokens"),
            (lambda w, z, gone: w @ z.mean(0), "only what was removed"),
            (lambda w, z, gone: remedy(w, z, stays(gone)), "mean of what stays"),
            (lambda w, z, gone: -remedy(w, z, gone), "The sign"),
            (in_place, "changed one of its arguments"),
            (lambda w, z, gone: remedy(w, z, gone) if len(gone) else torch.ones(3).double(), "nothing removed"),
        ],
    )
