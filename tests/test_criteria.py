"""Scores equal what they claim to measure; their rankings survive what should not matter."""

import itertools
from functools import partial
from itertools import repeat

import pytest
import torch
from conftest import assert_untouched, state_of
from tiny import CONFIGS, tiny_model
from transformers.pytorch_utils import Conv1D

from greedy_helpers import (
    BlockStream,
    Moments,
    Seen,
    blocks_of,
    depth2_modules,
    flap,
    keep_top,
    module_moments,
    obs_cost,
    output_energy,
    random_scores,
    remove_units,
    scores_of,
    second_moment,
    second_moment_identity,
    set_weight,
    taylor,
    wanda_sp,
    weight_norm,
    weight_of,
)
from greedy_helpers.criteria import value_rows


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


def test_obs_cost_equals_the_rise_of_the_error_after_a_refit(model, tokens):
    """Remove one unit, solve the rest again on the same data with lstsq, and compare the squared error."""
    for module, seen in seen_by(model, tokens, 1).values():
        z = inputs_of(model, module, module.level2.linear, tokens)
        if z.shape[0] <= z.shape[1]:
            continue
        y = z @ weight_of(module.level2.linear).T
        found = obs_cost(module, seen, damp=1e-12)
        for unit in range(0, module.n_units, 11):
            rest = [c for c in range(z.shape[1]) if c not in module.level2.index[unit].tolist()]
            solution = torch.linalg.lstsq(z[:, rest], y).solution
            error = (y - z[:, rest] @ solution).square().sum(1).mean().item()
            assert found[unit].item() == pytest.approx(error, rel=1e-4)
        assert (found <= output_energy(module, seen) * (1 + 1e-9)).all()  # a refit never costs more than a cut


def test_obs_cost_refuses_a_singular_matrix():
    model = tiny_model("llama")
    module, seen = seen_by(model, torch.randint(0, 96, (2, 8)), 0)["gated_ffn"]
    with pytest.raises(ValueError, match=r"mlp\.down_proj: 16 tokens for 80 channels; expected damp > 0"):
        obs_cost(module, seen, damp=0)


def six_channel_module():
    """A plain FFN with six channels, two of them nearly equal, and what level 2 reads."""
    model = tiny_model("gpt2")
    remove_units(depth2_modules(model)[1], torch.arange(6))
    tokens = torch.randint(0, 96, (6, 24), generator=torch.Generator().manual_seed(3))
    module, seen = seen_by(model, tokens, 0)["ffn"]
    return module, seen, inputs_of(model, module, module.level2.linear, tokens)


def test_brute_force_over_all_subsets():
    """One unit: the optimum. Several, picked at once by their single costs: within twice the optimum here."""
    module, seen, z = six_channel_module()
    y = z @ weight_of(module.level2.linear).T

    def error(gone):
        rest = [c for c in range(6) if c not in gone]
        return (y - z[:, rest] @ torch.linalg.lstsq(z[:, rest], y).solution).square().sum().item()

    costs = obs_cost(module, seen, damp=1e-12)
    for n_gone in (1, 2, 3):
        subsets = {gone: error(gone) for gone in itertools.combinations(range(6), n_gone)}
        chosen = tuple(sorted(costs.argsort()[:n_gone].tolist()))
        best = min(subsets.values())
        assert subsets[chosen] == pytest.approx(best) if n_gone == 1 else subsets[chosen] <= 2 * best


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
    modules = [depth2_modules(m, [0])[0] for m in (model, doubled)]
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


def test_identity_is_the_second_moment_of_white_inputs():
    """Plain and gated FFN: moments of whitened inputs give the same scores; attention: white mixed inputs."""
    for name in ("gpt2", "llama-gqa"):
        model = tiny_model(name)
        for kind, (module, seen) in seen_by(model, torch.randint(0, 96, (6, 24)), 0).items():
            d = seen.level1.xx.shape[0]
            if kind == "attention":
                expected = torch.zeros(module.n_units, dtype=torch.float64)
                b, rows = weight_of(module.level2.linear), value_rows(module)
                for unit in range(module.n_units):
                    for place, channel in enumerate(module.level2.index[unit].tolist()):
                        a = rows[unit, place % rows.shape[1]]
                        expected[unit] += b[:, channel].square().sum() * a.square().sum()
            else:
                white = Moments()
                white.n, white.xx, white.x = 1, torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
                expected = second_moment(module, Seen(white, seen.level2))
                for group in module.level1.values():  # biases are no part of it
                    if group.linear.bias is not None:
                        expected = None
                        break
            if expected is not None:
                torch.testing.assert_close(second_moment_identity(module), expected)


