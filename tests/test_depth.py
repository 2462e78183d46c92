"""How others spread a budget over depth, and plans from prices: against definitions and brute force."""

from itertools import pairwise, product

import pytest
import torch
from conftest import assert_untouched, calibration, quiet, state_of
from tiny import tiny_model

from greedy_helpers import count_parameters, depth2_modules
from greedy_helpers.allocation import (
    asked_parameters,
    cost_plan,
    cumulative_costs,
    module_parameters,
    removed_parameters,
    shape_plan,
    uniform_plan,
    unit_parameters,
)
from greedy_helpers.depth import block_influence, influence_shares, plan_of_shares, slope_shares
from greedy_helpers.prices import stream_energy


def hidden_states(model, tokens):
    """In front of every block and behind the last, before the final norm: read by hooks, in one pass."""
    found = []
    blocks = model.model.layers
    hooks = [block.register_forward_pre_hook(lambda m, args: found.append(args[0])) for block in blocks]
    last = lambda _module, _args, out: found.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
    hooks.append(blocks[-1].register_forward_hook(last))
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("batch_size", [1, 5])
def test_influence_and_energy_are_what_they_say(batch_size):
    model, tokens = tiny_model("llama-gqa"), calibration()
    before, states = state_of(model), hidden_states(tiny_model("llama-gqa"), calibration())
    cosines = [torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairwise(states)]
    assert block_influence(model, tokens, batch_size=batch_size) == pytest.approx([1 - c for c in cosines])
    found = stream_energy(model, tokens, batch_size=batch_size)
    behind_ffns = [behind.square().sum(-1).median().item() for behind in states[1:]]
    assert [found[f"model.layers.{index}.mlp"] for index in range(2)] == pytest.approx(behind_ffns, rel=1e-5)
    read = []  # what the norm behind attention reads is the stream there
    hook = model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: read.append(args[0])
    )
    model(input_ids=tokens)
    hook.remove()
    assert found["model.layers.1.self_attn"] == pytest.approx(read[0].square().sum(-1).median().item(), rel=1e-5)
    assert_untouched(model, before)


def test_influence_shares():
    influence = [0.5, 0.1, 0.2, 0.1]
    shares = influence_shares(influence, 0.25, 0.3)
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] < shares[2] < shares[1] == shares[3]
    assert shares[1] / shares[0] == pytest.approx(torch.tensor(0.4 / 0.3).exp().item())
    sharp = influence_shares(influence, 0.5, 1e-3)  # two blocks would have to lose all they have
    assert sharp[1] == sharp[3] == pytest.approx(0.8)
    assert sum(sharp) == pytest.approx(2.0)
    assert influence_shares(influence, 0.8, 0.1) == pytest.approx([0.8] * 4)
    assert influence_shares(influence, 0.0, 0.1) == [0.0] * 4
    with pytest.raises(ValueError, match=r"at most 0\.8, found 0\.9"):
        influence_shares(influence, 0.9, 0.1)
    with pytest.raises(ValueError, match="temperature above 0, found 0"):
        influence_shares(influence, 0.5, 0)


def test_slope_shares():
    shares = slope_shares(5, 0.3, 0.1)
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert slope_shares(1, 0.3, 9.0) == [0.3]
    with pytest.raises(ValueError, match=r"found -0\.100 and 0\.700 with a slope of 0\.2"):
        slope_shares(5, 0.3, 0.2)


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gpt2"])
def test_a_plan_of_shares_gives_every_block_its_share(name):
    modules = depth2_modules(tiny_model(name))
    plan = plan_of_shares(modules, [0.1, 0.4])
    for index, share in enumerate([0.1, 0.4]):
        block = [m for m in modules if m.block == index]
        missed = removed_parameters(block, plan) - share * sum(map(module_parameters, block))
        assert abs(missed) <= max(unit_parameters(m) for m in block if m.kind != "attention") / 2
    same = plan_of_shares(modules, [0.25, 0.25])
    assert same == uniform_plan(modules, asked_parameters(modules, 0.25))


# --- plans from prices


def made_up_costs(modules, seed=0):
    """Costs that rise ever faster in every module, each at its own rate."""
    generator = torch.Generator().manual_seed(seed)
    costs = {}
    for place, module in enumerate(modules):
        rises = torch.rand(module.n_units, generator=generator).double().sort().values
        costs[module.name] = 3.0**place * unit_parameters(module) * rises.cumsum(0)
    return costs


