"""Query heads of grouped-query attention: the same number of every KV head goes, chosen KV head by KV head."""

import copy
import json
import re
from functools import partial

import pytest
import torch
from conftest import assert_same_model, assert_same_report, assert_untouched, calibration, quiet, state_of
from families_report import assert_removing_equals_zeroing, logits_of, some_tokens, units_of
from tiny import CONFIGS, tiny_model, unit_sets
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from greedy_helpers import (
    cost_plan,
    depth2_modules,
    discover,
    exact_greedy,
    export_plain,
    keep_best,
    load_model,
    load_pruned,
    output_energy,
    remove_units,
    save_pruned,
    scores_of,
    second_moment,
    taylor_scores,
    uniform_plan,
    zero_units,
)
from greedy_helpers.allocation import adaptive_plan, check_plan, removed_parameters, unit_parameters
from greedy_helpers.criteria import second_moment_identity, value_rows
from greedy_helpers.greedy import eliminate
from greedy_helpers.similarity import divergences_of, redundant_first, redundant_heads

GROUPED = [name for name in CONFIGS if len(units_of(name)) > 1]
NINE_OF_THREE = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
PLAN = {f"model.layers.{block}.{name}": n for block in (0, 1) for name, n in (("self_attn", 4), ("mlp", 60))}


def counts(model):
    """(KV heads, query heads) of every attention module."""
    attention = depth2_modules(model, kinds={"attention"}, unit="kv")
    return [(module.n_units, module.n_units * module.group) for module in attention]


# --- surgery


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", NINE_OF_THREE),
        ("llama", {"num_key_value_heads": 1}),  # as Gemma-2B: one set, and the KV head stays
        ("falcon-40b", {"alibi": True}),
        ("falcon-40b", {"num_kv_heads": 1, "alibi": True}),
        ("phi3", {"num_key_value_heads": 1}),
    ],
)
def test_removed_equals_zeroed(name, sizes, attention):
    model = tiny_model(name, attention=attention, **sizes)
    assert depth2_modules(model)[0].unit == "query head"
    before = counts(model)
    assert_removing_equals_zeroing(model)
    for (kv, query), (kv_before, query_before) in zip(counts(model), before, strict=True):
        assert kv == kv_before
        assert kv <= query < query_before


