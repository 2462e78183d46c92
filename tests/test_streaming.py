"""One block at a time: blocks that stay on the disk, hidden states that wait elsewhere, memory that runs out."""

import gc
import importlib
import json
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import assert_same_model, assert_same_report, assert_untouched, calibration, quiet, state_of
from tiny import VOCABULARY, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from greedy_helpers import (
    FLAP,
    BlockStream,
    blocks_of,
    exact_greedy,
    export_plain,
    flap,
    load_model,
    load_pruned,
    perplexity,
    prune,
    save_pruned,
    scores_of,
    second_moment,
    set_weight,
)
from greedy_helpers.large.lazy import resident
from greedy_helpers.moments import Moments
from greedy_helpers.similarity import divergences_of

TOKENS = calibration(10, 20)
FAMILIES = ("llama-gqa", "gpt2", "bloom", "falcon-rw", "gpt_neo", "gemma2", "stablelm", "olmo2")


def on_disk(name, folder, dtype=torch.float32):
    """A tiny model's folder, as transformers writes it."""
    tiny_model(name, dtype).save_pretrained(folder)
    return folder


# --- what blocks are called with


@pytest.mark.parametrize("name", FAMILIES)
def test_no_block_runs_to_find_out_what_blocks_are_called_with(name):
    """The recorded arguments equal those of a full pass, whose blocks do run."""
    model, tokens, seen, ran = tiny_model(name), calibration(3), [], []
    blocks = blocks_of(model)
    hooks = [b.register_forward_pre_hook(lambda _, a, k: seen.append((a[1:], k)), with_kwargs=True) for b in blocks]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    hooks = [part.register_forward_hook(lambda *_: ran.append(1)) for block in blocks for part in block.children()]
    stream = BlockStream(model, tokens)
    assert not ran
    ((_, recorded),) = stream._extra.items()
    for mine, theirs in zip(recorded, seen, strict=True):
        mine, theirs = torch.utils._pytree.tree_flatten(mine), torch.utils._pytree.tree_flatten(theirs)
        assert str(mine[1]) == str(theirs[1])
        for a, b in zip(mine[0], theirs[0], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert all("forward" not in vars(block) for block in blocks), "a block's forward was not put back"


# --- blocks on the disk


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*stays whole")
def test_blocks_on_the_disk_give_the_same_bits(name, tmp_path):
    folder = on_disk(name, tmp_path / "dense")
    whole, _ = load_model(folder, "cpu")
    lazy, _ = load_model(folder, "cpu", lazy=True)
    assert all(parameter.is_meta for parameter in blocks_of(lazy).parameters())
    how = {"ratio": 0.4, "remedy": "both", "batch_size": 4}
    expected = quiet(whole, TOKENS, **how)
    found = quiet(lazy, TOKENS, **how, work_dir=tmp_path / "work")
    assert_same_report(found, expected)
    assert all(parameter.is_meta for parameter in blocks_of(lazy).parameters())
    save_pruned(whole, tmp_path / "one")
    save_pruned(lazy, tmp_path / "other")
    assert_same_model(load_pruned(tmp_path / "other")[0], load_pruned(tmp_path / "one")[0])
    assert_same_model(load_pruned(tmp_path / "other")[0], whole)


def test_half_precision_on_the_disk(tmp_path):
    folder = on_disk("llama-gqa", tmp_path / "dense", torch.bfloat16)
    whole, _ = load_model(folder, "cpu", "auto")
    lazy, _ = load_model(folder, "cpu", "auto", lazy=True)
    assert whole.dtype == lazy.dtype == torch.bfloat16
    reports = [
        quiet(whole, TOKENS, 0.5, remedy="both, residual", criterion=exact_greedy),
        quiet(lazy, TOKENS, 0.5, remedy="both, residual", criterion=exact_greedy, work_dir=tmp_path / "work"),
    ]
    assert_same_report(*reports)
    save_pruned(lazy, tmp_path / "pruned")
    assert_same_model(load_pruned(tmp_path / "pruned", dtype="auto")[0], whole)


def test_a_pruned_checkpoint_can_be_lazy_too(tmp_path):
    whole = tiny_model("bloom", torch.float32)  # heads' alibi slices are a buffer
    quiet(whole, TOKENS, 0.25, remedy="bias")
    save_pruned(whole, tmp_path / "once")
    lazy, _ = load_model(tmp_path / "once", "cpu", lazy=True)
    quiet(lazy, TOKENS, 0.4, remedy="bias", work_dir=tmp_path / "work")
    quiet(whole, TOKENS, 0.4, remedy="bias")
    save_pruned(lazy, tmp_path / "twice", dtype=torch.float16)
    assert_same_model(load_pruned(tmp_path / "twice", dtype="auto")[0], whole.half())


def test_scores_of_blocks_on_the_disk(tmp_path):
    folder = on_disk("gpt2", tmp_path / "dense")
    expected = scores_of(load_model(folder, "cpu")[0], TOKENS)
    found = scores_of(load_model(folder, "cpu", lazy=True)[0], TOKENS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_whatever_goes_wrong_the_blocks_are_on_the_disk_again(tmp_path):
    lazy, _ = load_model(on_disk("llama", tmp_path / "dense"), "cpu", lazy=True)
    before = {name: (p.shape, p.device) for name, p in lazy.named_parameters()}, dict(lazy.weights_on_disk)

    def breaks(module, seen):
        if module.block == 1 and module.kind != "attention":
            raise RuntimeError("stop here")
        return second_moment(module, seen)

    with pytest.raises(ValueError, match="blocks are on the disk; expected a work_dir"):
        quiet(lazy, TOKENS, 0.5)
    for visit, message in [
        (lambda: quiet(lazy, TOKENS, 0.5, criterion=breaks, work_dir=tmp_path / "work"), "stop here"),
        (lambda: scores_of(lazy, TOKENS, breaks), "stop here"),
        (lambda: divergences_of(lazy, TOKENS), "expected attention maps, found none"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message) as caught:
            visit()
        now = {name: (p.shape, p.device) for name, p in lazy.named_parameters()}, dict(lazy.weights_on_disk)
        assert now == before
        del caught  # until now it held the frames, and with them the walk
    with pytest.raises(ValueError, match="expected a model in memory"):
        export_plain(lazy, tmp_path / "plain")


def test_plans_from_scores_of_the_whole_model_need_one_block_at_a_time(tmp_path):
    """FLAP ranks the units of all blocks before the first is cut."""
    folder = on_disk("llama", tmp_path / "dense")
    whole, lazy = load_model(folder, "cpu")[0], load_model(folder, "cpu", lazy=True)[0]
    reports = [prune(whole, TOKENS, 0.4, FLAP, progress=False)]
    reports.append(prune(lazy, TOKENS, 0.4, FLAP, work_dir=tmp_path / "work", progress=False))
    assert_same_report(*reports)
    assert len({step.units_after for step in reports[0].steps if step.kind != "attention"}) > 1


def test_bad_weights_on_the_disk_are_named(tmp_path):
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        blocks_of(model)[1].mlp.up_proj.weight[2, 3] = float("inf")
    model.save_pretrained(tmp_path / "dense")
    lazy, _ = load_model(tmp_path / "dense", "cpu", lazy=True)
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj\.weight: expected finite weights"):
        quiet(lazy, TOKENS, 0.5, work_dir=tmp_path / "work")


def test_folders_that_cannot_be_read_lazily(tmp_path):
    folder = on_disk("llama", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 81}))
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight: expected shape \[81, 48\], found \[80, 48\]"):
        load_model(folder, "cpu", lazy=True)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(
        ValueError,
        match=r"lacks weights of LlamaForCausalLM, .*: model\.layers\.2\.input_layernorm\.weight, .* and 6 more",
    ):
        load_model(folder, "cpu", lazy=True)


def test_placeholders_of_someone_else_are_refused():
    model = tiny_model("llama", torch.float32)
    blocks_of(model)[1].to("meta")
    with pytest.raises(RuntimeError, match=r"layers\.1\.\S+: expected a weight, found a placeholder"):
        quiet(model, TOKENS, 0.5)
    model = tiny_model("llama", torch.float32)
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1}
    with pytest.raises(ValueError, match="has spread the model over 0, 1; expected one place"):
        quiet(model, TOKENS, 0.5)


