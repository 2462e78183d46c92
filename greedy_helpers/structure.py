"""Depth-2 modules: which linear layers belong together, and which of their channels belong to which unit.

x -> level 1 (parallel linears) -> nonlinearity or attention -> level 2 -> residual stream (paper, sec. 3.1).
Removing a *unit* (an attention head or an FFN channel) takes its output channels out of level 1 and its input channels
out of level 2; nothing outside the module changes shape.

Where several query heads share a KV head there are two units to choose from: the query head, and the KV head with all
its query heads. Query heads go in equal numbers from every KV head, so that the module stays an ordinary grouped-query
attention (9 query heads on 3 KV heads -> 6 on 3). Only KV heads shrink the cache of keys and values.

What the rest of the package asks of any model is in this file, too: blocks, linears, parameters, tokens it can read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .doors import UnknownFamily, UnsupportedModule, check_is_model, check_model
from .families import CROSS, FAMILIES, REFUSED, Family, Kind, ModuleLayout
from .layouts import channel_index


@dataclass(frozen=True)
class ChannelGroup:
    """The channels of one linear layer, grouped by unit.

    Attributes:
        path: the layer's path in the model, e.g. `"model.layers.3.mlp.up_proj"`.
        linear: the layer itself, `nn.Linear` or GPT-2's `Conv1D`.
        side: level 1 loses outputs (`"out"`), level 2 loses inputs (`"in"`).
        index: long [n_units, width] on the CPU; unit u owns the channels index[u]. Channels that units share (keys and
            values of query heads) are in no row.
    """

    path: str
    linear: nn.Linear | Conv1D
    side: Literal["out", "in"]
    index: Tensor

    @property
    def n_channels(self) -> int:
        """Channels of the layer on that side, shared ones included."""
        return weight_of(self.linear).shape[0 if self.side == "out" else 1]

    def stays(self, keep: Tensor) -> Tensor:
        """Which channels are left when the units `keep` (long) stay: bool [n_channels] on the CPU.

        By what goes, so that channels that no unit owns stay.
        """
        gone = torch.ones(len(self.index), dtype=torch.bool, device="cpu")
        gone[keep] = False
        stays = torch.ones(self.n_channels, dtype=torch.bool, device="cpu")
        stays[self.index[gone].flatten()] = False
        return stays


Unit = Literal["query", "kv"]  # of attention whose query heads share KV heads
UnitChoice = Unit | Mapping[str, Unit]  # one for all modules, or by module name


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
        layout: the line of the family table it was made from.
        sizes: axis sizes of the layouts besides the number of units, e.g. `{"group": 1, "dim": 32}`.
        unit: what a unit is: `"query head"` or `"KV head"` where query heads share KV heads, `"head"` where they do not
            (or all share one that stays), `"channel"` of an FFN.
    """

    name: str
    kind: Kind
    block: int
    owner: nn.Module
    level1: dict[str, ChannelGroup]
    level2: ChannelGroup
    layout: ModuleLayout
    sizes: dict[str, int]
    unit: Literal["query head", "KV head", "head", "channel"] = "channel"

    @property
    def n_units(self) -> int:
        return len(self.level2.index)

    @property
    def n_sets(self) -> int:
        """Units come in so many sets of equal size, one after the other, that have to lose the same number each.

        The query heads of each KV head are a set; other units are all in one.
        """
        return self.n_units // self.group if self.unit == "query head" else 1

    @property
    def group(self) -> int:
        """Query heads that go when a KV head goes; 1 where each has its own, or where all share one that stays."""
        return _group(self.layout, self.sizes)

    @property
    def groups(self) -> list[ChannelGroup]:
        """Every linear of the module, level 1 first."""
        return [*self.level1.values(), self.level2]


def family_of(model: PreTrainedModel) -> Family:
    """The layouts of the model's family.

    Raises:
        TypeError, UnsupportedModule: a model that cannot be cut as it is, see :func:`check_model`.
        UnsupportedModule: a family that is refused by name, with the reason.
        UnknownFamily: naming the model type, the known ones, and how to add one.
    """
    check_model(model)
    model_type = getattr(model.config, "model_type", type(model).__name__)
    if (family := _layouts(model.config)) is not None:
        return family
    if reason := refusal(model.config):
        raise UnsupportedModule(
            f"model type {model_type!r} is not supported: {reason}. A family whose blocks are attention "
            "and dense FFNs can be added: see greedy_helpers.discover and CONTRIBUTING.md"
        )
    if (tower := _text_tower(model)) is not None:
        path, config = tower
        known = "which can be pruned by itself" if _layouts(config) else refusal(config) or "which has no layout"
        raise UnsupportedModule(
            f"model type {model_type!r} is not supported: it wraps a language model. Pass its text tower, "
            f"model.{path}, of type {config.model_type!r}: {known}"
        )
    known = sorted({key.partition(":")[0] for key in FAMILIES})
    raise UnknownFamily(
        f"no layout for model type {model_type!r}; known: {', '.join(known)}. To add one: "
        f"greedy_helpers.FAMILIES[{model_type!r}] = greedy_helpers.discover(model), or write a Family in "
        "greedy_helpers/families.py; then run tests/test_families.py: removing units has to equal zeroing them"
    )


