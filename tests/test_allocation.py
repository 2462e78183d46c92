"""Plans remove the parameters they promise; what they remove is what count_parameters misses afterwards."""

import warnings

import pytest
import torch
from conftest import quiet
from tiny import CONFIGS, tiny_model, unit_sets

from greedy_helpers import (
    budget,
    count_parameters,
    depth2_modules,
    keep_best,
    remove_units,
    scores_of,
    uniform_plan,
)
from greedy_helpers.allocation import (
    adaptive_plan,
    check_plan,
    middle_blocks,
    redundancy_plan,
    removed_parameters,
    unit_parameters,
)
from greedy_helpers.checkpoint import save_pruned
from greedy_helpers.structure import linears_of


@pytest.mark.parametrize("unit", ["query", "kv"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_unit_has_the_parameters_that_go_with_it(name, unit):
    model = tiny_model(name)
    for module in depth2_modules(model, [1], unit=unit):

        def parameters(owner=module.owner):  # of its linears: a norm per head (StableLM) is none of them
            return sum(p.numel() for linear in linears_of(owner).values() for p in linear.parameters())

        before = parameters()
        remove_units(module, unit_sets(module)[:, :-1].flatten())
        assert before - parameters() == unit_parameters(module) * module.n_sets


@pytest.mark.parametrize("of", ["blocks", "all"])
@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gpt2"])
@pytest.mark.parametrize("make", ["uniform", "adaptive"])
def test_a_plan_meets_its_budget(name, of, make, tokens):
    model = tiny_model(name)
    modules, wanted = depth2_modules(model), budget(model, 0.2, of)
    plan = (
        uniform_plan(modules, wanted) if make == "uniform" else adaptive_plan(modules, scores_of(model, tokens), wanted)
    )
    before = count_parameters(model)
    report = quiet(model, tokens, plan=plan)
    removed = before["total"] - count_parameters(model)["total"]
    steps = [unit_parameters(module) * module.n_sets for module in modules]
    slack = max(steps) if make == "adaptive" else sum(steps)
    assert wanted <= removed < wanted + slack
    assert {m.name: m.n_units for m in depth2_modules(model)} == plan
    assert report.parameters == {key: [before[key], count_parameters(model)[key]] for key in before}
    assert report.ratio is None


@pytest.mark.parametrize("multiple", [2, 8, 16, 32])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_widths_on_multiples(name, multiple, tokens):
    """FFN channels (80 here) in steps, heads as before; the smallest step that meets the budget; what it removes."""
    model = tiny_model(name)
    modules = depth2_modules(model)
    for ratio in (0.0, 0.1, 0.2, 0.35, 0.5):
        wanted = budget(model, ratio)
        plan = uniform_plan(modules, wanted, multiple=multiple)
        widths = [plan[m.name] for m in modules if m.kind != "attention"]
        assert all(width == 80 or width % multiple == 0 for width in widths)
        assert min(widths) >= multiple
        if ratio == 0:
            assert plan == {m.name: m.n_units for m in modules}
    before = count_parameters(model)["total"]
    quiet(model, tokens, plan=plan)
    removed = before - count_parameters(model)["total"]
    assert removed == removed_parameters(modules, plan) >= wanted


def test_a_multiple_is_never_rounded_to_nothing():
    """The nearest multiple, all of them, or the last multiple that is left."""
    modules = depth2_modules(tiny_model("llama"), kinds=["gated_ffn"])
    unit = unit_parameters(modules[0])
    found = [uniform_plan(modules, 2 * unit * n, multiple=32)[modules[0].name] for n in (0, 1, 8, 9, 16, 17, 48)]
    assert found == [80, 64, 64, 64, 64, 32, 32]  # 80 of 80, or 64, or 32
    with pytest.raises(ValueError, match=f"expected at least {2 * 49 * unit:,} parameters .* found {2 * 48 * unit:,}"):
        uniform_plan(modules, 2 * 49 * unit, multiple=32)
    assert uniform_plan(modules, 0, multiple=100) == {m.name: 80 for m in modules}
    for wrong in (0, -8, 2.0, True):
        with pytest.raises(ValueError, match="multiple of at least 1 channel, found"):
            uniform_plan(modules, 10, multiple=wrong)


def test_adaptive_standardises_inside_each_module():
    """Scales of modules do not matter; a unit far below its own module's mean goes first."""
    modules = depth2_modules(tiny_model("llama"))
    scores = {m.name: torch.randn(m.n_units, generator=torch.Generator().manual_seed(i)) for i, m in enumerate(modules)}
    scores[modules[1].name][7] = -1000.0
    plan = adaptive_plan(modules, scores, unit_parameters(modules[1]))
    assert plan == {m.name: m.n_units - (m is modules[1]) for m in modules}
    scaled = {name: 3.0 + 10.0**i * values for i, (name, values) in enumerate(scores.items())}
    wanted = 40 * unit_parameters(modules[1])
    assert adaptive_plan(modules, scaled, wanted) == adaptive_plan(modules, scores, wanted)


def test_the_floor_holds():
    modules = depth2_modules(tiny_model("llama"))
    scores = {m.name: torch.arange(m.n_units).double() for m in modules}
    everything = sum(m.n_units * unit_parameters(m) for m in modules)
    with pytest.raises(ValueError, match=r"expected at least [\d,]+ parameters in removable units, found [\d,]+"):
        adaptive_plan(modules, scores, everything)
    plan = adaptive_plan(modules, scores, int(0.7 * everything), floor=0.25)
    assert all(plan[m.name] >= 0.25 * m.n_units for m in modules)


def test_redundancy_fixes_the_heads_and_the_ffns_share_the_rest():
    model = tiny_model("llama")
    modules = depth2_modules(model)
    redundant = {modules[0].name: [1, 2], modules[2].name: []}
    wanted = budget(model, 0.3)
    plan = redundancy_plan(modules, redundant, wanted)
    assert (plan[modules[0].name], plan[modules[2].name]) == (2, 4)
    assert plan[modules[1].name] == plan[modules[3].name] < 80
    with pytest.raises(ValueError, match=r"more than the budget .* smaller tau"):
        redundancy_plan(modules, redundant, 10)


def test_middle_blocks():
    model = tiny_model("llama")
    assert middle_blocks(model, 1, 0) == range(1, 2)
    with pytest.raises(ValueError, match=r"fewer than all 2 blocks, found 4 \+ 2"):
        middle_blocks(model)


def test_bad_plans_are_refused():
    model = tiny_model("llama")
    with pytest.raises(KeyError, match=r"no module 'model\.layers\.9\.mlp'"):
        check_plan(model, {"model.layers.9.mlp": 3})
    for wrong in (0, 81, 2.5, True):
        with pytest.raises(ValueError, match="expected to keep 1 to 80 units"):
            check_plan(model, {"model.layers.1.mlp": wrong})
    with pytest.raises(ValueError, match="'blocks' or of 'all'"):
        budget(model, 0.2, "heads")
    with pytest.raises(ValueError, match="between 1 and 3 units, found 0"):
        keep_best(torch.ones(3), 0)


def test_steps_too_wide_for_the_ffns_are_said():
    """A multiple of 128 leaves 80 channels whole, so the heads pay: 1 of 4 is left."""
    modules = depth2_modules(tiny_model("llama"))
    wanted = 3 * unit_parameters(modules[0]) * 2
    with pytest.warns(
        UserWarning, match=r"multiples of 128 channels leave model\.layers\.0\.mlp whole, with 80, and 1 mo"
    ):
        plan = uniform_plan(modules, wanted, multiple=128)
    assert [plan[m.name] for m in modules] == [1, 80, 1, 80]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for multiple in (1, 8, 16):
            uniform_plan(modules, wanted, multiple=multiple)
        uniform_plan(modules, 0, multiple=128)


def test_a_ratio_that_removes_nothing_is_said(tokens):
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match=r"1% of 4 or 80 units is less than one: .* and 3 more lose nothing"):
        report = quiet(model, tokens, 0.01)
    assert report.removed == {"blocks": 0.0, "total": 0.0}
    asked = "asked: 0.01 of the units of each of 4 modules in blocks 0 to 1; removed: 0.0% of the blocks' parameters"
    assert asked in str(report)


@pytest.mark.parametrize("kv_heads", [2, 3])
def test_heads_that_do_not_divide_stay_whole_and_everything_says_so(kv_heads, tokens, tmp_path):
    """A quarter of two or three KV heads is less than one: the FFNs alone lose a quarter."""
    sizes = {"num_attention_heads": 2 * kv_heads, "num_key_value_heads": kv_heads, "hidden_size": 24 * kv_heads}
    model = tiny_model("llama", torch.float32, head_dim=12, **sizes)
    whole = count_parameters(model)["blocks"]
    gone = sum(20 * unit_parameters(module) for module in depth2_modules(model, kinds=["gated_ffn"]))
    with pytest.warns(
        UserWarning, match=rf"25% of {kv_heads} units is less than one: .*self_attn and 1 more lose noth"
    ):
        report = quiet(model, tokens, 0.25, unit="kv")
    assert report.removed["blocks"] == pytest.approx(gone / whole)
    assert gone / whole < 0.25
    share = f"{gone / whole:.1%}"
    left = (
        f"left in the modules that were pruned: {2 * kv_heads} of {2 * kv_heads} KV heads and 120 of 160 FFN channels"
    )
    assert f"removed: {share} of the blocks' parameters" in str(report)
    assert left in str(report)
    save_pruned(model, tmp_path / "pruned", report=report)
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert f"({share} removed)" in card
    assert f"| attention heads | {4 * kv_heads} of {4 * kv_heads} left |" in card
    assert f"| KV heads | {2 * kv_heads} of {2 * kv_heads} left |" in card
    assert "| FFN channels | 120 of 160 left |" in card