@pytest.mark.parametrize("order", [("query", "kv"), ("kv", "query")])
@pytest.mark.parametrize("name", GROUPED)
def test_both_units_in_turn(name, order):
    """6 query heads on 2 KV heads lose a KV head and two thirds or one third of the query heads, in either order."""
    removed, zeroed = tiny_model(name), tiny_model(name)
    per_kv = depth2_modules(zeroed, [0], unit="kv")[0].group
    stays = {"kv": [1], "query": [head for head in range(per_kv) if head != 1]}
    for unit in order:
        for module in depth2_modules(removed, kinds={"attention"}, unit=unit):
            sets = torch.arange(module.n_units).view(module.n_sets, -1)
            remove_units(module, sets[:, stays[unit]].flatten())
    for module in depth2_modules(zeroed, kinds={"attention"}):
        heads = torch.arange(module.n_units)
        zero_units(module, heads[(heads // per_kv != 1) | (heads % per_kv == 1)])
    torch.testing.assert_close(logits_of(removed), logits_of(zeroed), rtol=0, atol=1e-10)
    assert counts(removed) == [(1, per_kv - 1)] * 2


@pytest.mark.parametrize("name", GROUPED)
def test_down_to_one_query_head_per_kv_head(name):
    """Then each has its own, and a head goes with its key and value whatever `unit` says."""
    removed, zeroed = tiny_model(name), tiny_model(name)
    n_heads = [module.n_units for module in depth2_modules(zeroed, kinds={"attention"})]
    for module in depth2_modules(removed, kinds={"attention"}):
        remove_units(module, unit_sets(module)[:, 0])
    assert counts(removed) == [(2, 2), (2, 2)]
    for unit in ("query", "kv"):
        found = depth2_modules(removed, kinds={"attention"}, unit=unit)
        assert [(m.unit, m.n_sets, m.n_units) for m in found] == [("head", 1, 2)] * 2
    for module in found:
        remove_units(module, torch.tensor([1]))
    for module, n in zip(depth2_modules(zeroed, kinds={"attention"}), n_heads, strict=True):
        stays = int(unit_sets(module)[1, 0])  # the only one left of the second KV head
        zero_units(module, torch.tensor([head for head in range(n) if head != stays]))
    torch.testing.assert_close(logits_of(removed), logits_of(zeroed), rtol=0, atol=1e-10)


@pytest.mark.parametrize("keep", [[0, 1, 2], [0, 1, 3, 4, 5], [2, 3, 4]])
def test_unequal_numbers_are_refused_and_nothing_changes(keep):
    model = tiny_model("mistral")
    before = state_of(model)
    found = [sum(unit < 3 for unit in keep), sum(unit >= 3 for unit in keep)]
    message = f"self_attn: expected to keep the same number of query heads of every KV head, found {found}"
    with pytest.raises(ValueError, match=re.escape(message)):
        remove_units(depth2_modules(model)[0], torch.tensor(keep))
    assert_untouched(model, before)


def test_keys_and_values_stay_the_very_same():
    model = tiny_model("mistral")
    (module, *_) = depth2_modules(model)
    before = module.owner.k_proj.weight, module.owner.v_proj.weight
    remove_units(module, unit_sets(module)[:, :1].flatten())
    assert module.owner.k_proj.weight is before[0]
    assert module.owner.v_proj.weight is before[1]
    assert module.owner.num_key_value_groups == 1


# --- pruning


@pytest.mark.parametrize("criterion", [second_moment, output_energy, exact_greedy])
def test_pruning_without_a_remedy_is_zeroing_the_lowest_of_every_kv_head(criterion):
    model, tokens = tiny_model("mistral"), some_tokens(6, 24)
    twin = copy.deepcopy(model)
    report = quiet(model, tokens, plan=PLAN, criterion=criterion)
    for module, step in zip(depth2_modules(twin), report.steps, strict=True):
        sets = step.scores.view(module.n_sets, -1)
        assert (step.unit, step.units_before, step.units_after) == (module.unit, module.n_units, PLAN[module.name])
        kept = torch.zeros(module.n_units, dtype=torch.bool)
        kept[step.keep] = True
        for scores, stays in zip(sets, kept.view_as(sets), strict=True):
            assert stays.sum() == PLAN[module.name] // module.n_sets
            assert scores[stays].min() >= scores[~stays].max()
        zero_units(module, (~kept).nonzero().flatten())
    torch.testing.assert_close(logits_of(model), logits_of(twin), rtol=0, atol=1e-10)
    assert counts(model) == [(2, 4), (2, 4)]
    assert "8 of 12 query heads and 120 of 160 FFN channels" in str(report)


def test_each_module_its_own_unit():
    model = tiny_model("mistral")
    plan = {"model.layers.0.self_attn": 4, "model.layers.1.self_attn": 1}
    report = quiet(model, calibration(), plan=plan, unit={"model.layers.1.self_attn": "kv"}, remedy="both, residual")
    assert counts(model) == [(2, 4), (1, 3)]
    assert [step.unit for step in report.steps if step.kind == "attention"] == ["query head", "KV head"]
    assert "4 of 6 query heads" in str(report)
    assert "1 of 2 KV heads" in str(report)


@pytest.mark.parametrize("unit", ["query", "kv", {"model.layers.1.self_attn": "kv"}])
def test_a_killed_run_goes_on_with_its_units(unit, tmp_path):
    """The first block comes from the work folder; another unit is refused there."""
    plan = PLAN | {f"model.layers.{block}.self_attn": 1 for block in (0, 1) if unit == "kv"}
    plan |= {"model.layers.1.self_attn": 1} if isinstance(unit, dict) else {}
    how = {"plan": plan, "unit": unit, "remedy": "both, residual", "criterion": exact_greedy}
    whole = tiny_model("mistral", torch.float32)
    expected = quiet(whole, calibration(), **how)

    def killed(module, seen):
        if module.block == 1:
            raise KeyboardInterrupt
        return exact_greedy(module, seen)

    killed.__name__ = "exact greedy"
    model = tiny_model("mistral", torch.float32)
    with pytest.raises(KeyboardInterrupt):
        quiet(model, calibration(), **how | {"criterion": killed}, work_dir=tmp_path)
    assert len(list(tmp_path.glob("block-*.safetensors"))) == 1
    assert_same_report(quiet(model, calibration(), **how, work_dir=tmp_path), expected)
    assert_same_model(model, whole)
    other = how | {"unit": "kv" if unit == "query" else "query", "plan": None, "ratio": 0.5}
    with pytest.raises(ValueError, match=r"run with other settings: .*unit was"):
        quiet(tiny_model("mistral", torch.float32), calibration(), **other, work_dir=tmp_path)


# --- checkpoints


@pytest.mark.parametrize("unit", ["query", "kv"])
@pytest.mark.parametrize("lazy", [False, True])
def test_saved_and_loaded(unit, lazy, tmp_path):
    dense = tiny_model("mistral", torch.float32)
    left = {"query": (2, 4), "kv": (1, 3)}[unit]
    plan = PLAN | {f"model.layers.{block}.self_attn": left[unit == "query"] for block in (0, 1)}
    save_pruned(dense, tmp_path / "dense")
    whole, _ = load_model(tmp_path / "dense", "cpu")
    quiet(whole, calibration(), plan=plan, unit=unit, remedy="both")
    model, _ = load_model(tmp_path / "dense", "cpu", lazy=lazy)
    quiet(model, calibration(), plan=plan, unit=unit, remedy="both", work_dir=tmp_path / "work")
    config = json.loads((save_pruned(model, tmp_path / "pruned") / "config.json").read_text())
    both = dict(zip(("kv", "query"), left, strict=True))
    assert config["pruned_units"]["model.layers.0.self_attn"] == both
    assert config["pruned_units"]["model.layers.0.mlp"] == 60
    manifest = json.loads((tmp_path / "pruned" / "pruned.json").read_text())
    assert manifest["units"]["model.layers.1.self_attn"] == {"dense": {"kv": 2, "query": 6}, "left": both}
    again, _ = load_pruned(tmp_path / "pruned", "cpu")
    assert counts(again) == [left] * 2
    assert torch.equal(logits_of(again), logits_of(whole))
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert f"| attention heads | {2 * left[1]} of 12 left |" in card
    assert f"| KV heads | {2 * left[0]} of 4 left |" in card


def test_checkpoints_of_before_say_kv_heads(tmp_path):
    """A number alone, as version 0.2 wrote it, is of KV heads with all their query heads."""
    model = tiny_model("mistral", torch.float32)
    for module in depth2_modules(model, kinds={"attention"}, unit="kv"):
        remove_units(module, torch.tensor([1]))
    file = save_pruned(model, tmp_path / "pruned") / "config.json"
    config = json.loads(file.read_text())
    config["pruned_units"] = {name: left["kv"] for name, left in config["pruned_units"].items()}
    file.write_text(json.dumps(config))
    assert torch.equal(logits_of(load_pruned(tmp_path / "pruned", "cpu", verify=False)[0]), logits_of(model))


@pytest.mark.parametrize("name", ["falcon-40b", "bloom"])
def test_attention_that_a_plan_leaves_whole_saves_and_loads(name, tmp_path):
    """Nothing has to be remembered of heads that are all there."""
    model = tiny_model(name, torch.float32)
    attention, ffn = depth2_modules(model, [0])
    quiet(model, calibration(), plan={attention.name: attention.n_units, ffn.name: 60})
    assert torch.equal(logits_of(load_pruned(save_pruned(model, tmp_path / "pruned"), "cpu")[0]), logits_of(model))


@pytest.mark.parametrize(("units", "left"), [(["query"], (3, 6)), (["kv"], (2, 6)), (["query", "kv"], (2, 4))])
def test_plain_export(units, left, tmp_path):
    model = tiny_model("llama", torch.float32, **NINE_OF_THREE)
    for unit in units:
        for module in depth2_modules(model, kinds={"attention"}, unit=unit):
            remove_units(module, unit_sets(module)[:, 1:].flatten())
    assert counts(model) == [left] * 2
    export_plain(model, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert (plain.config.num_key_value_heads, plain.config.num_attention_heads) == left
    torch.testing.assert_close(logits_of(plain), logits_of(model), rtol=1e-6, atol=1e-6)


def test_plain_export_of_different_numbers_is_refused(tmp_path):
    model = tiny_model("llama", torch.float32, **NINE_OF_THREE)
    first = depth2_modules(model, [0])[0]
    remove_units(first, unit_sets(first)[:, 1:].flatten())
    message = r"same number of units, found 3 \(with 6 query heads\), 3 \(with 9 query heads\); use"
    with pytest.raises(ValueError, match=message):
        export_plain(model, tmp_path / "plain")


# --- scores


@pytest.mark.parametrize("name", GROUPED)
def test_values_of_query_heads_are_those_of_their_kv_head(name):
    query, kv = (depth2_modules(tiny_model(name), [0], unit=unit)[0] for unit in ("query", "kv"))
    rows = value_rows(query)
    assert len(rows) == query.n_units
    for head, values in enumerate(rows):
        assert torch.equal(values, value_rows(kv)[head // kv.group])


def test_identity_by_hand():
    (module, *_) = depth2_modules(tiny_model("mistral"))
    v, o = module.owner.v_proj.weight, module.owner.o_proj.weight  # [2 * 16, 48], [48, 6 * 16]
    expected = [
        sum(v[head // 3 * 16 + j].square().sum() * o[:, head * 16 + j].square().sum() for j in range(16)).item()
        for head in range(6)
    ]
    assert second_moment_identity(module).tolist() == pytest.approx(expected)


def test_taylor_by_hand():
    """Rows of queries and columns of outputs, nothing of keys and values."""
    model, tokens = tiny_model("mistral"), calibration(1, 12)
    scores = taylor_scores(model, tokens)
    loss = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])
    for module in depth2_modules(model, kinds={"attention"}):
        q, o = (module.owner.get_submodule(name).weight for name in ("q_proj", "o_proj"))
        g_q, g_o = torch.autograd.grad(loss, [q, o], retain_graph=True)
        per_head = (q * g_q).abs().view(6, -1).sum(1) + (o * g_o).abs().view(-1, 6, 16).sum((0, 2))
        torch.testing.assert_close(scores[module.name], per_head.detach(), rtol=1e-5, atol=0)
    by_kv = taylor_scores(model, tokens, unit="kv")
    assert [len(by_kv[name]) for name in by_kv] == [2, 80, 2, 80]


def test_scores_of_kv_heads_add_up_those_of_their_query_heads():
    """Output energy is a sum over heads; its KV heads also count how their query heads go together."""
    model, tokens = tiny_model("mistral"), calibration()
    for criterion in (second_moment, second_moment_identity):
        query, kv = (scores_of(model, tokens, criterion, unit=unit) for unit in ("query", "kv"))
        for module in depth2_modules(model, kinds={"attention"}):
            torch.testing.assert_close(query[module.name].view(2, 3).sum(1), kv[module.name])


def test_redundant_query_heads_go_first_in_their_kv_head():
    model, tokens = tiny_model("mistral", attention="eager"), calibration(4)
    divergences = divergences_of(model, tokens)
    name = "model.layers.0.self_attn"
    tau = divergences[name][~torch.eye(6, dtype=torch.bool)].median().item()
    redundant = redundant_heads(divergences[name], tau)
    assert 0 < len(redundant) < 6

    def loud(module, seen):  # by itself it would keep just the redundant ones
        return torch.isin(torch.arange(module.n_units), torch.tensor(redundant)).double()

    report = quiet(model, tokens, plan={name: 4}, criterion=partial(redundant_first, criterion=loud, tau=tau))
    step = report.steps[0]
    gone = set(range(6)) - set(step.keep.tolist())
    for heads in ({0, 1, 2}, {3, 4, 5}):
        assert len(gone & heads) == 1
        assert not heads & set(redundant) or gone & heads <= set(redundant)


# --- plans


@pytest.mark.parametrize("make", [uniform_plan, adaptive_plan, cost_plan])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("sizes", [NINE_OF_THREE, {"num_attention_heads": 8, "num_key_value_heads": 2}])
def test_plans_keep_the_same_number_of_every_kv_head(make, ratio, sizes):
    """Within one step of the budget, a step being one query head of every KV head, or a channel."""
    model = tiny_model("llama", **sizes)
    modules = depth2_modules(model)
    wanted = round(ratio * sum(m.n_units * unit_parameters(m) for m in modules))
    scores = {}
    if make is not uniform_plan:
        rising = {"criterion": lambda m, s: exact_greedy(m, s, whole_path=True)} if make is cost_plan else {}
        scores = {"scores": scores_of(model, calibration(), **rising)}
    plan = make(modules, **scores, n_parameters=wanted)
    steps = [unit_parameters(module) * module.n_sets for module in modules]
    slack = sum(steps) if make is uniform_plan else max(steps)
    assert abs(removed_parameters(modules, plan) - wanted) < slack
    for module in modules:
        assert plan[module.name] % module.n_sets == 0
        assert module.n_sets <= plan[module.name] <= module.n_units
    check_plan(model, plan)
    quiet(model, calibration(), plan=plan)
    assert {m.name: m.n_units for m in depth2_modules(model)} == plan


def test_a_round_costs_what_its_query_heads_cost_together():
    """Prices of 1 + 2, 30 + 40 and then the rest, against FFN channels that cost 9 per head's parameters."""
    modules = depth2_modules(tiny_model("llama", **NINE_OF_THREE | {"num_key_value_heads": 3}), [0])
    attention, ffn = modules
    rises = torch.tensor([1.0, 1, 1, 30, 30, 30, 1000, 1000, 1000])
    per_head = unit_parameters(attention)
    scores = {
        attention.name: rises.cumsum(0),
        ffn.name: (torch.full((80,), 9.0) * unit_parameters(ffn) / per_head).cumsum(0),
    }
    first = cost_plan(modules, scores, 3 * per_head)
    assert first == {attention.name: 6, ffn.name: 80}
    beyond = cost_plan(modules, scores, 3 * per_head + 10 * unit_parameters(ffn))
    assert beyond == {attention.name: 6, ffn.name: 70}


def test_numbers_that_are_no_multiples_are_refused():
    model = tiny_model("mistral")
    before, name = state_of(model), "model.layers.0.self_attn"
    for wrong in (1, 3, 7, 4.0):
        with pytest.raises(ValueError, match=rf"{name}: expected to keep 2 to 6 query heads, a multiple of 2, found"):
            quiet(model, calibration(), plan={name: wrong})
    check_plan(model, {name: 1}, unit="kv")
    with pytest.raises(ValueError, match=r"expected as unit of grouped-query attention .*, found 'head'"):
        quiet(model, calibration(), 0.5, unit="head")
    with pytest.raises(KeyError, match=r"unit: the model has no module 'model\.layers\.0\.attn'"):
        quiet(model, calibration(), 0.5, unit={"model.layers.0.attn": "kv"})
    with pytest.raises(ValueError, match="between 1 and 6 units, a multiple of 2, found 3"):
        keep_best(torch.ones(6), 3, 2)
    assert_untouched(model, before)
    h = torch.eye(6).double()
    with pytest.raises(ValueError, match="between 1 and 6 units in 2 equal sets, found 3"):
        eliminate(h, h, torch.arange(6)[:, None], 3, n_sets=2)


def test_the_best_of_every_set():
    scores = torch.tensor([9.0, 8, 7, 1, 3, 2])
    assert keep_best(scores, 4, 2).tolist() == [0, 1, 4, 5]
    assert keep_best(scores, 2, 2).tolist() == [0, 4]
    assert keep_best(torch.zeros(6), 4, 2).tolist() == [0, 1, 3, 4]  # equal scores: the earlier stays


# --- discovery


class _Turned(torch.nn.Linear):
    """An output projection that reads the query heads of each KV head in reverse."""

    def forward(self, x):
        per_kv = self.attention[0].num_key_value_groups
        heads = x.unflatten(-1, (-1, per_kv, self.attention[0].head_dim)).flip(-2)
        return super().forward(heads.flatten(-3))


def test_discovery_refuses_query_heads_that_are_dealt_out_wrongly(monkeypatch):
    """KV heads with all their query heads could go; one query head takes the outputs of another with it."""
    init = modeling_llama.LlamaAttention.__init__

    def turned(self, config, layer_idx):
        init(self, config, layer_idx)
        self.o_proj = _Turned(*reversed(self.o_proj.weight.shape), bias=False)
        self.o_proj.attention = [self]  # in a list, or it would be its own submodule

    monkeypatch.setattr(modeling_llama.LlamaAttention, "__init__", turned)
    model = tiny_model("llama", **NINE_OF_THREE)
    assert_removing_equals_zeroing(copy.deepcopy(model), unit="kv")
    with pytest.raises(AssertionError, match="not close"):
        assert_removing_equals_zeroing(model)
    found = discover(tiny_model("llama", **NINE_OF_THREE))
    assert [layout.kind for layout in found.modules] == ["gated_ffn"]
    assert found.whole["self_attn"].startswith("removing units does not equal zeroing them")


@pytest.mark.parametrize("per_kv", [2, 3, 4, 5, 7])
def test_discovery_proves_any_number_of_query_heads_per_kv_head(per_kv):
    sizes = {"num_attention_heads": 3 * per_kv, "num_key_value_heads": 3, "hidden_size": 6 * per_kv, "head_dim": 12}
    twin = tiny_model("llama", **sizes)
    found = discover(twin, twin=twin)
    assert [layout.kind for layout in found.modules] == ["attention", "gated_ffn"]
