"""Checkers of notebook 03, similarity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..similarity import unit_divergence
from .common import expect


def check_js_rows(js_rows: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Notebook 03: `js_rows(p, q)` -> [rows], divergence in nats of the rows of two tensors [rows, keys]."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(6, 5, generator=generator).softmax(-1) for _ in range(2))
    found = js_rows(p, q)
    expect(isinstance(found, Tensor) and found.shape == (6,), "js_rows: expected one number per row, a tensor [6]")
    kl = [(x * (x / ((p + q) / 2)).log()).sum(-1) for x in (p, q)]  # the other definition, fine without zeros
    right = sum(kl) / 2
    expect(
        not torch.allclose(found * math.log(2), right, atol=1e-6),
        "js_rows: these are bits. Use the natural logarithm (nats)",
    )
    expect(torch.allclose(found, right, atol=1e-6), f"js_rows: expected {right.tolist()}, found {found.tolist()}")
    one = torch.eye(4)
    edge = js_rows(one, one.roll(1, 0))
    expect(not edge.isnan().any(), "js_rows: NaN where a row has zeros; 0 log 0 counts as 0 (torch.special.xlogy)")
    expect(
        torch.allclose(edge, torch.full((4,), math.log(2)), atol=1e-7),
        f"js_rows: rows without a common key are exactly ln 2 = {math.log(2):.7f} apart, found {edge.tolist()}",
    )
    return "correct: zeros included"


def check_with_living_twin(with_living_twin: Callable[[Tensor, float], Sequence[int]]) -> str:
    """Notebook 03: heads to remove so that each still has a neighbour closer than tau among those that stay."""
    generator = torch.Generator().manual_seed(0)
    chain = (torch.arange(5.0)[:, None] - torch.arange(5.0)).abs()
    places = torch.rand(9, generator=generator)
    cloud = (places[:, None] - places).abs()
    for name, divergence, tau in (("a chain", chain, 1.5), ("nine heads", cloud, 0.1), ("all apart", chain, 0.5)):
        gone = list(with_living_twin(divergence, tau))
        n = len(divergence)
        expect(
            set(gone) <= set(range(n)) and len(set(gone)) == len(gone), f"{name}: expected distinct heads, found {gone}"
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
        before = divergence.clone()
        found = group_divergence(divergence, group)
        expect(torch.equal(divergence, before), "group_divergence: changed its argument; work on a copy")
        n = 6 // group
        expect(found.shape == (n, n), f"group={group}: expected shape {[n, n]}, found {list(found.shape)}")
        strided = divergence.reshape(group, n, group, n).mean((0, 2))
        expect(
            group in (1, 6) or not torch.allclose(found.fill_diagonal_(0), strided.fill_diagonal_(0)),
            f"group={group}: heads 0, {n}, ... were taken together; consecutive heads share a key: 0, 1, ...",
        )
        right = unit_divergence(divergence, group)
        expect(torch.allclose(found, right), f"group={group}: expected\n{right}\nfound\n{found}")
    return "correct: consecutive heads, zero diagonal"
