"""Checkers of notebook 07, data-free calibration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cards import calibration_card
from .common import expect


def check_draw(draw: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    """Notebook 07: `draw(logits, u, temperature)` -> long [batch], by inverting the distribution."""
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log().expand(5, -1).clone()
    u = torch.tensor([0.1, 0.49, 0.6, 0.71, 0.99])
    before = logits.clone()
    found = draw(logits, u, 1.0)
    expect(isinstance(found, Tensor) and found.shape == (5,), "draw: expected one token per row, a tensor [5]")
    expect(torch.equal(logits, before), "draw: changed its argument; work on a copy")
    expect(found.tolist() == [0, 0, 1, 2, 2], f"draw: expected tokens [0, 0, 1, 2, 2], found {found.tolist()}")
    cold = draw(torch.tensor([[1.0, 0.0]]), torch.tensor([0.8]), 0.5).tolist()
    expect(cold == [0], f"draw: at temperature 0.5 token 0 has probability 0.88, so u = 0.8 gives [0], found {cold}")
    last = draw(torch.zeros(1, 7), torch.ones(1), 1.0).tolist()
    expect(last == [6], f"draw: u = 1 has to give the last token [6], found {last}; rounding must not leave the range")
    return "correct: boundaries, temperature and the last token"


def check_shared_runs(shared_runs: Callable[[Tensor, Tensor, int], float]) -> str:
    """Notebook 07: `shared_runs(calibration, evaluation, run)` -> share of distinct runs of the evaluation."""
    text = torch.arange(24).view(2, 12)
    for name, mine, theirs, run in [
        ("the same text", text, text, 4),
        ("nothing shared", text, text + 100, 4),
        ("half", text, torch.cat([text[:1], text[1:] + 100]), 4),
        ("repeated runs count once", text, torch.cat([text[:1], text[:1], text[1:] + 100]), 4),
        ("runs stay inside a window", torch.arange(24).view(1, 24), text, 4),
    ]:
        right = calibration_card(mine, "x", evaluation={"y": theirs}, run=run).shared["y"]
        found = shared_runs(mine, theirs, run)
        expect(isinstance(found, float), f"{name}: expected a number, found {type(found).__name__}")
        expect(abs(found - right) < 1e-9, f"{name}: expected {right:.3f}, found {found:.3f}")
    return "correct: distinct runs, inside windows"


def check_sigma_of_random_ids(sigma_of_random_ids: Callable[[Tensor], Tensor]) -> str:
    """Notebook 07: `sigma_of_random_ids(embeddings)` -> [d, d], the uncentred second moment."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(50, 4, generator=generator) + 1
    found = sigma_of_random_ids(embeddings)
    expect(found.shape == (4, 4), f"expected shape [4, 4], found {list(found.shape)}")
    right = sum(torch.outer(e, e) for e in embeddings) / 50
    centred = torch.cov(embeddings.T, correction=0)
    expect(
        not torch.allclose(found, centred, atol=1e-4),
        "the covariance: Sigma is uncentred, the mean stays in it",
    )
    expect(not torch.allclose(found, right * 50, atol=1e-3), "that is the sum over the vocabulary; divide by its size")
    expect(torch.allclose(found, right, atol=1e-5), f"expected\n{right}\nfound\n{found}")
    return "correct: an average of outer products"
