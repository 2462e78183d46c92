"""The search over trades: its judge against a really pruned model, its refits against `prune`, its promises."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, calibration, state_of
from tiny import tiny_model

import greedy_helpers as gh
from greedy_helpers.allocation import asked_parameters, removed_parameters, uniform_plan, unit_parameters
from greedy_helpers.search import Judge, Nested, offers, trade

NAMES = ["llama", "llama-gqa", "gpt2"]


def divergence(dense, pruned, tokens):
    with torch.no_grad():
        p, q = (m(input_ids=tokens).logits.log_softmax(-1) for m in (dense, pruned))
    return F.kl_div(q, p, log_target=True, reduction="sum").item() / tokens.numel()


def plan_of(modules, attention=0.5, ffn=0.5):
    share = {"attention": attention}
    return {m.name: max(1, int(share.get(m.kind, ffn) * m.n_units / m.n_sets)) * m.n_sets for m in modules}


@pytest.mark.parametrize("name", NAMES)
def test_the_judged_model_is_the_pruned_one(name):
    """The same weights cut out by surgery, a pass over the whole model in the place of the judge's."""
    model, tokens = tiny_model(name), calibration(7, seed=1)
    modules = gh.depth2_modules(model)
    plan, nested, judge = plan_of(modules), Nested(model, calibration(), modules), Judge(model, tokens, batch_size=3)
    dense = copy.deepcopy(model)
    assert judge.divergence()[0] == pytest.approx(0, abs=1e-6)
    nested.put(modules, plan)
    found, _ = judge.divergence()
    for module in gh.depth2_modules(model):
        gone = gh.weight_of(module.level2.linear).abs().sum(0)[module.level2.index].sum(1) == 0
        assert int((~gone).sum()) == plan[module.name]
        gh.remove_units(module, (~gone).nonzero().flatten())
    assert gh.count_parameters(dense)["total"] - gh.count_parameters(model)["total"] == removed_parameters(
        modules, plan
    )
    assert found > 0.01
    assert found == pytest.approx(divergence(dense, model, tokens), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_refit_is_that_of_prune(name, place):
    """Where one module alone is cut its inputs are dense, so the nested solution is what `prune` makes."""
    model, tokens = tiny_model(name), calibration(7, seed=1)
    module, dense = gh.depth2_modules(model)[place], copy.deepcopy(model)
    nested = Nested(model, calibration(), [module], precision=torch.float64)
    for n_keep in (module.n_sets, module.n_units // 2):
        plan, pruned = {module.name: n_keep}, copy.deepcopy(dense)
        gh.prune(pruned, calibration(), recipe=gh.OSSCAR, plan=plan, progress=False)
        nested.put([module], plan)
        with torch.no_grad():
            ours, theirs = (m(input_ids=tokens).logits for m in (model, pruned))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_in_front_of_a_change_need_not_run_again(name):
    model, tokens = tiny_model(name), calibration(7, seed=1)
    modules = gh.depth2_modules(model)
    nested, judge = Nested(model, calibration(), modules), Judge(model, tokens, batch_size=3)
    nested.put(modules, plan_of(modules))
    _, behind = judge.divergence()
    nested.put(modules[2:], plan_of(modules, 0.5, 0.2))
    assert judge.divergence(behind, 1)[0] == pytest.approx(judge.divergence()[0], rel=1e-6)
    ran, hook = [], gh.blocks_of(model)[0].self_attn if name != "gpt2" else gh.blocks_of(model)[0].attn
    handle = hook.register_forward_hook(lambda *_: ran.append(1))
    judge.divergence(behind, 1)
    handle.remove()
    assert not ran


# --- the search


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_bad_plan_is_improved_within_its_budget(name):
    """One FFN pays for all: a tenth of it is left, all else is whole."""
    model = tiny_model(name).train()
    modules, before = gh.depth2_modules(model), state_of(model)
    bad = {m.name: m.n_units for m in modules} | {modules[1].name: 8}
    found = trade(model, bad, calibration(), calibration(8, seed=1), trades=12)
    assert_untouched(model, before)
    assert model.training
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    assert found.kept
    assert found.after < 0.7 * found.before
    wanted, smallest = removed_parameters(modules, bad), min(map(unit_parameters, modules))
    plans = [bad, *(one.plan for one in found.history)]
    assert len({tuple(plan.values()) for plan in plans}) == 13
    for plan in plans:
        assert abs(removed_parameters(modules, plan) - wanted) <= smallest / 2
        assert all(plan[m.name] % m.n_sets == 0 and m.n_sets <= plan[m.name] <= m.n_units for m in modules)
    assert any(one.plan[m.name] < m.n_units for m in modules if m.kind == "attention" for one in found.history)
    pruned = [copy.deepcopy(model.eval()) for _ in range(2)]
    for one, plan in zip(pruned, (bad, found.plan), strict=True):
        gh.prune(one, calibration(), recipe=gh.OSSCAR, plan=plan, progress=False)
    worse, better = (divergence(model, one, calibration(8, seed=2)) for one in pruned)
    assert better < 0.8 * worse


def test_the_budget_does_not_drift():
    """A hundred trades in a row. A KV head is 23.7 channels, and no number of them a round of query heads."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8, "attention_bias": False}
    model, draw, pairs = tiny_model("llama-gqa", **sizes), random.Random(0), set()
    modules = gh.depth2_modules(model, unit={"model.layers.0.self_attn": "kv"})
    plan, smallest = plan_of(modules), min(map(unit_parameters, modules))
    wanted = removed_parameters(modules, plan)
    for step in [3 * smallest, 20 * smallest] * 50:
        found = list(offers(modules, plan, wanted, step))
        for _, _, other in found:
            assert abs(removed_parameters(modules, other) - wanted) <= smallest / 2
        giver, taker, plan = draw.choice(found)
        pairs.add((giver, taker))
    names = {m.name for m in modules}
    assert pairs == {(a, b) for a in names for b in names if a != b and "mlp" in a + b}


def test_what_is_reported_is_what_the_windows_say():
    model, tokens = tiny_model("llama-gqa"), calibration(8, seed=1)
    modules, dense = gh.depth2_modules(model), tiny_model("llama-gqa")
    plan = plan_of(modules)
    found = trade(model, plan, calibration(), tokens, trades=8, precision=torch.float64)
    nested = Nested(model, calibration(), modules, precision=torch.float64)
    assert len(found.history) == 8
    for candidate, half, reported in [
        (plan, tokens[4:], found.before),
        (found.plan, tokens[4:], found.after),
        *((one.plan, tokens[:4], one.divergence) for one in found.history),
    ]:
        nested.put(modules, candidate)
        assert reported == pytest.approx(divergence(dense, model, half), rel=1e-5)
    nested.put(modules, now := plan)
    lowest = divergence(dense, model, tokens[:4])
    for one in found.history:
        assert sum(one.plan[name] != now[name] for name in now) == 2
        assert one.plan[one.giver] < now[one.giver]
        assert one.plan[one.taker] > now[one.taker]
        assert one.accepted == (one.divergence < lowest)
        if one.accepted:
            now, lowest = one.plan, one.divergence
    assert any(one.accepted for one in found.history)
    assert not all(one.accepted for one in found.history)
    assert now == found.plan


def test_the_other_half_decides():
    """What drives is one window of four tokens; what decides is another, which the plan at hand was made for."""
    model, tokens = tiny_model("llama"), torch.cat([calibration(1, 4, seed=0), calibration(1, 4, seed=100)])
    modules = gh.depth2_modules(model)
    plan = uniform_plan(modules, asked_parameters(modules, 0.4))
    own = trade(model, plan, calibration(), tokens[[1, 1]], trades=60)
    assert own.kept
    found = trade(model, own.plan, calibration(), tokens, trades=20)
    assert any(one.accepted for one in found.history)
    assert not found.kept
    assert found.after > found.before == pytest.approx(own.after, rel=1e-5)
    assert found.plan == own.plan


def test_only_named_modules_trade_and_a_seed_gives_the_same_search():
    model = tiny_model("llama-gqa")
    plan = {m.name: m.n_units // 2 for m in gh.depth2_modules(model)[1:]}
    runs = [trade(model, plan, calibration(), calibration(4, seed=1), trades=6, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert all(run.plan.keys() == plan.keys() for run in runs)
    names = {name for run in runs for one in run.history for name in (one.giver, one.taker)}
    assert names == plan.keys()


def test_steps_are_halved():
    model = tiny_model("llama")
    ffns = gh.depth2_modules(model, kinds=["gated_ffn"])
    plan = {m.name: 40 for m in ffns}
    found = trade(model, plan, calibration(), calibration(4, seed=1), trades=8, rounds=4, share=0.2)
    sizes, now = [], plan
    for one in found.history:
        sizes.append(one.plan[one.taker] - now[one.taker])
        now = one.plan if one.accepted else now
    assert sizes == sorted(sizes, reverse=True)
    assert {16, 8, 4, 2} >= set(sizes)
    assert len(set(sizes)) > 2


def test_what_it_cannot_do_is_said(model, tokens, tmp_path):
    modules = gh.depth2_modules(model)
    plan = plan_of(modules)
    before = state_of(model)
    for arguments, options, error, text in [
        ((plan | {"nowhere": 1}, calibration(), tokens), {}, KeyError, "the model has no module 'nowhere'"),
        (
            (plan | {modules[1].name: 0}, calibration(), tokens),
            {},
            ValueError,
            "expected to keep 1 to 80 units, found 0",
        ),
        (({modules[1].name: 40}, calibration(), tokens), {}, ValueError, "at least 2 modules and 2 .*found 1 and 6"),
        ((plan, calibration(), tokens[:1]), {}, ValueError, "2 validation windows, found 4 and 1"),
        ((plan, calibration(), tokens + 96), {}, ValueError, r"token ids in \[0, 96\)"),
        ((plan, calibration() + 96, tokens), {}, ValueError, r"token ids in \[0, 96\)"),
        ((plan, calibration(), tokens), {"trades": -1}, ValueError, "trades >= 0, rounds >= 1 .* found -1, 4 and 0.1"),
        ((plan, calibration(), tokens), {"share": 0}, ValueError, r"a share in \(0, 1\), found 40, 4 and 0"),
        ((plan, calibration(), tokens), {"damp": -1}, ValueError, "expected damp >= 0, found -1"),
        ((plan, calibration(), tokens), {"damp": "held out"}, ValueError, "windows that are held out"),
    ]:
        with pytest.raises(error, match=text):
            trade(model, *arguments, **options)
        assert_untouched(model, before)
    with pytest.raises(ValueError, match=r"causal language model in memory, found .* without a head"):
        trade(model.base_model, {m.name: m.n_sets for m in gh.depth2_modules(model.base_model)}, tokens, tokens)
    gh.save_pruned(model, tmp_path / "saved")
    lazy, _ = gh.load_model(tmp_path / "saved", lazy=True)
    with pytest.raises(ValueError, match="causal language model in memory, found its blocks on the disk"):
        trade(lazy, plan, calibration(), tokens)


def test_an_interrupted_search_leaves_the_model_as_it_was(model, tokens, monkeypatch):
    before, calls, own = state_of(model), [], Nested.put

    def put(self, modules, plan):
        own(self, modules, plan)
        calls.append(plan)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Nested, "put", put)
    with pytest.raises(KeyboardInterrupt):
        trade(model, plan_of(gh.depth2_modules(model)), calibration(), tokens)
    assert_untouched(model, before)
