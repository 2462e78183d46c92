"""Removing units equals zeroing them. A wrong layout of the right shape must not pass."""

import dataclasses

import pytest
import torch
from conftest import TINY, assert_untouched, state_of
from tiny import tiny_model

from greedy_helpers import depth2_modules, remove_units, set_weight, surgery, undone_on_error, weight_of, zero_units


def random_units(n_units: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(keep, cut): a random half, in random order."""
    order = torch.randperm(n_units, generator=torch.Generator().manual_seed(seed))
    return order[: n_units // 2], order[n_units // 2 :]


def removed_and_zeroed(name: str, attention: str, blocks: list[int]):
    removed, zeroed = tiny_model(name), tiny_model(name)
    for twin in (removed, zeroed):
        twin.set_attn_implementation(attention)
    for seed, (cut_here, zero_here) in enumerate(
        zip(depth2_modules(removed, blocks), depth2_modules(zeroed, blocks), strict=True)
    ):
        keep, cut = random_units(cut_here.n_units, seed)
        remove_units(cut_here, keep)
        zero_units(zero_here, cut)
    return removed, zeroed


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("blocks", [[0], [0, 1]])
@pytest.mark.parametrize("name", TINY)
def test_removed_equals_zeroed(name, blocks, attention, tokens):
    removed, zeroed = removed_and_zeroed(name, attention, blocks)
    with torch.no_grad():
        a, b = removed(tokens).logits, zeroed(tokens).logits
        dense = tiny_model(name)(tokens).logits
    assert (a - b).abs().max() <= 1e-10
    assert (a - dense).abs().max() > 0.1, "the cut changed nothing, so equality proves nothing"
    assert sum(p.numel() for p in removed.parameters()) < sum(p.numel() for p in zeroed.parameters())


@pytest.mark.parametrize("name", TINY)
def test_generation_with_cache_equals_recomputation(name, tokens):
    removed, _ = removed_and_zeroed(name, "sdpa", [0])
    prompt = tokens[:1, :6]
    written = removed.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    again = prompt
    with torch.no_grad():
        while again.shape[1] < written.shape[1]:
            again = torch.cat([again, removed(again, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, again)


@pytest.mark.parametrize(
    ("name", "linear", "deal_out"),
    [
        ("llama-gqa", "q_proj", lambda n: torch.arange(n).view(2, 2, 12).movedim(1, 0).reshape(2, -1)),  # group kv dim
        ("gpt2", "c_attn", lambda n: torch.arange(n).view(4, -1)),  # q, k, v interleaved per head, as GPT-NeoX has it
    ],
)
def test_the_oracle_has_teeth(name, linear, deal_out, tokens):
    """The same channels dealt out wrongly: right shapes, and removal no longer equals zeroing."""
    removed, zeroed = tiny_model(name), tiny_model(name)
    right = depth2_modules(removed)[0]
    group = right.level1[linear]
    index = deal_out(group.index.numel())
    assert index.shape == group.index.shape
    wrong = dataclasses.replace(right, level1=right.level1 | {linear: dataclasses.replace(group, index=index)})
    remove_units(wrong, torch.tensor([0]))
    zero_units(depth2_modules(zeroed)[0], torch.arange(1, right.n_units))
    with torch.no_grad():
        assert (removed(tokens).logits - zeroed(tokens).logits).abs().max() > 0.1


def test_sizes_follow_the_weights():
    model = tiny_model("gpt2")
    attention = depth2_modules(model)[0]
    remove_units(attention, torch.tensor([2, 0, 3]))
    assert attention.owner.num_heads == 3
    assert attention.owner.split_size == 36
    assert (attention.owner.c_attn.nf, attention.owner.c_attn.nx) == (108, 48)
    assert attention.owner.c_attn.bias.shape == (108,)
    assert (attention.owner.c_proj.nf, attention.owner.c_proj.nx) == (48, 36)
    assert depth2_modules(model)[0].n_units == 3


def test_nothing_else_is_touched(model):
    before = {name: parameter for name, parameter in model.named_parameters()}
    module = depth2_modules(model)[1]
    remove_units(module, torch.arange(5))
    mine = {f"{group.path}.{part}" for group in module.groups for part in ("weight", "bias")}
    for name, parameter in model.named_parameters():
        assert (parameter is before[name]) == (name not in mine or parameter is module.level2.linear.bias)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_device_and_frozen_parameters_are_kept(dtype, device, model):
    model = model.to(device, dtype).requires_grad_(False)
    for module in depth2_modules(model):
        remove_units(module, torch.tensor([0, 1]))
    for name, parameter in model.named_parameters():
        assert (parameter.dtype, parameter.device.type) == (dtype, device), name
        assert not parameter.requires_grad
        assert parameter.is_contiguous()


def test_out_of_memory_in_the_middle_of_one_cut(model, monkeypatch):
    """All but the last of the module's linears are cut already: they are put back."""
    before, module, calls = state_of(model), depth2_modules(model)[0], []

    def runs_out_of_memory(*args):
        calls.append(args)
        if len(calls) == len(module.groups):
            raise MemoryError
        set_weight(*args)

    monkeypatch.setattr(surgery, "set_weight", runs_out_of_memory)
    with pytest.raises(MemoryError):
        remove_units(module, torch.tensor([0]))
    assert len(calls) == len(module.groups)
    assert_untouched(model, before)


def test_survivors_keep_their_order_whatever_the_order_asked():
    a, b = tiny_model("llama"), tiny_model("llama")
    remove_units(depth2_modules(a)[1], torch.tensor([7, 1, 30]))
    remove_units(depth2_modules(b)[1], torch.tensor([1, 7, 30]))
    assert torch.equal(depth2_modules(a)[1].owner.up_proj.weight, depth2_modules(b)[1].owner.up_proj.weight)


@pytest.mark.parametrize(
    ("units", "error", "message"),
    [
        ([], ValueError, "self_attn: expected between 1 and 4 of 4 units, found 0"),
        ([0, 4], IndexError, r"self_attn: expected units in \[0, 4\), found 0..4"),
        ([-1, 2], IndexError, r"self_attn: expected units in \[0, 4\), found -1..2"),
        ([1, 1], IndexError, "found 1 of them twice"),
        ([0.5], TypeError, "expected a 1-d long tensor"),
        ([[0, 1]], TypeError, "expected a 1-d long tensor"),
    ],
)
def test_bad_units_are_refused_and_nothing_changes(units, error, message):
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(error, match=message):
        remove_units(depth2_modules(model)[0], torch.tensor(units))
    assert_untouched(model, before)


def test_zeroing_every_unit_is_refused():
    with pytest.raises(ValueError, match="at least one unit"):
        zero_units(depth2_modules(tiny_model("llama"))[0], torch.arange(4))


def test_undone_on_error_restores_weights_and_sizes(model):
    before = state_of(model)

    def cut_everything_then_stop():
        with undone_on_error(model):
            for module in depth2_modules(model):
                remove_units(module, torch.tensor([0]))
            assert weight_of(depth2_modules(model)[1].level2.linear).shape[1] == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_everything_then_stop()
    assert_untouched(model, before)
