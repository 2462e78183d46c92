"""Checkers of notebooks 04 to 06: the second moment, pruning, reconstruction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .common import ask, call, compare, draw, expect, is_linear, parts, refuses, ridge


def _toy(seed: int, d_out: int, channels: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A [channels, d], B [d_out, channels], a finite sample x [n, d] with a mean, and its exact Sigma = x'x / n."""
    a, b, root, mean, noise = draw(seed, (channels, d), (d_out, channels), (d, d), (d,), (50, d))
    x = noise @ root + 2 * mean
    return a, b, x, x.T @ x / len(x)


def check_gated_scores(gated_scores: Callable[..., Tensor]) -> str:
    """Notebook 04: `gated_scores(G, U, B, Sigma)` -> [channels], ||B_:,j||^2 u_j' Sigma u_j g_j' Sigma g_j."""
    for seed, d_out, channels, d in ((0, 3, 5, 4), (1, 4, 4, 4)):  # all sizes equal: rows and columns look alike
        u, b, x, sigma = _toy(seed, d_out, channels, d)
        (g,) = draw(seed + 10, (channels, d))
        up, gate = (x @ u.T).square().mean(0), (x @ g.T).square().mean(0)  # exact, as Sigma is this sample's
        columns = torch.stack([b[:, j].square().sum() for j in range(channels)])
        right = columns * up * gate
        diagonal = columns * (u.square() @ sigma.diagonal()) * (g.square() @ sigma.diagonal())
        what = f"gated_scores of {channels} channels in {d} dimensions"
        ask(what, gated_scores, g, u, b, sigma).must_be(
            right,
            (columns * right, "That is the paper's product: ||B_:,j||^2 enters once here, not twice"),
            (right / columns.sqrt(), "The column's norm enters squared: ||B_:,j||^2 is the sum of its squares"),
            (columns * up, "The gate path is missing"),
            (columns * gate, "The up path is missing"),
            (columns * u.square().sum(1) * g.square().sum(1), "Sigma is missing: that is the score for Sigma = I"),
            (diagonal, "Only the diagonal of Sigma is used; the covariances between inputs count as well"),
            "Channel j is row j of G, row j of U and *column* j of B",
        )
    return "correct: two rows and a column, each once"


def check_set_cost(set_cost: Callable[..., float]) -> str:
    """Notebook 04: `set_cost(A, B, Sigma, gone)`, the mean squared output error when the channels `gone` go."""
    a, b, x, sigma = _toy(2, 3, 6, 4)

    def measured(gone: list[int]) -> Tensor:
        return ((x @ a[gone].T) @ b[:, gone].T).square().sum(1).mean()

    hint = "That is the sum of the single scores. Together, channels can add up or cancel: sum first, then square"
    for size in (1, 2, 4):
        for gone in map(list, itertools.islice(itertools.combinations(range(6), size), 4)):
            alone = sum(measured([j]) for j in gone)
            ask(f"set_cost, gone = {gone}", set_cost, a, b, sigma, gone).must_be(measured(gone), (alone, hint))
    zero = torch.zeros(()).double()
    ask("set_cost, nothing removed", set_cost, a, b, sigma, []).must_be(zero)
    twins = torch.cat([a, a[:1]]), torch.cat([b, -b[:, :1]], dim=1), sigma, [0, 6]
    ask("set_cost of two channels that cancel exactly", set_cost, *twins).must_be(zero)
    return "correct: with the cross terms"


