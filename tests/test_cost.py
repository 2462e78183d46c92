"""Costs are counted from the shapes, and agree with what torch counts and what the system measures."""

from functools import partial

import pandas as pd
import pytest
import torch
from tiny import CONFIGS, ENCODERS, VOCABULARY, tiny_model, unit_sets
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from greedy_helpers import blocks_of, count_parameters, depth2_modules, remove_units, save_pruned
from greedy_helpers.course import cost
from greedy_helpers.course.cost import compare_latency, cost_table, count_macs, latency_table, peak_memory
from greedy_helpers.data_free import forward_cached
from greedy_helpers.files import disk_bytes
from greedy_helpers.structure import blocks_path, linears_of


def pruned_unevenly(model, unit="query"):
    """Another number of units out of every module."""
    for place, module in enumerate(depth2_modules(model, unit=unit)):
        sets = unit_sets(module)
        remove_units(module, sets[:, : max(1, sets.shape[1] - 1 - 5 * place)].flatten())
    return model


def macs_by_torch(model, tokens, cache=None):
    """What torch's dispatcher sees, sorted by the module that asked for it. Two FLOPs are one multiply-accumulate."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if cache is None:
            model(input_ids=tokens)
        else:
            forward_cached(model, tokens, cache)
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    prefix, path = type(model).__name__, blocks_path(model)
    in_blocks = sum(counts[f"{prefix}.{path}.{i}"] for i in range(len(blocks_of(model))))
    linears = linears_of(model)
    inside = sum(counts[f"{prefix}.{name}"] for name in linears if name.startswith(f"{path}."))
    outside = sum(counts[f"{prefix}.{name}"] for name in linears if not name.startswith(f"{path}."))
    # the rest of the whole is outer products for rotary angles
    return {"linears": inside, "attention": in_blocks - inside, "head": outside, "total": in_blocks + outside}


@pytest.mark.parametrize(
    "shrink", [lambda model: model, pruned_unevenly, partial(pruned_unevenly, unit="kv")], ids=["dense", "pruned", "kv"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_macs_are_what_torch_counts_on_eager_attention(name, shrink):
    model = shrink(tiny_model(name, torch.float32, attention="eager"))
    tokens = torch.randint(0, VOCABULARY, (3, 20))
    assert count_macs(model, 20, 3) == macs_by_torch(model, tokens)
    if name in ENCODERS:
        return
    with torch.no_grad():
        _, cache = forward_cached(model, tokens)
    # mistral, gemma2 and gemma3 slide over 8 tokens: their blocks have dropped most of the 20
    assert count_macs(model, 5, 3, cache=20) == macs_by_torch(model, tokens[:, :5], cache)


def test_macs_by_hand():
    model = tiny_model("llama-gqa")
    block = 48 * 48 + 2 * 48 * 24 + 48 * 48 + 3 * 48 * 80
    assert count_macs(model, 7, 2) == {
        "linears": 14 * 2 * block,
        "attention": 2 * (2 * 2 * 4 * 12 * 7 * 7),
        "head": 14 * 48 * VOCABULARY,
        "total": 14 * 2 * block + 2 * (2 * 2 * 4 * 12 * 7 * 7) + 14 * 48 * VOCABULARY,
    }
    assert count_macs(model, 7, 2, logits_to_keep=1)["head"] == 2 * 48 * VOCABULARY
    assert count_macs(model, 1, cache=9)["attention"] == 2 * 2 * 48 * 10
    assert count_macs(model.model, 7, 2)["head"] == 0


@pytest.mark.parametrize("name", ["mistral", "falcon-40b", "phi3"])
def test_kv_heads_shrink_the_cache_and_query_heads_do_not(name):
    """Falcon's class repeats keys and values for all query heads before it caches them."""

    def cache_bytes(model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.ones(1, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    whole, sizes = cache_bytes(tiny_model(name)), {}
    for unit in ("query", "kv"):
        model = tiny_model(name)
        for module in depth2_modules(model, kinds={"attention"}, unit=unit):
            remove_units(module, unit_sets(module)[:, :1].flatten())
        sizes[unit] = cache_bytes(model)
    assert sizes == {"query": whole / 3 if name == "falcon-40b" else whole, "kv": whole / 2}


@pytest.mark.parametrize("wrong", [{"seq": 0}, {"batch": 0}, {"cache": -1}, {"logits_to_keep": -1}])
def test_impossible_passes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"count_macs: expected seq >= 1.*found"):
        count_macs(tiny_model("llama"), **{"seq": 4} | wrong)


def test_parameters_are_counted_by_hand():
    model = tiny_model("gpt2")
    block = 2 * 96 + (48 * 144 + 144) + (48 * 48 + 48) + (48 * 80 + 80) + (80 * 48 + 48)
    assert count_parameters(model) == {"blocks": 2 * block, "total": 2 * block + 96 * 48 + 64 * 48 + 96}
    remove_units(depth2_modules(model)[1], torch.arange(79))
    assert count_parameters(model)["blocks"] == 2 * block - (48 + 1 + 48)  # one row, its bias, one column


def can_reset_the_peak():
    try:
        cost._PEAK_RESET.write_text("5")
    except OSError:  # not Linux, or a sandbox
        return False
    return True


@pytest.mark.skipif(not can_reset_the_peak(), reason="the system keeps one peak per process")
def test_peak_memory_sees_what_is_gone_again():
    earlier = torch.ones(2**25)  # 128 MB: an earlier peak must not hide a later one
    del earlier
    with peak_memory() as memory:
        temporary = torch.ones(2**23)
        del temporary
    assert memory.start > 0
    assert 0.9 * 2**25 < memory.rise < 1.6 * 2**25
    with peak_memory() as memory:
        pass
    assert memory.rise < 2**23


def test_without_a_reset_the_peak_is_a_lower_bound(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "_PEAK_RESET", tmp_path / "no" / "clear_refs")
    earlier = torch.ones(2**25)
    del earlier
    with peak_memory() as memory:
        temporary = torch.ones(2**23)
        del temporary
    assert memory.start > 2**27  # the highest peak so far, which 32 MB more do not reach
    assert memory.rise < 2**23


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_on_cuda_counts_tensors():
    with peak_memory("cuda") as memory:
        temporary = torch.ones(2**24, device="cuda")
        del temporary
    assert memory.rise == 2**26


def test_latency_names_and_interleaves():
    order = []
    models = {"a": tiny_model("llama", torch.float32), "b": tiny_model("llama", torch.float32)}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    seconds = compare_latency(models, torch.randint(0, VOCABULARY, (1, 8)), repeats=3)
    assert set(seconds) == {"a", "b"}
    assert all(value > 0 for value in seconds.values())
    assert order == ["a", "b"] * 5  # two rounds of warm-up, three timed
    with pytest.raises(ValueError, match="compare_latency: expected repeats >= 1, found 0"):
        compare_latency(models, torch.zeros(1, 8, dtype=torch.long), repeats=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "falcon-7b"])
