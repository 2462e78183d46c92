"""LLM-Pruner's scores are the change of the loss that they say; scores that are known already find their modules."""

from functools import partial

import pytest
import torch
from conftest import calibration
from tiny import tiny_model

from greedy_helpers import depth2_modules, fixed_scores, remove_units, taylor_scores, weight_of


def loss_of(model, window):
    logits = model(input_ids=window).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def signed_sums(model, module, window):
    """Per linear: the sum of w g over the weights of every channel."""
    sums = []
    for group in module.groups:
        (g,) = torch.autograd.grad(loss_of(model, window), group.linear.weight)
        sums.append((group.linear.weight * g).sum(1 if group.side == "out" else 0).detach()[group.index].sum(1))
    return torch.stack(sums)  # [linears, n_units]


def test_vector_predicts_finite_differences():
    """Scaling a channel's weights by 1 + e changes the loss by e times the signed sums that `vector` adds up."""
    model, window = tiny_model("llama-gqa"), calibration(1, seed=1)
    module = depth2_modules(model)[1]
    sums = signed_sums(model, module, window)
    for channel in (0, 5, 17):
        step, losses = 1e-3, []  # attention takes its softmax in float32: smaller steps drown in rounding
        for sign in (1, -1):
            moved = tiny_model("llama-gqa")
            with torch.no_grad():
                for group in depth2_modules(moved)[1].groups:
                    weight = weight_of(group.linear)
                    (weight if group.side == "out" else weight.T)[group.index[channel]] *= 1 + sign * step
                losses.append(loss_of(moved, window).item())
        slope = (losses[0] - losses[1]) / (2 * step)
        assert sums[:, channel].sum().item() == pytest.approx(slope, rel=5e-3, abs=1e-5)
    torch.testing.assert_close(
        taylor_scores(model, window, "vector")[module.name], sums.abs().sum(0), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("kind", ["vector", "element1", "element2", "mix"])
def test_scores_are_the_sums_they_say(kind, name):
    model, tokens = tiny_model(name), calibration(3, 12, seed=1)
    scores = taylor_scores(model, tokens, kind, batch_size=2)
    for module in depth2_modules(model):
        expected = torch.zeros(module.n_units, dtype=torch.float64)
        for group in module.groups:
            w = weight_of(group.linear).detach()
            per_window = [torch.autograd.grad(loss_of(model, t[None]), group.linear.weight)[0] for t in tokens]
            per_window = [g.t() if name == "gpt2" else g for g in per_window]
            g, a = sum(per_window) / 3, sum(p.square() for p in per_window) / 3
            change = {"element2": w**2 * a, "mix": w * g - w**2 * a / 2}.get(kind, w * g)
            axis = 1 if group.side == "out" else 0
            channels = change.sum(axis).abs() if kind == "vector" else change.abs().sum(axis)
            expected += channels[group.index].sum(1)
        torch.testing.assert_close(scores[module.name], expected, rtol=1e-5, atol=1e-9)  # logits are taken in float32


def test_taylor_scores_refuse_other_kinds_and_leave_no_gradients():
    model, tokens = tiny_model("llama"), calibration(2, 12)
    with pytest.raises(ValueError, match="'element1', 'element2' or 'mix', found 'first'"):
        taylor_scores(model, tokens, "first")
    taylor_scores(model, tokens)
    assert all(p.grad is None for p in model.parameters())


def test_fixed_scores_are_refused_where_they_do_not_fit():
    model = tiny_model("llama")
    ffn = depth2_modules(model)[1]
    criterion = partial(fixed_scores, scores={ffn.name: torch.arange(80.0)})
    assert criterion(ffn).tolist() == list(range(80))
    with pytest.raises(KeyError, match=r"layers\.0\.self_attn: no scores; there are some for model\.layers\.0\.mlp"):
        criterion(depth2_modules(model)[0])
    remove_units(ffn, torch.arange(10))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: the scores are for 80 units, found 10"):
        criterion(depth2_modules(model)[1])
