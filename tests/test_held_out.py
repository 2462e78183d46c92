"""Dampings chosen on calibration windows that are held out: from moments alone, and never worse there than no refit."""

import copy
import math

import pytest
import torch
from conftest import calibration, quiet
from tiny import tiny_model

import greedy_helpers as gh
from greedy_helpers.moments import Moments
from greedy_helpers.reconstruct import DAMPS, HELD_OUT, choose_damp, solve


def measured(n=240, d=12, bias=False, noise=1.0, seed=0):
    """Inputs, targets, weight, bias and which rows are held out; targets far from what the layer does."""
    g = torch.Generator().manual_seed(seed)
    x, w0 = torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(5, d, generator=g, dtype=torch.float64)
    y = x @ (w0 + 0.3).T + 0.5 * bias + noise * torch.randn(n, 5, generator=g, dtype=torch.float64)
    return x, y, w0, torch.zeros(5, dtype=torch.float64) if bias else None, torch.arange(n) % 4 == 3


def moments_of(x, y, held):
    moments = Moments("layer", hold_out=True)
    for rows in torch.arange(len(x)).split(50):
        moments.update(x[rows], y[rows], held[rows])
    return moments


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("noise", [0.01, 3.0, 30.0])
def test_the_choice_is_the_best_on_the_held_out_tokens(bias, noise):
    x, y, w0, b0, held = measured(bias=bias, noise=noise)
    rest, errors = Moments("rest"), {}
    rest.update(x[~held], y[~held])
    for damp in DAMPS:
        found = solve(rest, w0, b0, damp)
        made = x[held] @ found.weight.T + (0 if b0 is None else found.bias)
        errors[damp] = (made - y[held]).square().sum().item()
    chosen = choose_damp(moments_of(x, y, held), w0, b0)
    assert errors[chosen] == min(errors.values())


def test_what_teaches_nothing_is_not_learned():
    x, _, w0, _, held = measured(n=60)
    y = x @ w0.T + 5 * torch.randn(60, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moments = moments_of(x, y, held)
    assert choose_damp(moments, w0) >= 10
    assert torch.equal(solve(moments, w0, damp=math.inf).weight, w0)


def test_through_another_input_of_the_layer():
    """The targets are what the layer makes of the dense input: the same choice as with these targets written out."""
    x, _, w0, b0, held = measured(bias=True)
    dense = x + torch.randn(len(x), 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    b0 = b0 + 1.5
    through, plain = moments_of(x, dense, held), moments_of(x, dense @ w0.T + b0, held)
    assert choose_damp(through, w0, b0, through=True) == choose_damp(plain, w0, b0)


def test_parts_of_moments_follow_their_whole():
    x, y, w0, b0, held = measured(bias=True)
    moments, chosen = moments_of(x, y, held), torch.tensor([0, 3, 4])
    part = moments.select(chosen)
    torch.testing.assert_close(part.held_out.xx, x[held][:, chosen].T @ x[held][:, chosen])
    torch.testing.assert_close(part.fitted().xy, x[~held][:, chosen].T @ y[~held])
    assert (part.n, part.held_out.n, part.fitted().n) == (240, 60, 180)
    aimed = moments.aim_at(w0, b0)
    torch.testing.assert_close(aimed.held_out.xy, x[held].T @ (x[held] @ w0.T + b0))


def test_without_held_out_tokens_it_says_so():
    x, y, w0, _, _ = measured()
    moments = Moments("model.layers.0.mlp.down_proj")
    moments.update(x, y)
    with pytest.raises(ValueError, match=r"down_proj: expected calibration windows that are held out, .* 0 of 240"):
        choose_damp(moments, w0)


@pytest.mark.parametrize("remedy", ["post", "both, residual", "post, local"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_the_whole_method_does_not_depend_on_the_batches(name, remedy):
    text, models = calibration(24), []
    for size in (3, 24):
        model = copy.deepcopy(tiny_model(name))
        report = quiet(model, text, 0.5, remedy=remedy, damp=HELD_OUT, batch_size=size)
        assert all(step.damp in DAMPS for step in report.steps)
        models.append(model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_few_tokens_are_damped_more_than_many():
    damps = {}
    for n in (4, 96):
        model = tiny_model("llama")
        report = quiet(model, calibration(n), 0.5, remedy="post", damp=HELD_OUT)
        damps[n] = sum(min(step.damp, 100) for step in report.steps)
    assert damps[4] > damps[96]


def test_a_recipe_names_it_and_refuses_other_words():
    assert gh.Recipe(damp=HELD_OUT).names["damp"] == HELD_OUT
    with pytest.raises(ValueError, match="expected damp >= 0 or 'held out', found 'often'"):
        gh.Recipe(damp="often")


@pytest.mark.parametrize(("n", "held"), [(1, 6), (4, 24), (5, 24), (12, 48)])
def test_some_tokens_are_held_out_however_few_the_windows(n, held):
    """Every fifth window of 24 tokens; of fewer than five the last quarter of each."""
    found = []

    def recording(module, seen):
        found.append(seen.level2.held_out.n)
        return gh.output_energy(module, seen)

    parts = {"criterion": recording, "remedy": "post, local", "damp": HELD_OUT}
    report = quiet(tiny_model("llama"), calibration(n), 0.25, **parts)
    assert found == [held] * 4
    assert all(step.damp in DAMPS for step in report.steps)