def test_prefill_and_decode(name):
    """Prompts of two batch sizes, then single tokens behind a cache that grows: seen from inside the model."""
    models, seen = {"a": tiny_model(name, torch.float32), "b": tiny_model(name, torch.float32).train()}, []

    def watch(model, label):
        def before(_module, args, kwargs):
            cache = next((kwargs[key] for key in ("cache", "past_key_values") if kwargs.get(key) is not None), None)
            seen.append((label, list(kwargs["input_ids"].shape), 0 if cache is None else cache.get_seq_length()))
            assert not model.training

        model.register_forward_pre_hook(before, with_kwargs=True)

    for label, model in models.items():
        watch(model, label)
    tokens = torch.randint(0, VOCABULARY, (3, 8))
    found = latency_table(models, tokens, batch_sizes=(1, 3), new_tokens=2, repeats=2)
    expected = [
        (label, [size, new], behind)
        for size in (1, 3)
        for _ in range(4)  # two rounds of warm-up, two timed
        for label in ("a", "b")
        for new, behind in ((8, 0), (1, 8), (1, 9))
    ]
    assert seen == expected
    assert models["b"].training
    assert [tuple(row) for row in found[["batch", "model", "phase"]].to_numpy()] == [
        (size, label, phase) for size in (1, 3) for label in "ab" for phase in ("prefill", "decode")
    ]
    assert (found.seq == 8).all()
    assert (found.seconds > 0).all()
    assert (found.iqr >= 0).all()
    per_pass = found.batch * found.seq.where(found.phase == "prefill", 1)
    pd.testing.assert_series_equal(found.tokens_per_second, per_pass / found.seconds, check_names=False)


