"""The loop as a whole: what it keeps, what it repairs, and what it leaves alone when something is wrong."""

import copy
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_model, assert_same_report, assert_untouched, calibration, quiet, state_of
from tiny import VOCABULARY, tiny_model
from transformers import XLMConfig, XLMModel

from greedy_helpers import (
    FLAP,
    OSSCAR,
    PAPER,
    RECOMMENDED,
    Recipe,
    blocks_of,
    depth2_modules,
    exact_greedy,
    flap,
    prune,
    random_scores,
    scores_of,
    second_moment,
    weight_norm,
    zero_units,
)
from greedy_helpers.measure import DenseRecord
from greedy_helpers.moments import Moments
from greedy_helpers.similarity import divergences_of
from greedy_helpers.structure import UnknownFamily

# --- what is asked for


def test_the_default_is_the_recommended_recipe():
    """By itself, by name and spelled out: the same bits."""
    models = [tiny_model("llama-gqa", torch.float32) for _ in range(3)]
    plain = prune(models[0], calibration(), 0.5, progress=False)
    named = prune(models[1], calibration(), 0.5, RECOMMENDED, progress=False)
    parts = {"damp": "held out", "allocation": "loss prices"}
    spelled = quiet(models[2], calibration(), 0.5, criterion="exact greedy, loss metric", remedy="post, local", **parts)
    for model, report in zip(models[1:], (named, spelled), strict=True):
        assert_same_report(report, plain)
        assert_same_model(model, models[0])
    assert (plain.criterion, plain.remedy, plain.damp, plain.allocation) == (
        "exact greedy, loss metric", "post, local", "held out", "loss prices",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "name", "criterion", "remedy", "target"),
    [
        (RECOMMENDED, "exact greedy, loss metric, loss prices + post, local", exact_greedy, ("after",), "local"),
        (PAPER, "second moment + pre", second_moment, ("before",), "dense"),
        (FLAP, "FLAP WIFV, adaptive + bias", flap, ("after",), "dense"),
        (OSSCAR, "exact greedy + post, local", exact_greedy, ("after",), "local"),
    ],
)
def test_published_recipes_are_what_they_say(recipe, name, criterion, remedy, target):
    assert str(recipe) == name
    function, steps = recipe.resolved(SimpleNamespace(metric=dict))
    assert (getattr(function, "func", function), steps.target) == (criterion, target)
    assert tuple(when for when in ("before", "after") if getattr(steps, when)) == remedy
    assert (steps.refits_level1, steps.reads_means) == ("before" in remedy, recipe is FLAP)


