"""Plans remove the parameters they promise; what they remove is what count_parameters misses afterwards."""

import re
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
    asked_parameters,
    check_plan,
    middle_blocks,
    module_parameters,
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


def half_a_channel_each(modules):
    return sum(unit_parameters(m) for m in modules if m.kind != "attention") / 2


@pytest.mark.filterwarnings("ignore:the number of units nearest to")
@pytest.mark.parametrize("unit", ["query", "kv"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_ratio_means_what_it_says(name, unit):
    """Of all numbers of heads the nearest to the share; the same number of channels everywhere; together the ratio."""
    modules = depth2_modules(tiny_model(name), unit=unit)
    whole = sum(map(module_parameters, modules))
    for ratio in (0.0, 0.05, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.6):
        plan = uniform_plan(modules, asked_parameters(modules, ratio))
        assert abs(removed_parameters(modules, plan) - ratio * whole) <= half_a_channel_each(modules) + 0.5
        assert len({plan[m.name] for m in modules if m.kind != "attention"}) == 1
        for m in (m for m in modules if m.kind == "attention"):
            share = ratio * module_parameters(m)
            errors = {n: abs(n * unit_parameters(m) - share) for n in range(0, m.n_units, m.n_sets)}
            assert errors[m.n_units - plan[m.name]] <= min(errors.values()) + 0.5


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "glm", "olmo2"])
def test_the_base_is_what_the_linears_hold(name):
    """Shared keys and values and every bias, but no norm."""
    for module in depth2_modules(tiny_model(name)):
        held = sum(p.numel() for path, p in module.owner.named_parameters() if "norm" not in path)
        assert module_parameters(module) == held


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gpt2"])
def test_too_high_a_ratio_says_the_most_that_can_go(name, tokens):
    model = tiny_model(name)
    grouped, before = name == "llama-gqa", count_parameters(model)
    message = r"at most ([\d.]+)% of the modules' parameters .* found 95\.0% .* keeps 1 of its channels, attention one"
    with pytest.raises(ValueError, match=message) as caught:
        quiet(model, tokens, 0.95)
    assert ('unit="kv" allows more' in str(caught.value)) == grouped
    assert count_parameters(model) == before
    most = float(re.search(message, str(caught.value)).group(1)) / 100
    with pytest.raises(ValueError, match=f"at most {100 * most:.1f}%"):
        quiet(model, tokens, most + 0.01, unit="query")
    if grouped:
        quiet(tiny_model(name), tokens, most + 0.01, unit="kv")
    report = quiet(model, tokens, most)
    assert report.removed["modules"] == pytest.approx(most, abs=0.005)
    assert [step.units_after for step in report.steps] == [2 if grouped else 1, 1] * 2


