"""Checkers of notebook 04, the second-moment criterion."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .common import expect, is_tensor, same


def _number(found: object, what: str) -> float:
    try:
        return float(found)
    except (TypeError, ValueError):
        expect(False, f"{what}: expected a number, found {type(found).__name__}")


def _vector(found: object, n: int, what: str) -> Tensor:
    return is_tensor(found, (n,), what).detach().double()


def _toy(seed: int, d_out: int, channels: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A [channels, d], B [d_out, channels], a finite sample x [n, d] with a mean, and its exact Sigma = x'x / n."""
    generator = torch.Generator().manual_seed(seed)
    a, b, root, mean = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((channels, d), (d_out, channels), (d, d), (d,))
    )
    x = torch.randn(50, d, generator=generator, dtype=torch.float64) @ root + 2 * mean
    return a, b, x, x.T @ x / len(x)


def check_second_moment_scores(second_moment_scores: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Notebook 04: `second_moment_scores(A, B, Sigma)` -> [channels], M_j = ||B_:,j||^2 a_j' Sigma a_j."""
    a, b, x, sigma = _toy(0, 3, 5, 4)
    before = [t.clone() for t in (a, b, sigma)]
    found = _vector(second_moment_scores(a, b, sigma), 5, "second_moment_scores")
    expect(
        same((a, b, sigma), before),
        "second_moment_scores: changed its arguments; work on copies",
    )
    pre = x @ a.T  # [n, channels]: the mean of its squares is a_j' Sigma a_j, exactly, as Sigma is this sample's
    right = torch.stack([(pre[:, j, None] * b[:, j]).square().sum(1).mean() for j in range(5)])
    energy, columns = pre.square().mean(0), b.square().sum(0)
    hints = {
        "the column's norm enters squared: ||B_:,j||^2 is the sum of its squares": columns.sqrt() * energy,
        "that is twice too small: the factor 1/2 belongs to the ReLU, and changes no ranking": right / 2,
        "Sigma is missing: that is the score for Sigma = I": columns * a.square().sum(1),
        "only the diagonal of Sigma is used; the covariances between inputs count as well": columns
        * (a.square() @ sigma.diagonal()),
        "that is the square root": right.sqrt(),
    }
    for hint, wrong in hints.items():
        expect(not torch.allclose(found, wrong), f"second_moment_scores: {hint}")
    shown = [[round(v, 3) for v in values.tolist()] for values in (right, found)]
    expect(torch.allclose(found, right), f"second_moment_scores: expected {shown[0]}, found {shown[1]}")
    square_a, square_b, _, sigma = _toy(1, 4, 4, 4)  # all shapes equal: rows and columns are easily mixed up
    found = _vector(second_moment_scores(square_a, square_b, sigma), 4, "second_moment_scores")
    right = square_b.square().sum(0) * ((square_a @ sigma) * square_a).sum(1)
    expect(
        torch.allclose(found, right),
        "second_moment_scores: wrong when A and B are square. Channel j is row j of A and *column* j of B",
    )
    silent = _vector(second_moment_scores(square_a * 0, square_b, sigma), 4, "second_moment_scores")
    expect(torch.equal(silent, torch.zeros(4).double()), "second_moment_scores: a channel that never fires scores 0")
    return "correct: row j of A, column j of B, all of Sigma"


def check_set_cost(set_cost: Callable[[Tensor, Tensor, Tensor, list[int]], float]) -> str:
    """Notebook 04: `set_cost(A, B, Sigma, gone)`, the mean squared output error when the channels `gone` go."""
    a, b, x, sigma = _toy(2, 3, 6, 4)

    def measured(gone: list[int]) -> float:
        lost = (x @ a[gone].T) @ b[:, gone].T
        return lost.square().sum(1).mean().item()

    for size in (1, 2, 4):
        for gone in list(itertools.combinations(range(6), size))[:4]:
            gone = list(gone)
            found, right = _number(set_cost(a, b, sigma, gone), f"gone = {gone}"), measured(gone)
            alone = sum(measured([j]) for j in gone)
            expect(
                size == 1 or not math.isclose(found, alone, rel_tol=1e-6),
                f"gone = {gone}: {found:.4f} is the sum of the single scores. Removed together, channels can add up "
                "or cancel: sum the outputs first, square afterwards",
            )
            expect(math.isclose(found, right, rel_tol=1e-6), f"gone = {gone}: expected {right:.4f}, found {found:.4f}")
    nothing = _number(set_cost(a, b, sigma, []), "gone = []")
    expect(nothing == 0, f"gone = []: removing nothing costs 0, found {nothing}")
    twins_a, twins_b = torch.cat([a, a[:1]]), torch.cat([b, -b[:, :1]], dim=1)
    found = _number(set_cost(twins_a, twins_b, sigma, [0, 6]), "twins")
    expect(abs(found) < 1e-9, f"two channels that cancel exactly cost nothing together, found {found:.4f}")
    return "correct: with the cross terms"


def check_head_scores(head_scores: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Notebook 04: `head_scores(P, X, V, O)` -> [heads].

    P [heads, seq, seq] attention maps, X [seq, d], V [heads, dim, d] value rows, O [d_out, heads * dim].
    """
    generator = torch.Generator().manual_seed(3)
    for heads, seq, d, dim in ((3, 7, 5, 2), (2, 4, 3, 3), (1, 6, 4, 2)):
        scores = torch.randn(heads, seq, seq, generator=generator, dtype=torch.float64) * 3
        maps = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), -torch.inf).softmax(-1)
        x = torch.randn(seq, d, generator=generator, dtype=torch.float64)
        v = torch.randn(heads, dim, d, generator=generator, dtype=torch.float64)
        o = torch.randn(4, heads * dim, generator=generator, dtype=torch.float64)
        what = f"head_scores with {heads} heads of {dim} channels"
        before = maps.clone()
        found = _vector(head_scores(maps, x, v, o), heads, what)
        expect(torch.equal(maps, before), "head_scores: changed its arguments; work on copies")
        z = torch.cat([maps[h] @ x @ v[h].T for h in range(heads)], dim=1)  # [seq, heads * dim]: what O reads
        right = (o.square().sum(0) * z.square().mean(0)).view(heads, dim).sum(1)
        unmixed = torch.cat([x @ v[h].T for h in range(heads)], dim=1)
        without = (o.square().sum(0) * unmixed.square().mean(0)).view(heads, dim).sum(1)
        strided = (o.square().sum(0) * z.square().mean(0)).view(dim, heads).sum(0)
        expect(
            not torch.allclose(found, without),
            f"{what}: that is the score of X itself. A head reads the *mixed* input P_h X",
        )
        expect(
            heads == 1 or torch.allclose(strided, right) or not torch.allclose(found, strided),
            f"{what}: a head's channels are consecutive: head 0 owns 0 to {dim - 1} of O, not 0, {heads}, ...",
        )
        if heads * dim > 1:
            outputs = torch.stack(
                [(z.view(seq, heads, dim)[:, h] @ o.view(4, heads, dim)[:, h].T) for h in range(heads)]
            )
            expect(
                not torch.allclose(found, outputs.square().sum(2).mean(1)),
                f"{what}: that is the energy of the whole head, cross terms included (gh.output_energy). The paper's "
                "score is the sum over its channels",
            )
        shown = [[round(value, 3) for value in values.tolist()] for values in (right, found)]
        expect(torch.allclose(found, right), f"{what}: expected {shown[0]}, found {shown[1]}")
    return "correct: mixed input, consecutive channels, one score per head"


def check_standard_error(standard_error: Callable[[Tensor], tuple[float, float]]) -> str:
    """Notebook 04: `standard_error(values)` of values [windows, tokens] -> (mean, standard error)."""
    generator = torch.Generator().manual_seed(4)
    windows, tokens = 40, 50
    shared = torch.randn(windows, 1, generator=generator, dtype=torch.float64)
    values = 3 + shared + 0.5 * torch.randn(windows, tokens, generator=generator, dtype=torch.float64)
    before = values.clone()
    answer = standard_error(values)
    expect(
        isinstance(answer, tuple | list) and len(answer) == 2,
        f"standard_error: expected a pair (mean, standard error), found {type(answer).__name__}",
    )
    expect(torch.equal(values, before), "standard_error: changed its argument; work on a copy")
    mean, error = (_number(value, "standard_error") for value in answer)
    expect(
        math.isclose(mean, values.mean().item(), rel_tol=1e-6), f"mean: expected {values.mean():.4f}, found {mean:.4f}"
    )
    of_windows = values.mean(1)
    right = of_windows.std().item() / math.sqrt(windows)
    naive = values.std().item() / math.sqrt(values.numel())
    expect(
        not math.isclose(error, naive, rel_tol=0.02),
        f"standard_error: {error:.4f} treats all {values.numel()} tokens as independent. Tokens of one window hang "
        "together; the independent draws are the windows",
    )
    expect(
        not math.isclose(error, of_windows.std().item(), rel_tol=0.02),
        f"standard_error: {error:.4f} is the spread between windows. The error of their mean is sqrt(windows) smaller",
    )
    expect(
        not math.isclose(error, of_windows.std(correction=0).item() / math.sqrt(windows), rel_tol=1e-4),
        "standard_error: divide the sum of squares by windows - 1 (torch's default): the mean was estimated too",
    )
    expect(math.isclose(error, right, rel_tol=1e-4), f"standard error: expected {right:.4f}, found {error:.4f}")
    flat = _number(standard_error(torch.full((5, 3), 2.0))[1], "constant values")
    expect(flat == 0, f"constant values have no error, found {flat}")
    return f"correct: {right:.3f}, where counting every token as independent would have claimed {naive:.3f}"


def check_spearman(spearman: Callable[[Tensor, Tensor], float]) -> str:
    """Notebook 04: `spearman(a, b)`, the rank correlation; equal values share their average rank."""
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(12, generator=generator, dtype=torch.float64)
    b = a + torch.randn(12, generator=generator, dtype=torch.float64)
    before = a.clone()
    found = _number(spearman(a, b), "spearman")
    expect(torch.equal(a, before), "spearman: changed its argument; work on a copy (sort returns a new tensor)")
    ranks = [torch.tensor([(t < value).sum().item() for value in t]).double() for t in (a, b)]
    right = 1 - 6 * (ranks[0] - ranks[1]).square().sum().item() / (12 * (144 - 1))  # no ties: the textbook formula
    pearson = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    orders = torch.corrcoef(torch.stack([a.argsort(), b.argsort()]).double())[0, 1].item()
    expect(not math.isclose(found, pearson, rel_tol=1e-6), "spearman: that is the correlation of the values, not ranks")
    expect(
        not math.isclose(found, orders, rel_tol=1e-6),
        "spearman: argsort says who stands at each place, not which place each one has; sort twice",
    )
    expect(math.isclose(found, right, rel_tol=1e-6), f"spearman: expected {right:.4f}, found {found:.4f}")
    bent = _number(spearman(a, a.exp()), "spearman(a, exp(a))")
    expect(math.isclose(bent, 1, rel_tol=1e-6), f"spearman(a, exp(a)): expected 1 (same order), found {bent:.4f}")
    tied, other = torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 3, 2, 4])
    found, right = _number(spearman(tied, other), "ties"), 4.5 / math.sqrt(4.5 * 5)
    expect(
        math.isclose(found, right, rel_tol=1e-6),
        f"ties: expected {right:.4f}, found {found:.4f}. Equal values share the average of their ranks: 1, 2.5, 2.5, 4",
    )
    return "correct: ranks, ties included"
