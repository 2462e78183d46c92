"""Each checker accepts a right answer, and refuses the mistakes it is there for with a message that helps."""

import pytest
import torch

from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import NotYet


def fused(n_heads, dim):
    return torch.arange(3 * n_heads * dim).view(3, n_heads, dim).transpose(0, 1).reshape(n_heads, -1)


def test_fused_layout():
    assert exercises.check_fused_layout(fused).startswith("correct")
    for wrong, message in [
        (lambda h, d: None, "expected a torch tensor, found NoneType"),
        (lambda h, d: fused(h, d).float(), "expected dtype torch.long"),
        (lambda h, d: fused(h, d)[:, :d], r"expected shape \[4, 24\], found \[4, 8\]"),
        (lambda h, d: torch.arange(3 * h * d).view(h, -1), "GPT-NeoX's order"),
        (lambda h, d: fused(h, d).flip(0), "head 0 should own"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_fused_layout(wrong)


def cut(gate, up, down, keep, biases=True, sizes=True, down_keep=None):
    for linear in (gate, up):
        linear.weight = torch.nn.Parameter(linear.weight[keep])
        if linear.bias is not None and biases:
            linear.bias = torch.nn.Parameter(linear.bias[keep])
        if sizes:
            linear.out_features = len(keep)
    down.weight = torch.nn.Parameter(down.weight[:, keep if down_keep is None else down_keep])
    if sizes:
        down.in_features = len(keep)


def test_remove_channels():
    assert exercises.check_remove_channels(cut).startswith("correct")
    for wrong, message in [
        (lambda g, u, d, k: None, r"gate\.weight: expected shape \[4, 6\], found \[10, 6\]"),
        (lambda g, u, d, k: cut(g, u, d, k, biases=False), r"gate\.bias: expected 4 entries, found 10"),
        (lambda g, u, d, k: cut(g, u, d, k, down_keep=k.sort().values), "in the same order"),
        (lambda g, u, d, k: cut(g, u, d, k, sizes=False), "in_features and out_features still say"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_remove_channels(wrong)


def connected(coupled):
    labels = torch.arange(coupled.shape[0])
    together = (coupled.float() @ coupled.float().T) > 0
    together.fill_diagonal_(True)
    for _ in range(len(labels)):
        labels = torch.where(together, labels[None, :], len(labels)).amin(1)
    return labels


def test_pieces():
    assert exercises.check_pieces(connected).startswith("correct")

    def one_step(coupled):
        together = (coupled.float() @ coupled.float().T) > 0
        return torch.where(together, torch.arange(len(together))[None, :], len(together)).amin(1)

    def in_place(coupled):
        labels = connected(coupled)
        coupled.zero_()
        return labels

    for wrong, message in [
        (lambda c: torch.zeros(c.shape[0], dtype=torch.long), "four heads, shuffled: expected 4 pieces, found 1"),
        (lambda c: connected(c.T), r"expected shape \[12\], found \[16\]"),
        (one_step, "a chain: expected 1 pieces, found .* Neighbours of neighbours"),
        (in_place, "changed its argument"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_pieces(wrong)
