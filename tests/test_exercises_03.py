"""The checkers of notebook 03 accept a right answer, and refuse the mistakes they are there for."""

import pytest
import torch

from greedy_helpers import redundant_heads, unit_divergence
from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import NotYet


def entropies(x, eps=0.0):
    return -(x * (x + eps).log()).sum(-1) if eps else -torch.special.xlogy(x, x).sum(-1)


def js(p, q, h=entropies):
    return h((p + q) / 2) - (h(p) + h(q)) / 2


def test_js_rows():
    assert exercises.check_js_rows(js).startswith("correct")
    assert exercises.check_js_rows(lambda p, q: js(p.double(), q.double())).startswith("correct")

    def in_place(p, q):
        found = js(p, q)
        p.add_(q).div_(2)
        return found

    for wrong, message in [
        (lambda p, q: js(p, q).tolist(), "expected a tensor, found list"),
        (lambda p, q: js(p, q).mean(), r"one number per row, shape \[6\], found \[\]"),
        (in_place, "changed its arguments"),
        (lambda p, q: js(p, q) / torch.tensor(2.0).log(), "these are bits"),
        (lambda p, q: js(p, q).sqrt(), "the root"),
        (lambda p, q: js(q, p, lambda x: -entropies(x)), "the sign is wrong"),
        (lambda p, q: 2 * js(p, q), "twice too large"),
        (lambda p, q: entropies((p + q) / 2) - entropies(p) - entropies(q), "js_rows: expected .* found"),
        (lambda p, q: (p * (p / q).log()).sum(-1), "js_rows: expected .* found"),  # Kullback-Leibler
        (lambda p, q: js(p, q, lambda x: -(x * x.log()).sum(-1)), "NaN where a row has zeros"),
        (lambda p, q: js(p, q, lambda x: entropies(x, 1e-6)), "exactly ln 2 .* inside the logarithm"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_js_rows(wrong)


def greedy(divergence, tau):
    close = (divergence < tau) & ~torch.eye(len(divergence), dtype=torch.bool)
    alive = torch.ones(len(divergence), dtype=torch.bool)
    for head in range(len(divergence)):
        alive[head] = False
        if not (close & alive).any(1)[~alive].all():
            alive[head] = True
    return (~alive).nonzero().flatten()


def test_with_living_twin():
    assert exercises.check_with_living_twin(lambda d, t: greedy(d, t).tolist()).startswith("correct")
    assert exercises.check_with_living_twin(greedy).startswith("correct")  # a tensor will do

    def in_place(divergence, tau):
        divergence.fill_diagonal_(float("inf"))
        return greedy(divergence, tau).tolist()

    for wrong, message in [
        (lambda d, t: None, "expected a list of heads, found NoneType"),
        (in_place, "changed its argument"),
        (lambda d, t: [9], r"expected distinct heads in \[0, 5\), found \[9\]"),
        (lambda d, t: [0, 0], "expected distinct heads"),
        (redundant_heads, r"a chain: removed \[0, 1, 2, 3\], but head \[0\] has no similar head left"),
        (lambda d, t: [], r"a chain: removed \[\]; head \[0\] could go as well"),
        (lambda d, t: greedy(d, t).tolist()[:1], "could go as well"),
        (lambda d, t: (d < t).nonzero()[:, 0].unique().tolist(), "has no similar head left"),  # diagonal forgotten
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_with_living_twin(wrong)


def test_group_divergence():
    assert exercises.check_group_divergence(unit_divergence).startswith("correct")
    assert exercises.check_group_divergence(lambda d, g: unit_divergence(d.double(), g)).startswith("correct")

    def strided(divergence, group):
        n = len(divergence) // group
        return divergence.reshape(group, n, group, n).mean((0, 2)).fill_diagonal_(0)

    def means(divergence, group):
        n = len(divergence) // group
        return divergence.reshape(n, group, n, group).mean((1, 3))

    def in_place(divergence, group):
        divergence += torch.eye(len(divergence))
        return means(divergence, group).fill_diagonal_(0)

    for wrong, message in [
        (lambda d, g: unit_divergence(d, g).tolist(), "expected a tensor, found list"),
        (lambda d, g: d, r"group=2: expected shape \[3, 3\], found \[6, 6\]"),
        (in_place, "changed its argument"),
        (strided, "heads 0, 3, ... were taken together; consecutive heads share a key"),
        (lambda d, g: unit_divergence(d, g) * g * g, "these are sums"),
        (lambda d, g: means(d, g), "group=2: expected zeros on the diagonal"),
        (lambda d, g: d[::g, ::g], "group=2: expected\n"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_group_divergence(wrong)
