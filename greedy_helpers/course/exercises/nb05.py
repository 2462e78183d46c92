"""Checkers of notebook 05, pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .common import expect


def is_count(found: object, what: str) -> int:
    expect(
        isinstance(found, int) and not isinstance(found, bool),
        f"{what}: expected a whole number (int), found {found!r} of type {type(found).__name__}",
    )
    return found


def check_units_left(units_left: Callable[[int, float], int]) -> str:
    """Notebook 05: `units_left(n_units, ratio)` -> how many stay when at most `ratio` of them go."""
    for n_units, ratio in ((8, 0.25), (8, 0.1), (8, 0.45), (768, 0.5), (1024, 0.33), (12, 0.0)):
        right = n_units - int(Fraction(str(ratio)) * n_units)
        asked = f"units_left({n_units}, {ratio})"
        found = is_count(units_left(n_units, ratio), asked)
        hint = f" {n_units - found} of {n_units} go, more than {ratio:.0%}" if found < right else ""
        expect(found == right, f"{asked}: expected {right}, found {found}.{hint}")
    for n_units, ratio in ((100, 0.29), (100, 0.57), (10, 0.9), (1000, 0.009)):
        right = n_units - int(Fraction(str(ratio)) * n_units)
        asked = f"units_left({n_units}, {ratio})"
        found = is_count(units_left(n_units, ratio), asked)
        expect(
            found == right,
            f"{asked}: expected {right}, found {found}. On paper {ratio} * {n_units} is whole, but floating point has "
            f"{ratio * n_units!r} and (1 - {ratio}) * {n_units} = {(1 - ratio) * n_units!r}: add a little before "
            "you cut off",
        )
    for n_units, ratio in ((1, 0.9), (8, 0.99), (3, 0.999)):
        found = is_count(units_left(n_units, ratio), f"units_left({n_units}, {ratio})")
        expect(found >= 1, f"units_left({n_units}, {ratio}): a module must keep at least one unit, found {found}")
    return "correct: never more than asked, and never all"


def check_head_parameters(head_parameters: Callable[[int, int, int, bool], int]) -> str:
    """Notebook 05: `head_parameters(d, dim, group, bias)` -> parameters that leave with one attention unit."""
    for d, dim, group, bias in ((12, 4, 1, False), (12, 4, 1, True), (12, 4, 3, False), (20, 2, 5, True)):
        asked = f"head_parameters(d={d}, dim={dim}, group={group}, bias={bias})"
        found = is_count(head_parameters(d, dim, group, bias), asked)
        kv = 2 * dim
        layers = {"q": (d, 2 * group * dim), "k": (d, kv), "v": (d, kv), "o": (2 * group * dim, d)}
        before = sum(p.numel() for d_in, d_out in layers.values() for p in nn.Linear(d_in, d_out, bias).parameters())
        half = {"q": (d, group * dim), "k": (d, dim), "v": (d, dim), "o": (group * dim, d)}
        after = sum(p.numel() for d_in, d_out in half.values() for p in nn.Linear(d_in, d_out, bias).parameters())
        right, hint = before - after, ""
        if bias and found == right + d:
            hint = ". The bias of o_proj belongs to the residual stream: it stays however many heads go"
        elif bias and found == 2 * dim * d * (1 + group):
            hint = ". The queries, keys and values that go take their biases along"
        elif group > 1:
            hint = f". The unit is one key/value head with all of its {group} query heads"
        expect(found == right, f"{asked}: expected {right}, found {found}{hint}")
    return "correct: queries by the group, one key and one value, and the bias of o_proj stays"


def _by_head(
    x: Tensor, q: nn.Linear, k: nn.Linear, v: nn.Linear, o: nn.Linear, dim: int
) -> tuple[list[Tensor], Tensor]:
    """What every head adds to the output for x [tokens, d], and the output bias."""
    parts = []
    for rows in torch.arange(q.weight.shape[0]).split(dim):
        query, key, value = (x @ m.weight[rows].T + (0 if m.bias is None else m.bias[rows]) for m in (q, k, v))
        maps = (query @ key.T / dim**0.5).softmax(-1)
        parts.append(maps @ value @ o.weight[:, rows].T)
    return parts, torch.zeros(()) if o.bias is None else o.bias


RemoveHeads = Callable[[nn.Linear, nn.Linear, nn.Linear, nn.Linear, list[int], int], Any]


@torch.no_grad()
def check_remove_heads(
    remove_heads: RemoveHeads,
) -> str:
    """Notebook 05: `remove_heads(q, k, v, o, heads, dim)` takes `heads` out of four linears, in place."""
    torch.manual_seed(0)
    for bias, heads in ((False, [1]), (True, [1]), (True, [3, 0])):
        d, dim, n_heads = 6, 2, 4
        layers = {name: nn.Linear(d, n_heads * dim, bias) for name in "qkv"} | {"o": nn.Linear(n_heads * dim, d, bias)}
        x = torch.randn(5, d)
        parts, offset = _by_head(x, *layers.values(), dim)
        expected = sum(part for head, part in enumerate(parts) if head not in heads) + offset
        asked = list(heads)
        old_bias = None if layers["o"].bias is None else layers["o"].bias.clone()
        remove_heads(*layers.values(), asked, dim)
        case = f"heads {heads}, {'with' if bias else 'without'} biases"
        expect(asked == heads, f"{case}: your function changed the list of heads; work on a copy")
        width = (n_heads - len(heads)) * dim
        for name, layer in layers.items():
            right, found = ((d, width) if name == "o" else (width, d)), tuple(layer.weight.shape)
            expect(found == right, f"{case}: {name}.weight: expected shape {list(right)}, found {list(found)}")
            if bias:
                right, found = (d if name == "o" else width), len(layer.bias)
                expect(found == right, f"{case}: {name}.bias: expected {right} entries, found {found}")
        expect(
            old_bias is None or torch.equal(layers["o"].bias, old_bias),
            f"{case}: o.bias belongs to the outputs of o and has to stay as it is",
        )
        parts, offset = _by_head(x, *layers.values(), dim)
        expect(
            torch.allclose(sum(parts) + offset, expected, atol=1e-6),
            f"{case}: the shapes are right, but the output is not the sum over the heads that stay: head h owns the "
            f"consecutive channels h * dim ... (h + 1) * dim - 1 in q, k, v and o alike",
        )
        sizes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
        right = dict.fromkeys("qkv", (d, width)) | {"o": (width, d)}
        expect(sizes == right, f"{case}: in_features and out_features say {sizes}, expected {right}")
    return "correct: the output is the sum over the heads that stay"


GreedyPlan = Callable[[dict[str, int], dict[str, int], dict[str, list[float]], int], Mapping[str, int]]


def check_greedy_plan(greedy_plan: GreedyPlan) -> str:
    """Notebook 05: `greedy_plan(units, cost, damage, budget)` -> units left, at least `budget` parameters removed.

    `damage[name][k]` is the damage of having removed k + 1 units of a module; its steps grow with k.
    """
    generator = torch.Generator().manual_seed(0)
    units = {"attention 0": 4, "ffn 0": 9, "attention 1": 4, "ffn 1": 9}
    cost = {"attention 0": 30, "ffn 0": 4, "attention 1": 30, "ffn 1": 4}
    damage = {}
    for name, n in units.items():  # convex curves: every further unit hurts more than the one before
        steps = torch.rand(n, generator=generator, dtype=torch.float64).sort().values * cost[name]
        damage[name] = steps.cumsum(0).tolist()
    most = sum((n - 1) * cost[name] for name, n in units.items())
    for budget in (0, 1, 60, 120, 200, most):
        given = copy.deepcopy((units, cost, damage))
        plan = greedy_plan(units, cost, damage, budget)
        expect((units, cost, damage) == given, "greedy_plan: changed one of its arguments; work on copies")
        asked = f"budget {budget}"
        expect(isinstance(plan, Mapping), f"{asked}: expected a dict of units left, found {type(plan).__name__}")
        expect(set(plan) == set(units), f"{asked}: expected an entry for each of {sorted(units)}, found {sorted(plan)}")
        for name, left in plan.items():
            left = is_count(left, f"{asked}: {name}")
            expect(1 <= left <= units[name], f"{asked}: {name}: expected 1 to {units[name]} units left, found {left}")
        removed = sum((units[name] - left) * cost[name] for name, left in plan.items())
        expect(
            removed >= budget,
            f"{asked}: the plan removes only {removed} parameters; go on until the budget is reached",
        )
        right = _cheapest_first(units, cost, damage, budget)
        unpriced = _cheapest_first(units, dict.fromkeys(units, 1), damage, budget, paid=cost)
        hint = ". Compare the next step's damage *per parameter*: a head is dearer than a channel and removes more"
        expect(
            dict(plan) == right,
            f"{asked}: expected {right}, found {dict(plan)}" + hint * (dict(plan) == unpriced),
        )
    try:
        plan = greedy_plan(units, cost, damage, most + 1)
    except ValueError:
        return "correct: the budget goes where it costs least"
    expect(
        False, f"budget {most + 1}: every module keeps one unit, so this is impossible: raise ValueError, not {plan}"
    )


def _cheapest_first(
    units: Mapping[str, int],
    cost: Mapping[str, int],
    damage: Mapping[str, Sequence[float]],
    budget: int,
    paid: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """All steps of all modules in the order of their price; convex curves make that the order of each module, too."""
    steps = [
        ((after - before) / cost[name], name)
        for name, curve in damage.items()
        for before, after in zip([0, *curve[:-2]], curve[:-1], strict=True)
    ]
    plan, removed = dict(units), 0
    for _, name in sorted(steps):
        if removed >= budget:
            break
        plan[name] -= 1
        removed += (paid or cost)[name]
    return plan


def check_block_macs(block_macs: Callable[[int, int, int, int, int], int]) -> str:
    """Notebook 05: `block_macs(d, heads, dim, width, seq)` -> multiply-accumulates of a gated block over `seq` tokens.

    The reference runs the block's matrix products on the meta device and lets torch's counter watch.
    """
    for d, heads, dim, width, seq in ((8, 2, 4, 24, 5), (8, 1, 4, 10, 5), (16, 3, 2, 7, 1)):
        with FlopCounterMode(display=False) as counter:
            x, m = torch.empty(seq, d, device="meta"), heads * dim
            q, k, v = (x @ torch.empty(d, m, device="meta") for _ in range(3))
            q, k, v = (t.view(seq, heads, dim).transpose(0, 1) for t in (q, k, v))
            mixed = (torch.bmm(torch.bmm(q, k.mT), v)).transpose(0, 1).reshape(seq, m)
            _ = mixed @ torch.empty(m, d, device="meta")
            gate, up = (x @ torch.empty(d, width, device="meta") for _ in range(2))
            _ = (gate * up) @ torch.empty(width, d, device="meta")
        right = counter.get_total_flops() // 2  # a multiply-accumulate is two floating point operations
        asked = f"block_macs(d={d}, heads={heads}, dim={dim}, width={width}, seq={seq})"
        found = is_count(block_macs(d, heads, dim, width, seq), asked)
        products = 2 * seq * seq * m
        hint = ""
        if found == 2 * right:
            hint = ". Those are floating point operations: one multiply-accumulate counts as two of them"
        elif found == right - products:
            hint = f". The two products of attention, queries with keys and maps with values, add {products}"
        elif found == right - products + 2 * seq * seq * d:
            hint = ". After heads are gone, attention is heads * dim wide, not d"
        elif found * seq == right or found == right - products + products // seq:
            hint = f". Count all {seq} tokens: every one of them compares itself with {seq} keys"
        expect(found == right, f"{asked}: expected {right}, found {found}{hint}")
    return "correct: weights once per token, and attention once per pair of tokens"
