"""Removing units, and its twin that only zeroes them: the two must give the same outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .doors import check_own_weights
from .families import UNIT_AXES
from .layouts import channel_index, product
from .structure import Depth2Module, set_weight, weight_of


def check_units(module: Depth2Module, units: Tensor, least: int, most: int) -> Tensor:
    """Sorted, distinct unit numbers of this module, between `least` and `most` of them.

    Raises:
        TypeError: not an integer tensor of one dimension.
        IndexError: numbers outside [0, n_units), or given twice.
        ValueError: too few or too many units.
    """
    units = units if isinstance(units, Tensor) else torch.tensor(units, device="cpu")
    if units.numel() == 0:
        units = units.long()
    if units.ndim != 1 or units.dtype not in (torch.long, torch.int):
        raise TypeError(f"{module.name}: expected a 1-d long tensor of units, found {units.dtype} {list(units.shape)}")
    distinct = torch.unique(units.cpu().long())  # sorted
    if len(distinct) != len(units):
        raise IndexError(f"{module.name}: expected distinct units, found {len(units) - len(distinct)} of them twice")
    if len(distinct) and not 0 <= int(distinct[0]) <= int(distinct[-1]) < module.n_units:
        raise IndexError(
            f"{module.name}: expected units in [0, {module.n_units}), found {int(distinct[0])}..{int(distinct[-1])}"
        )
    if not least <= len(distinct) <= most:
        raise ValueError(
            f"{module.name}: expected between {least} and {most} of {module.n_units} units, found {len(distinct)}; "
            "a module must keep at least one unit"
        )
    return distinct


@torch.no_grad()
def remove_units(module: Depth2Module, keep: Tensor) -> None:
    """Keep the units `keep` (long [n_keep], any order) and take all others out of the weights, in place.

    Rows of level 1 (with their biases) and columns of level 2 go; level 2's bias stays; the owner's head counts
    follow. The surviving units keep their order. `module` describes the old weights: ask
    :func:`~greedy_helpers.structure.depth2_modules` again before cutting a second time.

    Raises:
        TypeError, IndexError, ValueError: see :func:`check_units`; or not as many query heads of every KV head.
        UnsupportedModule: a weight that torch computes from other parameters.
        Whatever is raised (out of memory, too), the module is left as it was.
    """
    keep = check_units(module, keep, least=1, most=module.n_units)
    in_set = module.n_units // module.n_sets
    if len(set(left := torch.bincount(keep // in_set, minlength=module.n_sets).tolist())) > 1:
        raise ValueError(
            f"{module.name}: expected to keep the same number of query heads of every KV head, found {left}; with "
            "unit='kv' KV heads go with all their query heads"
        )
    check_own_weights({group.path: group.linear for group in module.groups})
    planned = []
    for group in module.groups:  # plan everything before changing anything
        if not group.index.numel():  # keys and values of query heads stay the very same
            continue
        weight, bias = weight_of(group.linear), group.linear.bias
        channels = group.stays(keep).nonzero().flatten().to(weight.device)
        if group.side == "out":
            planned.append((group.linear, weight[channels], None if bias is None else bias[channels]))
        else:
            planned.append((group.linear, weight[:, channels], None))
    lists = {path: _kept_entries(module, path, text, keep) for path, text in module.layout.lists.items()}
    sizes = axis_sizes(module, len(keep))
    with undone_on_error(module.owner):
        for linear, weight, bias in planned:
            set_weight(linear, weight, bias)
        for path, entries in lists.items():
            if entries is not None:
                parent, _, name = path.rpartition(".")
                setattr(module.owner.get_submodule(parent), name, entries)
        for attribute, axes in module.layout.attributes.items():
            _set_attribute(module.owner, attribute, product(axes, sizes))
        if module.unit == "query head" and "//" not in (where := module.layout.sizes["group"]):
            _set_attribute(module.owner, where, sizes["group"])
        if (names := module.layout.head_inputs) and len(keep) < module.n_units:
            heads = module.group if module.unit == "KV head" else 1
            slice_head_inputs(module.owner, names, keep, module.n_units, heads)


def axis_sizes(module: Depth2Module, n_units: int) -> dict[str, int]:
    """The sizes of all axes of the module's layouts when `n_units` are left."""
    if module.unit == "query head":
        return module.sizes | {"kv": module.n_sets, "group": n_units // module.n_sets}
    return module.sizes | dict.fromkeys(UNIT_AXES, n_units)


def _kept_entries(module: Depth2Module, path: str, layout: str, keep: Tensor) -> nn.ModuleList | None:
    """The entries of a ModuleList (one per head) that stay; None if the model has no such list."""
    try:
        entries = module.owner.get_submodule(path)
    except AttributeError:
        return None
    finer = module.unit == "query head"
    index = channel_index(layout, len(entries), f"{module.name}.{path}", finer, **module.sizes)
    return nn.ModuleList([entries[i] for i in index[keep].flatten().tolist()]) if index.numel() else entries


class _ConfigView:
    """A config of which one module reads some values differently; everything else is the model's own, live.

    A copy would stop following the model: `set_attn_implementation` has to reach every module.
    """

    def __init__(self, config: PreTrainedConfig, **values: int) -> None:
        vars(self).update(_config=config, **values)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "_config":  # copy and pickle ask before there is a config
            raise AttributeError(name)
        return getattr(self._config, name)


def _set_attribute(owner: nn.Module, attribute: str, value: int) -> None:
    if attribute.startswith("config."):
        config = owner.config
        if isinstance(config, _ConfigView):
            config = config._config
        owner.config = _ConfigView(config, **{attribute.removeprefix("config."): value})
    else:
        parent, _, name = attribute.rpartition(".")
        setattr(owner.get_submodule(parent), name, value)


def slice_head_inputs(owner: nn.Module, names: Sequence[str], keep: Tensor, n_units: int, group: int = 1) -> None:
    """From now on `owner`'s forward sees only the kept heads' slices of these arguments (alibi, per-head masks).

    The model makes such tensors once for all blocks and all heads. Which heads this block still has is a buffer of
    the owner, so it is saved, loaded, copied and moved with the weights.

    Args:
        keep: long [n_keep], sorted units among the `n_units` that are there now.
        group: query heads per unit.
    """
    before = getattr(owner, "kept_heads", None)
    before = torch.arange(n_units * group, device=keep.device) if before is None else before
    heads = (keep[:, None] * group + torch.arange(group, device=keep.device)).flatten()
    device = next(owner.parameters()).device
    if "kept_heads" in owner._buffers:
        owner.kept_heads = before[heads.to(before.device)]
    else:
        owner.register_buffer("kept_heads", before[heads].to(device))
        owner.register_forward_pre_hook(_HeadInputs(tuple(names)), with_kwargs=True)


class _HeadInputs:
    """The hook itself; a class and not a closure, so that a model that carries it can be copied and pickled."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        found = {name: kwargs[name] for name in self.names if isinstance(kwargs.get(name), Tensor)}
        return args, kwargs | {name: _slice(value, owner.kept_heads, len(hidden)) for name, value in found.items()}


def _slice(value: Tensor, heads: Tensor, batch: int) -> Tensor:
    if value.ndim == 3 and len(value) > batch:  # [batch * heads, 1, key], as Bloom has it
        return value.unflatten(0, (batch, -1))[:, heads].flatten(0, 1)
    if value.ndim == 4 and value.shape[1] > 1:  # [batch, heads, query, key]
        return value[:, heads]
    return value  # the same for all heads


@torch.no_grad()
def zero_units(module: Depth2Module, units: Tensor) -> None:
    """Silence `units` (long, any order) without changing a shape: their columns of level 2 become zero.

    Has the effect on the outputs that removing them has, at the full cost: the oracle for :func:`remove_units`.

    Raises:
        TypeError, IndexError, ValueError: see :func:`check_units`.
    """
    units = check_units(module, units, least=0, most=module.n_units - 1)
    weight = weight_of(module.level2.linear).clone()
    weight[:, module.level2.index[units].flatten().to(weight.device)] = 0
    set_weight(module.level2.linear, weight)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Put every parameter, buffer, submodule, hook and size of `model` back if the body raises or is interrupted.

    Holds references, not copies: it costs nothing but the memory of the old weights until the body ends. Works
    because weights are replaced and never written into.
    """
    # Whatever surgery changes is an entry of a module's __dict__ or of one of the dicts in it.
    before = [
        (module, {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, state in before:
            for key, value in state.items():
                if isinstance(value, dict):  # in place: torch holds on to these very dicts
                    current = vars(module)[key]
                    current.clear()
                    current.update(value)
                else:
                    vars(module)[key] = value
            for key in vars(module).keys() - state.keys():
                del vars(module)[key]
        raise
