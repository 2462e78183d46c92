"""Checkers of notebooks 07 to 09: data-free calibration, comparing, beyond the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ...evaluate import TextScore
from ..cards import calibration_card
from .common import ask, call, compare, draw, expect, like, parts, ridge


def check_nucleus(nucleus: Callable[[Tensor, float], Tensor]) -> str:
    """Notebook 07: `nucleus(logits, p)` -> probabilities: the fewest likely tokens that reach p, scaled to sum to 1."""
    given = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.2, 0.05, 0.05, 0.7]], dtype=torch.float64)
    for p, kept in ((0.7, [[1, 2], [3]]), (0.4, [[1], [3]]), (0.8, [[1, 2, 3], [0, 3]]), (1.0, [[0, 1, 2, 3]] * 2)):
        size = torch.tensor([*map(len, kept)])
        right = given * torch.tensor([[token in row for token in range(4)] for row in kept])
        ranked = right.sort(dim=-1, descending=True).values
        ask(f"nucleus of probabilities {given.tolist()}, p = {p}", nucleus, given.log() + 3, p).must_be(
            right / right.sum(-1, keepdim=True),
            (right, "The kept tokens have to add up to 1 again"),
            (ranked / ranked.sum(-1, keepdim=True), "Put the probabilities back into the order of the vocabulary"),
            (lambda found, n=size: ((found > 0).sum(-1) < n).any(), "Keep the token with which p is reached"),
            (lambda found, n=size: ((found > 0).sum(-1) > n).any(), "Keep as few tokens as possible"),
            atol=1e-6,
        )
    return "correct: as few tokens as reach p, and scaled"


def check_shared_runs(shared_runs: Callable[[Tensor, Tensor, int], float]) -> str:
    """Notebook 07: `shared_runs(calibration, evaluation, run)` -> share of distinct runs of the evaluation."""
    text = torch.arange(24).view(2, 12)
    for what, mine, theirs in [
        ("the same text", text, text),
        ("nothing shared", text, text + 100),
        ("half", text, torch.cat([text[:1], text[1:] + 100])),
        ("repeated runs count once", text, torch.cat([text[:1], text[:1], text[1:] + 100])),
        ("runs stay inside a window", torch.arange(24).view(1, 24), text),
    ]:
        right = calibration_card(mine, "x", evaluation={"y": theirs}, run=4).shared["y"]
        ask(f"shared_runs, {what}", shared_runs, mine, theirs, 4).must_be(right)
    return "correct: distinct runs, inside windows"


def check_bits_per_byte(bits_per_byte: Callable[[Tensor, str], float]) -> str:
    """Notebook 09: `bits_per_byte(losses, text)`: nats of every token of `text` -> bits per byte of its UTF-8."""
    for text, n_bytes in (("abcdefgh", 8), ("äöü€", 9)):
        bits = 4 / math.log(2)
        right = bits / n_bytes
        ask(f"bits_per_byte of {text!r}", bits_per_byte, torch.tensor([2.0, 0.5, 1.5]), text).must_be(
            right,
            (right * math.log(2), "These are nats; one nat is 1 / ln 2 bits"),
            (right * math.log(2) ** 2, "Divide by ln 2, do not multiply: a nat is more than a bit"),
            (right / 3, "The mean over the tokens was divided by the bytes; expected the sum"),
            (bits / 3, "These are bits per token; divide by the bytes of the text"),
            (bits / len(text), "These are bits per character; letters beyond ASCII take 2 to 4 bytes"),
        )
    return "correct: whatever the tokenizer"


def check_bootstrap_error(bootstrap_error: Callable[[Tensor, Tensor], float]) -> str:
    """Notebook 09: `bootstrap_error(nats, targets)` per document -> standard error of the loss per token."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(20, 400, (40,), generator=generator)
    nats = targets * (3 + torch.randn(40, generator=generator, dtype=torch.float64))
    residual = nats - nats.sum() / targets.sum() * targets  # the ratio's linearisation: no draws
    right = (residual.square().sum().sqrt() / targets.sum()).item()
    spread, length = (nats / targets).std().item(), targets.double().mean().item()
    found = ask("bootstrap_error", bootstrap_error, nats, targets).must_be(
        right,
        (lambda found: found < 0, "A standard error is positive"),
        (spread, "The spread of single documents; the loss is a mean over many of them"),
        (right / math.sqrt(length), "Tokens were drawn, or counted, one by one; draw documents"),
        (nats.std().item() / math.sqrt(40) / length, "Divide a draw's nats by *its* tokens, not by a fixed number"),
        (spread / math.sqrt(40), "Every document counted alike; a long one has more tokens"),
        rtol=0.12,
    )
    alike = torch.full((9,), 30.0, dtype=torch.float64), torch.full((9,), 10)
    ask("bootstrap_error of documents that are all alike, which leave no doubt", bootstrap_error, *alike).must_be(
        0.0, atol=1e-6
    )
    package = TextScore(64, 64, 1, "documents", nats, targets, targets).loss_error
    return f"correct: {found:.3f}, the package says {package:.3f}"


