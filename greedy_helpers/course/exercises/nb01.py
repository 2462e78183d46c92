"""Checkers of notebook 01, structure."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...discover import find_units
from ...structure import channel_index
from .common import expect, is_index


def check_fused_layout(layout_index: Callable[[int, int], Tensor]) -> str:
    """Notebook 01: `layout_index(n_heads, dim)` -> long [n_heads, 3 * dim], each head's channels of GPT-2's c_attn."""
    for n_heads, dim in ((4, 8), (3, 5), (1, 2)):
        asked = f"layout_index({n_heads}, {dim})"
        found = is_index(layout_index(n_heads, dim), (n_heads, 3 * dim), asked).sort(1).values
        right = channel_index("kv dim | kv dim | kv dim", 3 * n_heads * dim, dim=dim)
        interleaved = channel_index("kv 3 dim", 3 * n_heads * dim, dim=dim)
        expect(
            n_heads == 1 or not torch.equal(found, interleaved),
            f"{asked}: that is GPT-NeoX's order (query, key, value of head 0, then of head 1). GPT-2 has all queries "
            "first: the key of head 0 begins behind the query of the last head",
        )
        expect(
            torch.equal(found, right),
            f"{asked}: head 0 should own {right[0].tolist()}, found {found[0].tolist()}",
        )
    return "correct: three stretches, and each head owns a piece of every one"


def check_remove_channels(remove_channels: Callable[[nn.Linear, nn.Linear, nn.Linear, Tensor], None]) -> str:
    """Notebook 01: `remove_channels(gate, up, down, keep)` cuts a gated FFN in place to the channels `keep`."""
    torch.manual_seed(0)
    for bias in (False, True):
        gate, up, down = nn.Linear(6, 10, bias), nn.Linear(6, 10, bias), nn.Linear(10, 6, bias)
        keep, x = torch.tensor([7, 0, 3, 9]), torch.randn(5, 6)
        silenced = copy.deepcopy(down)
        with torch.no_grad():
            silenced.weight[:, [c for c in range(10) if c not in keep.tolist()]] = 0
            expected = silenced(torch.nn.functional.silu(gate(x)) * up(x))
            remove_channels(gate, up, down, keep)
        for name, linear, shape in (("gate", gate, (4, 6)), ("up", up, (4, 6)), ("down", down, (6, 4))):
            found = tuple(linear.weight.shape)
            expect(found == shape, f"{name}.weight: expected shape {list(shape)}, found {list(found)}")
        if bias:
            for name, linear, size in (("gate", gate, 4), ("up", up, 4), ("down", down, 6)):
                found = len(linear.bias)
                expect(
                    found == size,
                    f"{name}.bias: expected {size} entries, found {found}. Level 1 loses the biases of the channels "
                    "that go; level 2's bias belongs to its outputs and stays",
                )
        with torch.no_grad():
            outputs = down(torch.nn.functional.silu(gate(x)) * up(x))
        expect(
            torch.allclose(outputs, expected, atol=1e-6),
            "the shapes are right, but the outputs are not those of a module whose other channels are silent: do the "
            "rows of gate and up and the columns of down all follow `keep`, in the same order?",
        )
        sizes = [(linear.in_features, linear.out_features) for linear in (gate, up, down)]
        expect(
            sizes == [(6, 4), (6, 4), (4, 6)],
            f"the outputs are right; in_features and out_features still say {sizes}, expected [(6, 4), (6, 4), (4, 6)]",
        )
    return "correct: removed equals silenced, with and without biases"


def check_pieces(pieces: Callable[[Tensor], Tensor]) -> str:
    """Notebook 01: `pieces(coupled)` labels the inputs of bool [d_in, d_out] by the piece they belong to."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(12, generator=generator)
    blocks = torch.block_diag(*[torch.ones(3, 4)] * 4).bool()[order]
    chain = torch.zeros(4, 3, dtype=torch.bool)
    chain[[0, 1, 1, 2, 2, 3], [0, 0, 1, 1, 2, 2]] = True  # 0-1, 1-2 and 2-3 share an output: all hang together
    apart = torch.eye(5, dtype=torch.bool)
    for name, coupled in (("four heads, shuffled", blocks), ("a chain", chain), ("five FFN channels", apart)):
        before = coupled.clone()
        found = is_index(pieces(coupled), (coupled.shape[0],), name)
        expect(torch.equal(coupled, before), f"{name}: your function changed its argument; work on a copy")
        units = find_units({"writer": coupled})
        together = torch.ones(len(found), len(found), dtype=torch.bool)
        if units is not None:
            together = torch.zeros_like(together)
            for row in units.inputs:
                together[row[:, None], row] = True
        same = found[:, None] == found
        hint = ". Neighbours of neighbours belong to the same piece: repeat until nothing changes"
        expect(
            torch.equal(same, together),
            f"{name}: expected {len(units.inputs) if units else 1} pieces, found {len(found.unique())}"
            + hint * (name == "a chain"),
        )
    return "correct: heads, chains and single channels"