def test_recipes_refuse_names_that_do_not_exist():
    for part, message in [
        ({"criterion": "L3"}, "expected a criterion among random; L1; .*: found 'L3'"),
        ({"remedy": "after"}, "expected a remedy among none; bias; .*: found 'after'"),
        ({"remedy": "both, local"}, "found 'both, local'"),
        ({"allocation": "fair"}, "allocation among uniform; .*: found 'fair'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Recipe(**part)
    with pytest.raises(TypeError, match="expected as remedy a Remedy, found None"):
        Recipe(remedy=None)


def test_a_ratio_that_takes_nothing_is_said():
    """Rounded down, a quarter of the two query heads of a KV head is none; of 80 channels it is 20."""
    message = (
        r"25% of their units is less than one: model\.layers\.0\.self_attn, with 4 query heads, and 1 more lose nothing"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        report = quiet(tiny_model("llama-gqa"), calibration(), 0.25, allocation="floor")
    assert len([w for w in caught if "lose nothing" in str(w.message)]) == 1
    assert [step.units_after for step in report.steps] == [4, 60, 4, 60]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(tiny_model("llama-gqa"), calibration(), 0.25)  # the nearest number of heads is two


# --- what comes of it


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
        kept = torch.isin(torch.arange(step.units_before), step.keep).view(module.n_sets, -1)
        scores = step.scores.view(module.n_sets, -1)
        assert (scores.masked_fill(~kept, torch.inf).amin(1) >= scores.masked_fill(kept, -torch.inf).amax(1)).all()
        cut = torch.tensor([u for u in range(step.units_before) if u not in step.keep.tolist()], dtype=torch.long)
        zero_units(module, cut)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, twin(tokens).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("remedy", ["post", "both", "both, residual"])
@pytest.mark.parametrize("damp", [1e-4, 1e-1])
def test_reconstruction_never_raises_the_calibration_error(model, remedy, damp):
    for step in quiet(model, calibration(), 0.5, remedy=remedy, damp=damp).steps:
        assert step.error <= step.error_cut * (1 + 1e-9)


def test_every_remedy_helps_where_it_works():
    """After: the model comes closer to the dense one than by cutting alone. Before: a broken prefix is repaired."""
    tokens, errors = calibration(32), {}
    with torch.no_grad():
        dense = tiny_model("llama")(tokens).logits
        for remedy in ("none", "bias", "post", "both", "both, residual"):
            model = tiny_model("llama")
            quiet(model, tokens, 0.5, remedy=remedy, damp=1e-3)
            errors[remedy] = (model(tokens).logits - dense).square().mean().item()
    assert errors["bias"] < errors["none"]
    assert all(errors[remedy] < 0.8 * errors["none"] for remedy in ("post", "both", "both, residual"))
    plan = {"model.layers.0.mlp": 40, "model.layers.1.mlp": 80}  # the second block only loses what reaches it
    cut, repaired = (quiet(tiny_model("llama"), tokens, plan=plan, remedy=remedy) for remedy in ("none", "pre"))
    assert repaired.steps[-1].error < 0.8 * cut.steps[-1].error
    assert repaired.stream_errors[-1] < cut.stream_errors[-1]


@pytest.mark.parametrize("remedy", ["both", "both, residual"])
def test_refit_without_a_cut_leaves_an_unpruned_model_alone(model, remedy, tokens):
    """Every target is then already met: the solution is the current weight, up to rounding."""
    with torch.no_grad():
        before = model(tokens).logits
        quiet(model, calibration(32), 0.0, remedy=remedy)
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("remedy", ["none", "both, residual"])
def test_batch_size_does_not_matter(remedy, tokens):
    logits = []
    for batch_size in (1, 5, 64):  # 5 leaves a last batch of another shape
        model = tiny_model("llama-gqa")
        quiet(model, calibration(), 0.5, remedy=remedy, batch_size=batch_size)
        logits.append(model(tokens).logits.detach())
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-8, atol=1e-8)


def test_only_the_chosen_blocks():
    model, dense = tiny_model("gpt2"), tiny_model("gpt2")
    report = quiet(model, calibration(), 0.5, blocks=[1], remedy="both")
    assert [step.block for step in report.steps] == [1, 1]
    for a, b in zip(blocks_of(model)[0].parameters(), blocks_of(dense)[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_same_seed_same_model_and_training_mode_is_kept(tokens):
    logits = []
    for training in (True, False):
        model = tiny_model("gpt2").train(training)  # dropout must not leak into the statistics
        quiet(model, calibration(), 0.5, criterion=partial(random_scores, seed=4), remedy="both")
        assert model.training == training
        logits.append(model.eval()(tokens).logits)
    assert torch.equal(*logits)


def test_report_to_frame_and_dict():
    report = quiet(tiny_model("llama"), calibration(), 0.25, criterion=weight_norm, remedy="post")
    frame = report.to_frame()
    assert list(frame["name"]) == [step.name for step in report.steps]
    assert {"units_before", "units_after", "error_cut", "error", "seconds"} <= set(frame.columns)
    record = report.to_dict()
    assert (record["criterion"], record["remedy"]) == ("L2", "post")
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
        ({"remedy": "twice"}, ValueError, "a remedy among none; bias; .*: found 'twice'"),
        ({"ratio": None}, ValueError, "expected a ratio or a plan, found neither"),
        ({"plan": {"model.layers.0.mlp": 40}}, ValueError, "expected a ratio or a plan, found both"),
        ({"ratio": {"model.layers.0.mlp": 40}}, TypeError, "a ratio as a number, found a mapping; pass it as plan="),
        (
            {"ratio": None, "plan": {"model.layers.0.mlp": 40}, "blocks": [1]},
            KeyError,
            r"model\.layers\.0\.mlp is not among the blocks and kinds",
        ),
        ({"blocks": [5]}, IndexError, r"expected blocks in \[0, 2\), found 5"),
        ({"calibration": calibration() + VOCABULARY}, ValueError, r"token ids in \[0, 96\).*found ids from"),
        ({"calibration": -calibration() - 1}, ValueError, r"token ids in \[0, 96\)"),
        ({"calibration": calibration().float()}, TypeError, "long tensor"),
        ({"calibration": calibration()[0]}, ValueError, r"shape \[n >= 1, seq >= 2\], found \[24\]"),
        ({"calibration": calibration(1, 8), "remedy": "both", "damp": 0.0}, ValueError, "8 calibration tokens for"),
        ({"damp": -1.0, "remedy": "post"}, ValueError, "damp >= 0"),
        ({"criterion": lambda module, seen: torch.ones(3)}, ValueError, r"self_attn: expected scores of shape \[4\]"),
        ({"criterion": breaks_in_the_middle}, FloatingPointError, "NaN scores"),
        ({"criterion": needs_maps}, ValueError, r"block 0: .*'sdpa'\. Call model\.set_attn_implementation\('eager'\)"),
        ({"calibration": calibration(2, 65)}, ValueError, "at most 64 tokens, the context of LlamaForCausalLM"),
        ({"criterion": interrupted, "remedy": "both"}, KeyboardInterrupt, None),
    ],
)
def test_whatever_goes_wrong_the_model_stays_as_it_was(arguments, error, message):
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(error, match=message):
        quiet(model, **{"calibration": calibration(), "ratio": 0.5} | arguments)
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
        quiet(model, calibration(), 0.5, remedy="both")
    assert_untouched(model, before)


# --- what is computed


@pytest.fixture
def watched(monkeypatch):
    """What a run collects: names of the moments, and the records of the dense model."""
    names, records = [], []

    class Counted(Moments):
        def __init__(self, name="input", dtype=torch.float64, **options):
            super().__init__(name, dtype, **options)
            names.append(name.removeprefix("model.layers."))

    class Kept(DenseRecord):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            records.append(self)

    monkeypatch.setattr("greedy_helpers.measure.Moments", Counted)
    monkeypatch.setattr("greedy_helpers.pruning.DenseRecord", Kept)
    return names, records


LEVEL1, LEVEL2 = ("self_attn.q_proj", "mlp.gate_proj"), ("self_attn.o_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    ("criterion", "remedy", "level1", "reads", "makes"),
    [
        ("random", "none", (), 0, 1),
        ("random", "bias", (), 1, 1),
        ("random", "post, local", (), 0, 0),
        ("second moment", "none", LEVEL1[1:], 0, 1),  # heads are scored by what level 2 reads
        ("exact greedy", "post", (), 0, 1),
        ("exact greedy", "both, residual", LEVEL1, 1, 1),
    ],
)
def test_nothing_is_measured_that_is_not_asked_for(criterion, remedy, level1, reads, makes, watched):
    model = tiny_model("llama")
    runs, attended = count_runs(model), []
    for block in blocks_of(model):
        block.self_attn.q_proj.register_forward_hook(lambda *_: attended.append(1))
    quiet(model, calibration(), 0.5, criterion=criterion, remedy=remedy, batch_size=6)
    names, records = watched
    assert sorted(names) == sorted(f"{block}.{path}" for block in range(2) for path in (*level1, *LEVEL2))
    assert [(len(record.reads), len(record.makes)) for record in records] == [(reads, makes)] * 4
    assert {len(record.outputs) for record in records} == {2 * makes}
    passes = 6 if level1 == LEVEL1 else 4  # densely, once per module (twice if level 1 changes), behind both
    assert runs == [2 * passes] * 2  # two batches
    # densely, up to its own level 2, and up to the FFN: a finished module is not run again
    assert len(attended) == 2 * 2 * 3


def count_runs(model):
    """How often each block of a Llama has run, counted at its first norm: blocks that hand inputs on do not run."""
    runs = [0] * len(blocks_of(model))

    def count(place):
        runs[place] += 1

    for place, block in enumerate(blocks_of(model)):
        block.input_layernorm.register_forward_pre_hook(lambda *_, place=place: count(place))
    return runs


def test_until_the_first_cut_one_stream_runs():
    for how in ({"ratio": 0.5}, {"plan": {"model.layers.1.mlp": 40}}):
        model = tiny_model("llama")
        runs = count_runs(model)
        report = quiet(model, calibration(), **how, remedy="both, residual", blocks=[1], batch_size=6)
        assert runs[0] == 2, "once for each of two batches"
        assert [error == 0 for error in report.stream_errors] == [True, False]


def test_the_walk_stops_behind_the_last_block_that_is_asked_for():
    model = tiny_model("llama", attention="eager")
    runs = count_runs(model)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the output layer ran"))
    scores = scores_of(model, calibration(), blocks=[0], batch_size=6)
    assert list(scores) == ["model.layers.0.self_attn", "model.layers.0.mlp"]
    assert runs == [2 * 2, 0]  # once per module and batch, and no further
    runs[:] = [0, 0]
    quiet(model, calibration(), 0.5, blocks=[0])
    assert runs[1] == 0
    runs[:] = [0, 0]
    divergences_of(model, calibration(), batch_size=6)
    assert runs == [2 * 2, 2]  # maps, and behind the first block


@pytest.mark.parametrize("training", [True, False])
def test_a_visit_that_fails_leaves_the_mode_as_it_was(training):
    model = tiny_model("gpt2").train(training)
    for visit in (lambda: scores_of(model, calibration(), breaks), lambda: divergences_of(model, calibration())):
        with pytest.raises((KeyboardInterrupt, ValueError)) as caught:  # sdpa computes no maps
            visit()
        assert all(part.training == training for part in model.modules())
        del caught


def breaks(module, seen):
    raise KeyboardInterrupt


# --- rounding


@pytest.mark.parametrize("recipe", [PAPER, RECOMMENDED], ids=["paper", "recommended"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_single_precision_with_outlier_channels_chooses_the_same_units(recipe, name):
    """One channel of the residual stream is a hundred times as loud as the rest, as in large models."""
    reports = []
    for dtype in (torch.float64, torch.float32):
        model = tiny_model(name, dtype)
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 7] *= 100
        reports.append(prune(model, calibration(40), 0.5, recipe, precision=dtype, progress=False))
    for exact, rounded in zip(*(report.steps for report in reports), strict=True):
        assert rounded.keep.tolist() == exact.keep.tolist()
        assert rounded.error == pytest.approx(exact.error, rel=1e-3, abs=1e-6)  # one that loses nothing
    assert reports[1].stream_errors == pytest.approx(reports[0].stream_errors, rel=1e-3)