def test_medians_and_spreads():
    """A clock of our own: the passes take 1, 2, ... seconds each, so every number is known."""
    now, length = [0.0], iter(range(1, 1000))
    model = tiny_model("llama", torch.float32)

    def tick(*_):
        now[0] += next(length)

    model.register_forward_hook(tick)
    how = {"new_tokens": 2, "repeats": 3, "clock": lambda: now[0]}
    found = latency_table({"one": model}, torch.randint(0, VOCABULARY, (1, 8)), **how)
    # passes 1 to 6 warm up; then prefills take 7, 10, 13 and their two steps each 8 + 9, 11 + 12, 14 + 15
    assert found.seconds.tolist() == [10, 11.5]
    assert found.iqr.tolist() == [3, 3]


def test_the_prompt_has_to_leave_room():
    models, tokens = {"a": tiny_model("llama", torch.float32)}, torch.randint(0, VOCABULARY, (2, 60))
    with pytest.raises(ValueError, match=r"a: expected prompt and new tokens within the context of 64, found 60 \+ 5"):
        latency_table(models, tokens, new_tokens=5)
    for wrong in ({"batch_sizes": (3,)}, {"batch_sizes": ()}, {"new_tokens": 0}, {"repeats": 0}):
        with pytest.raises(ValueError, match=r"batch sizes in \[1, 2\], found"):
            latency_table(models, tokens, **wrong)
    with pytest.raises(ValueError, match="b: expected a model that generates, found BertForMaskedLM"):
        latency_table({"b": tiny_model("bert", torch.float32)}, tokens[:, :8])


def test_cost_table_compares_with_the_first(tmp_path):
    models = {"dense": tiny_model("llama", torch.float32), "cut": pruned_unevenly(tiny_model("llama", torch.float32))}
    tokens = torch.randint(0, VOCABULARY, (2, 8))
    folders = {name: save_pruned(model, tmp_path / name) for name, model in models.items()}
    found = cost_table(models, tokens, new_tokens=2, repeats=2, folders=folders)
    assert list(found.index) == ["dense", "cut"]
    for name, model in models.items():
        row = found.loc[name]
        assert row.parameters == count_parameters(model)["total"]
        assert row.block_parameters == count_parameters(model)["blocks"]
        assert row.bytes == 4 * row.parameters
        assert row.disk_bytes == disk_bytes(tmp_path / name)
        assert 0 <= row.disk_bytes - row.bytes < 8192  # names and shapes
        assert row.prefill_macs == count_macs(model, 8, 2, logits_to_keep=1)["total"]
        assert row.decode_macs == count_macs(model, 1, 2, cache=8)["total"]
    for column in [name for name in found if f"{name}_ratio" in found]:
        assert found[f"{column}_ratio"].tolist() == [1, found[column]["cut"] / found[column]["dense"]]
    assert found.ideal_speedup["cut"] == pytest.approx(found.parameters["dense"] / found.parameters["cut"])
    assert found.prefill_speedup["cut"] == pytest.approx(found.prefill_seconds["dense"] / found.prefill_seconds["cut"])
    assert found.decode_speedup["cut"] == pytest.approx(found.decode_seconds["dense"] / found.decode_seconds["cut"])
    assert (found[["prefill_iqr", "decode_iqr"]] >= 0).all(axis=None)
    counted = cost_table(models, tokens, repeats=0)
    assert not [name for name in counted if "seconds" in name or "iqr" in name or "e_speedup" in name]
    pd.testing.assert_frame_equal(counted, found[counted.columns])


def test_no_weights_no_bytes(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none"):
        disk_bytes(tmp_path)