def test_kv_heads_do_not_always_allow_more():
    """Eight query heads of a KV head weigh more than one of each of two and the second KV head."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 4}
    model = tiny_model("llama", torch.float32, **sizes)
    most = {}
    for unit in ("query", "kv"):
        modules = depth2_modules(model, unit=unit)
        with pytest.raises(ValueError, match=r"at most [\d.]+%") as caught:
            uniform_plan(modules, asked_parameters(modules, 0.99))
        most[unit] = float(re.search(r"at most ([\d.]+)%", str(caught.value)).group(1))
        assert "allows more" not in str(caught.value)
    assert most["query"] > most["kv"]


def test_heads_alone_go_to_the_nearest_number_and_the_report_says_so(tokens):
    report = quiet(tiny_model("llama"), tokens, 0.3, kinds=["attention"])
    assert [step.units_after for step in report.steps] == [3, 3]  # 1.2 of 4
    assert report.removed["modules"] == 0.25
    said = str(report)
    assert "asked: 30% of the parameters of 2 modules in blocks 0 to 1, to the nearest whole heads, as no FFN" in said
    assert "removed: 25.00% of their parameters, " in said
    with pytest.raises(ValueError, match=r"at most 75\.0% .* found 95\.0%"):
        quiet(tiny_model("llama"), tokens, 0.95, kinds=["attention"])


@pytest.mark.parametrize("of", ["blocks", "all"])
@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gpt2"])
@pytest.mark.parametrize("make", ["uniform", "adaptive"])
def test_a_plan_meets_its_budget(name, of, make, tokens):
    model = tiny_model(name)
    modules, wanted = depth2_modules(model), budget(model, 0.2, of)
    plan = (
        uniform_plan(modules, wanted) if make == "uniform" else adaptive_plan(modules, scores_of(model, tokens), wanted)
    )
    before, of_modules = count_parameters(model), sum(map(module_parameters, modules))
    report = quiet(model, tokens, plan=plan)
    removed = before["total"] - count_parameters(model)["total"]
    if make == "adaptive":
        assert abs(removed - wanted) <= min(map(unit_parameters, modules)) / 2
    else:
        assert abs(removed - wanted) <= half_a_channel_each(modules)
    assert {m.name: m.n_units for m in depth2_modules(model)} == plan
    sizes = {"modules": [of_modules, of_modules - removed]}
    assert report.parameters == sizes | {key: [before[key], count_parameters(model)[key]] for key in before}
    assert report.ratio is None


@pytest.mark.parametrize("multiple", [2, 8, 16, 32])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_widths_on_multiples(name, multiple, tokens):
    """FFN channels (80 here) in steps, heads as before; half a step per FFN is the most that is missed."""
    model = tiny_model(name)
    modules = depth2_modules(model)
    for ratio in (0.0, 0.2, 0.35, 0.5):
        wanted = budget(model, ratio)
        plan = uniform_plan(modules, wanted, multiple=multiple)
        widths = [plan[m.name] for m in modules if m.kind != "attention"]
        assert all(width == 80 or width % multiple == 0 for width in widths)
        assert min(widths) >= multiple
        assert abs(removed_parameters(modules, plan) - wanted) <= multiple * half_a_channel_each(modules)
        if ratio == 0:
            assert plan == {m.name: m.n_units for m in modules}
    before = count_parameters(model)["total"]
    quiet(model, tokens, plan=plan)
    removed = before - count_parameters(model)["total"]
    assert removed == removed_parameters(modules, plan)


def test_a_multiple_is_never_rounded_to_nothing():
    """The nearest multiple, all of them, or the last multiple that is left."""
    modules = depth2_modules(tiny_model("llama"), kinds=["gated_ffn"])
    unit = unit_parameters(modules[0])
    numbers = (0, 9, 16, 31, 32, 33, 48, 64)  # 8 and 32 are as near to one as to the other: more stay
    found = [uniform_plan(modules, 2 * unit * n, multiple=32)[modules[0].name] for n in numbers]
    assert found == [80, 64, 64, 64, 64, 32, 32, 32]  # 80 of 80, or 64, or 32
    with pytest.warns(
        UserWarning, match=r"nearest to 10% .* none: model\.layers\.0\.mlp, with 80 channels, and 1 more"
    ):
        assert uniform_plan(modules, 2 * unit * 8, multiple=32) == {m.name: 80 for m in modules}
    with pytest.raises(ValueError, match=r"at most 60\.0% .* found 81\.2% .* an FFN keeps 32 of its channels"):
        uniform_plan(modules, 2 * 65 * unit, multiple=32)  # more than half a step beyond the 48 that can go
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
    """A multiple of 128 leaves 80 channels whole, and the heads do not pay for it."""
    modules = depth2_modules(tiny_model("llama"))
    wanted = asked_parameters(modules, 0.25)
    with pytest.warns(
        UserWarning, match=r"nearest to 25% .* is none: model\.layers\.0\.mlp, with 80 channels, and 1 mo"
    ):
        plan = uniform_plan(modules, wanted, multiple=128)
    assert [plan[m.name] for m in modules] == [3, 80, 3, 80]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for multiple in (1, 8, 16):
            uniform_plan(modules, wanted, multiple=multiple)
        uniform_plan(modules, 0, multiple=128)


def test_a_ratio_that_removes_nothing_is_said(tokens):
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match=r"1% of their units is less than one: .*attn, with 4 heads, and 3 more lose"):
        report = quiet(model, tokens, 0.01, allocation="floor")
    assert report.removed == {"modules": 0.0, "blocks": 0.0, "total": 0.0}
    asked = "asked: 1% of the units of each of 4 modules in blocks 0 to 1, rounded down; removed: 0.00% of their"
    assert asked in str(report)


@pytest.mark.parametrize("kv_heads", [2, 3])
def test_heads_that_do_not_divide_and_everything_says_so(kv_heads, tokens, tmp_path):
    """A quarter of two or three KV heads, 0.5 or 0.75: rounded down it is none; of three the nearest number is one.

    What the heads do not lose, or lose more than their share, the FFNs' channels make up for.
    """
    sizes = {"num_attention_heads": 2 * kv_heads, "num_key_value_heads": kv_heads, "hidden_size": 24 * kv_heads}

    def pruned(allocation):
        model = tiny_model("llama", torch.float32, head_dim=12, **sizes)
        with pytest.warns(UserWarning, match=r"self_attn, with \d KV heads, and 1 more lose noth"):
            return model, quiet(model, tokens, 0.25, allocation=allocation, unit="kv")

    _, report = pruned("floor")
    assert [step.units_after for step in report.steps] == [kv_heads, 60] * 2
    assert report.removed["modules"] < 0.25
    if kv_heads == 3:
        model = tiny_model("llama", torch.float32, head_dim=12, **sizes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = quiet(model, tokens, 0.25, unit="kv")
    else:
        model, report = pruned("uniform")
    # d = 24 kv: a KV head with its two query heads has 6 d 12 parameters, a channel 3 d, so a head is 24 channels
    channels = round(0.25 * (80 + 24 * kv_heads)) - 24 * (kv_heads == 3)
    heads = kv_heads - (kv_heads == 3)
    assert [step.units_after for step in report.steps] == [heads, 80 - channels] * 2
    assert report.removed["modules"] == pytest.approx(0.25, abs=0.5 / (80 + 24 * kv_heads))
    share = f"{report.removed['blocks']:.2%}"
    assert f"removed: 25.00% of their parameters, {share} of the blocks' parameters" in str(report)
    save_pruned(model, tmp_path / "pruned", report=report)
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert f"({share} removed)" in card
    assert "| asked for | 25% of the parameters of 4 modules in blocks 0 to 1 |" in card
    assert "| removed from these modules | 25.00% of their parameters |" in card
    assert f"| KV heads | {2 * heads} of {2 * kv_heads} left |" in card
    assert f"| FFN channels | {160 - 2 * channels} of 160 left |" in card
