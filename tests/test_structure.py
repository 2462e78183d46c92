"""Layouts turn into channel tables; the tables fit the models."""

import pytest
import torch
from tiny import tiny_model
from transformers import XLMConfig, XLMModel

from greedy_helpers import depth2_modules, set_weight
from greedy_helpers.layouts import channel_index
from greedy_helpers.structure import UnknownFamily, eval_mode


def test_channel_index_by_hand():
    assert channel_index("unit", 3).tolist() == [[0], [1], [2]]
    assert channel_index("kv dim", 6, dim=2).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert channel_index("kv group dim", 8, group=2, dim=2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert channel_index("kv 3 dim", 6, dim=1).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert channel_index("kv group+2 dim", 8, group=2, dim=1).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert channel_index("head dim | dim | dim", 8, dim=2).tolist() == [[0, 1], [2, 3]]  # 4..7 belong to nobody
    fused = channel_index("kv dim | kv dim | kv dim", 12, dim=2).tolist()
    assert fused == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


@pytest.mark.parametrize("n_channels", [0, 7])
def test_channels_that_do_not_factor(n_channels):
    with pytest.raises(ValueError, match=f"q_proj: expected a positive multiple of 4 channels .* found {n_channels}"):
        channel_index("kv group dim", n_channels, "q_proj", group=2, dim=2)


@pytest.mark.parametrize("unit", ["query", "kv"])
def test_modules_of_each_family(unit, model):
    modules = depth2_modules(model, unit=unit)
    assert [module.block for module in modules] == [0, 0, 1, 1]
    grouped = getattr(model.config, "num_key_value_heads", 4) == 2
    heads = 2 if grouped and unit == "kv" else 4
    assert [module.n_units for module in modules] == [heads, 80, heads, 80]
    assert [module.n_sets for module in modules[:2]] == [2 if grouped and unit == "query" else 1, 1]
    words = {"query": "query head", "kv": "KV head"}[unit] if grouped else "head"
    assert [module.unit for module in modules[:2]] == [words, "channel"]
    for module in modules:
        for key, group in module.level1.items():  # every channel belongs to exactly one unit
            shared = words == "query head" and key in ("k_proj", "v_proj")
            owned = torch.arange(0 if shared else group.n_channels)
            assert torch.equal(torch.sort(group.index.flatten()).values, owned)
            assert model.get_submodule(group.path) is group.linear
        assert torch.equal(torch.sort(module.level2.index.flatten()).values, torch.arange(module.level2.n_channels))


def test_query_heads_by_hand():
    assert channel_index("kv group dim", 8, finer=True, group=2, dim=2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    fused = channel_index("kv group dim | kv dim | kv dim", 8, finer=True, group=2, dim=1).tolist()
    assert fused == [[0], [1], [2], [3]]  # 4..7 are the keys and values of two KV heads
    falcon = channel_index("kv group+2 dim", 10, finer=True, group=3, dim=1).tolist()
    assert falcon == [[0], [1], [2], [5], [6], [7]]
    assert channel_index("kv dim", 4, finer=True, group=3, dim=2).shape == (6, 0)


def test_a_unit_for_some_modules_only():
    model = tiny_model("mistral")
    second = "model.layers.1.self_attn"
    found = depth2_modules(model, kinds=["attention"], unit={second: "kv"})
    assert [(module.unit, module.n_units) for module in found] == [("query head", 6), ("KV head", 2)]
    assert [module.unit for module in depth2_modules(model, [1], unit={second: "kv"})] == ["KV head", "channel"]


@pytest.mark.parametrize("unit", ["head", None, ["kv"], {"model.layers.0.self_attn": "KV head"}])
def test_a_unit_that_does_not_exist(unit):
    with pytest.raises(ValueError, match=r"expected as unit of grouped-query attention .*'query', 'kv'.*found"):
        depth2_modules(tiny_model("mistral"), unit=unit)


def test_a_unit_for_a_module_that_does_not_exist():
    with pytest.raises(KeyError, match=r"no module 'model\.layers\.2\.self_attn'; it has model\.layers\.0\.mlp"):
        depth2_modules(tiny_model("mistral"), [0], unit={"model.layers.2.self_attn": "kv"})


def test_some_blocks_only():
    model = tiny_model("llama")
    assert {module.block for module in depth2_modules(model, [1])} == {1}
    with pytest.raises(IndexError, match=r"expected blocks in \[0, 2\), found 2"):
        depth2_modules(model, [2])


def test_eval_mode_puts_every_model_back():
    models = [torch.nn.Dropout().train(), torch.nn.Dropout().eval()]

    def interrupted():
        with eval_mode(*models):
            assert [model.training for model in models] == [False, False]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [model.training for model in models] == [True, False]


def test_unknown_family_is_refused_by_name():
    config = XLMConfig(emb_dim=16, n_layers=1, n_heads=2, n_words=9)
    with pytest.raises(UnknownFamily, match=r"'xlm'; known: bert, .*FAMILIES\['xlm'\] = .*discover.*families\.py"):
        depth2_modules(XLMModel(config))


def test_set_weight_checks_before_it_changes():
    linear = torch.nn.Linear(3, 2, bias=False)
    before = linear.weight
    with pytest.raises(ValueError, match="no bias"):
        set_weight(linear, torch.zeros(2, 3), torch.zeros(2))
    assert linear.weight is before
    linear = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"expected a bias of shape \[4\], found \[2\]"):
        set_weight(linear, torch.zeros(4, 3))
    assert linear.out_features == 2
