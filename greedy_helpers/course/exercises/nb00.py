"""Checkers of notebook 00, the quickstart: perplexity, repaired damage, a first criterion."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor

from .common import expect, is_tensor


class _Bigrams:
    """A language model in one table: the logits of the next token depend on this token only."""

    device = torch.device("cpu")

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def check_perplexity(my_perplexity: Callable[[object, Tensor], float]) -> str:
    """Notebook 00: `my_perplexity(model, tokens)` -> number; `tokens` long [windows, seq]."""
    uniform = my_perplexity(_Bigrams(torch.zeros(7, 7)), torch.arange(6).view(2, 3))
    expect(isinstance(uniform, float), f"my_perplexity: expected a float, found {type(uniform).__name__}; try .item()")
    expect(
        math.isclose(uniform, 7, rel_tol=1e-5),
        f"my_perplexity: a model that holds all 7 tokens for equally likely has perplexity 7, found {uniform:.4g}; "
        "take natural logarithms, their mean, and then the exponential",
    )
    generator = torch.Generator().manual_seed(0)
    model = _Bigrams(3 * torch.randn(7, 7, generator=generator))
    tokens = torch.randint(7, (3, 5), generator=generator)
    before = tokens.clone()
    found = my_perplexity(model, tokens)
    expect(torch.equal(tokens, before), "my_perplexity: changed its tokens; work on a copy")
    surprise = [
        [-math.log(model.table[this].softmax(-1)[following].item()) for this, following in pairwise(row)]
        for row in tokens.tolist()
    ]
    right = math.exp(sum(map(sum, surprise)) / sum(map(len, surprise)))
    own = math.exp(sum(-math.log(model.table[t].softmax(-1)[t].item()) for t in tokens.flatten()) / tokens.numel())
    by_window = sum(math.exp(sum(row) / len(row)) for row in surprise) / len(surprise)
    for wrong, message in [
        (own, "each token is judged on predicting itself; position t predicts token t + 1"),
        (by_window, "the windows' perplexities are averaged; average the surprise over all targets first"),
    ]:
        expect(not math.isclose(found, wrong, rel_tol=1e-4), f"my_perplexity: {message}")
    expect(
        math.isclose(found, right, rel_tol=1e-4),
        f"my_perplexity: expected {right:.4f} on 3 windows of 5 tokens, found {found:.4f}; every window has 4 targets",
    )
    return "correct: the right targets, one mean over all of them"


def check_share_repaired(share_repaired: Callable[[float, float, float], float]) -> str:
    """Notebook 00: `share_repaired(dense, cut, repaired)` -> share of the excess log-perplexity that is gone."""
    for dense, cut, repaired, right, what in [
        (10.0, 20.0, 20.0, 0.0, "nothing repaired"),
        (10.0, 20.0, 10.0, 1.0, "all repaired"),
        (10.0, 40.0, 20.0, 0.5, "from 4 times to 2 times the dense perplexity: half of it, in logarithms"),
        (10.0, 20.0, 40.0, -1.0, "a repair that harms has a negative share; do not hide it"),
    ]:
        found = share_repaired(dense, cut, repaired)
        expect(isinstance(found, float), f"share_repaired: expected a number, found {type(found).__name__}")
        given = f"share_repaired({dense:g}, {cut:g}, {repaired:g})"
        expect(math.isclose(found, right, abs_tol=1e-9), f"{given}: expected {right:g}, found {found:.4g} ({what})")
    return "correct: in logarithms, with its sign"


def check_activity(activity: Callable[[object, object], Tensor]) -> str:
    """Notebook 00: `activity(module, seen)` -> [units], the mean square of a unit's channels, added up."""
    mean_square = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)
    before = mean_square.clone()
    seen = SimpleNamespace(level2=SimpleNamespace(mean_square=mean_square))
    for index, what in [
        (torch.arange(6)[:, None], "channels of an FFN, one per unit"),
        (torch.arange(6).view(3, 2), "three heads of two channels"),
        (torch.tensor([[0, 3], [1, 4], [2, 5]]), "three heads whose channels do not lie side by side: use the index"),
    ]:
        module = SimpleNamespace(level2=SimpleNamespace(index=index), n_units=len(index))
        found = is_tensor(activity(module, seen), (len(index),), f"activity, {what}")
        right = torch.stack([sum(mean_square[channel] for channel in unit) for unit in index.tolist()])
        expect(
            torch.allclose(found.double(), right),
            f"activity, {what}: expected {right.tolist()}, found {found.tolist()}",
        )
    expect(torch.equal(mean_square, before), "activity: changed the moments; they are used again")
    return "correct: one score per unit, whatever the layout"
