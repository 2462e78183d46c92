"""Divergences against scipy, Algorithm 2 by hand, and maps of real forward passes."""

import itertools
import math
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from conftest import quiet
from scipy.spatial.distance import jensenshannon
from tiny import CONFIGS, tiny_model

from greedy_helpers import (
    BlockStream,
    blocks_of,
    depth2_modules,
    head_divergence,
    output_energy,
    redundant_heads,
    scores_of,
)
from greedy_helpers.similarity import divergences_of, redundant_first, unit_divergence


def random_maps(batch=3, heads=5, seq=7, keys=None, dtype=torch.float32):
    """Causal maps, so with exact zeros, one head twice; with more keys than queries the last ones see all before."""
    keys = keys or seq
    scores = 3 * torch.randn(batch, heads, seq, keys, generator=torch.Generator().manual_seed(0))
    scores[:, 3] = scores[:, 1]
    mask = torch.ones(seq, keys, dtype=torch.bool).triu(keys - seq + 1)
    return scores.masked_fill(mask, float("-inf")).softmax(-1).to(dtype)


@pytest.mark.parametrize("max_elements", [None, 1, 100, 333, 10**6])
@pytest.mark.parametrize(("batch", "heads", "seq", "keys"), [(1, 5, 7, 7), (3, 5, 7, 7), (4, 6, 5, 9)])
def test_divergence_equals_scipy(batch, heads, seq, keys, max_elements):
    """Sample by sample, row by row, in pieces of any size and batches of any size."""
    maps = random_maps(batch, heads, seq, keys)
    found = head_divergence(maps.split([1, batch - 1] if batch > 1 else 1), max_elements)
    for i, j in itertools.combinations(range(heads), 2):
        rows = zip(maps[:, i].flatten(0, 1).double().numpy(), maps[:, j].flatten(0, 1).double().numpy(), strict=True)
        expected = sum(jensenshannon(p, q) ** 2 for p, q in rows) / (batch * seq)  # scipy returns the root, in nats
        assert found[i, j] == pytest.approx(expected, abs=1e-6)
    assert torch.equal(found, found.T)
    assert found.diagonal().abs().max() == 0
    assert found[1, 3] == pytest.approx(0, abs=1e-7)
    assert found.max() <= math.log(2)


def test_opposite_heads_are_ln_2_apart():
    maps = torch.zeros(1, 2, 4, 4)
    maps[:, 0, :, 0] = maps[:, 1, :, 1] = 1
    assert head_divergence([maps])[0, 1] == pytest.approx(math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_accumulated_in_float32(dtype):
    maps = random_maps(dtype=dtype)
    torch.testing.assert_close(head_divergence([maps]), head_divergence([maps.float()]), rtol=0, atol=0)


def test_bad_maps_are_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        head_divergence([])
    with pytest.raises(ValueError, match=r"\[batch, heads, query, key\], found \[4, 4\]"):
        head_divergence([torch.eye(4)])
    broken = random_maps()
    broken[0, 0, 2, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or Inf in the attention maps"):
        head_divergence([broken])


def line(*distances):
    """Heads on a line at these places; divergence = distance."""
    places = torch.tensor(distances)
    return (places[:, None] - places[None, :]).abs()


def test_algorithm_2_by_hand():
    divergence = line(0.0, 0.1, 0.2, 0.9)
    # (0, 1) marks 0; (1, 2) marks 1; (2, 0) and (2, 1) find 0 and 1 marked; 3 is far from all.
    assert redundant_heads(divergence, 0.15) == [0, 1]
    assert redundant_heads(divergence, 0.05) == []
    assert redundant_heads(divergence, 0.1) == []  # strictly smaller
    assert redundant_heads(line(0.0, 0.0, 0.0), 0.01) == [0, 1]  # one of them stays
    assert redundant_heads(line(0.0, 0.1, 0.9, 0.95), 10) == [0, 1, 2]


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.2, 0.5, 0.7])
def test_every_marked_head_was_marked_beside_a_similar_one(tau):
    divergence = head_divergence([random_maps(heads=8)])
    marked = redundant_heads(divergence, tau)
    assert len(marked) < 8
    for i in marked:
        assert any(divergence[i, j] < tau for j in range(8) if j != i)


def test_the_walk_may_leave_a_head_without_a_twin():
    """Algorithm 2 as printed promises a twin at the moment of marking only, and depends on the numbering."""
    divergence = line(0.0, 0.1, 0.2)
    assert redundant_heads(divergence, 0.15) == [0, 1]  # 0 resembles 1 alone, which is gone
    middle_first = torch.tensor([1, 0, 2])
    assert redundant_heads(divergence[middle_first][:, middle_first], 0.15) == [0]


def test_redundant_heads_refuses():
    with pytest.raises(ValueError, match="heads, heads"):
        redundant_heads(torch.zeros(2, 3), 0.1)
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="tau >= 0"):
            redundant_heads(line(0.0, 1.0), wrong)


