"""Checkpoints whose blocks stay on the disk: loaded without their weights, saved one block at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..structure import blocks_path
from .lazy import entries, read_weight, same_kind


def load_lazily(loader, place: str, config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model with the weights of its blocks as placeholders, and where they are as `model.weights_on_disk`."""
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    config.dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    files = _tensors_on_disk(place)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)  # as from_pretrained does
    try:
        with init_empty_weights(include_buffers=False):
            model = loader.from_config(config) if loader is AutoModelForCausalLM else loader(config)
    finally:
        torch.set_default_dtype(usual)
    blocks, base, on_disk = f"{blocks_path(model)}.", f"{model.base_model_prefix}.", {}
    for name, holder, key, value in entries(model):
        stored = next((n for n in (name, name.removeprefix(base), base + name) if n in files), None)
        if stored is not None and files[stored][1] != list(value.shape):
            raise ValueError(f"{place}: {name}: expected shape {list(value.shape)}, found {files[stored][1]}")
        if stored is None:
            continue
        if isinstance(value, nn.Parameter) and name.startswith(blocks):
            on_disk[name] = files[stored][0], stored
        else:
            with safe_open(files[stored][0], "pt") as weights:
                holder[key] = same_kind(value, weights.get_tensor(stored).to(value.dtype, copy=True))
    model.tie_weights()
    if lost := [name for name, _, _, value in entries(model) if value.is_meta and name not in on_disk]:
        raise ValueError(f"{place}: lazy loading reads weights under their own names; not found: {', '.join(lost[:3])}")
    model.weights_on_disk = on_disk
    if (Path(place) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place)
    return model


def _tensors_on_disk(place: str) -> dict[str, tuple[str, list[int]]]:
    """Every tensor in a checkpoint's safetensors files: its key there -> (file, shape)."""
    if not Path(place).is_dir():
        from huggingface_hub import snapshot_download

        place = snapshot_download(place, allow_patterns=["*.json", "*.safetensors"])
    found = {}
    for file in sorted(Path(place).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            found |= {key: (str(file), list(weights.get_slice(key).get_shape())) for key in weights.keys()}  # noqa: SIM118
    if not found:
        raise FileNotFoundError(f"{place}: lazy loading needs *.safetensors, found none")
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
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value
