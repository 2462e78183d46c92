"""Loading models by name, saving pruned ones, and loading those again.

A pruned model is an ordinary Hugging Face folder whose config.json has one more entry, `pruned_units`: module path ->
number of units left. :func:`load_model` reads it, builds the dense architecture without memory, cuts it to size with
the same surgery that pruned it, and lets transformers fill in the weights.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .data import EMBEDDED
from .structure import depth2_modules
from .surgery import remove_units

_PACKAGE = Path(__file__).resolve().parent
# In a clone the models are in data/; an installed wheel carries them inside the package.
_EMBEDDED_FOLDERS = (_PACKAGE / "embedded", _PACKAGE.parent / "data")


def load_model(
    name_or_path: str | Path = "llama-mini",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer), the model in eval mode.

    Args:
        name_or_path: an embedded model (`"llama-mini"`, `"gpt2-mini"`), a local folder (dense or saved by
            :func:`save_model`), or a Hugging Face Hub id (`"openai-community/gpt2"`).
        device: default: CUDA where there is one, else the CPU.
        dtype: default: float32 on the CPU, the checkpoint's own on an accelerator.

    Raises:
        FileNotFoundError: no such embedded model or folder, a folder that lacks a file, or a Hub id that is
            neither cached nor reachable.
        ValueError: a pruned checkpoint whose manifest does not fit the model.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    place, is_local = _resolve(str(name_or_path))
    try:
        config = AutoConfig.from_pretrained(place)
        tokenizer = AutoTokenizer.from_pretrained(place)
        loader = _loader_of_pruned(config) if getattr(config, "pruned_units", None) else AutoModelForCausalLM
        model = loader.from_pretrained(place, config=config, dtype=dtype)
    except (OSError, SafetensorError) as error:
        if is_local:
            raise FileNotFoundError(f"load_model: {place} is not a complete model folder: {error}") from error
        raise FileNotFoundError(
            f"load_model: {place!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a local folder, nor a "
            f"Hub model that is cached or reachable from here. The embedded models need no network. ({error})"
        ) from error
    return model.to(device).eval(), tokenizer


def _resolve(name: str) -> tuple[str, bool]:
    if name in EMBEDDED:
        found = [folder / name for folder in _EMBEDDED_FOLDERS if (folder / name).is_dir()]
        if not found:
            raise FileNotFoundError(f"load_model: the embedded model {name!r} is in none of {_EMBEDDED_FOLDERS}")
        folder = found[0]
    else:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            # "org/model" may be on the Hub; anything that can only be a path is missing.
            if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
                raise FileNotFoundError(f"load_model: expected a model folder at {folder}, found nothing there")
            return name, False
    files = {path.name for path in folder.iterdir()}
    weights = any(file.endswith(".safetensors") or file.startswith("pytorch_model") for file in files)
    missing = [need for need, there in {"config.json": "config.json" in files, "weights": weights}.items() if not there]
    if missing:
        raise FileNotFoundError(
            f"load_model: {folder} is not a complete model folder: expected config.json and *.safetensors, "
            f"found {sorted(files) or 'nothing'} (missing: {', '.join(missing)})"
        )
    return str(folder), True


def _loader_of_pruned(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """A subclass of the model's class that cuts itself to the sizes in `config.pruned_units` when built."""
    base = AutoModelForCausalLM._model_mapping[type(config)]

    def __init__(self, config, *args, **kwargs) -> None:
        base.__init__(self, config, *args, **kwargs)
        modules = {module.name: module for module in depth2_modules(self)}
        for name, n_units in config.pruned_units.items():
            if name not in modules:
                raise ValueError(f"load_model: config.json names the pruned module {name!r}, which the model lacks")
            remove_units(modules[name], torch.arange(n_units, device="cpu"))

    # transformers finds out what a class supports from its name and source, so keep the base's own.
    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a dense or pruned model that :func:`load_model` reads back with the same logits.

    Everything is written to a temporary folder beside the target and renamed at the end: a killed or failed save
    leaves no half-written checkpoint and, with `overwrite`, the old one in place.

    Args:
        tokenizer: saved along, as loading needs one.
        dtype: store the weights in this dtype (e.g. `torch.float16`, half the bytes); default: as they are.

    Raises:
        FileExistsError: `folder` exists and is not empty, and `overwrite` is not set.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise FileExistsError(f"save_model: {folder} exists and is not empty; pass overwrite=True to replace it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OSError(f"save_model: cannot write to {folder.parent}: {error}") from error
    try:
        state = {k: v if dtype is None else v.to(dtype) for k, v in model.state_dict().items()}
        model.save_pretrained(partial, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _amend_config(partial / "config.json", model, dtype)
        if folder.is_dir():
            replaced = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, replaced)
            os.replace(partial, folder)
            shutil.rmtree(replaced)
        else:
            os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.chmod(folder, 0o755)  # mkdtemp made it private
    return folder


def _amend_config(path: Path, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    config = json.loads(path.read_text())
    dense = {module.name: module.n_units for module in _dense_twin(model)}
    units = {module.name: module.n_units for module in depth2_modules(model)}
    config["pruned_units"] = {name: n for name, n in units.items() if n != dense[name]}
    if not config["pruned_units"]:
        del config["pruned_units"]
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _dense_twin(model: PreTrainedModel):
    """The depth-2 modules that the config alone describes, on the meta device (no memory)."""
    with torch.device("meta"):
        base = AutoModelForCausalLM._model_mapping[type(model.config)]
        return depth2_modules(base(model.config))


def disk_bytes(folder: str | Path) -> int:
    """Bytes of the weight files in a saved model's folder."""
    found = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    if not found:
        raise FileNotFoundError(f"disk_bytes: expected *.safetensors in {folder}, found none")
    return sum(found)
