"""Residency: only the block at hand has to be on the device.

The others stay where they are at home, in the CPU's memory or, after `load_model(..., lazy=True)`, in the safetensors
files on the disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..structure import blocks_of, blocks_path, input_device


def entries(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Every parameter and buffer below `module`: (full name, the dict that holds it, its key there, the tensor)."""
    for path, part in module.named_modules(prefix=prefix):
        for holder in (part._parameters, part._buffers):
            for key, value in list(holder.items()):
                if value is not None:
                    yield f"{path}.{key}".lstrip("."), holder, key, value


def is_lazy(model: PreTrainedModel) -> bool:
    """Whether the weights of the model's blocks are on the disk (:func:`~greedy_helpers.checkpoint.load_model`)."""
    return hasattr(model, "weights_on_disk")


def read_weight(model: PreTrainedModel, name: str, device: torch.device | str | None = None) -> Tensor:
    """One weight of a lazy model, in the model's dtype: memory of its own, not a view of the file.

    Raises:
        FileNotFoundError, ValueError: the file was removed or replaced after the model was loaded.
    """
    file, key = model.weights_on_disk[name]
    wanted, why = model.get_parameter(name), f"{name}: {file} was replaced after the model was loaded; load it again"
    try:
        with safe_open(file, "pt") as weights:
            value = weights.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise FileNotFoundError(f"{why} ({error})") from error
    if value.shape != wanted.shape:
        raise ValueError(f"{why} (expected shape {list(wanted.shape)}, found {list(value.shape)})")
    return value.to(device or "cpu", wanted.dtype, copy=True)


@contextmanager
def resident(model: PreTrainedModel, index: int, device: torch.device | str | None = None) -> Iterator[nn.Module]:
    """Block `index` with all its weights on `device`; afterwards it is at home again, with whatever was changed.

    Home is the device on which it was found, and the disk for a lazy model: there weights are dropped when they leave,
    so what was changed has to be written before (`WorkFolder.commit`). Weights that nobody replaced are not
    copied back. A block that is on `device` already is left as it is.

    Raises:
        RuntimeError: weights on the meta device of a model that was not loaded with `lazy=True`.
    """
    block = blocks_of(model)[index]
    prefix = f"{blocks_path(model)}.{index}"
    lazy, moved = is_lazy(model), {}
    home = next(block.parameters()).device
    device = input_device(model) if device is None else torch.device(device)
    try:
        for name, holder, key, value in entries(block, prefix):
            if value.is_meta and not lazy:
                raise RuntimeError(
                    f"{name}: expected a weight, found a placeholder (a model that accelerate offloaded?); load the "
                    "model with lazy=True to leave its blocks on the disk"
                )
            here = read_weight(model, name, device) if value.is_meta else value.to(device)
            if here is not value:
                holder[key] = same_kind(value, here)
                moved[id(holder[key])] = holder[key], value  # both kept alive, so that ids stay unique
        yield block
    finally:
        for _, holder, key, value in entries(block, prefix):
            if id(value) in moved:
                holder[key] = moved[id(value)][1]
            elif moved and not value.is_meta:  # replaced while it was here
                holder[key] = same_kind(value, value.to(home if isinstance(value, nn.Parameter) or not lazy else "cpu"))


def same_kind(old: Tensor, value: Tensor) -> Tensor:
    """`value` as what `old` is: a parameter, or a plain tensor (a buffer)."""
    return nn.Parameter(value.detach(), requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def check_weights(module: nn.Module, prefix: str = "", skip: str | None = None) -> None:
    """Refuse weights that are NaN or Inf, in the order of the module.

    Args:
        prefix: of the module's own name, for the message.
        skip: the names that begin with this are looked at later, such as those of blocks that are elsewhere.

    Raises:
        FloatingPointError: naming the weight.
    """
    for name, parameter in module.named_parameters():
        later = parameter.is_meta or (skip is not None and name.startswith(skip))
        if not later and not parameter.isfinite().all():
            raise FloatingPointError(f"{prefix}{name}: expected finite weights, found NaN or Inf")


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of a model's weights: changes when one of them does. One pass over them, on their device.

    Of a lazy model only samples of its files are read.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().flatten()
            bits = flat.view(_BITS[flat.dtype.itemsize])
            # sums of integers do not depend on their order, so not on the number of threads either
            digest.update(str(bits.sum(dtype=torch.int64).item()).encode())
            digest.update(bits[:: max(1, len(bits) // 1024)].cpu().numpy().tobytes())
    for file in sorted({file for file, _ in getattr(model, "weights_on_disk", {}).values()}):
        size = os.path.getsize(file)
        digest.update(f"{Path(file).name} {size}".encode())
        with open(file, "rb") as content:
            for place in range(0, size, max(4096, size // 256)):
                content.seek(place)
                digest.update(content.read(4096))
    return digest.hexdigest()


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
