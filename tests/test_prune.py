"""The loop as a whole: what it keeps, what it repairs, and what it leaves alone when something is wrong."""

import copy
from functools import partial

import pytest
import torch
from conftest import assert_untouched, state_of
from slow import recorded, refit_slowly
from tiny import VOCABULARY, tiny_model
from transformers import XLMConfig, XLMModel

from greedy_helpers import (
    UnknownFamily,
    blocks_of,
    depth2_modules,
    prune,
    random_scores,
    remove_units,
    second_moment,
    weight_norm,
    weight_of,
    zero_units,
)

quiet = partial(prune, progress=False)


def calibration(n=12, seq=24, seed=5):
    return torch.randint(0, VOCABULARY, (n, seq), generator=torch.Generator().manual_seed(seed))


def test_ratio_zero_changes_nothing(model, tokens):
    with torch.no_grad():
        before = model(tokens).logits
        quiet(model, calibration(), 0.0)
        assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_without_refit_it_is_zeroing_the_lowest_units(model, tokens, ratio):
    twin = copy.deepcopy(model)
    report = quiet(model, calibration(), ratio)
    for module, step in zip(depth2_modules(twin), report.steps, strict=True):
        assert step.units_after == step.units_before - int(step.units_before * ratio)
        assert step.scores[step.keep].min() >= step.scores.sort().values[step.units_before - step.units_after]
        cut = torch.tensor([u for u in range(step.units_before) if u not in step.keep.tolist()], dtype=torch.long)
        zero_units(module, cut)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, twin(tokens).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("refit", ["post", "both"])
@pytest.mark.parametrize("damp", [1e-4, 1e-1])
def test_reconstruction_never_raises_the_calibration_error(model, refit, damp):
    for step in quiet(model, calibration(), 0.5, refit=refit, damp=damp).steps:
        assert step.error <= step.error_cut * (1 + 1e-9)


def reference_prune(model, tokens, ratio, refit, damp):
    """The method once more, slowly: a whole dense model beside it, full passes, stored activations, lstsq.

    Shares with the package only the tables of channels and the criterion's formula, written out again.
    """
    dense, errors = copy.deepcopy(model), []

    def activations(which, linear):
        return recorded(which, linear, tokens)

    def solve(linear, x, y):
        refit_slowly(linear, x, y, damp)

    for number in range(len(depth2_modules(model))):
        module, original = depth2_modules(model)[number], depth2_modules(dense)[number]
        pairs = [(g.linear, original.level1[key].linear) for key, g in module.level1.items()]
        cut_from, meant = module.level2.linear, activations(dense, original.level2.linear)[1]
        if refit in ("pre", "both"):
            solutions = [(a, activations(model, a)[0], activations(dense, b)[1]) for a, b in pairs]
            for solution in solutions:
                solve(*solution)
            solve(cut_from, activations(model, cut_from)[0], meant)
        columns = weight_of(cut_from).square().sum(0)
        if module.kind == "attention":
            z = activations(model, cut_from)[0]
            scores = (columns * z.square().mean(0))[module.level2.index].sum(1)
        else:
            energies = [columns * activations(model, a)[1].square().mean(0) for a, _ in pairs]
            scores = torch.stack(energies).prod(0)
        keep = scores.argsort()[int(ratio * len(scores)) :]
        remove_units(module, keep)
        if refit in ("post", "both"):
            solve(cut_from, activations(model, cut_from)[0], meant)
        errors.append(((activations(model, cut_from)[1] - meant).square().sum() / meant.square().sum()).item())
    return errors


@pytest.mark.parametrize("refit", [None, "pre", "post", "both"])
def test_the_streaming_method_equals_the_slow_one(model, refit, tokens):
    twin, text = copy.deepcopy(model), calibration(40)
    report = quiet(model, text, 0.5, refit=refit, damp=1e-2, batch_size=7)
    errors = reference_prune(twin, text, 0.5, refit, damp=1e-2)
    assert [step.error for step in report.steps] == pytest.approx(errors, rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, twin(tokens).logits, rtol=1e-6, atol=1e-6)


def test_refitting_helps_on_the_calibration_tokens():
    tokens, logits = calibration(32), {}
    with torch.no_grad():
        dense = tiny_model("llama")(tokens).logits
        for refit in (None, "pre", "post", "both"):
            model = tiny_model("llama")
            quiet(model, tokens, 0.5, refit=refit, damp=1e-3)
            logits[refit] = (model(tokens).logits - dense).square().mean().item()
    assert logits["post"] < 0.8 * logits[None]
    assert logits["both"] < 0.8 * logits[None]