@pytest.mark.parametrize("depths", [(4, 8, 16)])
def test_memory_grows_with_one_block_and_not_with_depth(depths, tmp_path):
    """Bytes of all tensors that are alive in the middle of a block, beside the embeddings, at three depths."""
    peaks, one_block = [], 0
    for depth in depths:
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "vocab_size": VOCABULARY}
        config = LlamaConfig(**sizes, num_hidden_layers=depth, max_position_embeddings=64)
        model = LlamaForCausalLM(config)
        one_block = sum(p.nbytes for p in blocks_of(model)[0].parameters())
        model.save_pretrained(tmp_path / f"dense{depth}")
        del model
        lazy, _ = load_model(tmp_path / f"dense{depth}", "cpu", lazy=True)
        gc.collect()
        before, seen = live_bytes(), []

        def watching(module, what, seen=seen, depth=depth):
            if module.block in (1, depth - 1) and module.kind != "attention":
                gc.collect()
                seen.append(live_bytes())
            return second_moment(module, what)

        quiet(lazy, calibration(16, 16), 0.25, remedy="both", criterion=watching, work_dir=tmp_path / f"work{depth}")
        peaks.append(max(seen) - before)
    per_block = [(b - a) / (m - n) for a, b, n, m in zip(peaks, peaks[1:], depths, depths[1:], strict=False)]
    assert max(per_block) < 0.02 * one_block, per_block  # a step's scores and kept units
    assert peaks[0] > one_block


