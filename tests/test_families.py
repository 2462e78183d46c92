"""Every family: removing equals zeroing, caches agree, checkpoints reload, plain exports load."""

import contextlib
import copy
import dataclasses
import json
import logging

import families_report as report
import pytest
import torch
import transformers
from conftest import assert_untouched, quiet, state_of
from families_report import assert_removing_equals_zeroing, logits_of, removed_and_zeroed, some_tokens
from tiny import CONFIGS, ENCODERS, randomize, tiny_config, tiny_model, unit_sets

from greedy_helpers import FAMILIES, depth2_modules, discover, export_plain, remove_units, zero_units
from greedy_helpers.families import REFUSED
from greedy_helpers.structure import UnsupportedModule, family_of, weight_of
from greedy_helpers.surgery import undone_on_error

EACH = [(name, unit) for name in CONFIGS for unit in report.units_of(name)]
GROUPED = [name for name, unit in EACH if unit == "kv"]
WITH_PLAN = [name for name in CONFIGS if tiny_config(name).base_model_tp_plan]
RECORDED = json.loads(report.RESULTS.read_text())["families"]


@pytest.fixture(autouse=True)
def no_warnings_of_transformers():
    transformers.logging.set_verbosity(logging.ERROR)


def test_the_readme_shows_the_recorded_table():
    assert list(RECORDED) == list(CONFIGS)
    assert report.render(json.loads(report.RESULTS.read_text())) in (report.ROOT / "README.md").read_text()


def test_every_entry_of_the_table_is_tested():
    """Every entry of the table has a tiny model, and every tiny model uses the entry it is meant for."""
    used = {id(family_of(tiny_model(name))) for name in CONFIGS}
    untested = {key for key, family in FAMILIES.items() if id(family) not in used}
    assert untested <= {"gpt_bigcode"}  # its variant without shared keys has its own test below


@pytest.mark.parametrize("blocks", [[0], [1], [0, 1]])
@pytest.mark.parametrize(("name", "unit"), EACH)
def test_removed_equals_zeroed(name, unit, blocks):
    assert report.supported_attention(name) == RECORDED[name]["attention"]
    for attention in RECORDED[name]["attention"]:
        difference, effect = report.greatest_difference(name, attention, blocks, unit)
        assert difference <= 1e-10
        assert effect > 1e-2, "the cut changed nothing, so equality proves nothing"
    removed, zeroed = removed_and_zeroed(name, None, blocks, unit)
    assert removed.num_parameters() < zeroed.num_parameters()


def test_bigcode_without_shared_keys():
    values = dict(CONFIGS["gpt_bigcode"][1]) | {"multi_query": False}
    torch.manual_seed(0)
    model = transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**values))
    randomize(model)
    assert_removing_equals_zeroing(model.double().eval())


@pytest.mark.parametrize(("name", "unit"), [(name, unit) for name, unit in EACH if name not in ENCODERS])
def test_generation_with_cache_equals_recomputation(name, unit):
    assert report.cache_equals_recomputation(name, unit)


@pytest.mark.parametrize(("name", "unit"), EACH)
def test_only_the_module_itself_changes(name, unit):
    model = tiny_model(name)
    before = dict(model.named_parameters())
    for module in depth2_modules(model, [1], unit=unit):
        mine = [group.path for group in module.groups if group.index.numel()]  # not keys and values of query heads
        mine += [f"{module.name}.{path}" for path in module.layout.lists]
        expected = {f"{path}.{part}" for path in mine for part in ("weight", "bias")} & before.keys()
        expected -= {f"{module.level2.path}.bias"}  # it belongs to the outputs
        remove_units(module, unit_sets(module)[:, 1:].flatten())
        after = dict(model.named_parameters())
        changed = {key for key in before.keys() | after.keys() if after.get(key) is not before.get(key)}
        lists = tuple(f"{module.name}.{path}." for path in module.layout.lists)
        assert {key for key in changed if not key.startswith(lists)} == expected
        before = after


