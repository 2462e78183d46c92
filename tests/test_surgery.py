"""Removing units equals zeroing them. A wrong layout of the right shape must not pass."""

import dataclasses

import pytest
import torch
from conftest import assert_untouched, state_of
from tiny import tiny_model, unit_sets

from greedy_helpers import depth2_modules, remove_units, set_weight, surgery, zero_units


@pytest.mark.parametrize(
    ("name", "unit", "linear", "deal_out"),
    [
        ("mistral", "kv", "q_proj", lambda n: torch.arange(n).view(3, 2, 16).movedim(1, 0).reshape(2, -1)),
        ("mistral", "query", "q_proj", lambda n: torch.arange(n).view(3, 2, 16).movedim(1, 0).reshape(6, -1)),
        ("gpt2", "query", "c_attn", lambda n: torch.arange(n).view(4, -1)),  # interleaved, as GPT-NeoX has it
    ],
)
def test_the_oracle_has_teeth(name, unit, linear, deal_out, tokens):
    """The same channels dealt out wrongly ("group kv dim"): right shapes, and removal no longer equals zeroing."""
    removed, zeroed = tiny_model(name), tiny_model(name)
    right = depth2_modules(removed, unit=unit)[0]
    group = right.level1[linear]
    index = deal_out(group.index.numel())
    assert index.shape == group.index.shape
    wrong = dataclasses.replace(right, level1=right.level1 | {linear: dataclasses.replace(group, index=index)})
    sets = torch.arange(right.n_units).view(right.n_sets, -1)
    remove_units(wrong, sets[:, :1].flatten())
    zero_units(depth2_modules(zeroed, unit=unit)[0], sets[:, 1:].flatten())
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


@pytest.mark.parametrize("unit", ["query", "kv"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_device_and_frozen_parameters_are_kept(dtype, device, unit, model):
    model = model.to(device, dtype).requires_grad_(False)
    for module in depth2_modules(model, unit=unit):
        remove_units(module, unit_sets(module)[:, ::2].flatten())
    for name, parameter in model.named_parameters():
        assert (parameter.dtype, parameter.device.type) == (dtype, device), name
        assert not parameter.requires_grad
        assert parameter.is_contiguous()


@pytest.mark.parametrize("unit", ["query", "kv"])
def test_out_of_memory_in_the_middle_of_one_cut(unit, model, monkeypatch):
    """All but the last of the module's linears are cut already: they are put back."""
    before, module, calls = state_of(model), depth2_modules(model, unit=unit)[0], []
    cut = [group for group in module.groups if group.index.numel()]

    def runs_out_of_memory(*args):
        calls.append(args)
        if len(calls) == len(cut):
            raise MemoryError
        set_weight(*args)

    monkeypatch.setattr(surgery, "set_weight", runs_out_of_memory)
    with pytest.raises(MemoryError):
        remove_units(module, unit_sets(module)[:, 0])
    assert len(calls) == len(cut)
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
