"""The checkers of notebook 08 accept right answers and say what is wrong with others."""

import math

import pytest
import torch

from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import NotYet


def test_bits_per_byte():
    def right(losses, text):
        return losses.sum().item() / math.log(2) / len(text.encode())

    assert exercises.check_bits_per_byte(right).startswith("correct")

    def in_place(losses, text):
        losses /= math.log(2)
        return losses.sum().item() / len(text.encode())

    for wrong, message in [
        (lambda x, t: x.sum() / math.log(2) / len(t.encode()), "expected a number"),
        (in_place, "changed its argument"),
        (lambda x, t: x.sum().item() / len(t.encode()), "these are nats"),
        (lambda x, t: x.sum().item() * math.log(2) / len(t.encode()), "do not multiply"),
        (lambda x, t: x.mean().item() / math.log(2) / len(t.encode()), "expected the sum"),
        (lambda x, t: x.mean().item() / math.log(2), "bits per token"),
        (lambda x, t: x.sum().item() / math.log(2) / len(t), "bits per character"),
        (lambda x, t: 1.0, "expected 0.7213, found 1.0000"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_bits_per_byte(wrong)


def resampled(nats, targets, statistic, n=2000):
    draws = torch.randint(len(nats), (n, len(nats)), generator=torch.Generator().manual_seed(7))
    return statistic(nats[draws], targets[draws]).std().item()


def test_bootstrap_error():
    def right(nats, targets):
        return resampled(nats, targets, lambda x, t: x.sum(1) / t.sum(1))

    assert exercises.check_bootstrap_error(right).startswith("correct")

    def in_place(nats, targets):
        nats /= targets
        return 0.1

    for wrong, message in [
        (lambda x, t: torch.tensor(0.1), "expected a number"),
        (in_place, "changed its arguments"),
        (lambda x, t: (x / t).std().item(), "spread of single documents"),
        (lambda x, t: right(x, t) / t.double().mean().sqrt().item(), "draw documents"),
        (lambda x, t: resampled(x, t, lambda x, _: x.sum(1) / t.sum()), "not by a fixed number"),
        (lambda x, t: resampled(x, t, lambda x, t: (x / t).mean(1)), "every document counted alike"),
        (lambda x, t: 1e-9, "expected about"),
        (lambda x, t: -1.0, "positive"),
        (lambda x, t: right(x, t) + (0.0 if len(x) == 40 else 0.2), "no doubt"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_bootstrap_error(wrong)


def counts(a, b):
    return int((a & ~b).sum()), int((b & ~a).sum())


def p_value(b, c, sides=2):
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    return min(1.0, sides * tail)


def test_mcnemar():
    def right(a, b):
        return *counts(a, b), p_value(*counts(a, b))

    assert exercises.check_mcnemar(right).startswith("correct")

    def in_place(a, b):
        a ^= b
        return 0, 0, 1.0

    for wrong, message in [
        (lambda a, b: p_value(*counts(a, b)), "expected three numbers"),
        (in_place, "changed its arguments"),
        (lambda a, b: (int(a.sum()), int(b.sum()), 0.5), "all right answers"),
        (lambda a, b: (*counts(b, a), 0.5), "expected the counts"),
        (lambda a, b: (*counts(a, b), p_value(*counts(a, b), sides=1)), "one-sided"),
        (
            lambda a, b: (
                *counts(a, b),
                2 * p_value(*counts(a, b), sides=1) if counts(a, b) == (1, 1) else right(a, b)[2],
            ),
            "no probability",
        ),
        (lambda a, b: (*counts(a, b), 0.5), "expected p ="),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_mcnemar(wrong)


def front(points):
    return [i for i, (x, y) in enumerate(points) if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in points)]


def test_pareto_front():
    assert exercises.check_pareto_front(front).startswith("correct")

    def strictly(points):  # dominated only by what is better in both
        return [i for i, (x, y) in enumerate(points) if not any(u < x and v < y for u, v in points)]

    def twins_kill_each_other(points):
        return [
            i
            for i, (x, y) in enumerate(points)
            if not any(u <= x and v <= y for j, (u, v) in enumerate(points) if j != i)
        ]

    def in_place(points):
        points.sort()
        return front(points)

    for wrong, message in [
        (in_place, "changed its argument"),
        (lambda points: {i for i in front(points)}, "expected a list of positions, found set"),
        (lambda points: [points[i] for i in front(points)], "expected positions in the list"),
        (strictly, "as dear and worse is dominated"),
        (twins_kill_each_other, "both stay"),
        (lambda points: front(points)[::-1], "ascending"),
        (lambda points: list(range(len(points))), "one inside"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_pareto_front(wrong)


def comparable(one, other):
    if any(one[key] != other[key] for key in ("model", "text", "seq", "stride", "metric")):
        return False
    if one["metric"] == "perplexity" and one["tokenizer"] != other["tokenizer"]:
        return False
    if abs(one["blocks left"] - other["blocks left"]) > 0.005:
        return False
    used = [run for run in (one, other) if run["calibration"] is not None]
    return len({math.prod(run["calibration"]) for run in used}) <= 1 and len({r["calibration text"] for r in used}) <= 1


def test_comparable():
    assert exercises.check_comparable(comparable).startswith("correct")

    def in_place(one, other):
        one["seed"] = other["method"] = None
        return True

    for wrong, message in [
        (in_place, "changed its arguments"),
        (lambda a, b: None, "expected True or False"),
        (lambda a, b: True, "expected False: another model"),
        (lambda a, b: a == b, "expected True: methods"),
        (lambda a, b: comparable(a, b) or a["stride"] != b["stride"], "more context"),
        (lambda a, b: comparable(a, b) and a["tokenizer"] == b["tokenizer"], "do not depend on the tokenizer"),
        (lambda a, b: comparable(a, b) and a["blocks left"] == b["blocks left"], "within half a percentage point"),
        (lambda a, b: comparable(a, b) and a["calibration"] == b["calibration"], "as many calibration tokens"),
        (lambda a, b: comparable(a, {**b, "calibration text": a["calibration text"]}), "kind of text it is judged on"),
        (
            lambda a, b: comparable(a, b) and (a["calibration"] is None) == (b["calibration"] is None),
            "needs no data gives nothing away",
        ),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_comparable(wrong)
