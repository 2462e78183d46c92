"""What a module is refitted to: each target against a slow computation with whole models and stored activations."""

import copy
from functools import partial
from itertools import islice

import pytest
import torch
from conftest import assert_untouched, calibration, quiet, state_of
from slow import exact_greedy_slowly, prune_slowly, recorded, second_moment_slowly
from tiny import tiny_model

from greedy_helpers import (
    RECOMMENDED,
    Recipe,
    blocks_of,
    depth2_modules,
    exact_greedy,
    fixed_scores,
    flap,
    load_pruned,
    output_energy,
    prune,
    remove_units,
    save_pruned,
    scores_of,
    weight_of,
)
from greedy_helpers.structure import UnsupportedModule

TOKENS = calibration(20)


def sizes_of(report):
    return [step.units_after for step in report.steps]


@pytest.mark.parametrize("remedy", ["none", "pre", "pre, residual", "post", "both"])
def test_the_streaming_method_equals_the_slow_one(model, remedy, tokens):
    twin, text = copy.deepcopy(model), calibration(40)
    report = quiet(model, text, 0.5, remedy=remedy, batch_size=7)
    steps = prune_slowly(twin, text, sizes_of(report), second_moment_slowly, remedy)
    assert [step.error for step in report.steps] == pytest.approx([step.error for step in steps], rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, twin(tokens).logits, rtol=1e-6, atol=1e-6)


# the last two add attention and FFN in parallel
@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gpt2", "gpt_neox", "phi"])
@pytest.mark.parametrize("remedy", ["post", "post, residual", "post, local"])
def test_every_target_equals_the_slow_one(name, remedy):
    """The target that criteria see, the errors and the weights."""
    model, seen = tiny_model(name), []
    dense, slow = copy.deepcopy(model), copy.deepcopy(model)

    def criterion(module, what):
        seen.append((what.level2.xx, what.level2.xy))
        return output_energy(module, what)

    report = quiet(model, TOKENS, 0.5, criterion=criterion, remedy=remedy, allocation="floor", batch_size=7)
    keeps = iter([step.keep for step in report.steps])
    steps = prune_slowly(slow, TOKENS, sizes_of(report), lambda *_: next(keeps), remedy)
    assert [step.error for step in report.steps] == pytest.approx([step.error for step in steps], rel=1e-4)
    for (xx, xy), step in zip(seen, steps, strict=True):
        torch.testing.assert_close(xx, step.seen.z.T @ step.seen.z, rtol=1e-8, atol=1e-6)
        torch.testing.assert_close(xy, step.seen.z.T @ step.seen.target, rtol=1e-8, atol=1e-6)
    with torch.no_grad():
        fresh = calibration(20, seed=9)
        torch.testing.assert_close(model(fresh).logits, slow(fresh).logits, rtol=1e-5, atol=1e-5)
        hidden = [m(TOKENS, output_hidden_states=True).hidden_states[1] for m in (dense, model)]
    lost = ((hidden[0] - hidden[1]).square().sum() / hidden[0].square().sum()).item()
    assert report.stream_errors[0] == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "width"), [("llama-gqa", "intermediate_size"), ("gpt2", "n_inner"), ("phi", "intermediate_size")]
)
@pytest.mark.parametrize("damp", [1e-2, 0.3])
@pytest.mark.parametrize("remedy", [RECOMMENDED.remedy, "post, residual", "both, residual"])
def test_exact_greedy_with_its_refits_equals_brute_force(name, width, damp, remedy):
    model = tiny_model(name, **{width: 20})
    slow = copy.deepcopy(model)
    recipe = Recipe("exact greedy", remedy, damp, "floor")
    report = prune(model, TOKENS, 0.5, recipe, batch_size=7, progress=False)
    steps = prune_slowly(slow, TOKENS, sizes_of(report), exact_greedy_slowly, remedy, damp)
    assert [step.keep.tolist() for step in report.steps] == [step.keep.tolist() for step in steps]
    assert [step.error for step in report.steps] == pytest.approx([step.error for step in steps], rel=1e-6)
    expected = slow.state_dict()
    for path, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[path], rtol=1e-6, atol=1e-6, msg=path)