def cost_of(modules, costs, plan):
    return sum(cumulative_costs(m, costs)[m.n_units - plan[m.name]].item() for m in modules)


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gpt2"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_the_budget_is_met_to_half_a_channel(name, ratio):
    modules = depth2_modules(tiny_model(name))
    wanted = asked_parameters(modules, ratio)
    plan = cost_plan(modules, made_up_costs(modules), wanted)
    assert abs(removed_parameters(modules, plan) - wanted) <= min(map(unit_parameters, modules)) / 2


def test_heads_alone_go_to_the_nearest_number():
    modules = depth2_modules(tiny_model("llama"), kinds=["attention"])
    per_head, costs = unit_parameters(modules[0]), made_up_costs(modules)
    for heads, wanted in [(0, 0.4), (1, 0.6), (1, 1.4), (2, 1.6)]:
        plan = cost_plan(modules, costs, round(wanted * per_head))
        assert removed_parameters(modules, plan) == heads * per_head


@pytest.mark.parametrize("multiple", [8, 32])
def test_prices_with_multiples(multiple):
    """80 channels and 4 heads: among all plans on multiples none is cheaper that removes as much."""
    modules = depth2_modules(tiny_model("llama"))
    costs = made_up_costs(modules)
    numbers = [
        range(1, 5) if m.kind == "attention" else [80, *(n for n in range(4, 80) if n % multiple == 0)] for m in modules
    ]
    names = [m.name for m in modules]
    every = [dict(zip(names, kept, strict=True)) for kept in product(*numbers)]
    for ratio in (0.2, 0.4):
        wanted = asked_parameters(modules, ratio)
        plan = cost_plan(modules, costs, wanted, multiple=multiple)
        assert all(plan[m.name] % multiple == 0 or plan[m.name] == 80 for m in modules if m.kind != "attention")
        took = removed_parameters(modules, plan)
        slack = multiple * max(unit_parameters(m) for m in modules if m.kind != "attention")
        assert abs(took - wanted) <= slack
        beyond = took + max(map(unit_parameters, modules)) + slack
        found = [(removed_parameters(modules, p), cost_of(modules, costs, p)) for p in every]
        cheapest, dearer = (min(cost for gone, cost in found if gone >= least) for least in (took, beyond))
        assert cheapest * (1 - 1e-9) <= cost_of(modules, costs, plan) <= dearer
    with pytest.raises(ValueError, match="multiple of at least 1 channel, found 0"):
        cost_plan(modules, costs, 10, multiple=0)


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gpt2"])
def test_a_shape_is_the_cheapest_of_all_shapes(name):
    model = tiny_model(name)
    modules = depth2_modules(model)
    costs, attention = made_up_costs(modules), modules[0]
    for ratio in (0.1, 0.25, 0.5):
        wanted = asked_parameters(modules, ratio)
        plan = shape_plan(modules, costs, wanted)
        sizes = {(m.kind == "attention", plan[m.name]) for m in modules}
        assert len(sizes) == 2
        ffns = [m for m in modules if m.kind != "attention"]
        per_channel = sum(map(unit_parameters, ffns))
        assert abs(removed_parameters(modules, plan) - wanted) <= per_channel / 2
        shapes = [
            {m.name: heads if m.kind == "attention" else channels for m in modules}
            for heads in range(attention.n_sets, attention.n_units + 1, attention.n_sets)
            for channels in range(4, ffns[0].n_units + 1)
        ]
        near = [s for s in shapes if abs(removed_parameters(modules, s) - wanted) <= per_channel / 2]
        assert cost_of(modules, costs, plan) == pytest.approx(min(cost_of(modules, costs, s) for s in near))
    before = count_parameters(model)["total"]
    quiet(model, calibration(), plan=plan)
    assert before - count_parameters(model)["total"] == removed_parameters(modules, plan)


def test_shapes_that_are_not_possible_are_refused():
    model = tiny_model("llama")
    quiet(model, calibration(), plan={"model.layers.0.mlp": 40})
    modules = depth2_modules(model)
    with pytest.raises(ValueError, match="modules of one size, found 40 channels, 80 channels"):
        shape_plan(modules, made_up_costs(modules), 1000)
    modules = depth2_modules(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"at most [\d,]+ parameters, found 10,000,000"):
        shape_plan(modules, made_up_costs(modules), 10**7)
    kept = shape_plan(modules, made_up_costs(modules), asked_parameters(modules, 0.3), multiple=16)
    assert all(kept[m.name] % 16 == 0 for m in modules if m.kind != "attention")
