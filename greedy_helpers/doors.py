"""What a model has to be before anybody looks for its structure: plain, whole, in full precision."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class UnknownFamily(ValueError):
    """The model's `model_type` has no entry in `greedy_helpers.families.FAMILIES`."""


class UnsupportedModule(ValueError):
    """A module, or a whole family, whose units cannot be cut without changing what the others compute."""


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be cut as it is: wrapped, with adapters attached, or quantized.

    Raises:
        TypeError: not a transformers model.
        UnsupportedModule: adapters of PEFT, or quantized weights, naming the layer.
    """
    check_is_model(model)
    name = type(model).__name__
    adapters = [path for path, part in model.named_modules() if _is_adapter(part)]
    wrapped = hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel)
    if wrapped or adapters or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModule(
            f"expected a plain model, found PEFT adapters in {name}{f' (at {adapters[0]})' if adapters else ''}: merge "
            "them first, model = peft_model.merge_and_unload(), and pass the result"
        )
    quantized = next((path for path, part in model.named_modules() if is_quantized(part)), None)
    if quantized is not None or getattr(model.config, "quantization_config", None):
        where = f"{quantized}: {type(model.get_submodule(quantized)).__name__}" if quantized else "its config says so"
        raise UnsupportedModule(f"expected full-precision weights, found a quantized {name} ({where}); {PRUNE_FIRST}")


def check_is_model(model: object) -> None:
    """Refuse what is no transformers model, and say where one is in it.

    Raises:
        TypeError: naming what was found.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        parts = model.named_modules() if isinstance(model, nn.Module) else getattr(model, "__dict__", {}).items()
        inside = [path for path, part in parts if path and isinstance(part, PreTrainedModel)]
        way_out = f"; it wraps one: pass .{inside[0]} of it" if inside else ""
        if isinstance(model, tuple):
            way_out = "; load_model returns a model and a tokenizer: model, tokenizer = load_model(...)"
        raise TypeError(f"expected a transformers model, found {type(model).__name__}{way_out}")


def check_own_weights(linears: Mapping[str, nn.Module]) -> None:
    """Refuse layers (by path) whose weight or bias torch computes from others: it cannot be cut or replaced.

    Raises:
        UnsupportedModule: naming the first of them.
    """
    for path, linear in linears.items():
        if name := next((name for name in ("weight", "bias") if name not in linear._parameters), None):
            raise UnsupportedModule(
                f"{path}: expected a {name} of its own, found one that is computed from other parameters; make it one "
                "first, with torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
            )


PRUNE_FIRST = "load the full-precision checkpoint, prune it, and quantize the result"
# Words in the names of modules, and of classes (torch itself has a NonDynamicallyQuantizableLinear).
_QUANTIZERS = "quant bitsandbytes torchao gptq awq hqq eetq vptq aqlm".split()
_QUANTIZED = "quantized quantlinear 4bit 8bit".split()


def _is_adapter(part: nn.Module) -> bool:
    names = [*part._modules, *part._parameters]
    return any(name in ("base_layer", "modules_to_save") or name.startswith("lora_") for name in names)


def is_quantized(part: nn.Module) -> bool:
    """Whether a module holds quantized weights, by the library it is from or by the numbers it holds."""
    weights = [value for value in part._parameters.values() if value is not None]
    # Buffers of integers are also positions or numbers of heads (one dimension), or belong to a module with parts.
    tables = [value for value in part._buffers.values() if value is not None and value.ndim > 1 and not part._modules]
    codes = any(_holds_codes(value) for value in weights + tables)
    return codes or any(_is_quantizer(kind) for kind in {type(part), *map(type, weights)})


@cache
def _is_quantizer(kind: type) -> bool:
    module, name = kind.__module__.lower(), kind.__name__.lower()
    return any(word in module for word in _QUANTIZERS) or any(word in name for word in _QUANTIZED)


def _holds_codes(value: Tensor) -> bool:
    """Integers or 8-bit floats; a mask is neither."""
    return value.is_quantized or (value.dtype.itemsize == 1 or not value.is_floating_point()) & (
        value.dtype != torch.bool
    )