def check_mcnemar(mcnemar: Callable[[Tensor, Tensor], tuple[int, int, float]]) -> str:
    """Notebook 09: `mcnemar(a, b)`, bool [items] -> (only a right, only b right, two-sided exact p)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(60, generator=generator) < 0.7, torch.rand(60, generator=generator) < 0.45
    same = torch.ones(5, dtype=torch.bool)
    for what, first, second in (
        ("sixty items", a, b),
        ("the other way round", b, a),
        ("an even split", torch.tensor([True, False, True]), torch.tensor([False, True, True])),
        ("never different", same, same),
    ):
        only_a, only_b, p = parts(what, call(what, mcnemar, first, second), "only a, only b, p")
        counts = [int((first & ~second).sum()), int((second & ~first).sum())]
        totals = [int(first.sum()), int(second.sum())]
        hint = "These are all right answers; items that both get right say nothing about the difference"
        compare(f"{what}: the counts", [int(only_a), int(only_b)], counts, (totals, hint))
        n, fewer = sum(counts), min(counts)  # of splits at least as uneven, when both are equally likely
        right = torch.tensor(min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n), dtype=torch.float64)
        compare(
            f"{what}: p",
            p,
            right,
            (lambda p: not 0 <= p <= 1, "That is no probability; an even split gives 1"),
            (right / 2, "That is one-sided; either model might have been the better one, so double it"),
            atol=1e-6,
        )
    return "correct: only the items that tell the two apart"


_RUN = {
    "model": "7B",
    "text": "WikiText-2",
    "seq": 128,
    "stride": 128,
    "tokenizer": "fast",
    "metric": "perplexity",
    "blocks left": 0.8,
    "calibration": (16, 128),
    "calibration text": "C4",
    "method": "A",
    "seed": 0,
}


def check_comparable(comparable: Callable[[dict, dict], bool]) -> str:
    """Notebook 09: `comparable(one, other)`, two runs with their settings -> may their numbers be compared?"""
    magnitude = {"calibration": None, "calibration text": None}
    for change, of_both, right, why in (
        ({}, {}, True, "the same settings"),
        ({"method": "B"}, {}, True, "methods are what we want to compare"),
        ({"seed": 1}, {}, True, "another draw of the same calibration text is fair"),
        ({"model": "13B"}, {}, False, "another model"),
        ({"text": "PTB"}, {}, False, "another text"),
        ({"seq": 2048}, {}, False, "the length of the windows alone can halve a perplexity"),
        ({"stride": 64}, {}, False, "overlapping windows give every token more context"),
        ({"tokenizer": "slow"}, {}, False, "perplexity per token depends on the tokens"),
        ({"tokenizer": "slow"}, {"metric": "bits per byte"}, True, "bits per byte do not depend on the tokenizer"),
        ({"metric": "bits per byte"}, {}, False, "two units"),
        ({"blocks left": 0.803}, {}, True, "the budgets agree within half a percentage point"),
        ({"blocks left": 0.81}, {}, False, "one has a larger budget"),
        ({"calibration": (8, 256)}, {}, True, "as many calibration tokens"),
        ({"calibration": (1024, 128)}, {}, False, "64 times the calibration tokens"),
        ({"calibration text": "WikiText-2"}, {}, False, "one was calibrated on the kind of text it is judged on"),
        (magnitude, {}, True, "a method that needs no data gives nothing away"),
        ({}, magnitude, True, "neither needs data"),
        (magnitude | {"seq": 64}, {}, False, "no calibration, but other windows"),
    ):
        one, other = _RUN | of_both, _RUN | of_both | change
        for first, second in ((one, other), (other, one)):
            differ = {key: (first[key], second[key]) for key in first if first[key] != second[key]}
            what = f"comparable: two {first['metric']} runs that differ in {differ or 'nothing'}"
            found = like(what, call(what, comparable, first, second), right)
            expect(found == right, f"{what}: expected {right}: {why}")
    return "correct: you would have caught all of them"


def _problem(seed: int, channels: int = 6, tokens: int = 40, d_y: int = 3) -> tuple[Tensor, ...]:
    """Correlated channels z, targets y, the normal equations' H (with 0.5 I), solution B [d_y, channels]. Float64."""
    z, mix, b, noise = draw(seed, (tokens, channels), (channels, channels), (channels, d_y), (tokens, d_y))
    z = z @ mix
    y = z @ b + noise
    h = z.T @ z + 0.5 * torch.eye(channels).double()
    return z, y, h, torch.cholesky_solve(z.T @ y, torch.linalg.cholesky(h)).T


