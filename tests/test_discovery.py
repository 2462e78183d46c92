"""Probing finds what the family table says, and what no table knows; what it returns is proven."""

import families_report as report
import pytest
import torch
import transformers
from conftest import assert_untouched, state_of
from families_report import assert_removing_equals_zeroing
from tiny import CONFIGS, randomize, tiny_model
from torch import nn
from transformers import AutoConfig, Phi3Config, Phi3ForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from greedy_helpers import FAMILIES, depth2_modules, discover, discovery
from greedy_helpers.discovery import coupling, find_units, tiny_twin
from greedy_helpers.structure import UnknownFamily, UnsupportedModule


@pytest.mark.parametrize("name", CONFIGS)
def test_discovery_agrees_with_the_table(name):
    assert report.discovery_agrees(name)


def test_experts_are_refused_even_if_the_family_is_unknown():
    class Other(transformers.MixtralConfig):
        model_type = "other"

    config = Other(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                   num_key_value_heads=1, num_local_experts=2)  # fmt: skip
    with pytest.raises(UnsupportedModule, match=r"experts.* is a stack of matrices"):
        discover(transformers.MixtralForCausalLM(config))


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
    assert_removing_equals_zeroing(model)


def test_a_layout_that_only_fits_the_size_of_the_twin_is_not_returned():
    """CodeGen stores its channels in four partitions: with four heads that looks like one head after another."""
    config = transformers.CodeGenConfig(vocab_size=96, n_embd=128, n_layer=2, n_head=16, n_inner=80, rotary_dim=4)
    model = transformers.CodeGenForCausalLM(config)
    family = discover(model)
    assert [layout.owner for layout in family.modules] == ["mlp"]
    assert family.whole["attn"].startswith("what fits 4 heads does not fit 8: ")
    on_four_heads = discover(model, tiny_twin(model, grouped=False))
    assert [layout.owner for layout in on_four_heads.modules] == ["attn", "mlp"]  # why one twin is not enough


def test_a_cut_that_fails_without_a_word_is_a_reason(monkeypatch):
    def fails(*_):
        raise AssertionError

    monkeypatch.setattr(discovery, "remove_units", fails)
    with pytest.raises(UnsupportedModule, match="does not equal zeroing them: AssertionError with eager"):
        discover(tiny_model("llama"))


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
        self.wide = nn.Linear(config.hidden_size, config.width)
        self.narrow = nn.Linear(config.width, config.hidden_size)

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
    assert_removing_equals_zeroing(model)


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
    assert [m.n_units for m in modules[:2]] == [32, 14336]
    assert [m.n_units for m in depth2_modules(model, [0], family=family, unit="kv")] == [8, 14336]
    assert len(modules) == 64