def check_head_scores(head_scores: Callable[..., Tensor]) -> str:
    """Notebook 04: `head_scores(P, X, V, O)` -> [heads].

    P [heads, seq, seq] attention maps, X [seq, d], V [heads, dim, d] value rows, O [d_out, heads * dim].
    """
    for heads, seq, d, dim in ((3, 7, 5, 2), (2, 4, 3, 3), (1, 6, 4, 2)):
        logits, x, v, o = draw(3, (heads, seq, seq), (seq, d), (heads, dim, d), (4, heads * dim))
        maps = (3 * logits).masked_fill(torch.ones(seq, seq).triu(1).bool(), -torch.inf).softmax(-1)
        z = torch.stack([maps[h] @ x @ v[h].T for h in range(heads)], dim=1)  # [seq, heads, dim]: what O reads
        columns = o.view(4, heads, dim)
        whole = torch.stack([(z[:, h] @ columns[:, h].T).square().sum(1).mean() for h in range(heads)])
        energy = z.square().mean(0) * columns.square().sum(0)
        strided = energy.flatten().view(dim, heads).sum(0)
        unmixed = ((v @ x.T).square().mean(2) * columns.square().sum(0)).sum(1)
        ask(f"head_scores with {heads} heads of {dim} channels", head_scores, maps, x, v, o).must_be(
            energy.sum(1),
            (unmixed, "That is the score of X itself. A head reads the *mixed* input P_h X"),
            (strided, f"A head's channels are consecutive: head 0 owns 0 to {dim - 1} of O, not 0, {heads}, ..."),
            (
                whole,
                "That is the energy of the whole head, cross terms included. The paper adds up its channels' scores",
            ),
        )
    return "correct: mixed input, consecutive channels, one score per head"


def check_standard_error(standard_error: Callable[[Tensor], tuple[float, float]]) -> str:
    """Notebook 04: `standard_error(values)` of values [windows, tokens] -> (mean, standard error)."""
    shared, noise = draw(4, (40, 1), (40, 50))
    values = 3 + shared + 0.5 * noise
    found = call("standard_error", standard_error, values)
    mean, error = parts("standard_error", found, "mean, standard error")
    compare("mean", mean, values.mean())
    spread, naive = values.mean(1).std(), values.std() / math.sqrt(values.numel())
    right = spread / math.sqrt(40)
    compare(
        "standard error",
        error,
        right,
        (naive, "That treats all tokens as independent. Those of a window hang together; windows are independent"),
        (spread, "That is the spread between windows. The error of their mean is sqrt(windows) smaller"),
        (right * math.sqrt(39 / 40), "Divide by windows - 1 (torch's default): the mean was estimated too"),
    )
    flat = parts("standard_error", standard_error(torch.full((5, 3), 2.0)), "mean, standard error")
    compare("standard error of constant values", flat[1], torch.zeros(()))
    return f"correct: {right:.3f}, where counting every token as independent would have claimed {naive:.3f}"


def check_head_parameters(head_parameters: Callable[[int, int, int, bool], int]) -> str:
    """Notebook 05: `head_parameters(d, dim, group, bias)` -> parameters that leave with one attention unit."""
    for d, dim, group, bias in ((12, 4, 1, False), (12, 4, 1, True), (12, 4, 3, False), (20, 2, 5, True)):

        def attention(units: int, d: int = d, dim: int = dim, group: int = group, bias: bool = bias) -> int:
            kv, q = units * dim, units * group * dim
            layers = [nn.Linear(*sizes, bias) for sizes in ((d, q), (d, kv), (d, kv), (q, d))]
            return sum(p.numel() for layer in layers for p in layer.parameters())

        right = attention(2) - attention(1)
        ask(
            f"head_parameters(d={d}, dim={dim}, group={group}, bias={bias})", head_parameters, d, dim, group, bias
        ).must_be(
            right,
            (right + d, "The bias of o_proj belongs to the residual stream: it stays however many heads go"),
            (2 * dim * d * (1 + group), "The queries, keys and values that go take their biases along"),
            f"The unit is one key/value head with all of its {group} query heads",
        )
    return "correct: queries by the group, one key and one value, and the bias of o_proj stays"


def _by_head(x: Tensor, layers: Mapping[str, nn.Linear], dim: int) -> list[Tensor]:
    """What every head adds to the output for x [tokens, d]."""
    added = []
    for rows in torch.arange(len(layers["q"].weight)).split(dim):
        q, k, v = (nn.functional.linear(x, m.weight, m.bias)[:, rows] for m in map(layers.get, "qkv"))
        added.append((q @ k.T / dim**0.5).softmax(-1) @ v @ layers["o"].weight[:, rows].T)
    return added


