"""Depth-2 modules: which linear layers belong together, and which of their channels belong to which unit.

x -> level 1 (parallel linears) -> nonlinearity or attention -> level 2 -> residual stream (paper, sec. 3.1).
Removing a *unit* (a KV head with its query heads, or an FFN channel) takes its output channels out of level 1 and
its input channels out of level 2; nothing outside the module changes shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .families import FAMILIES, Family, Kind, ModuleLayout

UNIT_AXES = ("kv", "unit")


class UnknownFamily(ValueError):
    """The model's `model_type` has no entry in `greedy_helpers.families.FAMILIES`."""


@dataclass(frozen=True)
class ChannelGroup:
    """The channels of one linear layer, grouped by unit.

    Attributes:
        path: the layer's path in the model, e.g. `"model.layers.3.mlp.up_proj"`.
        linear: the layer itself, `nn.Linear` or GPT-2's `Conv1D`.
        side: level 1 loses outputs (`"out"`), level 2 loses inputs (`"in"`).
        index: long [n_units, width] on the CPU; unit u owns the channels index[u].
    """

    path: str
    linear: nn.Linear | Conv1D
    side: Literal["out", "in"]
    index: Tensor


@dataclass(frozen=True)
class Depth2Module:
    """A view of one depth-2 module. After surgery ask :func:`depth2_modules` again: the indices have moved.

    Attributes:
        name: path of the owner, e.g. `"model.layers.3.mlp"`.
        kind: `"attention"`, `"ffn"` or `"gated_ffn"`.
        block: index of the block it lives in.
        owner: the transformers module that holds the linears (and their head counts).
        level1: linear's name below the owner -> its channels; all read the same input.
        level2: the channels of the one linear that writes to the residual stream.
        attributes: see :class:`~greedy_helpers.families.ModuleLayout`.
        sizes: axis sizes of the layouts, e.g. `{"kv": 8, "group": 1, "dim": 32}`.
    """

    name: str
    kind: Kind
    block: int
    owner: nn.Module
    level1: dict[str, ChannelGroup]
    level2: ChannelGroup
    attributes: dict[str, str]
    sizes: dict[str, int]

    @property
    def n_units(self) -> int:
        return len(self.level2.index)

    @property
    def groups(self) -> list[ChannelGroup]:
        """Every linear of the module, level 1 first."""
        return [*self.level1.values(), self.level2]


def family_of(model: PreTrainedModel) -> Family:
    """The layouts of the model's family.

    Raises:
        UnknownFamily: naming the model type, the known ones, and how to add one.
    """
    model_type = getattr(model.config, "model_type", type(model).__name__)
    if model_type not in FAMILIES:
        raise UnknownFamily(
            f"no layout for model type {model_type!r}; known: {', '.join(sorted(FAMILIES))}. "
            "Add a Family to FAMILIES in greedy_helpers/families.py, then run tests/test_surgery.py: "
            "removing units has to equal zeroing them"
        )
    return FAMILIES[model_type]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's transformer blocks, in execution order."""
    return model.get_submodule(family_of(model).blocks)


def depth2_modules(model: PreTrainedModel, blocks: Iterable[int] | None = None) -> list[Depth2Module]:
    """All depth-2 modules in execution order (attention, FFN, attention, ...), or those of some blocks.

    Unit counts are read off the weights, so this works on dense and pruned models alike.

    Raises:
        UnknownFamily: the model's type is not in the table.
        IndexError: a block that the model does not have.
        ValueError: a weight whose channels do not factor into its layout; the layer is named.
    """
    family, found = family_of(model), []
    n_blocks = len(blocks_of(model))
    for block in range(n_blocks) if blocks is None else blocks:
        if not 0 <= block < n_blocks:
            raise IndexError(f"depth2_modules: expected blocks in [0, {n_blocks}), found {block}")
        for layout in family.modules:
            found.append(_module(model, layout, f"{family.blocks}.{block}.{layout.owner}", block))
    return found


