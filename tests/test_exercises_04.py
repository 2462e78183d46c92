"""Notebook 04's checkers accept a right answer and refuse the typical wrong ones with a message that helps."""

import math

import pytest
import torch

from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import NotYet


def refused(check, wrong, message):
    with pytest.raises(NotYet, match=message):
        check(wrong)


def scores(a, b, sigma):
    return b.square().sum(0) * ((a @ sigma) * a).sum(1)


def scores_in_place(a, b, sigma):
    found = scores(a, b, sigma)
    a *= 2
    return found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a, b, s: None, "expected a torch tensor, found NoneType"),
        (lambda a, b, s: scores(a, b, s)[None], r"expected shape \[5\], found \[1, 5\]"),
        (lambda a, b, s: b.norm(dim=0) * ((a @ s) * a).sum(1), "norm enters squared"),
        (lambda a, b, s: scores(a, b, s) / 2, "factor 1/2 belongs to the ReLU"),
        (lambda a, b, s: b.square().sum(0) * a.square().sum(1), "Sigma is missing"),
        (lambda a, b, s: b.square().sum(0) * (a.square() @ s.diagonal()), "only the diagonal"),
        (lambda a, b, s: scores(a, b, s).sqrt(), "square root"),
        (lambda a, b, s: scores(a, b, s) + 1, "expected .* found"),
        (lambda a, b, s: b.square().sum(int(b.shape[0] == b.shape[1])) * ((a @ s) * a).sum(1), "column.* j of B"),
        (scores_in_place, "changed its arguments"),
        (lambda a, b, s: scores(a, b, s) + (a == 0).all(), "never fires scores 0"),
    ],
)
def test_second_moment_scores(wrong, message):
    assert exercises.check_second_moment_scores(scores).startswith("correct")
    refused(exercises.check_second_moment_scores, wrong, message)


def cost(a, b, sigma, gone):
    return ((b[:, gone].T @ b[:, gone]) * (a[gone] @ sigma @ a[gone].T)).sum().item()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a, b, s, g: None, "expected a number, found NoneType"),
        (lambda a, b, s, g: scores(a, b, s)[g].sum(), "sum of the single scores"),
        (lambda a, b, s, g: math.sqrt(cost(a, b, s, g)), "expected .* found"),
        (lambda a, b, s, g: cost(a, b, s, g) if g else 1.0, "removing nothing costs 0"),
        (lambda a, b, s, g: cost(a, b, s, g) + (len(a) == 7), "cancel exactly"),
    ],
)
def test_set_cost(wrong, message):
    assert exercises.check_set_cost(cost).startswith("correct")
    refused(exercises.check_set_cost, wrong, message)


def heads(p, x, v, o):
    z = torch.einsum("hst,td,hcd->shc", p, x, v)  # [seq, heads, dim]
    return (z.square().mean(0) * o.square().sum(0).view(z.shape[1:])).sum(1)


def whole_heads(p, x, v, o):
    z = torch.einsum("hst,td,hcd->hsc", p, x, v)
    return (z @ o.view(len(o), *v.shape[:2]).permute(1, 2, 0)).square().sum(2).mean(1)


def strided_heads(p, x, v, o):
    z = torch.einsum("hst,td,hcd->shc", p, x, v)
    return (z.square().mean(0) * o.square().sum(0).view(z.shape[1:])).flatten().view(-1, len(v)).sum(0)


def heads_in_place(p, x, v, o):
    found = heads(p, x, v, o)
    p.zero_()
    return found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p, x, v, o: heads(p, x, v, o).sum(), r"expected shape \[3\], found \[\]"),
        (lambda p, x, v, o: heads(torch.eye(len(x)).double().expand_as(p), x, v, o), "reads the \\*mixed\\* input"),
        (whole_heads, "cross terms included"),
        (strided_heads, "consecutive: head 0 owns"),
        (lambda p, x, v, o: heads(p, x, v, o) * 2, "expected .* found"),
        (heads_in_place, "changed its arguments"),
    ],
)
def test_head_scores(wrong, message):
    assert exercises.check_head_scores(heads).startswith("correct")
    refused(exercises.check_head_scores, wrong, message)


def error(values):
    return values.mean().item(), (values.mean(1).std() / len(values) ** 0.5).item()


def error_in_place(values):
    found = error(values)
    values -= values.mean()
    return found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda v: v.mean(), "expected a pair"),
        (lambda v: (v.sum(), error(v)[1]), "mean: expected"),
        (lambda v: (v.mean(), v.std() / v.numel() ** 0.5), "the independent draws are the windows"),
        (lambda v: (v.mean(), v.mean(1).std()), "spread between windows"),
        (lambda v: (v.mean(), v.mean(1).std(correction=0) / len(v) ** 0.5), "windows - 1"),
        (lambda v: (v.mean(), 2 * error(v)[1]), "standard error: expected"),
        (lambda v: (v.mean(), error(v)[1] + (v.std() == 0)), "constant values"),
        (error_in_place, "changed its argument"),
    ],
)
def test_standard_error(wrong, message):
    assert exercises.check_standard_error(error).startswith("correct")
    refused(exercises.check_standard_error, wrong, message)


def average_ranks(values):
    return (values[:, None] > values).double().sum(1) + ((values[:, None] == values).double().sum(1) - 1) / 2


def spearman(a, b):
    return torch.corrcoef(torch.stack([average_ranks(a), average_ranks(b)]))[0, 1].item()


def twice_sorted(a, b):
    return torch.corrcoef(torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double())[0, 1]


def spearman_in_place(a, b):
    found = spearman(a, b)
    a[:] = a.sort().values
    return found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a, b: "high", "expected a number, found str"),
        (lambda a, b: torch.corrcoef(torch.stack([a, b.to(a)]))[0, 1], "correlation of the values, not ranks"),
        (lambda a, b: torch.corrcoef(torch.stack([a.argsort(), b.argsort()]).double())[0, 1], "sort twice"),
        (lambda a, b: -spearman(a, b), "expected .* found"),
        (lambda a, b: spearman(a, b) - (b > 0).all().item(), "same order"),
        (twice_sorted, "share the average of their ranks"),
        (spearman_in_place, "changed its argument"),
    ],
)
def test_spearman(wrong, message):
    assert exercises.check_spearman(spearman).startswith("correct")
    refused(exercises.check_spearman, wrong, message)