# --- Taylor


def loss_of(model, window):
    logits = model(input_ids=window).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def test_taylor_predicts_finite_differences():
    """vector: scaling a unit's weights by (1 + e) changes the loss by e times the signed sum of w g."""
    model = tiny_model("llama-gqa")
    window = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(1))
    scores = {m.name: taylor(model, window, "vector")(m) for m in depth2_modules(model)}
    module = depth2_modules(model)[1]
    for channel in (0, 5, 17):
        step, losses = 1e-3, []  # attention takes its softmax in float32: smaller steps drown in rounding
        for sign in (1, -1):
            moved = tiny_model("llama-gqa")
            with torch.no_grad():
                for group in depth2_modules(moved)[1].groups:
                    weight = weight_of(group.linear)
                    rows = group.index[channel]
                    part = weight[rows] if group.side == "out" else weight[:, rows]
                    part = part * (1 + sign * step)
                    if group.side == "out":
                        weight[rows] = part
                    else:
                        weight[:, rows] = part
                losses.append(loss_of(moved, window).item())
        slope = (losses[0] - losses[1]) / (2 * step)
        # "vector" adds |.| per linear; a unit of width 1 has one channel in each of three linears
        parts = []
        for group in module.groups:
            w = group.linear.weight
            (g,) = torch.autograd.grad(loss_of(model, window), w)
            product = (w * g).sum(1 if group.side == "out" else 0)
            parts.append(product[group.index[channel]].sum().item())
        assert sum(parts) == pytest.approx(slope, rel=5e-3, abs=1e-5)
        assert scores[module.name][channel].item() == pytest.approx(sum(abs(part) for part in parts), rel=1e-5)


@pytest.mark.parametrize("kind", ["vector", "element1", "element2", "mix"])
def test_taylor_is_the_sum_it_says(kind):
    model = tiny_model("gpt2")
    tokens = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    criterion = taylor(model, tokens, kind)
    for module in depth2_modules(model):
        expected = torch.zeros(module.n_units, dtype=torch.float64)
        for group in module.groups:
            w = weight_of(group.linear)
            per_window = [torch.autograd.grad(loss_of(model, t[None]), group.linear.weight)[0].t() for t in tokens]
            g, a = sum(per_window) / 3, sum(p.square() for p in per_window) / 3
            change = {"element2": w**2 * a, "mix": w * g - w**2 * a / 2}.get(kind, w * g)
            axis = 1 if group.side == "out" else 0
            channels = change.sum(axis).abs() if kind == "vector" else change.abs().sum(axis)
            expected += channels[group.index].sum(1)
        torch.testing.assert_close(criterion(module), expected, rtol=1e-5, atol=1e-9)  # logits are taken in float32


def test_taylor_refuses_what_it_was_not_taken_on():
    model = tiny_model("llama")
    tokens = torch.randint(0, 96, (2, 12))
    criterion = taylor(model, tokens)
    remove_units(depth2_modules(model)[1], torch.arange(10))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: Taylor scores were taken for 80 units, found 10"):
        criterion(depth2_modules(model)[1])
    with pytest.raises(ValueError, match="'element1', 'element2' or 'mix', found 'first'"):
        taylor(model, tokens, "first")
    assert all(p.grad is None for p in model.parameters())


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
    criterion_ = partial(criterion, damp=1e-12) if criterion is obs_cost else criterion
    a, b = (scores_of(m, tokens, criterion_)[first] for m in (model, moved))
    if criterion is second_moment:  # a product of two paths counts the columns twice: B^2 B^2 up^2 gate^2 c^2 / c^4
        assert not torch.allclose(a, b, rtol=1e-3)
    else:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)
    l2 = [weight_norm(depth2_modules(m)[1]) for m in (model, moved)]
    assert not torch.allclose(*l2)


def test_scores_of_leaves_the_model_alone(model, tokens):
    before = state_of(model)
    found = scores_of(model, tokens, blocks=[1], kinds={"attention"})
    assert list(found) == [depth2_modules(model, [1])[0].name]
    assert_untouched(model, before)
