"""The checkers of notebook 07 accept right answers and say what is wrong with others."""

import pytest
import torch

from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import NotYet


def draw(logits, u, temperature=1.0):
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    return (cumulative <= u[:, None]).sum(-1).clamp(max=logits.shape[1] - 1)


def test_draw():
    assert exercises.check_draw(draw).startswith("correct")
    for wrong, message in [
        (lambda x, u, t: x.argmax(-1), "expected tokens"),
        (lambda x, u, t: draw(x, u, 1.0), "temperature 0.5"),
        (lambda x, u, t: ((x / t).softmax(-1).cumsum(-1) <= u[:, None] + 1e-6).sum(-1), "the last token"),
        (lambda x, u, t: draw(x, u, t)[0], "one token per row"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_draw(wrong)


def runs(windows, run):
    return [tuple(r) for r in windows.unfold(1, run, 1).reshape(-1, run).tolist()]


def test_shared_runs():
    def right(a, b, run):
        return len(set(runs(b, run)) & set(runs(a, run))) / len(set(runs(b, run)))

    def counts_repeats(a, b, run):
        return sum(r in set(runs(a, run)) for r in runs(b, run)) / len(runs(b, run))

    def crosses(a, b, run):
        return right(a.reshape(1, -1), b.reshape(1, -1), run)

    assert exercises.check_shared_runs(right).startswith("correct")
    for wrong, message in [
        (counts_repeats, "repeated runs count once"),
        (crosses, "expected"),
        (lambda a, b, run: right(b, a, run), "expected"),
        (lambda a, b, run: torch.tensor(1.0), "expected a number"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_shared_runs(wrong)


def test_sigma_of_random_ids():
    assert exercises.check_sigma_of_random_ids(lambda e: e.T @ e / len(e)).startswith("correct")
    for wrong, message in [
        (lambda e: torch.cov(e.T, correction=0), "uncentred"),
        (lambda e: e.T @ e, "divide by its size"),
        (lambda e: e @ e.T, r"expected shape \[4, 4\]"),
        (lambda e: torch.eye(4), "expected"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_sigma_of_random_ids(wrong)
