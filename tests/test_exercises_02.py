"""The checkers of notebook 02 accept a right answer and refuse the usual mistakes with a message that helps."""

import pytest
import torch

from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import NotYet


def magnitude(gate, up, down):
    return gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)


def test_gated_magnitude():
    assert exercises.check_gated_magnitude(magnitude).startswith("correct")

    def in_place(gate, up, down):
        found = magnitude(gate, up, down)
        gate.zero_()
        return found

    for wrong, message in [
        (lambda g, u, d: None, "expected a torch tensor, found NoneType"),
        (lambda g, u, d: magnitude(g, u, d)[:, None], r"expected shape \[7\], found \[7, 1\]"),
        (lambda g, u, d: magnitude(g, u, d).sqrt(), "asked for squared"),
        (lambda g, u, d: d.square().sum(0), "level 1 is missing"),
        (lambda g, u, d: g.square().sum(1) + u.square().sum(1), "level 2 is missing"),
        (lambda g, u, d: u.square().sum(1) + d.square().sum(0), r"expected \["),
        (
            lambda g, u, d: magnitude(g, u, d if d.shape[0] != d.shape[1] else d.T),
            "channel j is its column j",
        ),
        (in_place, "changed its arguments"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_gated_magnitude(wrong)


def energy(z, b, index):
    return torch.stack([(z[:, own] @ b[:, own].T).square().sum(1).mean() for own in index])


def test_unit_energy():
    assert exercises.check_unit_energy(energy).startswith("correct")

    def in_place(z, b, index):
        found = energy(z, b, index)
        z.square_()
        return found

    for wrong, message in [
        (lambda z, b, i: energy(z, b, i)[:, None], r"expected shape \[3\], found \[3, 1\]"),
        (lambda z, b, i: energy(z, b, i) * len(z), "the sum over tokens"),
        (lambda z, b, i: energy(z, b, i) / len(b), "sum over the output's dimensions"),
        (lambda z, b, i: (z.square().mean(0) * b.square().sum(0))[i].sum(1), "add up what they say first"),
        (lambda z, b, i: energy(z, b, torch.arange(i.numel()).view(i.shape)), "need not be neighbours"),
        (lambda z, b, i: energy(z - z.mean(0), b, i), r"expected \["),
        (in_place, "changed its arguments"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_unit_energy(wrong)


def element1(loss, a, b):
    a, b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    g_a, g_b = torch.autograd.grad(loss(a, b), (a, b))
    return (a * g_a).abs().sum(1) + (b * g_b).abs().sum(0)


def test_first_order():
    assert exercises.check_first_order(element1).startswith("correct")

    def products(loss, a, b):
        a, b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
        g_a, g_b = torch.autograd.grad(loss(a, b), (a, b))
        return a * g_a, b * g_b

    def vector(loss, a, b):
        level1, level2 = products(loss, a, b)
        return level1.sum(1).abs() + level2.sum(0).abs()

    def leaves_traces(loss, a, b):
        a.requires_grad_(), b.requires_grad_()
        loss(a, b).backward()
        return ((a * a.grad).abs().sum(1) + (b * b.grad).abs().sum(0)).detach()

    def in_place(loss, a, b):
        found = element1(loss, a, b)
        a.mul_(0)
        return found

    def exact(loss, a, b):
        whole, found = loss(a, b), []
        for u in range(len(a)):
            rest = b.clone()
            rest[:, u] = 0
            found.append((loss(a, rest) - whole).abs())
        return torch.stack(found)

    for wrong, message in [
        (lambda loss, a, b: element1(loss, a, b).sum(), r"expected shape \[5\], found \[\]"),
        (vector, "before the sum"),
        (lambda *given: products(*given)[1].abs().sum(0), "level 1 is missing"),
        (lambda *given: products(*given)[0].abs().sum(1), "level 2 is missing"),
        (leaves_traces, "ask for gradients"),
        (in_place, "changed the weights"),
        (exact, r"expected \["),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_first_order(wrong)


PURPOSES = {
    "L2 magnitude": "function",
    "second moment": "output",
    "Wanda-sp": "output",
    "FLAP": "output",
    "LLM-Pruner": "objective",
    "Optimal Brain Damage": "objective",
    "OSSCAR": "output",
    "random": "none",
}


def test_purposes():
    assert exercises.check_purposes(PURPOSES).startswith("correct")
    for wrong, message in [
        ("function", "expected a dictionary, found str"),
        ({}, "not answered yet: L2 magnitude"),
        (PURPOSES | {"OSSCAR": "objective"}, "of which function"),
        (PURPOSES | {"FLAP": "weights"}, "expected 'function', 'output', 'objective' or 'none', found 'weights'"),
        (PURPOSES | {"SparseGPT": "output"}, "was not asked"),
        (PURPOSES | {"Wanda-sp": "function"}, "no loss anywhere, but activations"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_purposes(wrong)


def fool(gate, up, down, order):
    least = 2 * (up.square().sum(1) * down.square().sum(0)).sqrt()
    base = gate.square().sum(1)
    target = torch.empty_like(base)
    target[order] = (base + least).max() + torch.arange(1, len(order) + 1).to(base)
    free = target - base  # = a c^2 + b / c^2
    a, b = up.square().sum(1), down.square().sum(0)
    return ((free + (free.square() - 4 * a * b).sqrt()) / (2 * a)).sqrt()


def test_fool_magnitude():
    assert exercises.check_fool_magnitude(fool).startswith("correct")

    def in_place(gate, up, down, order):
        c = fool(gate, up, down, order)
        up.mul_(c[:, None])
        return c

    for wrong, message in [
        (lambda g, u, d, o: fool(g, u, d, o)[:, None], r"expected shape \[6\], found \[6, 1\]"),
        (lambda g, u, d, o: -fool(g, u, d, o), "positive, finite scales"),
        (lambda g, u, d, o: torch.ones(len(o)), "L2 ranks them"),
        (lambda g, u, d, o: fool(g, u, d, o.flip(0)), "L2 ranks them"),
        (lambda g, u, d, o: fool(g, u, d, o.argsort()), "L2 ranks them"),
        (in_place, "changed its arguments"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_fool_magnitude(wrong)
