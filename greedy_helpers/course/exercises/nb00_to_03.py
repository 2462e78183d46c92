"""Checkers of notebooks 00 to 03: quickstart, structure, what to approximate, similarity."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import silu

from ...layouts import channel_index
from .common import ask, call, compare, draw, expect, is_linear, like


class _Bigrams:
    """A language model in one table: the logits of the next token depend on this token only."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.device = table, table.device

    def __call__(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def check_perplexity(my_perplexity: Callable[..., float]) -> str:
    """Notebook 00: `my_perplexity(model, tokens)` -> number; `tokens` long [windows, seq]."""
    uniform = _Bigrams(torch.zeros(7, 7)), torch.arange(6).view(2, 3)
    hint = "Take natural logarithms, their mean, and then the exponential"
    ask("my_perplexity of a model for which all 7 tokens are equally likely", my_perplexity, *uniform).must_be(
        7.0, hint
    )
    table = 3 * draw(0, (7, 7))[0].float()
    tokens = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(0))
    surprise = -table.double().log_softmax(-1)
    by_window = [[surprise[this, following].item() for this, following in pairwise(row)] for row in tokens.tolist()]
    right = math.exp(sum(map(sum, by_window)) / 12)
    own = surprise.diagonal()[tokens].mean().exp()
    averaged = sum(math.exp(sum(row) / 4) for row in by_window) / 3
    ask("my_perplexity of 3 windows of 5 tokens", my_perplexity, _Bigrams(table), tokens).must_be(
        right,
        (own, "Each token is judged on predicting itself; position t predicts token t + 1"),
        (averaged, "The windows' perplexities are averaged; average the surprise over all targets first"),
        "Every window has 4 targets",
        rtol=1e-4,
    )
    return "correct: the right targets, one mean over all of them"


def check_activity(activity: Callable[..., Tensor]) -> str:
    """Notebook 00: `activity(module, seen)` -> [units], the mean square of a unit's channels, added up."""
    mean_square = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)
    seen = SimpleNamespace(level2=SimpleNamespace(mean_square=mean_square))
    for what, index in [
        ("channels of an FFN, one per unit", torch.arange(6)[:, None]),
        ("three heads of two channels", torch.arange(6).view(3, 2)),
        ("three heads whose channels do not lie side by side", torch.tensor([[0, 3], [1, 4], [2, 5]])),
    ]:
        module = SimpleNamespace(level2=SimpleNamespace(index=index), n_units=len(index))
        right = torch.stack([sum(mean_square[channel] for channel in unit) for unit in index.tolist()])
        neighbours = mean_square.view(index.shape).sum(1)
        hint = (neighbours, "Take the channels that the index names")
        ask(f"activity, {what}", activity, module, seen).must_be(right, hint)
    return "correct: one score per unit, whatever the layout"


def check_fused_layout(layout_index: Callable[[int, int], Tensor]) -> str:
    """Notebook 01: `layout_index(n_heads, dim)` -> long [n_heads, 3 * dim], each head's channels of GPT-2's c_attn."""
    for n_heads, dim in ((4, 8), (3, 5), (1, 2)):
        what = f"layout_index({n_heads}, {dim})"
        right = channel_index("kv dim | kv dim | kv dim", 3 * n_heads * dim, dim=dim)
        found = like(what, layout_index(n_heads, dim), right).sort(1).values
        hint = (
            "That is GPT-NeoX's order (query, key, value of head 0, then of head 1). GPT-2 has all queries first: the "
            "key of head 0 begins behind the query of the last head"
        )
        compare(what, found, right, (channel_index("kv 3 dim", 3 * n_heads * dim, dim=dim), hint))
    return "correct: three stretches, and each head owns a piece of every one"