def test_refit_without_a_cut_leaves_an_unpruned_model_alone(model, tokens):
    """Every target is then already met: the solution is the current weight, up to rounding."""
    with torch.no_grad():
        before = model(tokens).logits
        quiet(model, calibration(32), 0.0, refit="both")
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("refit", [None, "both"])
def test_batch_size_does_not_matter(refit, tokens):
    logits = []
    for batch_size in (1, 5, 64):  # 5 leaves a last batch of another shape
        model = tiny_model("llama-gqa")
        quiet(model, calibration(), 0.5, refit=refit, batch_size=batch_size)
        logits.append(model(tokens).logits.detach())
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-8, atol=1e-8)


def test_only_the_chosen_blocks():
    model, dense = tiny_model("gpt2"), tiny_model("gpt2")
    report = quiet(model, calibration(), 0.5, blocks=[1], refit="both")
    assert [step.block for step in report.steps] == [1, 1]
    for a, b in zip(blocks_of(model)[0].parameters(), blocks_of(dense)[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_same_seed_same_model_and_training_mode_is_kept(tokens):
    logits = []
    for training in (True, False):
        model = tiny_model("gpt2").train(training)  # dropout must not leak into the statistics
        quiet(model, calibration(), 0.5, criterion=partial(random_scores, seed=4), refit="both")
        assert model.training == training
        logits.append(model.eval()(tokens).logits)
    assert torch.equal(*logits)


def test_report_to_frame_and_dict():
    report = quiet(tiny_model("llama"), calibration(), 0.25, criterion=weight_norm, refit="post")
    frame = report.to_frame()
    assert list(frame["name"]) == [step.name for step in report.steps]
    assert {"units_before", "units_after", "error_cut", "error", "seconds"} <= set(frame.columns)
    record = report.to_dict()
    assert record["criterion"] == "weight_norm"
    assert record["steps"][0]["keep"] == report.steps[0].keep.tolist()
    assert report.tokens == 12 * 24


def breaks_in_the_middle(module, seen):
    return second_moment(module, seen) * (float("nan") if module.block == 1 else 1.0)


def needs_maps(module, seen):
    return sum(maps.sum((0, 2, 3)) for maps in seen.attention_maps())


def interrupted(module, seen):
    if module.block == 1:
        raise KeyboardInterrupt
    return second_moment(module, seen)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": 1.0}, ValueError, r"ratio in \[0, 1\)"),
        ({"ratio": -0.1}, ValueError, r"ratio in \[0, 1\)"),
        ({"refit": "twice"}, ValueError, "expected refit None, 'pre', 'post', 'both' or 'bias', found 'twice'"),
        ({"blocks": [5]}, IndexError, r"expected blocks in \[0, 2\), found 5"),
        ({"calibration": calibration() + VOCABULARY}, ValueError, r"token ids in \[0, 96\).*found ids from"),
        ({"calibration": -calibration() - 1}, ValueError, r"token ids in \[0, 96\)"),
        ({"calibration": calibration().float()}, TypeError, "long tensor"),
        ({"calibration": calibration()[0]}, ValueError, r"shape \[n >= 1, seq >= 2\], found \[24\]"),
        ({"calibration": calibration(1, 8), "refit": "both", "damp": 0.0}, ValueError, "8 calibration tokens for"),
        ({"damp": -1.0, "refit": "post"}, ValueError, "damp >= 0"),
        ({"criterion": lambda module, seen: torch.ones(3)}, ValueError, r"self_attn: expected scores of shape \[4\]"),
        ({"criterion": breaks_in_the_middle}, FloatingPointError, "NaN scores"),
        ({"criterion": needs_maps}, ValueError, r"block 0: .*'sdpa'\. Call model\.set_attn_implementation\('eager'\)"),
        ({"calibration": calibration(2, 65)}, ValueError, "at most 64 tokens, the context of LlamaForCausalLM"),
        ({"criterion": interrupted, "refit": "both"}, KeyboardInterrupt, None),
    ],
)
def test_whatever_goes_wrong_the_model_stays_as_it_was(arguments, error, message):
    model = tiny_model("llama")
    before = state_of(model)
    call = {"calibration": calibration(), "ratio": 0.5} | arguments
    with pytest.raises(error, match=message):
        quiet(model, call.pop("calibration"), call.pop("ratio"), **call)
    assert_untouched(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules()), "a hook was left behind"


def test_an_unknown_family_is_left_alone():
    model = XLMModel(XLMConfig(emb_dim=16, n_layers=1, n_heads=2, n_words=VOCABULARY))
    before = state_of(model)
    with pytest.raises(UnknownFamily, match="no layout for model type 'xlm'"):
        quiet(model, calibration(), 0.5)
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_named(value):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = value
    before = state_of(model)
    with pytest.raises(FloatingPointError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight: expected finite weights"):
        quiet(model, calibration(), 0.5)
    assert_untouched(model, before)


def test_overflowing_activations_are_named():
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e38)
        model.model.layers[1].mlp.gate_proj.weight.abs_().mul_(1e3)
    before = state_of(model)
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.\w+: NaN or Inf"):
        quiet(model, calibration(), 0.5, refit="both")
    assert_untouched(model, before)