def test_a_criterion_may_look_at_windows_before_it_asks_for_moments():
    """The drift behind attention is then known all the same, whether the criterion looks at every window or at one."""

    def looking(module, seen, most):
        for _ in islice(seen.level2_windows(), most):
            pass
        return exact_greedy(module, seen)

    models = []
    for most in (0, 1, 99):
        model = tiny_model("llama")
        quiet(model, calibration(12), 0.5, criterion=partial(looking, most=most), remedy="post, residual", batch_size=4)
        models.append(model)
    for other in models[1:]:
        for one, same in zip(models[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, same, rtol=1e-9, atol=1e-10)


def test_the_residual_target_follows_modules_that_are_not_cut():
    """Only the FFN is pruned, the attention behind a broken prefix is not: its drift counts all the same."""
    how = {"kinds": {"gated_ffn"}, "criterion": output_energy}
    reports = [quiet(tiny_model("llama"), TOKENS, 0.5, remedy=remedy, **how) for remedy in ("post, residual", "post")]
    assert [step.kind for step in reports[0].steps] == ["gated_ffn"] * 2
    followed, ignored = (report.stream_errors for report in reports)
    assert followed[1] < ignored[1]
    assert followed[0] == pytest.approx(ignored[0])  # in the first block nothing is broken yet


@pytest.mark.parametrize("name", ["gemma2", "granite", "olmo2", "bert"])
@pytest.mark.filterwarnings("ignore:.*stays whole")
def test_blocks_that_do_not_simply_add_are_refused(name):
    """A norm behind level 2, a multiplier, attention that the table leaves out: the residual target would be wrong."""
    model = tiny_model(name)
    for block in blocks_of(model):
        if name == "granite":
            block.residual_multiplier = 0.5
    before = state_of(model)
    with pytest.raises(UnsupportedModule, match=r"'residual' needs .* block 0 does not .* dense target, e\.g\. 'both'"):
        quiet(model, TOKENS[:4], 0.5, remedy="post, residual")
    assert_untouched(model, before)


@pytest.mark.parametrize(("damps", "differ"), [((1e-4, 1.0), True), ((1e-2, 1.1e-2), False)])
def test_exact_greedy_counts_on_the_damping_of_the_refit(damps, differ):
    """How strongly survivors are held decides which of them can stand in for the others."""
    seen, keeps = [], []

    def criterion(module, what):
        seen.append(what.damp)
        return exact_greedy(module, what)

    for damp in damps:
        first = {"blocks": [0], "kinds": {"ffn"}}  # nothing else is refitted in front of it
        report = quiet(tiny_model("gpt2"), TOKENS, 0.5, criterion=criterion, remedy="post", damp=damp, **first)
        keeps.append(report.steps[0].keep.tolist())
    assert seen == list(damps)
    assert (keeps[0] != keeps[1]) == differ


# --- FLAP's remedy


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_bias_is_the_dense_mean_of_what_was_removed(name, tmp_path):
    model = tiny_model(name)
    dense = copy.deepcopy(model)
    scores = scores_of(dense, TOKENS, flap)
    fixed = partial(fixed_scores, scores=scores)
    report = quiet(model, TOKENS, 0.5, criterion=fixed, remedy="bias", batch_size=7)
    for step, original, module in zip(report.steps, depth2_modules(dense), depth2_modules(model), strict=True):
        gone = torch.tensor([u for u in range(step.units_before) if u not in step.keep.tolist()])
        channels = original.level2.index[gone].flatten()
        z, _ = recorded(dense, original.level2.linear, TOKENS)
        expected = weight_of(original.level2.linear)[:, channels] @ z.mean(0)[channels]
        if original.level2.linear.bias is not None:
            expected = expected + original.level2.linear.bias
        torch.testing.assert_close(module.level2.linear.bias.detach(), expected.detach())
    assert report.steps[0].error < report.steps[0].error_cut
    save_pruned(model, tmp_path / "flap")
    loaded, _ = load_pruned(tmp_path / "flap", dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


def test_added_biases_go_when_something_fails():
    model = tiny_model("llama")
    before = state_of(model)

    def breaks(module, seen):
        if module.block == 1:
            raise RuntimeError("stop here")
        return output_energy(module, seen)

    with pytest.raises(RuntimeError, match="stop here"):
        quiet(model, TOKENS, 0.5, criterion=breaks, remedy="bias")
    assert_untouched(model, before)
    assert all(module.level2.linear.bias is None for module in depth2_modules(model))


def test_fixed_scores_refuse_other_modules_and_sizes():
    model = tiny_model("llama")
    scores = scores_of(model, TOKENS[:4], output_energy)
    first, second = depth2_modules(model)[:2]
    with pytest.raises(KeyError, match=r"layers\.0\.mlp: no scores; there are some for model\.layers\.0\.self_attn"):
        fixed_scores(second, scores={first.name: scores[first.name]})
    remove_units(second, torch.arange(7))
    with pytest.raises(ValueError, match=r"the scores are for 80 units, found 7"):
        fixed_scores(depth2_modules(model)[1], scores=scores)
