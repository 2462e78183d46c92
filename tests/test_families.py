"""Every family: removing equals zeroing, caches agree, checkpoints reload, discovery finds what the table says."""

import copy
import dataclasses
import json
import logging

import families_report as report
import pytest
import torch
import transformers
from conftest import assert_untouched, state_of
from families_report import removed_and_zeroed, some_tokens
from tiny import CONFIGS, ENCODERS, randomize, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, Phi3Config, Phi3ForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from greedy_helpers import (
    FAMILIES,
    UnknownFamily,
    UnsupportedModule,
    coupling,
    depth2_modules,
    discover,
    export_plain,
    prune,
    remove_units,
    tiny_twin,
    undone_on_error,
    zero_units,
)
from greedy_helpers.discovery import find_units
from greedy_helpers.families import REFUSED
from greedy_helpers.structure import family_of, weight_of

RECORDED = json.loads(report.RESULTS.read_text())["families"]


@pytest.fixture(autouse=True)
def quiet():
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
@pytest.mark.parametrize("name", CONFIGS)
def test_removed_equals_zeroed(name, blocks):
    assert report.supported_attention(name) == RECORDED[name]["attention"]
    for attention in RECORDED[name]["attention"]:
        difference, effect = report.greatest_difference(name, attention, blocks)
        assert difference <= 1e-10
        assert effect > 1e-2, "the cut changed nothing, so equality proves nothing"


def test_bigcode_without_shared_keys():
    values = dict(CONFIGS["gpt_bigcode"][1]) | {"multi_query": False}
    torch.manual_seed(0)
    removed = transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**values))
    randomize(removed)
    removed = removed.double().eval()
    zeroed = copy.deepcopy(removed)
    for a, b in zip(depth2_modules(removed), depth2_modules(zeroed), strict=True):
        remove_units(a, torch.arange(a.n_units)[1::2])
        zero_units(b, torch.arange(b.n_units)[::2])
    with torch.no_grad():
        torch.testing.assert_close(removed(some_tokens()).logits, zeroed(some_tokens()).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ENCODERS])
