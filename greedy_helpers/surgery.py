"""Removing units, and its twin that only zeroes them: the two must give the same outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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
        TypeError, IndexError, ValueError: see :func:`check_units`; the module is then untouched.
    """
    keep = check_units(module, keep, least=1, most=module.n_units)
    planned = []
    for group in module.groups:  # plan everything before changing anything
        weight, bias = weight_of(group.linear), group.linear.bias
        channels = torch.sort(group.index[keep].flatten()).values.to(weight.device)
        if group.side == "out":
            planned.append((group.linear, weight[channels], None if bias is None else bias[channels]))
        else:
            planned.append((group.linear, weight[:, channels], None))
    for linear, weight, bias in planned:
        set_weight(linear, weight, bias)
    sizes = module.sizes | {"kv": len(keep), "unit": len(keep)}
    for attribute, product in module.attributes.items():
        setattr(module.owner, attribute, math.prod(sizes[axis] for axis in product.split()))


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
    """Put every parameter and size of `model` back if the body raises (or is interrupted).

    Holds references, not copies: it costs nothing but the memory of the old weights until the body ends. Works
    because weights are replaced and never written into.
    """
    before = [
        (module, dict(module._parameters), {k: v for k, v in vars(module).items() if isinstance(v, int | float)})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, parameters, numbers in before:
            module._parameters.update(parameters)
            vars(module).update(numbers)
        raise