@pytest.mark.parametrize(("name", "unit"), EACH)
def test_an_interruption_in_the_middle_leaves_the_model_whole(name, unit):
    model = tiny_model(name)
    logits, before = logits_of(model), state_of(model)

    def cut_then_stop():
        with undone_on_error(model):
            for module in depth2_modules(model, unit=unit):
                remove_units(module, unit_sets(module)[:, 0])
            assert {module.n_units for module in depth2_modules(model, unit=unit)} <= {1, 2}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_then_stop()
    assert_untouched(model, before)
    assert not any("kept_heads" in key for key in model.state_dict())
    assert torch.equal(logits_of(model), logits)


@pytest.mark.parametrize(("name", "unit"), EACH)
def test_cutting_twice_equals_cutting_once(name, unit):
    """Also where the kept heads have to be remembered (alibi) or the config is read (Phi-3)."""
    twice, once = tiny_model(name), tiny_model(name)

    def cut(model, first, last):
        """Every set loses its first and its last, if it has three."""
        for module in depth2_modules(model, [1], unit=unit):
            sets = torch.arange(module.n_units).view(module.n_sets, -1)
            remove_units(module, sets[:, first and sets.shape[1] > 2 : sets.shape[1] - last].flatten())

    cut(twice, first=True, last=False)
    cut(twice, first=False, last=True)
    cut(once, first=True, last=True)
    assert torch.equal(logits_of(twice), logits_of(once))


@pytest.mark.parametrize(("name", "unit"), EACH)
def test_a_copy_works_like_the_original(name, unit):
    removed, _ = removed_and_zeroed(name, None, [0, 1], unit)
    assert torch.equal(logits_of(copy.deepcopy(removed)), logits_of(removed))


@pytest.mark.parametrize(("name", "unit"), EACH)
def test_reloads_with_the_same_logits(name, unit, tmp_path):
    assert report.reloads(name, unit, tmp_path / "pruned")


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi3", "falcon-7b", "bloom", "opt", "olmo2"])
def test_the_whole_method_runs(name):
    """Two-step reconstruction on each kind of layout: the pruned model is closer to the dense one than a cut alone."""
    tokens = some_tokens(12, 24)
    with torch.no_grad():
        dense = tiny_model(name)(input_ids=tokens)[0]
    errors = {}
    for remedy in ("none", "both"):
        model, warning = tiny_model(name), contextlib.nullcontext()
        if name == "olmo2":
            warning = pytest.warns(UserWarning, match="olmo2: self_attn stays whole: its q_norm")
        with warning:
            quiet(model, tokens, 0.5, remedy=remedy)
        with torch.no_grad():
            errors[remedy] = (model(input_ids=tokens)[0] - dense).square().mean().item()
    assert 0 < errors["both"] < errors["none"]


def test_attention_that_has_to_stay_whole_is_refused_with_the_reason():
    model = tiny_model("olmo2")
    before = state_of(model)
    with pytest.raises(UnsupportedModule, match=r"olmo2: attention has to stay whole .*q_norm and k_norm"):
        quiet(model, some_tokens(), 0.5, kinds={"attention"})
    with pytest.raises(ValueError, match="expected kinds among"):
        depth2_modules(model, kinds={"mlp"})
    assert_untouched(model, before)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_families_name_the_reason(model_type):
    model = tiny_model("llama")
    model.config.model_type = model_type
    for ask in (depth2_modules, discover):
        with pytest.raises(UnsupportedModule, match=f"'{model_type}' is not supported: .{{20,}}"):
            ask(model)


@pytest.mark.parametrize("name", WITH_PLAN)
def test_agrees_with_the_plan_that_transformers_ships(name):
    """base_model_tp_plan shards level 1 by columns and level 2 by rows: an independent list of the same layers."""
    family = family_of(tiny_model(name))
    mine = {
        f"{family.blocks}.*.{layout.owner}.{linear}": way
        for layout in family.modules
        for linears, way in ((layout.level1, "colwise"), (layout.level2, "rowwise"))
        for linear in linears
    }
    theirs = {
        path: way.partition("_")[0]
        for path, way in tiny_config(name).base_model_tp_plan.items()
        if way.startswith(("colwise", "rowwise")) and not any(f".*.{whole}." in path for whole in family.whole)
    }
    assert mine == theirs


