"""Checkers of notebook 08, comparing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...evaluate import TextScore
from .common import expect


def check_bits_per_byte(bits_per_byte: Callable[[Tensor, str], float]) -> str:
    """Notebook 08: `bits_per_byte(losses, text)`: nats of every token of `text` -> bits per byte of its UTF-8."""
    losses = torch.tensor([2.0, 0.5, 1.5])
    for text, n_bytes in (("abcdefgh", 8), ("äöü€", 9)):
        before = losses.clone()
        found = bits_per_byte(losses, text)
        expect(isinstance(found, float), f"bits_per_byte: expected a number (float), found {type(found).__name__}")
        expect(torch.equal(losses, before), "bits_per_byte: changed its argument; work on a copy")
        right = 4.0 / math.log(2) / n_bytes
        for wrong, why in (
            (right * math.log(2), "these are nats; one nat is 1 / ln 2 bits"),
            (right * math.log(2) ** 2, "divide by ln 2, do not multiply: a nat is more than a bit"),
            (right / 3, "the mean over the tokens was divided by the bytes; expected the sum"),
            (right * n_bytes / 3, "these are bits per token; divide by the bytes of the text"),
            (right * n_bytes / len(text), "these are bits per character; letters beyond ASCII take 2 to 4 bytes"),
        ):
            close = math.isclose(found, wrong, rel_tol=1e-4) and not math.isclose(wrong, right, rel_tol=1e-4)
            expect(not close, f"bits_per_byte of {text!r}: found {found:.4f}; {why}")
        expect(
            math.isclose(found, right, rel_tol=1e-5),
            f"bits_per_byte of {text!r}: expected {right:.4f}, found {found:.4f}",
        )
    return "correct: whatever the tokenizer"


def check_bootstrap_error(bootstrap_error: Callable[[Tensor, Tensor], float]) -> str:
    """Notebook 08: `bootstrap_error(nats, targets)` per document -> standard error of the loss per token."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(20, 400, (40,), generator=generator)
    nats = targets * (3 + torch.randn(40, generator=generator, dtype=torch.float64))
    before = nats.clone(), targets.clone()
    found = bootstrap_error(nats, targets)
    expect(isinstance(found, float), f"bootstrap_error: expected a number (float), found {type(found).__name__}")
    unchanged = torch.equal(nats, before[0]) and torch.equal(targets, before[1])
    expect(unchanged, "bootstrap_error: changed its arguments; work on copies")
    loss = nats.sum() / targets.sum()
    residual = nats - loss * targets  # the ratio's linearisation: no draws
    right = (residual.square().sum().sqrt() / targets.sum()).item()

    def near(other: float, tolerance: float = 0.12) -> bool:
        return abs(found / other - 1) < tolerance

    per_document = nats / targets
    expect(found > 0, f"bootstrap_error: expected a positive number, found {found:.4f}")
    for wrong, why in (
        (per_document.std().item(), "the spread of single documents; the loss is a mean over many of them"),
        (right / targets.double().mean().sqrt().item(), "tokens were drawn, or counted, one by one; draw documents"),
        (
            (nats.std() / 40**0.5 / targets.double().mean()).item(),
            "the sum of the nats varies mostly because documents differ in length; divide each drawn set's nats by "
            "*its* tokens, not by a fixed number",
        ),
        ((per_document.std() / 40**0.5).item(), "every document counted alike; a long one has more tokens"),
    ):
        expect(near(right) or not near(wrong), f"bootstrap_error: found {found:.4f}, expected {right:.4f}: {why}")
    expect(near(right), f"bootstrap_error: expected about {right:.4f}, found {found:.4f}")
    package = TextScore(64, 64, 1, "documents", nats, targets, targets).loss_error
    alike = bootstrap_error(torch.full((9,), 30.0, dtype=torch.float64), torch.full((9,), 10))
    expect(alike < 1e-6, f"bootstrap_error: documents that are all alike leave no doubt: expected 0, found {alike:.4f}")
    return f"correct: {found:.3f}, the package says {package:.3f}"


def _two_sided(b: int, c: int) -> float:
    """Probability of a split at least as uneven as b : c when both are equally likely."""
    n = b + c
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n)