def live_bytes():
    """Bytes in memory behind all tensors that Python knows, each storage once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects dislike being looked at
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not t.is_meta]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_only_one_block_is_resident(tmp_path):
    lazy, _ = load_model(on_disk("gpt2", tmp_path / "dense"), "cpu", lazy=True)
    blocks = blocks_of(lazy)
    with resident(lazy, 1) as block:
        assert block is blocks[1]
        assert not any(p.is_meta for p in block.parameters())
        assert all(p.is_meta for p in blocks[0].parameters())
    assert all(p.is_meta for p in blocks.parameters())


def test_what_nobody_replaced_is_not_copied_back():
    model = tiny_model("gpt2", torch.float32)
    before = {name: value for name, value in model.state_dict(keep_vars=True).items()}
    with suppress(KeyboardInterrupt), resident(model, 0, "meta") as block:  # any device that is not home
        assert all(p.is_meta for p in block.parameters())
        assert not any(p.is_meta for p in blocks_of(model)[1].parameters())
        set_weight(block.mlp.c_proj, torch.ones(48, 7))
        block.mlp.c_proj.weight = torch.nn.Parameter(torch.ones(7, 48))  # the other device would have numbers
        raise KeyboardInterrupt
    after = model.state_dict(keep_vars=True)
    assert [name for name in after if after[name] is not before[name]] == ["transformer.h.0.mlp.c_proj.weight"]
    assert torch.equal(after["transformer.h.0.mlp.c_proj.weight"], torch.ones(7, 48))


# --- memory that runs out


def runs_out(times, above):
    """A criterion that claims to be out of memory while batches are larger than `above` windows."""
    left = [times]

    def criterion(module, seen):
        sizes = [len(batch) for batch in seen.level2_windows()]
        if module.block == 1 and max(sizes) > above and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")
        return second_moment(module, seen)

    return criterion


def test_out_of_memory_becomes_a_smaller_batch():
    tokens, expected = calibration(11), tiny_model("llama")
    report = quiet(expected, tokens, 0.5, remedy="both, residual", batch_size=8)
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="out of memory .*; going on with . windows per batch") as caught:
        found = quiet(model, tokens, 0.5, remedy="both, residual", batch_size=8, criterion=runs_out(9, above=2))
    assert [str(w.message).split("with ")[-1] for w in caught if "out of memory" in str(w.message)] == [
        "4 windows per batch",
        "2 windows per batch",
    ]
    assert [step.keep.tolist() for step in found.steps] == [step.keep.tolist() for step in report.steps]
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-8, atol=1e-9)


def test_out_of_memory_with_one_window_is_said():
    model = tiny_model("llama", torch.float32)
    before = state_of(model)
    with pytest.warns(UserWarning, match="with 1 windows"), pytest.raises(torch.OutOfMemoryError) as caught:
        quiet(model, calibration(4), 0.5, batch_size=2, criterion=runs_out(9, above=0))
    assert "block 1: out of memory with 1 windows per batch; expected a smaller batch_size" in caught.value.__notes__[0]
    assert_untouched(model, before)


def test_other_errors_are_not_taken_for_memory():
    def breaks(module, seen):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="mat1"):
            quiet(tiny_model("llama"), calibration(4), 0.5, criterion=breaks)


# --- precision


def test_moments_in_single_precision_come_close():
    tokens, models, reports = calibration(64), [], []
    for precision in (torch.float64, torch.float32):
        models.append(tiny_model("llama-gqa", torch.float32))
        seen = []

        def watching(module, what, seen=seen):
            seen.append((what.level1.xx.dtype, what.level2.xy.dtype, what.level2.select(torch.tensor([0])).dtype))
            return second_moment(module, what)

        reports.append(quiet(models[-1], tokens, 0.5, remedy="both", precision=precision, criterion=watching))
        assert {dtype for dtypes in seen for dtype in dtypes} == {precision}
    for a, b in zip(*(report.steps for report in reports), strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-3)


# --- pruned models that are spread over devices


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pruned_model_runs_offloaded(name, tmp_path):
    model = tiny_model(name, torch.float32)
    quiet(model, TOKENS, 0.5, remedy="both", criterion=partial(flap, metric="WIFN"))
    tokenizer = load_model("llama-mini")[1]
    save_pruned(model, tmp_path / "pruned", tokenizer)
    embeddings = "model.embed_tokens" if name == "llama" else "transformer.wte"
    for placement in (
        {"device_map": {"": "cpu"}},
        {"device_map": "auto", "max_memory": {"cpu": "40KB"}, "offload_folder": str(tmp_path / "offload")},
    ):
        spread, _ = load_model(tmp_path / "pruned", **placement)
        offloaded = [parameter.is_meta for parameter in blocks_of(spread).parameters()]
        assert any(offloaded) == ("max_memory" in placement)
        with torch.no_grad():
            assert torch.equal(spread(TOKENS).logits, model(TOKENS).logits)
        assert spread.get_submodule(embeddings) is spread.get_input_embeddings()
        assert perplexity(spread, TOKENS) == perplexity(model, TOKENS)
        greedy = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
        assert torch.equal(spread.generate(TOKENS[:1], **greedy), model.generate(TOKENS[:1], **greedy))
    with pytest.raises(RuntimeError, match="expected a weight, found a placeholder"):
        quiet(spread, TOKENS, 0.5)  # to be run, not to be pruned
    with pytest.raises(ValueError, match="expected one of device, device_map and lazy"):
        load_model(tmp_path / "pruned", "cpu", device_map="auto")


def test_the_gpu_benchmark_runs_anywhere(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    found = importlib.import_module("gpu").main(["--shape", "tiny", "--device", "cpu", "--layers", "7", "--seq", "16"])
    for run in importlib.import_module("gpu").RUNS:
        rows = {row["stage"]: row for row in found["rows"] if row["run"] == run}
        assert rows["total"]["blocks pruned"] == 1
        assert sum(row["seconds"] for name, row in rows.items() if name != "total") == pytest.approx(
            rows["total"]["seconds"], abs=0.01
        )
        assert {
            "dense pass",
            "pruned pass",
            "moments, passes for them included",
            "scores",
            "cut",
            "refit",
        } <= rows.keys()
    assert all(rate > 0 for name, rate in found["rates"].items() if name != "unit")


def test_sums_hold_no_graph():
    """Targets come from trainable weights: a sum that kept their graph would keep every batch of them."""
    linear, x, moments = torch.nn.Linear(3, 2), torch.randn(5, 3), Moments("layer")
    moments.update(x, linear(x))
    assert not moments.xy.requires_grad
