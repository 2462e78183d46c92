"""Checkers of notebook 10, large models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .common import ask, call, compare, parts, refuses


def check_block_bytes(block_bytes: Callable[[LlamaConfig, int], int]) -> str:
    """Notebook 10: `block_bytes(config, itemsize)`: bytes of the weights of one Llama block without biases."""
    d, heads, width = 32, 4, 80
    for name, kv, sizes in (
        ("as many KV heads as heads", 4, {}),
        ("grouped-query attention", 2, {}),
        ("a head size of its own", 2, {"head_dim": 24}),
    ):
        sizes |= {"hidden_size": d, "intermediate_size": width, "num_hidden_layers": 3}
        config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv, **sizes)
        with torch.device("meta"):
            weights = sum(p.numel() for p in LlamaDecoderLayer(config, 0).parameters())
        for item in (2, 4):
            right = item * weights
            many_kv = right + item * 2 * d * (heads - kv) * config.head_dim
            divided = right + item * (d // heads - config.head_dim) * 2 * d * (heads + kv)
            ask(f"{name}, {item} bytes a weight", block_bytes, config, item).must_be(
                right,
                (weights, "These are numbers, not bytes"),
                (3 * right, "These are all blocks of the model; expected one"),
                (right - item * 2 * d, "The two norms have d weights each"),
                (right - item * d * width, "A gated FFN has three matrices: gate, up, down"),
                (many_kv, "Keys and values have num_key_value_heads heads, fewer than the queries"),
                (divided, "The head size is config.head_dim, which need not be hidden_size // num_attention_heads"),
            )
    return "correct: groups and head sizes included"


def check_merge(merge: Callable[..., tuple[int, Tensor, Tensor]]) -> str:
    """Notebook 10: `merge(parts)`: (n, mean of x, mean of x x') per process -> the same over all their tokens."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    right, squares = x.mean(0), x.T @ x / 20
    for what, sizes in (
        ("equal shares", (10, 10)),
        ("unequal shares", (2, 11, 7)),
        ("one process", (20,)),
        ("a process without tokens", (9, 0, 11)),
    ):
        given = []
        for share in x.split(sizes):
            seen = max(len(share), 1)  # a process without tokens reports zeros
            given.append((len(share), share.sum(0) / seen, share.T @ share / seen))
        n, mean, second = parts(what, call(what, merge, given), "n, mean, second")
        compare(f"{what}: n, the number of tokens", int(n), 20)
        alike = sum(part[1] for part in given) / len(given)
        compare(
            f"{what}: mean",
            mean,
            right,
            (alike, "Every process counted alike; a larger share weighs more"),
            (right * 20, "This is the sum over the tokens; expected the mean"),
        )
        centred = squares - torch.outer(right, right)
        hint = "This is the covariance; expected the uncentred mean"
        compare(f"{what}: second, the mean of x x'", second, squares, (centred, hint))
    return "correct: as if one process had seen all tokens"


def check_micro_batch(micro_batch: Callable[[float, float, float, int], int]) -> str:
    """Notebook 10: `micro_batch(free, fixed, per_window, n_windows)`: the largest power of two that fits."""
    for name, (free, fixed, each, n), right in (
        ("room for five", (10.0, 4.9, 1.0, 64), 4),
        ("exactly eight", (12.0, 4.0, 1.0, 64), 8),
        ("room for one", (5.5, 4.0, 1.0, 64), 1),
        ("fewer windows than room", (100.0, 4.0, 1.0, 6), 4),
        ("as many windows as room", (100.0, 4.0, 1.0, 16), 16),
    ):
        ask(f"{name}: micro_batch{(free, fixed, each, n)}", micro_batch, free, fixed, each, n).must_be(
            right,
            (lambda size: size < 1, "A batch has at least one window"),
            (lambda size, n=n: size > n, f"There are only {n} windows"),
            (lambda size, most=(free - fixed) / each: size > most, "That takes more than is free"),
            (lambda size: size & (size - 1), "That is no power of two"),
            "A larger batch fits",
        )
    refuses("not even one window fits (4.0 + 1.0 of 4.5)", micro_batch, 4.5, 4.0, 1.0, 64)
    return "correct: and it says so when nothing fits"


def check_channel_energy(channel_energy: Callable[[Sequence[Tensor]], Tensor]) -> str:
    """Notebook 10: `channel_energy(batches)`: float16 batches [tokens, channels] -> sum of squares [channels]."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(3000, 4, generator=generator).add(1).half()
    large = torch.tensor([[300.0, 1.0, -280.0, 0.5]]).half()

    def same(found: Tensor, wrong: Tensor) -> bool:
        return torch.allclose(found, wrong, rtol=1e-9)

    for what, batches in (
        ("one batch", [small]),
        ("batches of unequal size", list(small.split([1000, 1999, 1]))),
        ("squares above 65,504", [small[:20], large, small[20:50]]),
        ("one token in a batch", list(small[:2500].split(1))),
    ):
        every = torch.cat(batches)
        right = every.double().square().sum(0)
        squared_in_16 = every.square().double().sum(0)
        by_batch = sum(batch.double().square().sum(0).half() for batch in batches).double()
        ask(f"channel_energy, {what}", channel_energy, batches).must_be(
            right,
            (lambda found: found.dtype != torch.float64, "The sum needs 64 bits: .double()"),
            (lambda found: bool(found.isinf().any()), "300 ** 2 is more than float16 holds; change the type first"),
            (right / len(every), "This is the mean over the tokens; expected the sum"),
            (right.sqrt(), "This is the norm; expected the sum of squares"),
            (lambda found, wrong=squared_in_16: same(found, wrong), "Change the type before you square, not after"),
            (lambda found, wrong=by_batch: same(found, wrong), "Sums of batches were rounded to 16 bits"),
            rtol=1e-9,
        )
    return "correct: nothing overflows, nothing stalls"