@torch.no_grad()
def check_remove_channels(remove_channels: Callable[..., None]) -> str:
    """Notebook 01: `remove_channels(gate, up, down, keep)` cuts a gated FFN in place to the channels `keep`."""
    torch.manual_seed(0)
    for bias in (False, True):
        gate, up, down = nn.Linear(6, 10, bias), nn.Linear(6, 10, bias), nn.Linear(10, 6, bias)
        keep, x, silent = torch.tensor([7, 0, 3, 9]), torch.randn(5, 6), copy.deepcopy(down)
        silent.weight[:, [channel for channel in range(10) if channel not in keep.tolist()]] = 0
        right = silent(silu(gate(x)) * up(x))
        with torch.enable_grad():
            remove_channels(gate, up, down, keep)
        for name, layer, sizes in (("gate", gate, (6, 4)), ("up", up, (6, 4)), ("down", down, (4, 6))):
            is_linear(name, layer, *sizes)
        compare(
            "the outputs, beside those of a module whose other channels are silent",
            down(silu(gate(x)) * up(x)),
            right,
            "Do the rows of gate and up and the columns of down all follow `keep`, in the same order?",
            atol=1e-6,
        )
    return "correct: removed equals silenced, with and without biases"


def check_pieces(pieces: Callable[[Tensor], Tensor]) -> str:
    """Notebook 01: `pieces(coupled)` labels the inputs of bool [d_in, d_out] by the piece they belong to."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    heads = torch.block_diag(*[torch.ones(3, 4)] * 4).bool()[order]
    chain = torch.zeros(4, 3, dtype=torch.bool)
    chain[[0, 1, 1, 2, 2, 3], [0, 0, 1, 1, 2, 2]] = True  # 0-1, 1-2 and 2-3 share an output: all hang together
    neighbours = "Neighbours of neighbours belong to the same piece: repeat until nothing changes"
    for what, coupled, right, *hints in (
        ("four heads, shuffled", heads, order // 3),
        ("a chain", chain, torch.zeros(4, dtype=torch.long), neighbours),
        ("five FFN channels", torch.eye(5, dtype=torch.bool), torch.arange(5)),
    ):
        found = like(what, call(what, pieces, coupled), right)
        compare(f"{what}: number of pieces", len(found.unique()), len(right.unique()), *hints)
        compare(f"{what}: who is together with whom", found[:, None] == found, right[:, None] == right)
    return "correct: heads, chains and single channels"


def check_gated_magnitude(gated_magnitude: Callable[..., Tensor]) -> str:
    """Notebook 02: `gated_magnitude(gate, up, down)` -> [n], ||W - W_-u||^2 of every channel of a gated FFN."""
    for n, d in ((7, 3), (4, 4), (1, 5)):
        gate, up, down = weights = draw(0, (n, d), (n, d), (d, n))
        right = torch.zeros(n).double()
        for u in range(n):  # brute force: what is lost when unit u goes
            rest = [weight.clone() for weight in weights]
            rest[0][u], rest[1][u], rest[2][:, u] = 0, 0, 0
            right[u] = sum((w - r).square().sum() for w, r in zip(weights, rest, strict=True))
        rows, columns = up.square().sum(1) + gate.square().sum(1), down.square().sum(0)
        hints = [
            (right.sqrt(), "These are norms; the distance is asked for squared"),
            (rows, "Level 2 is missing. A channel also owns its column of `down`"),
            (columns, "Level 1 is missing. A channel also owns its rows of `gate` and `up`"),
        ]
        if n == d:
            swapped = rows + down.square().sum(1)
            hints.append((swapped, "You took rows of `down`. Its rows are outputs; channel j is its column j"))
        ask(f"gated_magnitude of {n} channels in {d} dimensions", gated_magnitude, *weights).must_be(right, *hints)
    return "correct: two rows and a column, squared"


def check_unit_energy(unit_energy: Callable[..., Tensor]) -> str:
    """Notebook 02: `unit_energy(z, B, index)` -> [units], mean over tokens of ||B_u z_u||^2."""
    for units, width, order in ((3, 2, range(6)), (2, 4, (6, 2, 0, 5, 1, 7, 3, 4)), (5, 1, range(5))):
        z, b = draw(0, (40, units * width), (3, units * width))
        z = z + z.mean(1, keepdim=True) * 2  # correlated channels, as a head's are
        index = torch.tensor(list(order)).view(units, width)

        def energies(index: Tensor, z: Tensor = z, b: Tensor = b) -> Tensor:
            rest = [[c for c in range(z.shape[1]) if c not in own] for own in index.tolist()]
            return torch.stack([(z @ b.T - z[:, r] @ b[:, r].T).square().sum(1).mean() for r in rest])

        right, apart = energies(index), (z.square().mean(0) * b.square().sum(0))[index].sum(1)
        ask(f"unit_energy of {units} units of {width} channel{'s' * (width > 1)}", unit_energy, z, b, index).must_be(
            right,
            (right * len(z), "That is the sum over tokens; the *mean* over tokens is asked for"),
            (right / 3, "Sum over the output's dimensions, average over tokens only"),
            (apart, "You added up the channels' energies. A head's channels speak together: first add up, then square"),
            (energies(index.flatten().sort().values.view(units, width)), "Channels of a unit need not be neighbours"),
        )
    return "correct: single channels and heads, in any order"


_PURPOSES = {
    "L2 magnitude": ("function", "its formula contains weights and nothing else"),
    "second moment": ("output", "Sigma = E[x x'] and B say how large a unit's part of the module's output is"),
    "Wanda-sp": ("output", "|weight| times the size of what arrives there: no loss anywhere, but activations"),
    "FLAP": ("output", "the variance of an activation times its column's energy: what the module's output would lose"),
    "LLM-Pruner": ("objective", "g is the gradient of the language-modelling loss"),
    "OSSCAR": (
        "output",
        "there is a Hessian in it, but of which function? H = X'X belongs to the squared error of one layer's output, "
        "and no backward pass is needed for it",
    ),
    "random": ("none", "it looks at nothing, so it keeps nothing in particular"),
}


def check_purposes(purposes: Mapping[str, str]) -> str:
    """Notebook 02: criterion -> `"function"`, `"output"`, `"objective"` or `"none"`."""
    like("purposes", purposes, {})
    missing = [name for name in _PURPOSES if name not in purposes]
    expect(not missing, f"not answered yet: {', '.join(missing)}")
    for name, answer in purposes.items():
        expect(name in _PURPOSES, f"{name!r} was not asked; the names are {', '.join(_PURPOSES)}")
        known = answer in ("function", "output", "objective", "none")
        expect(known, f"{name}: expected 'function', 'output', 'objective' or 'none', found {answer!r}")
        right, reason = _PURPOSES[name]
        expect(answer == right, f"{name}: not {answer!r}. Look again: {reason}")
    return "correct: look at what a formula needs, not at its name"


def check_fool_magnitude(fool_magnitude: Callable[..., Tensor]) -> str:
    """Notebook 02: `fool_magnitude(gate, up, down, order)` -> scales c [n] that make L2 rank in that order."""
    for n, d in ((6, 4), (9, 2), (1, 3)):
        gate, up, down, x = draw(0, (n, d), (n, d), (d, n), (8, d))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        what = f"{n} channels in the order {order.tolist()}"
        c = like(what, call(what, fool_magnitude, gate, up, down, order), torch.ones(n))
        expect(bool((c > 0).all() and c.isfinite().all()), f"{what}: expected positive, finite scales, found {c}")
        before, after = ((F.silu(x @ gate.T) * (x @ (up * s[:, None]).T)) @ (down / s).T for s in (torch.ones(n), c))
        compare(f"{what}: the outputs", after, before, "The scales are so extreme that rounding shows", rtol=1e-6)
        size = gate.square().sum(1) + (up * c[:, None]).square().sum(1) + (down / c).square().sum(0)
        compare(
            f"{what}: L2's order after your scales, smallest first",
            size.argsort().tolist(),
            order.tolist(),
            "No scale makes a channel smaller than ||g||^2 + 2 ||u|| ||d||, but every channel can be made as large as "
            "you like: choose targets above everybody's minimum",
        )
        gaps = size[order][1:] > size[order][:-1] * (1 + 1e-6)
        expect(bool(gaps.all()), f"{what}: some channels have equal norms; leave a gap between neighbours")
    return "correct: the same function, and magnitude obeys you"


def check_js_rows(js_rows: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Notebook 03: `js_rows(p, q)` -> [rows], divergence in nats of the rows of two tensors [rows, keys]."""
    p, q = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    right = sum((x * (x / ((p + q) / 2)).log()).sum(-1) for x in (p, q)) / 2  # the other definition, without zeros
    ask("js_rows", js_rows, p, q).must_be(
        right,
        (right / math.log(2), "These are bits. Use the natural logarithm (nats)"),
        (right.sqrt(), "This is the root, the Jensen-Shannon distance; leave the root out"),
        (-right, "The sign is wrong; H(p) = -sum p ln p, and mixing raises the entropy"),
        (2 * right, "Twice too large; subtract the mean of the two entropies, halve their sum"),
        rtol=1e-3,
        atol=1e-6,
    )
    one = torch.eye(4)
    ask("js_rows of rows without a common key, exactly ln 2 apart", js_rows, one, one.roll(1, 0)).must_be(
        torch.full((4,), math.log(2)),
        (lambda found: bool(found.isnan().any()), "NaN: 0 log 0 counts as 0 (torch.special.xlogy)"),
        "Was a small number added inside the logarithm?",
        rtol=0.0,
        atol=2e-7,
    )
    return "correct: zeros included"


