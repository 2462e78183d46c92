"""Scores equal what they claim to measure; their rankings survive what should not matter."""

import itertools
from functools import partial

import pytest
import torch
from conftest import assert_untouched, calibration, state_of
from tiny import CONFIGS, ENCODERS, tiny_model
from transformers.pytorch_utils import Conv1D

from greedy_helpers import (
    BlockStream,
    Moments,
    Seen,
    blocks_of,
    depth2_modules,
    flap,
    keep_best,
    output_energy,
    random_scores,
    remove_units,
    scores_of,
    second_moment,
    set_weight,
    wanda_sp,
    weight_norm,
    weight_of,
)
from greedy_helpers.allocation import n_removed
from greedy_helpers.criteria import obs_cost, second_moment_identity, value_rows
from greedy_helpers.measure import ModulePasses


def inputs_of(model, module, linear, tokens):
    """Activations in front of a linear from one plain forward pass: independent of BlockStream."""
    seen = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0]


def seen_by(model, tokens, index, damp=1e-2):
    """What criteria see of the modules of one block: kind -> (module, seen)."""
    stream = BlockStream(model, tokens, batch_size=4)
    for block in blocks_of(model)[:index]:
        stream.advance(block)
    seen = {}
    for module in depth2_modules(model, [index]):
        passes = ModulePasses(stream, blocks_of(model)[index], module)
        seen[module.kind] = module, Seen(*passes.moments(1, 2), damp=damp)
    return seen


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


def test_score_of_a_linear_module_is_its_expected_output_energy():
    """Eq. 2-3 by Monte Carlo: E||B_:,j (a_j' x + b_j)||^2 over fresh inputs with the same second moments."""
    module = depth2_modules(tiny_model("gpt2"))[1]
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(48, 48, generator=generator, dtype=torch.float64)
    known, fresh = Moments(), torch.randn(100_000, 48, generator=generator, dtype=torch.float64) @ root.T
    known.update(7 * torch.cat([root.T, -root.T]))  # exactly 49 * 2 root root' over 96 tokens, mean 0
    known.n = 49 * 2
    with torch.no_grad():
        sent = module.level1["c_fc"].linear(fresh).square().mean(0)
    expected = sent * weight_of(module.level2.linear).square().sum(0)
    scores = second_moment(module, Seen(known))
    torch.testing.assert_close(scores, expected, rtol=0.03, atol=0)
    torch.testing.assert_close(second_moment(module, Seen(known), half=True), scores / 2)


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


def test_random_differs_by_seed_and_module():
    first, second = depth2_modules(tiny_model("llama"))[1::2]
    assert not torch.equal(random_scores(first), random_scores(second))
    assert not torch.equal(random_scores(first), random_scores(first, seed=1))


@pytest.mark.parametrize(("ratio", "left"), [(0, 10), (0.3, 7), (0.25, 8), (0.95, 1), (0.999, 1)])
def test_the_best_stay_and_never_more_go_than_asked(ratio, left):
    scores = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    keep = keep_best(scores, 10 - n_removed(10, ratio))
    assert len(keep) == left
    assert keep.tolist() == sorted(keep.tolist())
    assert scores[keep].min() >= scores.sort().values[10 - left]


def test_rounding_in_the_ratio_costs_no_unit():
    assert 0.29 * 100 < 29  # in floating point
    assert n_removed(100, 0.29) == 29


def test_ties_keep_the_earlier_unit():
    assert keep_best(torch.ones(4), 2).tolist() == [0, 1]


@pytest.mark.parametrize("ratio", [1, 1.5, -0.1, float("nan"), "0.25", True])
def test_ratio_outside_range(ratio):
    with pytest.raises(ValueError, match=r"expected a ratio in \[0, 1\)"):
        n_removed(4, ratio)


def test_nan_scores():
    with pytest.raises(FloatingPointError, match="2 NaN scores"):
        keep_best(torch.tensor([1.0, float("nan"), float("nan")]), 2)


# --- the other criteria, each against an independent computation


def test_output_energy_equals_the_measured_energy_of_each_unit(model, tokens):
    """Silence all other units and measure what arrives."""
    for module, seen in seen_by(model, tokens, 1).values():
        z = inputs_of(model, module, module.level2.linear, tokens)
        b = weight_of(module.level2.linear)
        for unit in range(0, module.n_units, 7):
            channels = module.level2.index[unit]
            sent = z[:, channels] @ b[:, channels].T
            assert output_energy(module, seen)[unit].item() == pytest.approx(sent.square().sum(1).mean().item())