def test_generation_with_cache_equals_recomputation(name):
    assert report.cache_equals_recomputation(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_module_itself_changes(name):
    model = tiny_model(name)
    before = dict(model.named_parameters())
    for module in depth2_modules(model, [1]):
        mine = [group.path for group in module.groups] + [f"{module.name}.{path}" for path in module.layout.lists]
        expected = {f"{path}.{part}" for path in mine for part in ("weight", "bias")} & before.keys()
        expected -= {f"{module.level2.path}.bias"}  # it belongs to the outputs
        remove_units(module, torch.arange(1, module.n_units))
        after = dict(model.named_parameters())
        changed = {key for key in before.keys() | after.keys() if after.get(key) is not before.get(key)}
        lists = tuple(f"{module.name}.{path}." for path in module.layout.lists)
        assert {key for key in changed if not key.startswith(lists)} == expected
        before = after


@pytest.mark.parametrize("name", CONFIGS)
def test_a_failure_in_the_middle_leaves_the_model_whole(name):
    model = tiny_model(name)
    with torch.no_grad():
        logits = model(input_ids=some_tokens())[0]
    before = state_of(model)

    def cut_then_fail():
        with undone_on_error(model):
            for module in depth2_modules(model):
                remove_units(module, torch.tensor([0]))
            raise MemoryError

    with pytest.raises(MemoryError):
        cut_then_fail()
    assert_untouched(model, before)
    assert not any("kept_heads" in key for key in model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(input_ids=some_tokens())[0], logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_cutting_twice_equals_cutting_once(name):
    """Also where the kept heads have to be remembered (alibi) or the config is read (Phi-3)."""
    twice, once = tiny_model(name), tiny_model(name)
    for module in depth2_modules(twice, [1]):
        remove_units(module, torch.arange(module.n_units)[module.n_units > 2 :])  # the first goes, if three are left
    for module in depth2_modules(twice, [1]):
        remove_units(module, torch.arange(module.n_units)[:-1])
    for module in depth2_modules(once, [1]):
        remove_units(module, torch.arange(module.n_units)[module.n_units > 2 : -1])
    with torch.no_grad():
        assert torch.equal(twice(input_ids=some_tokens())[0], once(input_ids=some_tokens())[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_works_like_the_original(name):
    removed, _ = removed_and_zeroed(name, None, [0, 1])
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(removed)(input_ids=some_tokens())[0], removed(input_ids=some_tokens())[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_reloads_with_the_same_logits(name, tmp_path):
    assert report.reloads(name, tmp_path / "pruned")


@pytest.mark.parametrize("name", CONFIGS)
def test_discovery_agrees_with_the_table(name):
    assert report.discovery_agrees(name)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi3", "falcon-7b", "bloom", "opt", "olmo2"])
def test_the_whole_method_runs(name):
    """Two-step reconstruction on each kind of layout: the pruned model is closer to the dense one than a cut alone."""
    tokens = some_tokens(12, 24)
    with torch.no_grad():
        dense = tiny_model(name)(input_ids=tokens)[0]
    errors = {}
    for refit in (None, "both"):
        model = tiny_model(name)
        if name == "olmo2":
            with pytest.warns(UserWarning, match="olmo2: self_attn stays whole: its q_norm"):
                prune(model, tokens, 0.5, refit=refit, progress=False)
        else:
            prune(model, tokens, 0.5, refit=refit, progress=False)
        with torch.no_grad():
            errors[refit] = (model(input_ids=tokens)[0] - dense).square().mean().item()
    assert 0 < errors["both"] < errors[None]


def test_attention_that_has_to_stay_whole_is_refused_with_the_reason():
    model = tiny_model("olmo2")
    before = state_of(model)
    with pytest.raises(UnsupportedModule, match=r"olmo2: attention has to stay whole .*q_norm and k_norm"):
        prune(model, some_tokens(), 0.5, kinds={"attention"}, progress=False)
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


def test_experts_are_refused_even_if_the_family_is_unknown():
    class Other(transformers.MixtralConfig):
        model_type = "other"

    config = Other(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                   num_key_value_heads=1, num_local_experts=2)  # fmt: skip
    with pytest.raises(UnsupportedModule, match=r"experts.* is a stack of matrices"):
        discover(transformers.MixtralForCausalLM(config))


WITH_PLAN = [name for name in CONFIGS if tiny_config(name).base_model_tp_plan]


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
    with torch.no_grad():
        difference = removed(some_tokens()).logits - zeroed(some_tokens()).logits
    assert difference.abs().max() > 0.1


# --- discovery from scratch


class MysteryConfig(Phi3Config):
    model_type = "mystery"


class MysteryForCausalLM(Phi3ForCausalLM):
    config_class = MysteryConfig


def test_a_renamed_family_is_discovered(monkeypatch):
    values = CONFIGS["phi3"][1]
    model = MysteryForCausalLM(MysteryConfig(**values)).double().eval()
    with pytest.raises(UnknownFamily, match="no layout for model type 'mystery'"):
        depth2_modules(model)
    monkeypatch.setitem(FAMILIES, "mystery", discover(model))
    twin = copy.deepcopy(model)
    for a, b in zip(depth2_modules(model), depth2_modules(twin), strict=True):
        remove_units(a, torch.arange(a.n_units)[1::2])
        zero_units(b, torch.arange(b.n_units)[::2])
    with torch.no_grad():
        torch.testing.assert_close(model(some_tokens()).logits, twin(some_tokens()).logits, rtol=0, atol=1e-10)


def test_a_layout_that_only_fits_the_size_of_the_twin_is_not_returned():
    """CodeGen stores its channels in four partitions: with four heads that looks like one head after another."""
    config = transformers.CodeGenConfig(vocab_size=96, n_embd=128, n_layer=2, n_head=16, n_inner=80, rotary_dim=4)
    model = transformers.CodeGenForCausalLM(config)
    family = discover(model)
    assert [layout.owner for layout in family.modules] == ["mlp"]
    assert family.whole["attn"].startswith("what fits 4 heads does not fit 8: ")
    on_four_heads = discover(model, tiny_twin(model, grouped=False))
    assert [layout.owner for layout in on_four_heads.modules] == ["attn", "mlp"]  # why one twin is not enough


class StrangeConfig(PreTrainedConfig):
    model_type = "strange"
    is_decoder = True

    def __init__(self, vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, width=80, **kwargs):
        self.vocab_size, self.hidden_size, self.width = vocab_size, hidden_size, width
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(**kwargs)


class StrangeMixer(nn.Module):
    """Value, query and key of all heads one after another in one projection; the head count is asked twice."""

    def __init__(self, config):
        super().__init__()
        self.n, self.size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.split = config.hidden_size
        self.vqk, self.out = nn.Linear(self.split, 3 * self.split), nn.Linear(self.split, config.hidden_size)

    def forward(self, x):
        v, q, k = self.vqk(x).split(self.split, dim=-1)
        v, q, k = (part.unflatten(-1, (self.n, self.size)).transpose(1, 2) for part in (v, q, k))
        scores = (q @ k.transpose(-1, -2) / self.size**0.5).masked_fill(
            torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), float("-inf")
        )
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class StrangeBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.mix = StrangeMixer(config)
        self.wide, self.narrow = (
            nn.Linear(config.hidden_size, config.width),
            nn.Linear(config.width, config.hidden_size),
        )

    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.narrow(self.wide(self.n2(x)).relu().square())


class StrangeForCausalLM(PreTrainedModel):
    config_class = StrangeConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stages = nn.ModuleList(StrangeBlock(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, **kwargs):
        x = self.words(input_ids)
        for stage in self.stages:
            x = stage(x)
        return CausalLMOutput(logits=self.head(x))


def test_a_model_nobody_has_seen_is_discovered_from_scratch(monkeypatch):
    torch.manual_seed(0)
    model = StrangeForCausalLM(StrangeConfig())
    randomize(model)
    model = model.double().eval()
    family = discover(model)
    attention, ffn = family.modules
    assert family.blocks == "stages"
    assert (attention.owner, attention.level1, attention.level2) == (
        "mix", {"vqk": "kv dim | kv dim | kv dim"}, {"out": "kv dim"}
    )  # fmt: skip
    assert attention.attributes == {"n": "kv", "split": "kv dim"}
    assert (ffn.owner, ffn.level1, ffn.level2) == ("", {"wide": "unit"}, {"narrow": "unit"})
    monkeypatch.setitem(FAMILIES, "strange", family)
    zeroed = copy.deepcopy(model)
    for a, b in zip(depth2_modules(model), depth2_modules(zeroed), strict=True):
        remove_units(a, torch.arange(a.n_units)[1::2])
        zero_units(b, torch.arange(b.n_units)[::2])
    with torch.no_grad():
        torch.testing.assert_close(model(some_tokens()).logits, zeroed(some_tokens()).logits, rtol=0, atol=1e-10)


def test_coupling_of_one_ffn_is_the_identity_pattern():
    model = tiny_model("opt")  # ReLU: dead channels must not look unconnected
    coupled = coupling(model)["model.decoder.layers.1.fc2"]
    assert list(coupled) == ["model.decoder.layers.1.fc1"]
    assert torch.equal(coupled["model.decoder.layers.1.fc1"], torch.eye(80, dtype=torch.bool))


def test_coupling_names_the_residual_stream():
    coupled = coupling(tiny_model("llama"))
    assert "model.layers.0.self_attn.q_proj" not in coupled  # reads the embeddings
    reads = coupled["model.layers.1.mlp.up_proj"]
    assert set(reads) == {
        "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"
    }  # fmt: skip
    assert all(rows.all() for rows in reads.values())
    assert find_units(reads) is None


def test_coupling_leaves_the_model_as_it_was():
    model = tiny_model("gpt2").train()
    before = state_of(model)
    coupling(model)
    assert_untouched(model, before)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"at least 4 token ids, found shape \[2\]"):
        coupling(model, torch.tensor([1, 2]))


def test_discovery_does_not_depend_on_the_size_of_the_model():
    """Wide and deep on the meta device: no weights are read, only their shapes."""
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, vocab_size=128_256,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    family = discover(model)
    modules = depth2_modules(model, family=family)
    assert [m.n_units for m in modules[:2]] == [8, 14336]
    assert len(modules) == 64


# --- plain export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    words = {name: report.export(name, folder) for name in CONFIGS}
    return words, report.load_plainly(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_export(name, exported):
    words, loaded = exported
    assert words[name] == RECORDED[name]["export"]
    if words[name] == "no":
        assert name not in loaded
    else:
        assert loaded[name][1] <= 1e-5


def llama_with_six_of_eight_heads(**values):
    """LLaMA-7B's 32 -> 24 heads at width 4,096 in small: 64 is no multiple of 6."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=8,
        initializer_range=0.2, max_position_embeddings=64, **values,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for module in depth2_modules(model):
        remove_units(module, torch.arange(module.n_units * 3 // 4))
    return model


def test_llama_with_a_head_count_its_config_refuses_becomes_mistral(tmp_path):
    scaled = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    variants = {"llama-1": {}, "llama-3-1": {"num_key_value_heads": 4, "rope_parameters": scaled}}
    for name, values in variants.items():
        model = llama_with_six_of_eight_heads(**values)
        export_plain(model, tmp_path / name)
        with torch.no_grad():
            torch.save(model(some_tokens()).logits, tmp_path / f"{name}.logits")
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
    with pytest.raises(ValueError, match=r"layers\.0\.mlp .*same number of units, found \[40, 80\]; use"):
        export_plain(model, tmp_path / "model")
    model = tiny_model("gpt2")
    for module in depth2_modules(model, kinds={"attention"}):
        remove_units(module, torch.arange(2))
    with pytest.raises(UnsupportedModule, match=r"a plain gpt2 config cannot say that .*attn has 2 of 4 units"):
        export_plain(model, tmp_path / "model")
    model = tiny_model("llama-gqa")  # biases: no Mistral has them; 48 is a multiple of 2, so Llama itself takes it
    for module in depth2_modules(model):
        remove_units(module, torch.arange(module.n_units // 2))
    export_plain(model, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_group_channels_and_weights_agree():
    for name in CONFIGS:
        for module in depth2_modules(tiny_model(name), [0]):
            for group in module.groups:
                owned = group.index.flatten()
                assert len(owned.unique()) == len(owned) <= group.n_channels
                assert group.n_channels == weight_of(group.linear).shape[0 if group.side == "out" else 1]
