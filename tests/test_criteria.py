"""Scores equal what they claim to measure; their rankings survive what should not matter."""

from functools import partial
from itertools import repeat

import pytest
import torch
from tiny import tiny_model

from greedy_helpers import (
    BlockStream,
    Seen,
    blocks_of,
    depth2_modules,
    keep_top,
    module_moments,
    random_scores,
    second_moment,
    weight_norm,
    weight_of,
)


def inputs_of(model, module, linear, tokens):
    """Activations in front of a linear from one plain forward pass: independent of BlockStream."""
    seen = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0]


def seen_by(model, tokens, index):
    stream = BlockStream(model, tokens, batch_size=4)
    for i in range(index):
        stream.advance(blocks_of(model)[i], i)
    block = blocks_of(model)[index]
    found = {}
    for module in depth2_modules(model, [index]):
        found[module.kind] = module, Seen(*module_moments(stream, block, module, repeat(None), repeat(None)))
    return found


def test_moments_of_a_stream_equal_a_plain_forward_pass(model, tokens):
    for module, seen in seen_by(model, tokens, 1).values():
        x = inputs_of(model, module, next(iter(module.level1.values())).linear, tokens)
        z = inputs_of(model, module, module.level2.linear, tokens)
        torch.testing.assert_close(seen.level1.xx, x.T @ x)
        torch.testing.assert_close(seen.level2.mean_square, z.square().mean(0))
        assert seen.level1.n == tokens.numel()


def test_closed_form_equals_the_measured_energy(model, tokens):
    """a_j' Sigma a_j (with biases) is the mean square of the pre-activation; a head's score is its channels' sum."""
    for kind, (module, seen) in seen_by(model, tokens, 1).items():
        scores = second_moment(module, seen)
        columns = weight_of(module.level2.linear).square().sum(0)
        if kind == "attention":
            z = inputs_of(model, module, module.level2.linear, tokens)
            expected = (columns * z.square().mean(0))[module.level2.index].sum(1)
        else:
            expected = torch.ones(module.n_units, dtype=torch.float64)
            for group in module.level1.values():
                x = inputs_of(model, module, group.linear, tokens)
                expected = expected * columns * group.linear(x).square().mean(0)
        torch.testing.assert_close(scores, expected.detach())


def test_linear_module_score_is_the_expected_output_energy():
    """Eq. 2-3 by Monte Carlo: E||B_:,j a_j' x||^2 = ||B_:,j||^2 a_j' Sigma a_j for x ~ (0, Sigma)."""
    generator = torch.Generator().manual_seed(0)
    d, m = 6, 5
    a, b = torch.randn(m, d, generator=generator).double(), torch.randn(d, m, generator=generator).double()
    root = torch.randn(d, d, generator=generator).double()
    sigma = root @ root.T
    closed = b.square().sum(0) * ((a @ sigma) * a).sum(1)
    x = torch.randn(200_000, d, generator=generator).double() @ root.T
    one_unit_outputs = (x @ a.T).square().mean(0) * b.square().sum(0)
    torch.testing.assert_close(one_unit_outputs, closed, rtol=0.02, atol=0)


@pytest.mark.parametrize("criterion", [second_moment, weight_norm, partial(weight_norm, p=1), random_scores])
def test_shape_sign_and_purity(criterion, model, tokens):
    before = {name: p.clone() for name, p in model.named_parameters()}
    for module, seen in seen_by(model, tokens, 0).values():
        scores = criterion(module, seen)
        assert scores.shape == (module.n_units,)
        assert (scores >= 0).all()
        assert torch.equal(scores, criterion(module, seen))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_weight_norm_by_hand():
    module = depth2_modules(tiny_model("gpt2"))[1]
    c_fc, c_proj = module.owner.c_fc.weight, module.owner.c_proj.weight  # stored [d_in, d_out]
    expected = c_fc[:, 3].square().sum() + c_proj[3].square().sum()
    assert weight_norm(module)[3].item() == pytest.approx(expected.item())


def test_rescaling_level_1_against_level_2_moves_magnitude_but_not_the_plain_ffn_score(tokens):
    """ReLU-like scaling freedom: up path times c, level 2 by 1/c leaves a linear path's outputs as they are."""
    model = tiny_model("llama")
    c = torch.linspace(0.2, 5.0, 80, dtype=torch.float64)
    ((_, before),) = [v for k, v in seen_by(model, tokens, 0).items() if k == "gated_ffn"]
    module = depth2_modules(model)[1]
    gate = module.level1["gate_proj"]
    score, norm = second_moment(module, before), weight_norm(module)
    with torch.no_grad():
        module.level1["up_proj"].linear.weight.mul_(c[:, None])
        module.level2.linear.weight.div_(c)
    ((_, after),) = [v for k, v in seen_by(model, tokens, 0).items() if k == "gated_ffn"]
    rescaled = second_moment(module, after)
    # The product of two metrics has ||B||^4 against one c^2: the paper's heuristic is not invariant, by c^-2 exactly.
    torch.testing.assert_close(rescaled, score / c.square())
    assert not torch.allclose(weight_norm(module), norm)
    assert gate.linear.weight.shape[0] == 80


def test_random_differs_by_seed_and_module():
    first, second = depth2_modules(tiny_model("llama"))[1::2]
    assert not torch.equal(random_scores(first), random_scores(second))
    assert not torch.equal(random_scores(first), random_scores(first, seed=1))


@pytest.mark.parametrize(("ratio", "left"), [(0, 10), (0.3, 7), (0.25, 8), (0.95, 1), (0.999, 1)])
def test_keep_top_never_removes_more_than_asked(ratio, left):
    scores = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    keep = keep_top(scores, ratio)
    assert len(keep) == left
    assert keep.tolist() == sorted(keep.tolist())
    assert scores[keep].min() >= scores.sort().values[10 - left]


def test_rounding_in_the_ratio_costs_no_unit():
    assert 0.29 * 100 < 29  # in floating point
    assert len(keep_top(torch.arange(100.0), 0.29)) == 71


def test_ties_keep_the_earlier_unit():
    assert keep_top(torch.ones(4), 0.5).tolist() == [0, 1]


@pytest.mark.parametrize("ratio", [1, 1.5, -0.1, float("nan"), "0.25", True])
def test_ratio_outside_range(ratio):
    with pytest.raises(ValueError, match=r"expected a ratio in \[0, 1\)"):
        keep_top(torch.ones(4), ratio)


def test_nan_scores():
    with pytest.raises(FloatingPointError, match="2 NaN scores"):
        keep_top(torch.tensor([1.0, float("nan"), float("nan")]), 0.5)