def _layouts(config: PreTrainedConfig) -> Family | None:
    for key, family in FAMILIES.items():  # "type:flag" stands before "type"
        name, _, flag = key.partition(":")
        if name == getattr(config, "model_type", None) and (not flag or getattr(config, flag, False)):
            return family
    return None


def refusal(config: PreTrainedConfig) -> str | None:
    """Why models of this config cannot be described as depth-2 modules; None if nothing speaks against it."""
    return REFUSED.get(getattr(config, "model_type", None)) or (
        CROSS if getattr(config, "is_encoder_decoder", False) else None
    )


def _text_tower(model: PreTrainedModel) -> tuple[str, PreTrainedConfig] | None:
    """Path and config of the language model in a model that reads pictures or sound as well."""
    text = model.config.get_text_config()
    for path, part in model.named_modules():
        another = path and isinstance(part, PreTrainedModel) and part.config.model_type != model.config.model_type
        if another and (part.config.model_type == text.model_type or _layouts(part.config) is not None):
            return path, part.config
    return None


def blocks_path(model: PreTrainedModel, family: Family | None = None) -> str:
    """Where the model's list of blocks is, e.g. `"model.layers"`, or `"layers"` for a model without a head."""
    family = family or family_of(model)
    prefix = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
    return ".".join(filter(None, [prefix, family.blocks]))


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's transformer blocks, in execution order."""
    path = blocks_path(model)  # refuses what is no model
    return model.get_submodule(path)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids belong: beside the embeddings, or where accelerate brings those of an offloaded model."""
    embeddings = model.get_input_embeddings()
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if device is None else torch.device(device)


def linears_of(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Every linear layer by path, in the order of the model's definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode within the `with`, so no dropout; after it every module is in the mode that it was in before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def asking_for_gradients(parameters: Iterable[nn.Parameter], wanted: bool) -> Iterator[None]:
    """All `parameters` ask for gradients, or none does, within the `with`; after it each does as before."""
    others = [parameter for parameter in parameters if parameter.requires_grad != wanted]
    try:
        for parameter in others:
            parameter.requires_grad_(wanted)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(not wanted)


def check_tokens(model: PreTrainedModel, tokens: Tensor, *, packed: bool = False) -> None:
    """Refuse token ids the model cannot read, before any work is done.

    Args:
        packed: refuse padding, too: text that nobody writes would be measured.

    Raises:
        TypeError: no transformers model, or no integer tensor.
        ValueError: not of shape [n, seq] with seq >= 2, empty, longer than the model's context, ids outside the
            vocabulary, or more than 5% padding.
    """
    check_is_model(model)
    if not isinstance(tokens, Tensor):
        rows = isinstance(tokens, list | tuple) and len(tokens) > 0 and isinstance(tokens[0], Tensor)
        way_out = "its ['input_ids'] as a tensor" if isinstance(tokens, Mapping) else "torch.tensor(...) of it"
        way_out = "torch.stack(...) of it" if rows else way_out
        raise TypeError(
            f"expected token ids as a long tensor [n, seq], found {type(tokens).__name__}; pass {way_out}, windows of "
            "equal length without padding, as calibration_tokens makes them"
        )
    if tokens.dtype not in (torch.long, torch.int):
        raise TypeError(f"expected token ids as a long tensor [n, seq], found dtype {tokens.dtype}")
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"expected token ids of shape [n >= 1, seq >= 2], found {list(tokens.shape)}")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and tokens.shape[1] > context:
        raise ValueError(
            f"expected windows of at most {context} tokens, the context of {type(model).__name__}, "
            f"found {tokens.shape[1]}"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"expected token ids in [0, {vocabulary}), the vocabulary of {type(model).__name__}, "
            f"found ids from {low} to {high}; were the tokens made by another model's tokenizer?"
        )
    if packed and (share := _padding(model, tokens)) > 0.05:
        raise ValueError(
            f"expected packed windows without padding, found {share:.1%} pad tokens (id {model.config.pad_token_id}); "
            "lay the texts end to end, as calibration_tokens does"
        )


def _padding(model: PreTrainedModel, tokens: Tensor) -> float:
    """The share of pad tokens beside another or at the end of a window; one alone may separate documents."""
    pad = getattr(model.config, "pad_token_id", None)
    eos = getattr(model.config, "eos_token_id", None)
    if pad is None or pad in (*(eos if isinstance(eos, list) else [eos]), getattr(model.config, "bos_token_id", None)):
        return 0.0
    pads = nn.functional.pad(tokens == pad, (1, 1), value=True)
    return (pads[:, 1:-1] & (pads[:, :-2] | pads[:, 2:])).double().mean().item()


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the whole model (tied ones once) and of its blocks alone.

    A ratio is of the modules to be pruned, so "25% pruned" is less than 25% of the model: quote both.
    """
    parts = {"total": model, "blocks": blocks_of(model)}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def depth2_modules(
    model: PreTrainedModel,
    blocks: Iterable[int] | None = None,
    kinds: Iterable[Kind] | None = None,
    *,
    unit: UnitChoice = "query",
    family: Family | None = None,
) -> list[Depth2Module]:
    """All depth-2 modules in execution order (attention, FFN, attention, ...), or those of some blocks or kinds.

    Unit counts are read off the weights, so this works on dense and pruned models alike.

    Args:
        blocks: block numbers; default: all.
        kinds: some of `"attention"`, `"ffn"`, `"gated_ffn"`; default: all that can be cut.
        unit: of attention whose query heads share KV heads: `"query"` heads, or `"kv"` heads with all their query
            heads; or module name -> one of the two. Other modules have one kind of unit whatever it says.
        family: the layouts to use instead of the table's.

    Raises:
        UnknownFamily: the model's type is not in the table.
        UnsupportedModule: a refused family, or `kinds` asks for attention in a family whose heads are coupled.
        TypeError, UnsupportedModule: a wrapped, adapted or quantized model, see :func:`check_model`.
        IndexError: a block that the model does not have.
        KeyError: a unit for a module that the model does not have.
        ValueError: a kind or a unit that does not exist, or a weight whose channels do not factor into its layout.
    """
    check_model(model)
    family = family or family_of(model)
    path, modules = blocks_path(model, family), []
    n_blocks = len(model.get_submodule(path))
    kinds = set(get_args(Kind)) if kinds is None else _check_kinds(kinds, family, model)

    def name_of(layout: ModuleLayout, block: int) -> str:
        return ".".join(filter(None, [path, str(block), layout.owner]))

    _check_unit(unit, {name_of(layout, block) for layout in family.modules for block in range(n_blocks)})
    for block in range(n_blocks) if blocks is None else blocks:
        if not 0 <= block < n_blocks:
            raise IndexError(f"depth2_modules: expected blocks in [0, {n_blocks}), found {block}")
        for layout in family.modules:
            if layout.kind in kinds:
                name = name_of(layout, block)
                mine = unit if isinstance(unit, str) else unit.get(name, "query")
                modules.append(_module(model, layout, name, block, mine))
    return modules


