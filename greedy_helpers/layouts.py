"""What the lines of the family table mean: which channels of a linear layer each unit owns."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .families import UNIT_AXES


def channel_index(layout: str, n_channels: int, path: str = "layer", finer: bool = False, **sizes: int) -> Tensor:
    """Which channels each unit owns: long [n_units, width].

    `layout` is a line of the table in families.py, `sizes` the sizes of its axes except the unit axis, whose size
    follows from `n_channels`. Stretches without a unit axis belong to nobody.

    Args:
        finer: the units are the query heads of all KV heads. Keys and values then belong to nobody.

    >>> channel_index("kv dim | kv dim", 8, dim=2)
    tensor([[0, 1, 4, 5],
            [2, 3, 6, 7]])
    >>> channel_index("kv group dim", 8, finer=True, group=2, dim=2)
    tensor([[0, 1],
            [2, 3],
            [4, 5],
            [6, 7]])

    Raises:
        ValueError: `n_channels` is not a multiple of the channels of one unit.
    """
    stretches = [stretch.split() for stretch in layout.split("|")]
    per_unit = shared = 0
    for axes in stretches:
        width = math.prod(_size(axis, sizes) for axis in axes if axis not in UNIT_AXES)
        per_unit, shared = (per_unit, shared + width) if _unit_axis(axes) is None else (per_unit + width, shared)
    n_units, left_over = divmod(n_channels - shared, per_unit)
    if left_over or n_units <= 0:
        beside = f" beside {shared} shared ones" if shared else ""
        raise ValueError(
            f"{path}: expected a positive multiple of {per_unit} channels{beside} (layout {layout!r}, "
            f"{', '.join(f'{axis}={size}' for axis, size in sizes.items())}), found {n_channels}"
        )
    columns, start = [], 0
    for axes in stretches:
        shape = [n_units if axis in UNIT_AXES else _size(axis, sizes) for axis in axes]
        if (unit_axis := _unit_axis(axes)) is not None:
            # on the CPU even while a model is being built on the meta device (loading a pruned checkpoint)
            channels = torch.arange(start, start + math.prod(shape), device="cpu").view(shape)
            heads = _group_axis(axes) if finer else None
            if heads is not None:  # the query heads of a KV head stand before its key and its value
                channels = channels.narrow(heads, 0, sizes["group"]).movedim((unit_axis, heads), (0, 1))
                columns.append(channels.reshape(n_units * sizes["group"], -1))
            elif not finer:
                columns.append(channels.movedim(unit_axis, 0).reshape(n_units, -1))
        start += math.prod(shape)
    rows = n_units * sizes["group"] if finer else n_units
    return torch.cat([torch.empty(rows, 0, dtype=torch.long, device="cpu"), *columns], dim=1)


def _group_axis(axes: list[str]) -> int | None:
    return next((i for i, axis in enumerate(axes) if axis.partition("+")[0] == "group"), None)


def _unit_axis(axes: list[str]) -> int | None:
    return next((i for i, axis in enumerate(axes) if axis in UNIT_AXES), None)


def product(axes: str, sizes: Mapping[str, int]) -> int:
    """The size of `"kv group dim"`: what attributes and configs say about several axes at once."""
    return math.prod(_size(axis, sizes) for axis in axes.split())


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    """The size of `"dim"`, `"3"` or `"group+2"`."""
    return sum(int(term) if term.isdigit() else sizes[term] for term in axis.split("+"))