def _solved_again(z: Tensor, y: Tensor, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The least of ||Y - Z_S B'||^2 + 0.5 ||B||^2 and its B, without a shortcut."""
    z = z[:, list(channels)]
    b = ridge(z, y, torch.zeros(y.shape[1], z.shape[1]).double(), 0.5)
    return (y - z @ b.T).square().sum() + 0.5 * b.square().sum(), b


def check_downdate(downdate: Callable[..., tuple[Tensor, Tensor]]) -> str:
    """Notebook 08: `downdate(inverse, b, g)` -> H^-1 and B on the channels that are left when `g` go."""
    z, y, h, b = _problem(1)
    inverse = torch.linalg.inv(h)
    for g in (torch.tensor([2]), torch.tensor([4, 1])):
        rest, what = [c for c in range(6) if c not in g.tolist()], f"downdate, without channels {g.tolist()}"
        new_inverse, new_b = parts(what, call(what, downdate, inverse, b, g), "new inverse, B")
        hint = "The inverse of a part is not the part of the inverse: subtract what went through the removed channels"
        part = inverse[rest][:, rest]
        compare(f"{what}: the inverse", new_inverse, torch.linalg.inv(h[rest][:, rest]), (part, hint))
        compare(
            f"{what}: B, against solving again",
            new_b,
            _solved_again(z, y, rest)[1],
            (b[:, rest], "The survivors' columns of B did not move; they have to take over the work of what went"),
            "The block of H^-1 of two channels is a matrix: invert it, do not divide by its diagonal",
        )
    return "correct: one channel or several, without solving again"


def check_residual_refit(residual_refit: Callable[..., Tensor]) -> str:
    """Notebook 08: `residual_refit(z, y, x, x_hat, w0, lam)` -> W [d, channels] that also repairs the stream."""
    z, x, w0, error, noise = draw(2, (50, 4), (50, 3), (3, 4), (4, 3), (50, 3))
    x_hat, y = x + 0.5 * z @ error, z @ w0.T + noise
    lacks = x - x_hat
    for lam in (0.0, 20.0):
        ask(f"residual_refit, lam = {lam:g}", residual_refit, z, y, x, x_hat, w0, lam).must_be(
            ridge(z, y + lacks, w0, lam),
            (ridge(z, y, w0, lam), "This W only imitates the dense module; the stream's error is still there"),
            (ridge(z, y - lacks, w0, lam), "The sign. The stream has X_hat and should have X: it lacks X - X_hat"),
            (ridge(z, y + lacks, 0 * w0, lam), "This damping pulls toward zero, not toward the current weight w0"),
        )
    return "correct: it repairs the stream, and stays near the current weight where data say nothing"


def check_greedy_keep(greedy_keep: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """Notebook 08: `greedy_keep(h, b, n_keep)` -> sorted channels that survive the backward elimination."""
    for seed, n_keep in ((5, 5), (3, 3), (4, 2), (6, 6)):
        z, y, h, b = _problem(seed)
        left = list(range(6))
        while len(left) > n_keep:
            left.remove(min(left, key=lambda j: _solved_again(z, y, [c for c in left if c != j])[0]))
        one_shot = (b.square().sum(0) / torch.linalg.inv(h).diagonal()).topk(n_keep).indices.sort().values
        ask(
            f"greedy_keep, {n_keep} of 6, against solving again after every removal", greedy_keep, h, b, n_keep
        ).must_be(
            torch.tensor(left),
            (lambda found: not torch.equal(found, found.unique()), "Give sorted, distinct channels"),
            (one_shot, "These are the dearest before anything went: after each removal the costs change"),
        )
    twins = torch.tensor([[1.0, 0.99, 0], [0.99, 1.0, 0], [0, 0, 0.5]]).double()
    kept = greedy_keep(twins, torch.eye(3).double(), 2).tolist()
    expect(kept in ([0, 2], [1, 2]), f"twins: one of channels 0 and 1 can stand in for the other; found {kept} kept")
    return "correct: the costs follow what is left"


def check_rising_prices(rising_prices: Callable[[Sequence[float]], Sequence[float]]) -> str:
    """Notebook 08: `rising_prices(prices)` -> the nearest sequence that never falls (pool adjacent violators)."""
    for prices in ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [1.0, 5.0, 3.0, 1.0, 9.0], [4.0, 3.0, 2.0, 1.0], [2.0], []):
        what, total, ends = f"rising_prices({prices})", sum(prices), range(1, len(prices) + 1)
        found = call(what, rising_prices, prices)
        expect(isinstance(found, Iterable), f"{what}: expected a list, found {type(found).__name__}")
        found = torch.tensor([float(price) for price in found], dtype=torch.float64)
        # the nearest one is unique: max over starts of min over ends of the averages
        right = [
            max(min(sum(prices[a:b]) / (b - a) for b in ends if b > i) for a in range(i + 1))
            for i in range(len(prices))
        ]
        compare(
            what,
            found,
            torch.tensor(right, dtype=torch.float64),
            (lambda found: (found.diff() < -1e-9).any(), "It still falls; look back after you merge two pools"),
            (lambda found, total=total: abs(found.sum() - total) > 1e-9, "The sum must stay: average, do not clip"),
            "Average only where a price falls",
        )
    return "correct: rising, and the same in total"