@torch.no_grad()
def check_remove_heads(remove_heads: Callable[..., Any]) -> str:
    """Notebook 05: `remove_heads(q, k, v, o, heads, dim)` takes `heads` out of four linears, in place."""
    torch.manual_seed(0)
    for bias, heads in ((False, [1]), (True, [1]), (True, [3, 0])):
        d, dim, n_heads = 6, 2, 4
        layers = {name: nn.Linear(d, n_heads * dim, bias) for name in "qkv"} | {"o": nn.Linear(n_heads * dim, d, bias)}
        x, asked, old_bias = torch.randn(5, d), list(heads), torch.zeros(d)
        if bias:
            old_bias = layers["o"].bias.clone()
        right = sum(part for head, part in enumerate(_by_head(x, layers, dim)) if head not in heads)
        remove_heads(*layers.values(), asked, dim)
        what = f"heads {heads}, {'with' if bias else 'without'} biases"
        expect(asked == heads, f"{what}: your function changed the list of heads; work on a copy")
        width = (n_heads - len(heads)) * dim
        for name, layer in layers.items():
            is_linear(f"{what}: {name}", layer, *((width, d) if name == "o" else (d, width)))
        if bias:
            compare(f"{what}: o.bias, which belongs to the outputs of o and stays as it is", layers["o"].bias, old_bias)
        hint = "Head h owns the consecutive channels h * dim ... (h + 1) * dim - 1 in q, k, v and o alike"
        found = sum(_by_head(x, layers, dim))
        compare(f"{what}: the output, as the sum over the heads that stay", found, right, hint, atol=1e-6)
    return "correct: the output is the sum over the heads that stay"


def check_plan_by_price(plan_by_price: Callable[..., Mapping[str, int]]) -> str:
    """Notebook 05: `plan_by_price(prices, parameters, budget)` -> units left, at least `budget` parameters removed.

    `prices[name]` are those of a module's units, in no order; `parameters[name]` goes with each of them.
    """
    parameters = {"attention 0": 30, "ffn 0": 4, "attention 1": 30, "ffn 1": 4}
    values = draw(0, (4,), (9,), (4,), (9,))
    prices = {name: (own.abs() * parameters[name]).tolist() for name, own in zip(parameters, values, strict=True)}
    units = {name: len(own) for name, own in prices.items()}

    def removed(plan: Mapping[str, int]) -> int:
        return sum((units[name] - left) * parameters[name] for name, left in plan.items())

    def one_by_one(weight: Mapping[str, int], budget: int, as_listed: bool = False) -> dict[str, int]:
        """The next unit of each module on offer, and the best of these offers taken, until the budget is met."""
        left = {
            name: own[::-1] if as_listed else sorted(own)[::-1] for name, own in prices.items()
        }  # the last one next
        while removed(plan := {name: len(own) for name, own in left.items()}) < budget:
            name = min((n for n in left if len(left[n]) > 1), key=lambda n: left[n][-1] / weight[n])
            left[name].pop()
        return plan

    most = removed(dict.fromkeys(units, 1))
    for budget in (0, 1, 60, 120, 200, most):
        right = one_by_one(parameters, budget)
        ask(f"plan_by_price, budget {budget}", plan_by_price, prices, parameters, budget).must_be(
            right,
            (lambda plan: plan.keys() != units.keys(), f"Give an entry for each of {sorted(units)}"),
            (lambda plan: not all(1 <= plan[name] <= n for name, n in units.items()), "A module keeps a unit at least"),
            (lambda plan, budget=budget: removed(plan) < budget, "Go on until the budget is reached"),
            (
                one_by_one(dict.fromkeys(units, 1), budget),
                "Compare the price *per parameter*: a head is more than a channel",
            ),
            (
                one_by_one(parameters, budget, as_listed=True),
                "The lists are in no order: sort, the cheapest unit goes first",
            ),
            (lambda plan, right=right: removed(plan) > removed(right), "Stop as soon as the budget is reached"),
        )
    refuses("more than can go, as every module keeps one unit", plan_by_price, prices, parameters, most + 1)
    return "correct: the budget goes where a parameter costs least"


