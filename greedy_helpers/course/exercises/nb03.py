"""Checkers of notebook 03, similarity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .common import expect


def check_js_rows(js_rows: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Notebook 03: `js_rows(p, q)` -> [rows], divergence in nats of the rows of two tensors [rows, keys]."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(6, 5, generator=generator).softmax(-1) for _ in range(2))
    before = p.clone(), q.clone()
    found = js_rows(p, q)
    expect(isinstance(found, Tensor), f"js_rows: expected a tensor, found {type(found).__name__}")
    expect(found.shape == (6,), f"js_rows: expected one number per row, shape [6], found {list(found.shape)}")
    expect(torch.equal(p, before[0]) and torch.equal(q, before[1]), "js_rows: changed its arguments; work on copies")
    kl = [(x * (x / ((p + q) / 2)).log()).sum(-1) for x in (p, q)]  # the other definition, fine without zeros
    right = sum(kl) / 2
    found = found.to(right)

    def equal(other: Tensor) -> bool:
        return torch.allclose(found, other, rtol=1e-3, atol=1e-6)

    expect(not equal(right / math.log(2)), "js_rows: these are bits. Use the natural logarithm (nats)")
    expect(not equal(right.sqrt()), "js_rows: this is the root, the Jensen-Shannon distance; leave the root out")
    expect(not equal(-right), "js_rows: the sign is wrong; H(p) = -sum p ln p, and mixing raises the entropy")
    expect(not equal(2 * right), "js_rows: twice too large; subtract the mean of the two entropies, halve their sum")
    expect(equal(right), f"js_rows: expected {right.tolist()}, found {found.tolist()}")
    one = torch.eye(4)
    edge = js_rows(one, one.roll(1, 0)).to(right)
    expect(not edge.isnan().any(), "js_rows: NaN where a row has zeros; 0 log 0 counts as 0 (torch.special.xlogy)")
    expect(
        torch.allclose(edge, torch.full((4,), math.log(2)), rtol=0, atol=2e-7),
        f"js_rows: rows without a common key are exactly ln 2 = {math.log(2):.7f} apart, found {edge.tolist()}. "
        "Was a small number added inside the logarithm?",
    )
    return "correct: zeros included"


def check_with_living_twin(with_living_twin: Callable[[Tensor, float], Sequence[int]]) -> str:
    """Notebook 03: heads to remove so that each still has a neighbour closer than tau among those that stay."""
    generator = torch.Generator().manual_seed(0)
    chain = (torch.arange(5.0)[:, None] - torch.arange(5.0)).abs()
    places = torch.rand(9, generator=generator)
    cloud = (places[:, None] - places).abs()
    for name, divergence, tau in (("a chain", chain, 1.5), ("nine heads", cloud, 0.1), ("all apart", chain, 0.5)):
        n, before = len(divergence), divergence.clone()
        found = with_living_twin(divergence, tau)
        expect(
            isinstance(found, Sequence | Tensor | set | frozenset) and not isinstance(found, str),
            f"with_living_twin: expected a list of heads, found {type(found).__name__}",
        )
        expect(torch.equal(divergence, before), "with_living_twin: changed its argument; work on a copy")
        gone = [int(head) for head in found]
        expect(
            set(gone) <= set(range(n)) and len(set(gone)) == len(gone),
            f"{name}: expected distinct heads in [0, {n}), found {gone}",
        )
        close = (divergence < tau) & ~torch.eye(n, dtype=torch.bool)

        def orphans(gone: set[int], close: Tensor = close, n: int = n) -> list[int]:
            stays = [head for head in range(n) if head not in gone]
            return [head for head in sorted(gone) if not close[head, stays].any()]

        alone = orphans(set(gone))
        expect(not alone, f"{name}: removed {gone}, but head {alone[:1]} has no similar head left among the survivors")
        more = [head for head in range(n) if head not in gone and not orphans({*gone, head})]
        expect(not more, f"{name}: removed {gone}; head {more[:1]} could go as well, and all would keep a twin")
    return "correct: nobody is left without a twin"


def check_group_divergence(group_divergence: Callable[[Tensor, int], Tensor]) -> str:
    """Notebook 03: `group_divergence(divergence, group)` -> [groups, groups]."""
    generator = torch.Generator().manual_seed(0)
    divergence = torch.rand(6, 6, generator=generator)
    divergence = (divergence + divergence.T).fill_diagonal_(0)
    for group in (2, 3, 1):
        before, n = divergence.clone(), 6 // group
        found = group_divergence(divergence, group)
        expect(torch.equal(divergence, before), "group_divergence: changed its argument; work on a copy")
        expect(isinstance(found, Tensor), f"group_divergence: expected a tensor, found {type(found).__name__}")
        expect(found.shape == (n, n), f"group={group}: expected shape {[n, n]}, found {list(found.shape)}")
        right = torch.zeros(n, n)
        for a in range(n):
            for b in range(n):
                if a != b:
                    pairs = [divergence[a * group + i, b * group + j] for i in range(group) for j in range(group)]
                    right[a, b] = torch.stack(pairs).mean()
        off = ~torch.eye(n, dtype=torch.bool)
        found, strided = found.to(right), divergence.reshape(group, n, group, n).mean((0, 2))
        expect(
            group == 1 or torch.allclose(right[off], strided[off]) or not torch.allclose(found[off], strided[off]),
            f"group={group}: heads 0, {n}, ... were taken together; consecutive heads share a key: 0, 1, ...",
        )
        expect(
            group == 1 or not torch.allclose(found[off], right[off] * group**2),
            f"group={group}: these are sums over the pairs of heads; expected means",
        )
        expect(torch.allclose(found[off], right[off]), f"group={group}: expected\n{right}\nfound\n{found}")
        expect(
            not found.diagonal().any(),
            f"group={group}: expected zeros on the diagonal, found {found.diagonal().tolist()}; a group is not "
            "different from itself, even if its heads differ from each other",
        )
    return "correct: consecutive heads, zero diagonal"
