"""Checkers of notebook 10, large models."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .common import NotYet, ask, call, compare, expect, parts, refuses


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


class _Killed(BaseException):
    """What the checker stops the process with."""


class _Torn(AbstractContextManager):
    """A file to which only a part of a write gets through before the process dies."""

    def __init__(self, file: Any, dies: Callable[[], bool]) -> None:
        self._file, self._dies = file, dies

    def write(self, data: Any) -> int:
        if self._dies():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise _Killed
        return self._file.write(data)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _dying(folder: str, last: int) -> Iterator[None]:
    """Of the writes to `folder` and the renames, number `last` is the end: a write half done, a rename not begun."""
    numbers, opens = iter(range(1, 10**6)), io.open

    def dies() -> bool:
        return next(numbers) == last

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = opens(file, mode, *args, **kwargs)
        mine = not isinstance(file, int) and Path(os.fsdecode(file)).is_relative_to(folder)
        return _Torn(opened, dies) if mine and set(mode) & set("wax+") else opened

    def moving(original: Callable) -> Callable:
        def move(*args: Any, **kwargs: Any) -> None:
            if dies():
                raise _Killed
            original(*args, **kwargs)

        return move

    moves = {name: moving(getattr(os, name)) for name in ("replace", "rename")}
    with mock.patch.multiple(os, **moves), mock.patch("io.open", open_), mock.patch("builtins.open", open_):
        yield


def check_resumable(resumable: Callable[[Path, Sequence[int], Callable[[int], int]], list[int]]) -> str:
    """Notebook 10: `resumable(folder, items, work)`: [work(item), ...] that no kill can make wrong or repeat."""
    items, calls = [3, 1, 4, 1, 5], []
    right = [10**9 + 12_345 * item for item in items]  # half of its digits is a number, too

    def work(item: int) -> int:
        calls.append(item)
        return 10**9 + 12_345 * item

    def stops(item: int) -> int:
        if len(calls) == 2:
            raise _Killed
        return work(item)

    def again(folder: str, how: str, most: int) -> None:
        try:
            found = resumable(Path(folder), items, work)
        except Exception as error:
            raise NotYet(f"{how}: the next call failed on what was left: {type(error).__name__}: {error}") from error
        hint = "Half a file was taken for a whole one: write under another name, then os.replace"
        compare(f"{how}: the next call", found, right, hint)
        expect(len(calls) <= most, f"{how}: {len(calls)} items were worked on, expected {most}: finished ones again")

    with tempfile.TemporaryDirectory() as folder:
        compare("resumable", resumable(Path(folder), items, work), right)
        compare("the items that resumable works on, once each and in their order", calls, items)
        again(folder, "nothing left to do", len(items))
    with tempfile.TemporaryDirectory() as folder:
        compare("resumable without items", resumable(Path(folder), [], work), [])

    with tempfile.TemporaryDirectory() as folder:
        calls.clear()
        try:
            resumable(Path(folder), items, stops)
        except _Killed:
            again(folder, "killed in the third item", len(items))
        else:
            expect(False, "resumable: nothing may be caught that is not your own: an interrupt has to get through")

    deaths = 0
    for last in range(1, 100):
        with tempfile.TemporaryDirectory() as folder:
            calls.clear()
            try:
                with _dying(folder, last):
                    resumable(Path(folder), items, work)
            except _Killed:
                deaths += 1
                again(folder, f"killed in write or rename {last}", len(items) + 1)
            else:
                break
    expect(deaths > 0, "resumable: nothing was written through open() or Path.write_text(), so nothing could be torn")
    return f"correct: survived {deaths} deaths"
