"""The checkers of notebook 00 accept right answers and say what is wrong with others."""

import math

import pytest
import torch

from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import NotYet


def losses(model, tokens):
    logits = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    return -logits.gather(-1, tokens[:, 1:, None])[..., 0]


def test_perplexity():
    def right(model, tokens):
        return losses(model, tokens).mean().exp().item()

    def predicts_itself(model, tokens):
        return -model(tokens).logits.log_softmax(-1).gather(-1, tokens[..., None]).mean()

    def in_place(model, tokens):
        found = right(model, tokens)
        tokens.zero_()
        return found

    assert exercises.check_perplexity(right).startswith("correct")
    for wrong, message in [
        (lambda m, t: losses(m, t).mean().exp(), "expected a float"),
        (lambda m, t: losses(m, t).mean().item(), "perplexity 7"),
        (lambda m, t: 2 ** losses(m, t).mean().item(), "perplexity 7"),
        (lambda m, t: predicts_itself(m, t).exp().item(), "position t predicts token"),
        (lambda m, t: losses(m, t).mean(1).exp().mean().item(), "average the surprise"),
        (lambda m, t: losses(m, t[:1]).mean().exp().item(), "every window has 4 targets"),
        (in_place, "changed its tokens"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_perplexity(wrong)


def test_share_repaired():
    def right(dense, cut, repaired):
        return 1 - math.log(repaired / dense) / math.log(cut / dense)

    assert exercises.check_share_repaired(right).startswith("correct")
    for wrong, message in [
        (lambda d, c, r: (c - r) / (c - d), "in logarithms"),
        (lambda d, c, r: 1 - right(d, c, r), "nothing repaired"),
        (lambda d, c, r: max(0.0, right(d, c, r)), "do not hide it"),
        (lambda d, c, r: torch.tensor(right(d, c, r)), "expected a number"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_share_repaired(wrong)


def test_activity():
    def right(module, seen):
        return seen.level2.mean_square[module.level2.index].sum(1)

    def in_place(module, seen):
        found = right(module, seen)
        seen.level2.mean_square.zero_()
        return found

    assert exercises.check_activity(right).startswith("correct")
    for wrong, message in [
        (lambda m, s: s.level2.mean_square, r"expected shape \[3\]"),
        (lambda m, s: s.level2.mean_square.view(m.n_units, -1).sum(1), "side by side"),
        (lambda m, s: s.level2.mean_square[m.level2.index].mean(1), "three heads of two"),
        (in_place, "expected"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_activity(wrong)