def test_most_families_have_such_a_plan():
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "olmo2"} <= set(WITH_PLAN)


def test_opt_with_a_stale_head_count_is_silently_wrong():
    """Why a cut has to be proven by its outputs: nothing raises, and the logits are those of another model."""
    removed, zeroed = tiny_model("opt", attention="sdpa"), tiny_model("opt", attention="sdpa")
    module = depth2_modules(removed)[0]
    stale = dataclasses.replace(module, layout=dataclasses.replace(module.layout, attributes={}))
    remove_units(stale, torch.tensor([0, 2]))
    zero_units(depth2_modules(zeroed)[0], torch.tensor([1, 3]))
    assert (logits_of(removed) - logits_of(zeroed)).abs().max() > 0.1


# --- plain export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    words = {(name, unit): report.export(name, unit, folder) for name, unit in EACH}
    return words, report.load_plainly(folder)


@pytest.mark.parametrize(("name", "unit"), EACH)
def test_plain_export(name, unit, exported):
    words, loaded = exported
    assert words[name, unit] == RECORDED[name]["export"]
    if words[name, unit] == "no":
        assert f"{name}+{unit}" not in loaded
    else:
        assert loaded[f"{name}+{unit}"][1] <= 1e-5


def llama_with_six_of_eight_heads(unit="query", **values):
    """LLaMA-7B's 32 -> 24 heads at width 4,096 in small: 64 is no multiple of 6."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=8,
        initializer_range=0.2, max_position_embeddings=64, **values,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for module in depth2_modules(model, unit=unit):
        sets = unit_sets(module)
        remove_units(module, sets[:, : sets.shape[1] * 3 // 4].flatten())
    return model


def test_llama_with_a_head_count_its_config_refuses_becomes_mistral(tmp_path):
    scaled = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    variants = {
        "llama-1": {},
        "llama-3-1": {"num_key_value_heads": 2, "rope_parameters": scaled},
        "llama-3-1-kv": {"num_key_value_heads": 4, "rope_parameters": scaled, "unit": "kv"},
    }
    for name, values in variants.items():
        model = llama_with_six_of_eight_heads(**values)
        export_plain(model, tmp_path / name)
        torch.save(logits_of(model), tmp_path / f"{name}.logits")
    loaded = report.load_plainly(tmp_path)
    assert set(loaded) == set(variants)
    for cls, difference in loaded.values():
        assert cls == "MistralForCausalLM"
        assert difference <= 1e-6


def test_llama_with_biases_and_a_head_count_that_no_config_takes(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)no plain config takes .*use save_pruned.*multiple.*Mistral.*do not fit"):
        export_plain(llama_with_six_of_eight_heads(attention_bias=True), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_a_plain_config_cannot_say_is_refused(tmp_path):
    model = tiny_model("llama")
    remove_units(depth2_modules(model)[1], torch.arange(40))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp .*same number of units, found 40, 80; use"):
        export_plain(model, tmp_path / "model")
    model = tiny_model("gpt2")
    for module in depth2_modules(model, kinds={"attention"}):
        remove_units(module, torch.arange(2))
    with pytest.raises(UnsupportedModule, match=r"a plain gpt2 config cannot say that .*attn has 2 of 4 units"):
        export_plain(model, tmp_path / "model")
    model = tiny_model("llama-gqa")  # biases: no Mistral has them; 48 is a multiple of 2, so Llama itself takes it
    for module in depth2_modules(model, unit="kv"):
        remove_units(module, torch.arange(module.n_units // 2))
    export_plain(model, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_group_channels_and_weights_agree():
    for name, unit in EACH:
        for module in depth2_modules(tiny_model(name), [0], unit=unit):
            for group in module.groups:
                owned = group.index.flatten()
                assert len(owned.unique()) == len(owned) <= group.n_channels
                assert group.n_channels == weight_of(group.linear).shape[0 if group.side == "out" else 1]