def _check_unit(unit: UnitChoice, names: set[str]) -> None:
    by_name = unit if isinstance(unit, Mapping) else {}
    for found in by_name.values() if isinstance(unit, Mapping) else [unit]:
        if found not in get_args(Unit):
            raise ValueError(f"expected as unit of grouped-query attention one of {get_args(Unit)}, found {found!r}")
    if unknown := sorted(by_name.keys() - names):
        raise KeyError(f"unit: the model has no module {unknown[0]!r}; it has {', '.join(sorted(names)[:4])}, ...")


def _check_kinds(kinds: Iterable[Kind], family: Family, model: PreTrainedModel) -> set[Kind]:
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if not kinds <= set(get_args(Kind)):
        raise ValueError(f"expected kinds among {get_args(Kind)}, found {sorted(kinds)}")
    if "attention" in kinds and family.whole and not any(layout.kind == "attention" for layout in family.modules):
        reasons = "; ".join(f"{path}: {reason}" for path, reason in family.whole.items())
        raise UnsupportedModule(f"{model.config.model_type}: attention has to stay whole ({reasons})")
    return kinds


def _module(model: PreTrainedModel, layout: ModuleLayout, name: str, block: int, unit: Unit) -> Depth2Module:
    owner = model.get_submodule(name)
    sizes = {axis: _axis_size(owner, where) for axis, where in layout.sizes.items()}
    words = "channel" if layout.kind != "attention" else "head"
    if _group(layout, sizes) > 1:
        words = "query head" if unit == "query" else "KV head"

    def group(linear_name: str, text: str, side: Literal["out", "in"]) -> ChannelGroup:
        linear, path = owner.get_submodule(linear_name), f"{name}.{linear_name}"
        n_channels = weight_of(linear).shape[0 if side == "out" else 1]
        return ChannelGroup(path, linear, side, channel_index(text, n_channels, path, words == "query head", **sizes))

    level1 = {key: group(key, text, "out") for key, text in layout.level1.items()}
    ((key, text),) = layout.level2.items()
    level2 = group(key, text, "in")
    counts = {g.path: len(g.index) for g in [*level1.values(), level2]}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{name}: expected the same number of units in every linear, found {counts}")
    return Depth2Module(name, layout.kind, block, owner, level1, level2, layout, sizes, words)


def _axis_size(owner: nn.Module, where: str) -> int:
    """`"self.head_dim"` or `"num_heads // num_kv_heads"` read off the owner; 1 where there is no such attribute."""
    values = []
    for path in where.split(" // "):
        *parents, name = path.split(".")
        values.append(getattr(reduce(getattr, parents, owner), name, 1))
    return values[0] if len(values) == 1 else values[0] // values[1]


def _group(layout: ModuleLayout, sizes: Mapping[str, int]) -> int:
    return sizes.get("group", 1) if any("group" in text for text in layout.level2.values()) else 1


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
