"""Beside the notebooks' solutions: other right answers, and (wrong answer, what the message has to say). 12."""

import torch
from solutions import nb


def without(w, gone):
    return w.index_fill(0, gone, 0)


def binary(w, mask, j=None):
    mask = mask if j is None else mask.index_fill(0, torch.tensor([j]), 0)
    return mask * torch.sign(w - w.mean()), mask


def solve_two(vectors, s, target):
    basis = torch.stack(vectors)
    return tuple(torch.linalg.solve(basis @ s @ basis.T, basis @ s @ target))


def by_score(score, share):
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, score.argsort(1)[:, : int(share * 10)], True)


def whole_matrix(w, s, share):
    flat = torch.zeros(w.numel(), dtype=torch.bool)
    flat[(w.abs() * s.clamp(min=0).sqrt()).flatten().argsort()[: 3 * int(share * 10)]] = True
    return flat.view_as(w)


ANSWERS = {
    "check_remove_jointly": [
        lambda w, inverse, gone: w - w[gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone],
        (lambda w, inverse, gone: without(w, gone), "survivors did not move"),
        (lambda w, inverse, gone: 2 * w - nb.remove_jointly(w, inverse, gone), "The sign"),
        (lambda w, inverse, gone: w - w[gone] / inverse.diagonal()[gone] @ inverse[gone], "each went alone"),
        (
            lambda w, inverse, gone: without(w - w[gone] / inverse.diagonal()[gone] @ inverse[gone], gone),
            "each went alone",
        ),
        (lambda w, inverse, gone: nb.remove_jointly(w, inverse, gone)[:-1], "expected shape"),
    ],
    "check_drop_and_refit": [
        lambda w, s, mask, j: tuple(number.item() for number in nb.drop_and_refit(w, s, mask, j)),
        (lambda w, s, mask, j: solve_two(binary(w, mask), s, w), "still in the mask"),
        (lambda w, s, mask, j: solve_two(binary(w, mask, j), s, binary(w, mask, j)[1] * w), "removed weights included"),
        (lambda w, s, mask, j: tuple(v @ s @ w / (v @ s @ v) for v in binary(w, mask, j)), "off-diagonal"),
        (lambda w, s, mask, j: solve_two(binary(w, mask, j), torch.eye(8).double(), w), "best for the weights"),
        (lambda *a: nb.drop_and_refit(*a)[::-1], "alpha first"),
        (lambda *a: nb.drop_and_refit(*a)[0], "expected .alpha, mu."),
    ],
    "check_least_responsive": [
        lambda w, s, share: by_score(w.square() * s.clamp(min=0), share),
        (lambda w, s, share: by_score(w.abs() * s.sqrt(), share), "which sorts last"),
        (lambda w, s, share: by_score(w.abs() * s.abs().sqrt(), share), "not |s|".replace("|", r"\|")),
        (lambda w, s, share: by_score(-w.abs() * s.clamp(min=0).sqrt(), share), "respond most"),
        (lambda *a: ~nb.least_responsive(*a), "True is for what goes"),
        (whole_matrix, "in every row"),
        (lambda w, s, share: by_score(s.clamp(min=0).expand_as(w), share), "The weights count"),
        (lambda *a: nb.least_responsive(*a).double(), "expected dtype torch.bool"),
    ],
    "check_fair_rival": [
        lambda d, kept, rank, matrices: (kept * matrices + 2 * rank) // matrices,
        (lambda d, kept, rank, matrices: kept + rank, "a channel has one vector in each matrix"),
        (lambda d, kept, rank, matrices: kept + rank // matrices, "The branch has two matrices"),
        (lambda d, kept, rank, matrices: kept + -(-2 * rank // matrices), "more weights than the other"),
        (lambda d, kept, rank, matrices: kept - 1, "at least as many"),
        (lambda d, kept, rank, matrices: kept, "One more channel fits"),
        (lambda d, kept, rank, matrices: kept + 2 * rank / matrices, "expected a whole number"),
    ],
}