def check_block_macs(block_macs: Callable[[int, int, int, int, int], int]) -> str:
    """Notebook 05: `block_macs(d, heads, dim, width, seq)` -> multiply-accumulates of a gated block over `seq` tokens.

    The reference runs the block's matrix products on the meta device and lets torch's counter watch.
    """
    for d, heads, dim, width, seq in ((8, 2, 4, 24, 5), (8, 1, 4, 10, 5), (16, 3, 2, 7, 1)):
        m = heads * dim
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            x = torch.empty(seq, d)
            q, k, v = ((x @ torch.empty(d, m)).view(seq, heads, dim).transpose(0, 1) for _ in range(3))
            _ = torch.bmm(torch.bmm(q, k.mT), v).transpose(0, 1).reshape(seq, m) @ torch.empty(m, d)
            gate, up = (x @ torch.empty(d, width) for _ in range(2))
            _ = (gate * up) @ torch.empty(width, d)
        right = counter.get_total_flops() // 2  # a multiply-accumulate is two floating point operations
        products, count = 2 * seq * seq * m, f"Count all {seq} tokens: each compares itself with {seq} keys"
        ask(
            f"block_macs(d={d}, heads={heads}, dim={dim}, width={width}, seq={seq})",
            block_macs,
            d,
            heads,
            dim,
            width,
            seq,
        ).must_be(
            right,
            (2 * right, "Those are floating point operations: one multiply-accumulate counts as two of them"),
            (right - products, f"The two products of attention (maps, and maps with values) add {products}"),
            (right - products + 2 * seq * seq * d, "After heads are gone, attention is heads * dim wide, not d"),
            (right // seq, count),
            (right - products + products // seq, count),
        )
    return "correct: weights once per token, and attention once per pair of tokens"


def _problem(seed: int, n: int, d_x: int, d_y: int) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs with means, targets with an offset, and a current weight. Float64."""
    x, mix, w0, w, noise = draw(seed, (n, d_x), (d_x, d_x), (d_y, d_x), (d_x, d_y), (n, d_y))
    x = x @ mix + 1.5
    return x, x @ w + noise - 2, w0


def check_ridge_toward(ridge_toward: Callable[..., Tensor]) -> str:
    """Notebook 06: `ridge_toward(x, y, w0, lam)` -> W [d_y, d_x] near the targets and near the current weight."""
    for n, lam in ((40, 0.0), (40, 3.0), (3, 0.5)):
        x, y, w0 = _problem(0, n, 5, 2)
        hint = "This W is pulled toward zero. Solve for the *change* of the weight: its target is Y - X W0'"
        wrong = ridge(x, y, torch.zeros_like(w0), lam)
        what = f"ridge_toward, {n} tokens, lam = {lam}, against least squares with sqrt(lam) I stacked below X"
        ask(what, ridge_toward, x, y, w0, lam).must_be(ridge(x, y, w0, lam), (wrong, hint), rtol=1e-6)
    x, y, w0 = _problem(1, 4, 5, 2)
    hint = "Such inputs teach nothing: W has to stay W0, however large lam is"
    ask("ridge_toward, inputs that are always zero", ridge_toward, torch.zeros_like(x), y, w0, 0.1).must_be(w0, hint)
    return "correct: near the targets where data speak, near the current weight where they do not"


def check_two_steps(two_steps: Callable[..., tuple[Tensor, Tensor]]) -> str:
    """Notebook 06: `two_steps(x, x_hat, w1, w2, act, damp)` -> both new weights, each refitted to its dense outputs.

    x, x_hat [n, d]; w1 [2 m, d], of which `act` makes m channels; w2 [d_y, m].
    """
    x, mix, drift, w1, w2 = draw(6, (60, 4), (4, 4), (60, 4), (6, 4), (2, 3))
    x = x @ mix

    def act(h: Tensor) -> Tensor:
        return nn.functional.silu(h[:, :3]) * h[:, 3:]

    def refit(read: Tensor, target: Tensor, w0: Tensor, damp: float, toward: float = 1.0) -> Tensor:
        return ridge(read, target, toward * w0, damp * read.square().sum().item() / read.shape[1])

    for damp in (1e-3, 0.3):
        x_hat, y1 = x + 0.5 * drift, x @ w1.T
        y2 = act(y1) @ w2.T
        right1 = refit(x_hat, y1, w1, damp)
        z_hat, z_old = act(x_hat @ right1.T), act(x_hat @ w1.T)
        what = f"two_steps, damp = {damp:g}"
        found1, found2 = parts(what, call(what, two_steps, x, x_hat, w1, w2, act, damp), "new w1, new w2")
        compare(
            f"{what}: level 1",
            found1,
            right1,
            (w1, "Level 1 did not move: its targets are x w1', what the *dense* level 1 puts out"),
            (refit(x_hat, y1, w1, damp, toward=0.0), "Pull toward the current weight, not toward zero"),
            (ridge(x_hat, y1, w1, damp), "lam is `damp` times the mean diagonal of x_hat' x_hat"),
            rtol=1e-6,
        )
        compare(
            f"{what}: level 2",
            found2,
            refit(z_hat, y2, w2, damp),
            (
                w2,
                "Level 2 did not move. It reads something else now, and aims at the *dense* module's outputs",
            ),
            (refit(z_old, y2, w2, damp), "Run again: level 2 reads what the *new* level 1 gives on x_hat"),
            (
                refit(z_hat, z_old @ w2.T, w2, damp),
                "Its targets are the dense module's outputs, from x and the old weights",
            ),
            rtol=1e-6,
        )
    return "correct: level 1 to its dense outputs, run again, then level 2"


def check_error_from_moments(error_from_moments: Callable[..., float | Tensor]) -> str:
    """Notebook 06: `error_from_moments(xx, xy, yy, w)` -> ||Y - X W'||^2 / ||Y||^2 from X'X, X'Y and ||Y||^2."""
    for seed, n in ((2, 30), (3, 4)):
        x, y, w = _problem(seed, n, 6, 3)
        left, total, mixed = (y - x @ w.T).square().sum(), y.square().sum(), (y * (x @ w.T)).sum()
        right = left / total
        ask(f"error_from_moments, {n} tokens", error_from_moments, x.T @ x, x.T @ y, total, w).must_be(
            right,
            (left, "That is the error itself: divide by the energy of the targets"),
            (right.sqrt(), "The errors of this notebook are squared: no root"),
            (right + mixed / total, "The mixed term stands there twice: (a - b)^2 = a^2 - 2ab + b^2"),
            rtol=1e-6,
        )
    x, _, w = _problem(4, 20, 6, 3)
    y = x @ w.T
    for what, weight, right in (("targets that the layer meets exactly", w, 0.0), ("a zero weight", 0 * w, 1.0)):
        given = x.T @ x, x.T @ y, y.square().sum(), weight
        ask(f"error_from_moments, {what}", error_from_moments, *given).must_be(torch.tensor(right), atol=1e-9, rtol=0.0)
    return "correct: no activation was needed"


def check_centred_solve(centred_solve: Callable[..., tuple[Tensor, Tensor]]) -> str:
    """Notebook 06: `centred_solve(n, xx, xy, x, y, w0, lam)` -> (W, b), from sums over n tokens; b is not damped."""
    x, y, w0 = _problem(5, 50, 4, 3)
    mean_x, mean_y = x.mean(0), y.mean(0)
    for lam in (0.0, 2.0, 1e9):
        what = f"centred_solve, lam = {lam:g}"
        found = call(what, centred_solve, 50, x.T @ x, x.T @ y, x.sum(0), y.sum(0), w0, lam)
        weight, bias = parts(what, found, "W, b")
        right = ridge(x - mean_x, y - mean_y, w0, lam)
        hint = "This W is right without a bias. Centre first: X'X - x x' / n with x the sum over tokens, X'Y alike"
        weight = compare(f"{what}: W", weight, right, (ridge(x, y, w0, lam), hint))
        hint = "b is mean(y) - W mean(x). Take the new W, and means, not sums"
        compare(f"{what}: b", bias, mean_y - right @ mean_x, hint, atol=1e-6)
    return "correct: the weight explains what varies, the bias what does not"