def _module(model: PreTrainedModel, layout: ModuleLayout, name: str, block: int) -> Depth2Module:
    owner = model.get_submodule(name)
    sizes = {"dim": getattr(owner, "head_dim", 1), "group": getattr(owner, "num_key_value_groups", 1)}

    def group(linear_name: str, text: str, side: Literal["out", "in"]) -> ChannelGroup:
        linear, path = owner.get_submodule(linear_name), f"{name}.{linear_name}"
        n_channels = weight_of(linear).shape[0 if side == "out" else 1]
        return ChannelGroup(path, linear, side, channel_index(text, n_channels, path, **sizes))

    level1 = {key: group(key, text, "out") for key, text in layout.level1.items()}
    ((key, text),) = layout.level2.items()
    level2 = group(key, text, "in")
    counts = {g.path: len(g.index) for g in [*level1.values(), level2]}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{name}: expected the same number of units in every linear, found {counts}")
    sizes |= {axis: len(level2.index) for axis in UNIT_AXES}
    return Depth2Module(name, layout.kind, block, owner, level1, level2, layout.attributes, sizes)


def channel_index(layout: str, n_channels: int, path: str = "layer", **sizes: int) -> Tensor:
    """Which channels each unit owns: long [n_units, width].

    `layout` is a line of the table in families.py, `sizes` the sizes of its axes except the unit axis, whose size
    follows from `n_channels`.

    >>> channel_index("kv dim | kv dim", 8, dim=2)
    tensor([[0, 1, 4, 5],
            [2, 3, 6, 7]])

    Raises:
        ValueError: `n_channels` is not a multiple of the channels of one unit.
    """
    stretches = [stretch.split() for stretch in layout.split("|")]
    per_unit = sum(math.prod(sizes[axis] for axis in axes if axis not in UNIT_AXES) for axes in stretches)
    n_units, left_over = divmod(n_channels, per_unit)
    if left_over or n_units == 0:
        raise ValueError(
            f"{path}: expected a positive multiple of {per_unit} channels (layout {layout!r}, "
            f"{', '.join(f'{axis}={size}' for axis, size in sizes.items())}), found {n_channels}"
        )
    columns, start = [], 0
    for axes in stretches:
        shape = [n_units if axis in UNIT_AXES else sizes[axis] for axis in axes]
        # on the CPU even while a model is being built on the meta device (loading a pruned checkpoint)
        channels = torch.arange(start, start + math.prod(shape), device="cpu").view(shape)
        unit_axis = next(i for i, axis in enumerate(axes) if axis in UNIT_AXES)
        columns.append(channels.movedim(unit_axis, 0).reshape(n_units, -1))
        start += math.prod(shape)
    return torch.cat(columns, dim=1)


def weight_of(linear: nn.Linear | Conv1D) -> Tensor:
    """The weight as [d_out, d_in], whatever the layer stores (Conv1D stores the transpose). A view."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


@torch.no_grad()
def set_weight(linear: nn.Linear | Conv1D, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give a layer a new weight [d_out, d_in] and bias [d_out]: weight, bias and sizes change together.

    Dtype and device stay the layer's own. The parameters are replaced, never written into, so whoever holds the
    old ones can put them back (see `surgery.undone_on_error`). `bias=None` keeps the current bias.

    Raises:
        ValueError: a bias for a layer without one, or shapes that do not fit together.
    """
    d_out, d_in = weight.shape
    if bias is not None and linear.bias is None:
        raise ValueError("set_weight: this layer has no bias to set")
    kept = linear.bias if bias is None else bias
    if kept is not None and kept.shape != (d_out,):
        raise ValueError(f"set_weight: expected a bias of shape [{d_out}], found {list(kept.shape)}")
    stored = weight.t() if isinstance(linear, Conv1D) else weight
    linear.weight = _parameter_like(linear.weight, stored)
    if bias is not None:
        linear.bias = _parameter_like(linear.bias, bias)
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = d_out, d_in
    else:
        linear.out_features, linear.in_features = d_out, d_in


def _parameter_like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    value = value.detach().to(old.device, old.dtype)
    # a copy, so that two layers (or a layer and the caller's tensor) never share storage
    return nn.Parameter(value.clone(memory_format=torch.contiguous_format), requires_grad=old.requires_grad)
