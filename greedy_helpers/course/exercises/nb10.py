"""Checkers of notebook 10, large models."""

from __future__ import annotations

import builtins
import copy
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .common import NotYet, expect, is_tensor


def check_block_bytes(block_bytes: Callable[[LlamaConfig, int], int]) -> str:
    """Notebook 10: `block_bytes(config, itemsize)`: bytes of the weights of one Llama block without biases."""
    plain = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 80, "num_hidden_layers": 3}
    for name, sizes in (
        ("as many KV heads as heads", plain | {"num_key_value_heads": 4}),
        ("grouped-query attention", plain | {"num_key_value_heads": 2}),
        ("a head size of its own", plain | {"num_key_value_heads": 2, "head_dim": 24}),
    ):
        config = LlamaConfig(**sizes)
        with torch.device("meta"):
            weights = sum(p.numel() for p in LlamaDecoderLayer(config, 0).parameters())
        d, heads, kv, width = 32, 4, config.num_key_value_heads, config.intermediate_size
        for itemsize in (2, 4):
            before = copy.deepcopy(config).to_dict()
            found = block_bytes(config, itemsize)
            expect(isinstance(found, int), f"block_bytes: expected a whole number, found {type(found).__name__}")
            expect(config.to_dict() == before, "block_bytes: changed the config; only read it")
            right = itemsize * weights
            for wrong, why in (
                (weights, "these are numbers, not bytes"),
                (3 * right, "these are all blocks of the model; expected one"),
                (right - itemsize * 2 * d, "the two norms have d weights each"),
                (right - itemsize * d * width, "a gated FFN has three matrices: gate, up, down"),
                (
                    right + itemsize * 2 * d * (heads - kv) * config.head_dim,
                    "keys and values have num_key_value_heads heads, fewer than the queries",
                ),
                (
                    right + itemsize * (d // heads - config.head_dim) * 2 * d * (heads + kv),
                    "the head size is config.head_dim, which need not be hidden_size // num_attention_heads",
                ),
            ):
                expect(found != wrong or wrong == right, f"{name}, {itemsize} bytes a weight: found {found:,}; {why}")
            expect(found == right, f"{name}, {itemsize} bytes a weight: expected {right:,}, found {found:,}")
    return "correct: groups and head sizes included"


Part = tuple[int, Tensor, Tensor]


def check_merge(merge: Callable[[Sequence[Part]], Part]) -> str:
    """Notebook 10: `merge(parts)`: (n, mean of x, mean of x x') per process -> the same over all their tokens."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    for name, sizes in (
        ("equal shares", (10, 10)),
        ("unequal shares", (2, 11, 7)),
        ("one process", (20,)),
        ("a process without tokens", (9, 0, 11)),
    ):
        parts = []
        for share in x.split(sizes):
            seen = max(len(share), 1)  # a process without tokens reports zeros
            parts.append((len(share), share.sum(0) / seen, share.T @ share / seen))
        before = copy.deepcopy(parts)
        found = merge(parts)
        pairs = zip([t for part in before for t in part[1:]], [t for part in parts for t in part[1:]], strict=False)
        same = all(torch.equal(old, new) for old, new in pairs)
        expect(same and len(parts) == len(before), "merge: changed its argument; work on copies")
        expect(isinstance(found, tuple) and len(found) == 3, f"merge: expected (n, mean, second), found {found!r}")
        n, mean, second = int(found[0]), is_tensor(found[1], (3,), "mean"), is_tensor(found[2], (3, 3), "second")
        expect(n == 20, f"{name}: expected 20 tokens, found {n}")
        right = x.mean(0), x.T @ x / 20
        for wrong, why in (
            (sum(part[1] for part in parts) / len(parts), "every process counted alike; a larger share weighs more"),
            (right[0] * 20, "this is the sum over the tokens; expected the mean"),
        ):
            told = torch.allclose(wrong, right[0]) or not torch.allclose(mean, wrong)
            expect(told, f"{name}: mean {mean.tolist()}: {why}")
        expect(torch.allclose(mean, right[0]), f"{name}: expected the mean {right[0].tolist()}, found {mean.tolist()}")
        centred = right[1] - torch.outer(right[0], right[0])
        expect(not torch.allclose(second, centred), f"{name}: this is the covariance; expected the uncentred mean")
        expect(torch.allclose(second, right[1]), f"{name}: expected the mean of x x'\n{right[1]}\nfound\n{second}")
    return "correct: as if one process had seen all tokens"


def check_micro_batch(micro_batch: Callable[[float, float, float, int], int]) -> str:
    """Notebook 10: `micro_batch(free, fixed, per_window, n_windows)`: the largest power of two that fits."""
    for name, arguments, right in (
        ("room for five", (10.0, 4.9, 1.0, 64), 4),
        ("exactly eight", (12.0, 4.0, 1.0, 64), 8),
        ("room for one", (5.5, 4.0, 1.0, 64), 1),
        ("fewer windows than room", (100.0, 4.0, 1.0, 6), 4),
        ("as many windows as room", (100.0, 4.0, 1.0, 16), 16),
    ):
        found = micro_batch(*arguments)
        expect(isinstance(found, int), f"micro_batch: expected a whole number, found {type(found).__name__}")
        free, fixed, per_window, n = arguments
        told = f"{name}: micro_batch{arguments}: expected {right}, found {found}"
        expect(found >= 1, f"{told}; a batch has at least one window")
        expect(found <= n, f"{told}; there are only {n} windows")
        expect(fixed + found * per_window <= free, f"{told}, which takes {fixed + found * per_window} of {free}")
        expect(found & (found - 1) == 0, f"{told}, which is no power of two")
        expect(found == right, f"{told}; a larger batch fits")
    try:
        found = micro_batch(4.5, 4.0, 1.0, 64)
    except ValueError as error:
        expect(bool(str(error)), "not even one window fits: the ValueError has to say what was expected and found")
        return "correct: and it says so when nothing fits"
    expect(False, f"not even one window fits (4.0 + 1.0 of 4.5): expected a ValueError, found {found!r}")


class _Killed(BaseException):
    """What the checker stops the process with."""


class _Torn:
    """A file to which only a part of a write gets through before the process dies."""

    def __init__(self, file: Any, left: list[int]) -> None:
        self._file, self._left = file, left

    def write(self, data: Any) -> int:
        self._left[0] -= 1
        if self._left[0] == 0:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise _Killed
        return self._file.write(data)

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _dying(folder: str, where: str, call: int) -> Iterator[None]:
    """The process dies in the `call`-th write to `folder`, half done, or in (or behind) the `call`-th rename."""
    left = [call]
    opens, replace, rename = io.open, os.replace, os.rename

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = opens(file, mode, *args, **kwargs)
        mine = not isinstance(file, int) and Path(os.fsdecode(file)).is_relative_to(folder)
        return _Torn(opened, left) if mine and set(mode) & set("wax+") else opened

    def moving(original: Callable) -> Callable:
        def move(*args: Any, **kwargs: Any) -> None:
            left[0] -= 1
            if left[0] == 0 and where == "before a rename":
                raise _Killed
            original(*args, **kwargs)
            if left[0] == 0:
                raise _Killed

        return move

    with ExitStack() as stack:
        if where == "in a write":
            for module in (io, builtins):
                stack.enter_context(mock.patch.object(module, "open", open_))
        else:
            stack.enter_context(mock.patch.object(os, "replace", moving(replace)))
            stack.enter_context(mock.patch.object(os, "rename", moving(rename)))
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
        hint = "half a file was taken for a whole one: write under another name, then os.replace"
        expect(found == right, f"{how}: the next call returned {found}, expected {right}; {hint}")
        expect(len(calls) <= most, f"{how}: {len(calls)} items were worked on, expected {most}: finished ones again")

    with tempfile.TemporaryDirectory() as folder:
        found = resumable(Path(folder), items, work)
        expect(isinstance(found, list), f"resumable: expected a list of results, found {type(found).__name__}")
        expect(found == right, f"resumable: expected {right}, found {found}")
        expect(calls == items, f"resumable: expected the items once each and in their order, found {calls}")
        again(folder, "nothing left to do", len(items))
    with tempfile.TemporaryDirectory() as folder:
        expect(resumable(Path(folder), [], work) == [], "resumable: without items there are no results")

    with tempfile.TemporaryDirectory() as folder:
        calls.clear()
        try:
            resumable(Path(folder), items, stops)
        except _Killed:
            again(folder, "killed in the third item", len(items))
        else:
            expect(False, "resumable: nothing may be caught that is not your own: an interrupt has to get through")

    deaths = 0
    for where in ("in a write", "before a rename", "behind a rename"):
        for call in range(1, 30):
            with tempfile.TemporaryDirectory() as folder:
                calls.clear()
                try:
                    with _dying(folder, where, call):
                        resumable(Path(folder), items, work)
                except _Killed:
                    deaths += 1
                    again(folder, f"killed {where}, number {call}", len(items) + 1)
                else:
                    break
    expect(deaths > 0, "resumable: nothing was written through open() or Path.write_text(), so nothing could be torn")
    return f"correct: survived {deaths} deaths"
