"""Notebook 05's checkers: each accepts a right answer, and refuses the usual mistakes with a message that helps."""

import math

import pytest
import torch

from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import NotYet


def refuses(check, cases):
    for wrong, message in cases:
        with pytest.raises(NotYet, match=message):
            check(wrong)


def test_units_left():
    assert exercises.check_units_left(lambda n, r: n - math.floor(r * n + 1e-9)).startswith("correct")
    refuses(
        exercises.check_units_left,
        [
            (lambda n, r: n * (1 - r), "expected a whole number"),
            (lambda n, r: n - round(r * n), r"units_left\(8, 0.1\): expected 8, found 7. 1 of 8 go, more than 10%"),
            (lambda n, r: int((1 - r) * n + 1e-9), r"units_left\(8, 0.1\): expected 8, found 7"),
            (lambda n, r: n - int(r * n), r"units_left\(100, 0.29\): expected 71, found 72. On paper"),
            (lambda n, r: n - int(r * n + 1e-9) if r < 0.9 or n == 10 else 0, "must keep at least one unit"),
        ],
    )


def head(d, dim, group, bias):
    return dim * (group + 2) * (d + bias) + group * dim * d


def test_head_parameters():
    assert exercises.check_head_parameters(head).startswith("correct")
    refuses(
        exercises.check_head_parameters,
        [
            (lambda *a: head(*a) / 2, "expected a whole number"),
            (lambda d, dim, g, b: head(d, dim, g, b) + b * d, "bias of o_proj belongs to the residual stream"),
            (lambda d, dim, g, b: head(d, dim, g, False), "take their biases along"),
            (lambda d, dim, g, b: head(d, dim, 1, b), "with all of its 3 query heads"),
        ],
    )


def take_out(q, k, v, o, heads, dim, biases=True, sizes=True, stride=False, keep_of_o=None):
    n = q.weight.shape[0] // dim
    channels = torch.arange(n * dim).view(dim, n).T if stride else torch.arange(n * dim).view(n, dim)
    keep = channels[[h for h in range(n) if h not in heads]].flatten()
    for linear in (q, k, v):
        linear.weight = torch.nn.Parameter(linear.weight[keep])
        if linear.bias is not None and biases:
            linear.bias = torch.nn.Parameter(linear.bias[keep])
    o.weight = torch.nn.Parameter(o.weight[:, keep if keep_of_o is None else keep_of_o])
    if sizes:
        q.out_features = k.out_features = v.out_features = o.in_features = len(keep)


def test_remove_heads():
    assert exercises.check_remove_heads(take_out).startswith("correct")

    def empties_the_list(q, k, v, o, heads, dim):
        take_out(q, k, v, o, heads, dim)
        heads.clear()

    def zeroes_the_bias(q, k, v, o, heads, dim):
        take_out(q, k, v, o, heads, dim)
        if o.bias is not None:
            o.bias = torch.nn.Parameter(torch.zeros_like(o.bias))

    refuses(
        exercises.check_remove_heads,
        [
            (lambda *a: None, r"q\.weight: expected shape \[6, 6\], found \[8, 6\]"),
            (lambda *a: take_out(*a, biases=False), r"q\.bias: expected 6 entries, found 8"),
            (lambda *a: take_out(*a, stride=True), "consecutive channels"),
            (lambda *a: take_out(*a, keep_of_o=torch.arange(6)), "not the sum over the heads that stay"),
            (lambda *a: take_out(*a, sizes=False), "in_features and out_features say"),
            (empties_the_list, "changed the list of heads"),
            (zeroes_the_bias, "o.bias belongs to the outputs"),
        ],
    )


def spend(units, cost, damage, budget, price=None, stop_early=False):
    plan, removed = dict(units), 0
    while removed < budget:
        free = [name for name in plan if plan[name] > 1]
        if not free:
            raise ValueError("the budget is larger than what can go")

        def next_price(name):
            gone = units[name] - plan[name]
            step = damage[name][gone] - (damage[name][gone - 1] if gone else 0)
            return step / (cost[name] if price is None else price)

        name = min(free, key=next_price)
        if stop_early and removed + cost[name] > budget:
            break
        plan[name] -= 1
        removed += cost[name]
    return plan


def test_greedy_plan():
    assert exercises.check_greedy_plan(spend).startswith("correct")

    def in_place(units, cost, damage, budget):
        plan = spend(units, cost, damage, budget)
        units.update(plan)
        return units

    def no_floor(units, cost, damage, budget):
        return dict.fromkeys(units, 0)

    def gives_what_it_can(units, cost, damage, budget):
        most = sum((n - 1) * cost[name] for name, n in units.items())
        return spend(units, cost, damage, min(budget, most))

    refuses(
        exercises.check_greedy_plan,
        [
            (lambda u, c, d, b: None, "expected a dict of units left, found NoneType"),
            (lambda u, c, d, b: {"ffn 0": 3}, "expected an entry for each of"),
            (no_floor, "expected 1 to 4 units left, found 0"),
            (lambda u, c, d, b: dict(u), "budget 1: the plan removes only 0 parameters"),
            (lambda *a: spend(*a, stop_early=True), "go on until the budget is reached"),
            (lambda *a: spend(*a, price=1), "per parameter"),
            (in_place, "changed one of its arguments"),
            (gives_what_it_can, "raise ValueError"),
        ],
    )


def count(d, heads, dim, width, seq):
    return seq * (4 * d * heads * dim + 3 * d * width) + 2 * seq * seq * heads * dim


def test_block_macs():
    assert exercises.check_block_macs(count).startswith("correct")
    refuses(
        exercises.check_block_macs,
        [
            (lambda *a: float(count(*a)), "expected a whole number"),
            (lambda *a: 2 * count(*a), "floating point operations"),
            (lambda d, h, k, w, s: s * (4 * d * h * k + 3 * d * w), "two products of attention"),
            (lambda d, h, k, w, s: count(d, h, k, w, s) // s, "Count all 5 tokens"),
            (
                lambda d, h, k, w, s: s * (4 * d * h * k + 3 * d * w) + 2 * s * s * d,
                r"heads \* dim wide, not d",
            ),
        ],
    )