def test_groups_average_their_pairs():
    divergence = line(0.0, 0.2, 1.0, 1.2).double()
    grouped = unit_divergence(divergence, 2)
    assert grouped.tolist() == [[0, pytest.approx(1.0)], [pytest.approx(1.0), 0]]
    assert torch.equal(unit_divergence(divergence, 1), divergence)
    with pytest.raises(ValueError, match="multiple of 3 heads, found 4"):
        unit_divergence(divergence, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_maps_of_every_family(name):
    """Rows sum to 1, one map per query head, and a plain forward pass returns the same."""
    model = tiny_model(name, attention="eager")
    tokens = torch.randint(1, 96, (4, 12), generator=torch.Generator().manual_seed(1))
    modules = depth2_modules(model, [1])
    if modules[0].kind != "attention":
        pytest.skip("its attention stays whole")
    stream = BlockStream(model, tokens, batch_size=3)
    stream.advance(blocks_of(model)[0])
    maps = torch.cat(list(stream.attention_maps(blocks_of(model)[1], modules[0].owner)))
    assert maps.shape[1] % modules[0].n_units == 0
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]), rtol=0, atol=1e-5)
    with torch.no_grad():
        expected = model(input_ids=tokens, output_attentions=True).attentions[1]
    torch.testing.assert_close(maps, expected.to(maps), rtol=0, atol=1e-6)


def test_sdpa_is_refused_with_the_way_out(tokens):
    model = tiny_model("llama", attention="sdpa")
    with pytest.raises(ValueError, match=r"attention 'sdpa'\. Call model\.set_attn_implementation\('eager'\)"):
        quiet(model, tokens, 0.25, criterion=partial(redundant_first, tau=0.2))
    assert depth2_modules(model)[0].n_units == 4


def test_divergences_of_a_model_are_those_of_its_blocks(tokens):
    model = tiny_model("llama-gqa", attention="eager")
    with torch.no_grad():
        maps = model(input_ids=tokens, output_attentions=True).attentions
    for unit, group in {"query": 1, "kv": 2}.items():
        found = divergences_of(model, tokens, batch_size=4, unit=unit)
        assert list(found) == [m.name for m in depth2_modules(model, kinds={"attention"})]
        for values, block in zip(found.values(), maps, strict=True):
            assert len(values) == 4 // group
            torch.testing.assert_close(values, unit_divergence(head_divergence([block]), group), rtol=1e-5, atol=1e-7)


def peak_rise(call):
    """MB by which `call` lifts a fresh process above a GPT-2 of 12 heads, on 16 windows of 1,024 tokens."""
    script = f"""
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from greedy_helpers import BlockStream, blocks_of, depth2_modules
from greedy_helpers.course.cost import peak_memory
from greedy_helpers.similarity import divergences_of
config = GPT2Config(vocab_size=96, n_embd=96, n_layer=1, n_head=12, n_positions=1024, attn_implementation="eager")
model = GPT2LMHeadModel(config).eval()
tokens = torch.randint(0, 96, (16, 1024))
with torch.no_grad():
    model(tokens[:1, :64])
with peak_memory() as memory:
    {call}
print(memory.start / 2**20, memory.rise / 2**20)
"""
    # Where a Linux process cannot reset its peak it starts with its parent's; a shell in between forgets it.
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, rise = map(float, done.stdout.split())
    assert before < 1500, "the start is the model's, not the parent's"
    return rise


@pytest.mark.skipif(sys.platform == "win32", reason="no record of the peak")
def test_memory_of_1024_tokens_and_12_heads():
    """16 samples of 12 heads at 1,024 tokens: 805 MB of maps if stored; streamed, the rise stays below 500 MB."""
    ballast = torch.ones(2**28)  # 1 GB: a child that inherited this peak would see no rise at all
    assert 50 < peak_rise("divergences_of(model, tokens)") < 500
    del ballast


@pytest.mark.skipif(sys.platform == "win32", reason="no record of the peak")
def test_the_memory_test_has_teeth():
    call = "list(BlockStream(model, tokens, 1).attention_maps(blocks_of(model)[0], depth2_modules(model)[0].owner))"
    assert peak_rise(call) > 700


def test_a_batch_of_maps_is_gone_before_the_next_one_is_made(tokens):
    """From the attention module to the sum: one batch of maps at a time."""
    model = tiny_model("llama", attention="eager")
    block, owner = blocks_of(model)[0], depth2_modules(model)[0].owner
    stream, made, alive = BlockStream(model, tokens, batch_size=2), [], []
    owner.register_forward_pre_hook(lambda *_: alive.append(sum(maps() is not None for maps in made)))

    def watched():
        for maps in stream.attention_maps(block, owner):
            made.append(weakref.ref(maps))
            yield maps
            del maps

    head_divergence(watched())
    assert len(made) == 3
    assert alive == [0, 0, 0]


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gpt2"])
def test_redundant_first_ranks_them_below_all_others(name, tokens):
    model = tiny_model(name, attention="eager")
    plain = scores_of(model, tokens, output_energy)
    found = scores_of(
        model, tokens, partial(redundant_first, criterion=output_energy, tau=0.7)
    )  # above ln 2: all but one
    marked = 0
    for module in depth2_modules(model):
        a, b = plain[module.name], found[module.name]
        changed = (a != b).nonzero().flatten().tolist()
        marked += len(changed)
        if module.kind != "attention":
            assert not changed
        elif changed:
            rest = [u for u in range(module.n_units) if u not in changed]
            assert b[changed].max() < b[rest].min()
            assert torch.equal(a[changed].argsort(), b[changed].argsort())
    assert marked > 0