def check_with_living_twin(with_living_twin: Callable[..., Sequence[int]]) -> str:
    """Notebook 03: heads to remove so that each still has a neighbour closer than tau among those that stay."""
    places = torch.arange(5.0), torch.rand(9, generator=torch.Generator().manual_seed(0)), torch.arange(5.0)
    for what, place, tau in zip(("a chain", "nine heads", "all apart"), places, (1.5, 0.1, 0.5), strict=True):
        divergence, n = (place[:, None] - place).abs(), len(place)
        found = call(what, with_living_twin, divergence, tau)
        fits = isinstance(found, Sequence | Tensor | set | frozenset) and not isinstance(found, str)
        expect(fits, f"{what}: expected a list of heads, found {type(found).__name__}")
        gone = [int(head) for head in found]
        distinct = set(gone) <= set(range(n)) and len(set(gone)) == len(gone)
        expect(distinct, f"{what}: expected distinct heads in [0, {n}), found {gone}")
        close = (divergence < tau) & ~torch.eye(n, dtype=torch.bool)

        def orphans(gone: set[int], close: Tensor = close, n: int = n) -> list[int]:
            stays = [head for head in range(n) if head not in gone]
            return [head for head in sorted(gone) if not close[head, stays].any()]

        alone = orphans(set(gone))
        expect(not alone, f"{what}: removed {gone}, but head {alone[:1]} has no similar head left among the survivors")
        more = [head for head in range(n) if head not in gone and not orphans({*gone, head})]
        expect(not more, f"{what}: removed {gone}; head {more[:1]} could go as well, and all would keep a twin")
    return "correct: nobody is left without a twin"


def check_group_divergence(group_divergence: Callable[[Tensor, int], Tensor]) -> str:
    """Notebook 03: `group_divergence(divergence, group)` -> [groups, groups]."""
    divergence = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    divergence = (divergence + divergence.T).fill_diagonal_(0)
    for group in (2, 3, 1):
        n = 6 // group
        right = torch.zeros(n, n)
        for a, b in ((a, b) for a in range(n) for b in range(n) if a != b):
            pairs = [divergence[a * group + i, b * group + j] for i in range(group) for j in range(group)]
            right[a, b] = sum(pairs) / len(pairs)
        strided = divergence.reshape(group, n, group, n).mean((0, 2)).fill_diagonal_(0)
        means = divergence.reshape(n, group, n, group).mean((1, 3))
        ask(f"group_divergence, group={group}", group_divergence, divergence, group).must_be(
            right,
            (strided, f"Heads 0, {n}, ... were taken together; consecutive heads share a key: 0, 1, ..."),
            (right * group**2, "These are sums over the pairs of heads; expected means"),
            (means, "Zeros on the diagonal: a group is not different from itself, even if its heads differ"),
        )
    return "correct: consecutive heads, zero diagonal"
