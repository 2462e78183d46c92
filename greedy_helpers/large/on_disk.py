"""Checkpoints whose blocks stay on the disk: loaded without their weights, saved one block at a time."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..doors import PRUNE_FIRST
from ..structure import blocks_path
from .lazy import entries, read_weight, same_kind


def load_lazily(
    loader: type[PreTrainedModel], place: str, config: PreTrainedConfig, dtype: torch.dtype | str
) -> PreTrainedModel:
    """The model with the weights of its blocks as placeholders, and where they are as `model.weights_on_disk`.

    Raises:
        FileNotFoundError: no safetensors files.
        ValueError: a weight of another shape, that the files lack, or that the class does not have.
    """
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    config.dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    if not (files := stored_tensors(place)):
        raise FileNotFoundError(f"{place}: lazy loading needs *.safetensors, found none")
    usual = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)  # as from_pretrained does
    try:
        with init_empty_weights(include_buffers=False):
            model = loader(config)
    finally:
        torch.set_default_dtype(usual)
    blocks, base, on_disk = f"{blocks_path(model)}.", f"{model.base_model_prefix}.", {}
    read, missing, keys = set(), set(), _keys_by_name(model, files)
    for name, holder, key, value in entries(model):
        stored = next((keys[n] for n in (name, name.removeprefix(base), base + name) if n in keys), None)
        if stored is not None and files[stored].shape != list(value.shape):
            raise misfit(place, name, value.shape, files[stored].shape)
        if stored is None:
            missing |= {name} if value.is_meta else set()
            continue
        read.add(stored)
        if isinstance(value, nn.Parameter) and name.startswith(blocks):
            on_disk[name] = files[stored].file, stored
        else:
            with safe_open(files[stored].file, "pt") as weights:
                holder[key] = same_kind(value, weights.get_tensor(stored).to(value.dtype, copy=True))
    model.tie_weights(missing_keys=missing)  # what the files hold twice, with other values, stays two
    lost = {name for name, _, _, value in entries(model) if value.is_meta and name not in on_disk}
    check_keys(model, place, lost, files.keys() - read)
    model.weights_on_disk, model.save_pretrained = on_disk, _refuse_to_save
    if model.can_generate() and (Path(place) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place)
    return model


def _refuse_to_save(*_args: object, **_options: object) -> None:
    raise ValueError(
        "save_pretrained: expected a model in memory, found one with its blocks on the disk; use "
        "greedy_helpers.save_pruned(model, folder, tokenizer)"
    )


def _keys_by_name(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Under which key of a checkpoint each weight is: some had another name once, such as the head of GPT-NeoX."""
    renamings = [part for part in get_model_conversion_mapping(model) if isinstance(part, WeightRenaming)]
    return {rename_source_key(key, renamings, [])[0]: key for key in keys}


def check_keys(model: PreTrainedModel, place: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse weights that a folder lacks or that the class has no place for: one would be random, the other lost.

    Heads that a class with another head does not have (BERT's for pairs of sentences beside that for masked words) are
    no part of what it computes. They are named in a warning.

    Raises:
        ValueError: naming the first three of each; or that they are those of a quantized checkpoint.
    """
    # Tables that older versions stored and newer ones compute: masks, frequencies, positions.
    base, ignored = f"{model.base_model_prefix}.", model._keys_to_ignore_on_load_unexpected or ()
    patterns = [*ignored, r"\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$", r"\.attn\.bias$"]
    tables = {name.removeprefix(base) for name, _ in model.named_buffers()}
    missing, unexpected = (
        sorted(missing),
        sorted(
            name
            for name in unexpected
            if name.removeprefix(base) not in tables and not any(re.search(pattern, name) for pattern in patterns)
        ),
    )
    if codes := next(filter(_QUANTIZED.search, unexpected), None):
        raise ValueError(f"load_model: {place} is quantized (it holds {codes}); {PRUNE_FIRST}")
    if not missing and unexpected and all(_is_spare_head(name, model) for name in unexpected):
        warnings.warn(
            f"{place} holds weights of heads that {type(model).__name__} does not have, {_first(unexpected)}: they are "
            "not loaded, and will not be saved",
            stacklevel=4,
        )
        return
    for names, what in ((missing, "lacks weights of"), (unexpected, "holds weights that are not of")):
        if names:
            raise ValueError(
                f"{place} {what} {type(model).__name__}, the class in its config.json: {_first(names)}. "
                "Correct config.architectures, or load the model with transformers if you can do without them"
            )


# What stands beside, or in the place of, a layer's weight in checkpoints of GPTQ, AWQ, bitsandbytes, fp8, mxfp4, ...
_QUANTIZED = re.compile(
    r"weight[_.](_?scale|_data|blocks|packed|zero_point|absmax|quant)|proj_(blocks|scales)$"
    r"|\.(qweight|qzeros|scales|g_idx|SCB|W_q|codes|codebooks)$"
)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_spare_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight is of a head beside the model's own: no part of the base model, its pooler aside."""
    base, children = model.base_model, dict(model.named_children())
    if base is model:  # a class without a head would lose the only one
        return False
    first, second, *_ = [*name.removeprefix(f"{model.base_model_prefix}.").split("."), ""]
    if first == "pooler":
        return getattr(base, first, None) is None
    if name.startswith(f"{model.base_model_prefix}.") or first in dict(base.named_children()):
        return False
    # several heads may be in one module, such as BERT's `cls`
    return first not in children or not (children[first]._parameters or hasattr(children[first], second))


def misfit(place: str, name: str, expected: Iterable[int], found: Iterable[int]) -> ValueError:
    """The error for a weight of a shape that config.json does not say."""
    return ValueError(
        f"{place}: {name}: expected shape {list(expected)}, found {list(found)}, which is not what config.json says; a "
        "model that was pruned in memory has to be saved with greedy_helpers.save_pruned, not with save_pretrained"
    )


class Stored(NamedTuple):
    """Where a tensor is, and what: `dtype` as safetensors writes it, such as `"F16"`."""

    file: str
    shape: list[int]
    dtype: str


def stored_tensors(place: str | Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint's safetensors files by its key there; those of the index, where there is one."""
    place = Path(place)
    index = place / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    files = [place / name for name in sorted(names)]
    if not index.is_file() and not files[0].is_file():
        files = sorted(place.glob("*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                part = weights.get_slice(key)
                found[key] = Stored(str(file), list(part.get_shape()), str(part.get_dtype()))
    return found


def write_lazily(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> None:
    """What save_pretrained writes, with a weight file for each block, read when its turn comes."""
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    prefix, persistent = f"{blocks_path(model)}.", model.state_dict().keys()
    once = {**dict(model.named_parameters()), **{k: v for k, v in model.named_buffers() if k in persistent}}
    groups: dict[str, list[str]] = {}
    for name in once:  # a tied weight has one name here
        groups.setdefault(name[len(prefix) :].split(".")[0] if name.startswith(prefix) else "", []).append(name)
    places, total = {}, 0
    for number, names in enumerate(groups.values(), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weights = {n: read_weight(model, n) if once[n].is_meta else once[n].detach().cpu() for n in names}
        weights = {name: cast(value, dtype).contiguous() for name, value in weights.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        total += sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`value` in `dtype` if it is of a floating type."""
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value