def check_mcnemar(mcnemar: Callable[[Tensor, Tensor], tuple[int, int, float]]) -> str:
    """Notebook 08: `mcnemar(a, b)`, bool [items] -> (only a right, only b right, two-sided exact p)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(60, generator=generator) < 0.7, torch.rand(60, generator=generator) < 0.45
    same = torch.ones(5, dtype=torch.bool)
    for name, first, second in (
        ("sixty items", a, b),
        ("the other way round", b, a),
        ("an even split", torch.tensor([True, False, True]), torch.tensor([False, True, True])),
        ("never different", same, same),
    ):
        before = first.clone(), second.clone()
        found = mcnemar(first, second)
        right_shape = isinstance(found, Sequence) and len(found) == 3
        expect(right_shape, f"mcnemar: expected three numbers (only a, only b, p), found {found!r}")
        expect(
            torch.equal(first, before[0]) and torch.equal(second, before[1]),
            "mcnemar: changed its arguments; work on copies",
        )
        only_a, only_b, p = (float(value) for value in found)
        counts = int((first & ~second).sum()), int((second & ~first).sum())
        totals = int(first.sum()), int(second.sum())
        expect(
            (only_a, only_b) == counts or (only_a, only_b) != totals,
            f"{name}: {totals} are all right answers; items that both get right say nothing about the difference",
        )
        expect((only_a, only_b) == counts, f"{name}: expected the counts {counts}, found {(only_a, only_b)}")
        right = _two_sided(*counts)
        expect(0 <= p <= 1 + 1e-12, f"{name}: p = {p:.3f} is no probability; an even split gives 1")
        one_sided = right / 2
        expect(
            math.isclose(p, right, abs_tol=1e-6) or not math.isclose(p, one_sided, abs_tol=1e-6),
            f"{name}: {p:.4f} is one-sided; either model might have been the better one, so double it",
        )
        expect(math.isclose(p, right, abs_tol=1e-6), f"{name}: expected p = {right:.4f}, found {p:.4f}")
    return "correct: only the items that tell the two apart"


def check_pareto_front(pareto_front: Callable[[Sequence[tuple[float, float]]], Sequence[int]]) -> str:
    """Notebook 08: `pareto_front(points)`: positions of the (cost, loss) pairs that no other dominates, ascending."""
    for name, points, right in (
        ("three in a row", [(1, 3.0), (2, 2.0), (3, 1.0)], [0, 1, 2]),
        ("one inside", [(1, 3.0), (2, 3.5), (3, 1.0)], [0, 2]),
        ("unsorted", [(3, 1.0), (1, 3.0), (2, 0.5), (4, 2.0)], [1, 2]),
        ("equal cost", [(1, 2.0), (1, 1.0), (2, 1.5)], [1]),
        ("equal loss", [(1, 1.0), (2, 1.0)], [0]),
        ("twins", [(1, 1.0), (1, 1.0), (2, 3.0)], [0, 1]),
        ("a single point", [(5, 5.0)], [0]),
    ):
        given = copy.deepcopy(points)
        found = pareto_front(given)
        expect(given == points, "pareto_front: changed its argument; work on a copy")
        expect(
            isinstance(found, Sequence) and not isinstance(found, str),
            f"pareto_front: expected a list of positions, found {type(found).__name__}",
        )
        found = list(found)
        expect(
            all(isinstance(i, int) for i in found), f"{name}: expected positions in the list (integers), found {found}"
        )
        hint = {
            "twins": "; nobody dominates an equal: both stay",
            "equal loss": "; as good and dearer is dominated",
            "equal cost": "; as dear and worse is dominated",
        }.get(name, "")
        expect(sorted(found) == right, f"{name}: {points}: expected the positions {right}, found {found}{hint}")
        expect(found == right, f"{name}: expected ascending positions {right}, found {found}")
    return "correct: ties included"


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
    """Notebook 08: `comparable(one, other)`, two runs with their settings -> may their numbers be compared?"""
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
            before = copy.deepcopy((first, second))
            found = comparable(first, second)
            expect((first, second) == before, "comparable: changed its arguments; work on copies")
            expect(isinstance(found, bool), f"comparable: expected True or False, found {found!r}")
            differ = {key: (first[key], second[key]) for key in first if first[key] != second[key]}
            expect(
                found == right,
                f"comparable: two {first['metric']} runs that differ in {differ or 'nothing'}: expected {right}: {why}",
            )
    return "correct: you would have caught all of them"