def refit_error(linear, z, gone):
    """Squared error per token when level 2 loses inputs and is solved again, its bias too, by lstsq on the data."""
    y = z @ weight_of(linear).T
    stays = torch.ones(z.shape[1], dtype=torch.bool).index_fill_(0, torch.as_tensor(gone), False)
    z = z[:, stays] if linear.bias is None else torch.cat([z[:, stays], z.new_ones(len(z), 1)], 1)
    return (y - z @ torch.linalg.lstsq(z, y, driver="gelsd").solution).square().sum(1).mean().item()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ENCODERS])
def test_obs_cost_equals_the_rise_of_the_error_after_a_refit(name):
    """In every family, for heads and channels: a bias is refitted with the weights, and makes removing cheaper."""
    model, tokens = tiny_model(name), calibration(16)
    for module, seen in seen_by(model, tokens, 1, damp=1e-12).values():
        z = inputs_of(model, module, module.level2.linear, tokens)
        scores = obs_cost(module, seen)
        for unit in range(0, module.n_units, 3 if module.kind == "attention" else 27):
            rise = refit_error(module.level2.linear, z, module.level2.index[unit])
            assert scores[unit].item() == pytest.approx(rise, rel=1e-4, abs=1e-9)
        assert (scores <= output_energy(module, seen) * (1 + 1e-9) + 1e-9).all()  # a refit never costs more than a cut


def test_obs_cost_refuses_a_singular_matrix():
    module, seen = seen_by(tiny_model("llama"), calibration(2, 8), 0, damp=0)["gated_ffn"]
    with pytest.raises(ValueError, match=r"mlp\.down_proj: 16 calibration tokens for 80 input features; .* damp > 0"):
        obs_cost(module, seen)


def test_brute_force_over_all_subsets():
    """The optimum for one unit; for several, picked at once by their single costs, here too: no two are alike."""
    model, tokens = tiny_model("gpt2"), calibration(6, seed=3)
    remove_units(depth2_modules(model)[1], torch.arange(6))
    module, seen = seen_by(model, tokens, 0, damp=1e-12)["ffn"]
    z, costs = inputs_of(model, module, module.level2.linear, tokens), obs_cost(module, seen)
    for n_gone in (1, 2, 3):
        subsets = itertools.combinations(range(6), n_gone)
        errors = {gone: refit_error(module.level2.linear, z, gone) for gone in subsets}
        assert tuple(sorted(costs.argsort()[:n_gone].tolist())) == min(errors, key=errors.get)


def test_wanda_and_flap_by_hand(model, tokens):
    for kind, (module, seen) in seen_by(model, tokens, 1).items():
        z = inputs_of(model, module, module.level2.linear, tokens)
        b = weight_of(module.level2.linear)
        by_hand = {
            "wanda": b.abs().mean(0) * z.norm(dim=0) / len(z) ** 0.5,
            "WIFV": z.var(0, correction=0) * b.square().sum(0),  # two passes: mean first
            "IFV": z.var(0, correction=0),
        }
        for name, channels in by_hand.items():
            found = wanda_sp(module, seen) if name == "wanda" else flap(module, seen, name)
            torch.testing.assert_close(found, channels[module.level2.index].sum(1), msg=f"{kind} {name}")
        torch.testing.assert_close(flap(module, seen, "WIFN"), wanda_sp(module, seen))
        with pytest.raises(ValueError, match="'WIFV', 'IFV' or 'WIFN', found 'wifv'"):
            flap(module, seen, "wifv")


def test_flap_as_published_follows_the_released_recursion(model, tokens):
    """The alias bug replayed with plain loops over windows; and with many windows the ranking is the variance's."""
    captured = {}

    def spy(module, seen):
        captured[module.name] = module, flap(module, seen, published_code=True), list(seen.level2_windows())
        return torch.ones(module.n_units)

    scores_of(model, tokens, spy, batch_size=4)
    for module, found, batches in captured.values():
        windows = torch.cat(batches)
        assert windows.shape[:2] == tokens.shape
        mean = torch.zeros(windows.shape[-1], dtype=torch.float64)
        baseline = torch.zeros_like(mean)
        for n, window in enumerate(windows, 1):
            mean *= (n - 1) / n  # in place: the "old" mean is the same tensor
            mean += window.mean(0) / n
            if n > 1:
                baseline *= (n - 2) / (n - 1)
                baseline += ((window - mean) * (window - mean)).sum(0) / n
        channels = baseline * weight_of(module.level2.linear).square().sum(0)
        channels = channels.square() if module.kind == "attention" else channels
        torch.testing.assert_close(found, channels[module.level2.index].sum(1))


def test_flap_as_published_needs_two_windows():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="at least 2 windows, found 1"):
        scores_of(model, torch.randint(0, 96, (1, 24)), partial(flap, published_code=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_value_rows_are_the_values(name):
    """Doubling the value rows of a unit doubles what level 2 reads from it, in every family."""
    model, doubled = tiny_model(name), tiny_model(name)
    modules = [depth2_modules(m, [0], unit="kv")[0] for m in (model, doubled)]
    if modules[0].kind != "attention":
        pytest.skip("its attention stays whole")
    tokens = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    rows = value_rows(modules[1])
    assert rows.shape[::2] == (modules[1].n_units, modules[1].level1[list(modules[1].level1)[-1]].linear.weight.shape[
        0 if isinstance(modules[1].level2.linear, Conv1D) else 1
    ])  # fmt: skip
    group = list(modules[1].level1.values())[-1]
    dim = modules[1].sizes["dim"]
    shared = group.index.numel() < group.n_channels
    channels = torch.arange(group.n_channels)[-dim:] if shared else group.index[:, -dim:].flatten()
    with torch.no_grad():
        weight_of(group.linear)[channels] *= 2
        if group.linear.bias is not None:
            group.linear.bias[channels] *= 2
    a, b = (inputs_of(m, d, d.level2.linear, tokens) for m, d in zip((model, doubled), modules, strict=True))
    torch.testing.assert_close(b, 2 * a)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
def test_identity_is_the_second_moment_of_white_inputs(name):
    """Plain, gated and fused FFN: a white input's moments give the same scores. Attention: a white mixed input's."""
    white = Moments()
    white.update(torch.cat([torch.eye(48), -torch.eye(48)]).double() * 48**0.5)  # Sigma = I, mean 0
    attention, ffn = depth2_modules(tiny_model(name), [0])
    for group in ffn.level1.values():
        if group.linear.bias is not None:  # no part of it
            group.linear.bias.data.zero_()
    torch.testing.assert_close(second_moment_identity(ffn), second_moment(ffn, Seen(white)))

    b, rows = weight_of(attention.level2.linear), value_rows(attention)
    expected = torch.zeros(attention.n_units, dtype=torch.float64)
    for unit in range(attention.n_units):
        for place, channel in enumerate(attention.level2.index[unit].tolist()):
            expected[unit] += b[:, channel].square().sum() * rows[unit, place % rows.shape[1]].square().sum()
    torch.testing.assert_close(second_moment_identity(attention), expected)


# --- invariances

OUTPUT_BASED = [second_moment, output_energy, wanda_sp, flap, obs_cost]


@pytest.mark.parametrize("criterion", [*OUTPUT_BASED, weight_norm, second_moment_identity])
def test_permuting_the_units_permutes_the_scores(criterion, tokens):
    model, permuted = tiny_model("gpt2"), tiny_model("gpt2")
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    ffn = depth2_modules(permuted)[1]
    with torch.no_grad():
        fc, proj = ffn.level1["c_fc"].linear, ffn.level2.linear
        set_weight(fc, weight_of(fc)[order], fc.bias[order])
        set_weight(proj, weight_of(proj)[:, order])
    a, b = (scores_of(m, tokens, criterion)[ffn.name] for m in (model, permuted))
    torch.testing.assert_close(b, a[order])


@pytest.mark.parametrize("criterion", OUTPUT_BASED)
def test_moving_scale_between_the_levels_changes_no_output_based_score(criterion, tokens):
    """W_up by c and W_down by 1/c: the same function (up is linear in a gated FFN), the same scores; not for L2."""
    model, moved = tiny_model("llama"), tiny_model("llama")
    ffn = depth2_modules(moved)[1]
    with torch.no_grad():
        ffn.level1["up_proj"].linear.weight[:10] *= 4
        ffn.level2.linear.weight[:, :10] /= 4
    first = depth2_modules(model)[1].name
    a, b = (scores_of(m, tokens, criterion, damp=1e-12)[first] for m in (model, moved))
    if criterion is second_moment:  # the paper's product of two paths counts the columns twice: ||B||^4 against one c^2
        b[:10] *= 4**2
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-9)
    l2 = [weight_norm(depth2_modules(m)[1]) for m in (model, moved)]
    assert not torch.allclose(*l2)


def test_scores_of_leaves_the_model_alone(model, tokens):
    before = state_of(model)
    found = scores_of(model, tokens, blocks=[1], kinds={"attention"})
    assert list(found) == [depth2_modules(model, [1])[0].name]
    assert_untouched(model, before)
