"""Loading models by name, saving pruned ones, loading those again, and exporting to plain transformers.

A pruned model is an ordinary Hugging Face folder with two additions: an entry `pruned_units` in config.json (module
path -> number of units left; and `added_biases`, where a remedy gave a bias to a layer without one) and a manifest
`pruned.json` (format, checksums, how it was pruned). :func:`load_model` builds the dense architecture without memory,
cuts it to size with the same surgery that pruned it, and lets transformers fill in the weights: whatever surgery can
do, a checkpoint can hold.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .data import EMBEDDED
from .families import UNIT_AXES
from .files import sha256_of
from .large.lazy import entries, is_lazy, read_weight, same_kind
from .reconstruct import add_to_bias
from .structure import UnsupportedModule, blocks_path, depth2_modules, family_of, product, weight_of
from .surgery import remove_units

if TYPE_CHECKING:
    from .report import PruneReport

_PACKAGE = Path(__file__).resolve().parent
# In a clone the models are in data/; an installed wheel carries them inside the package.
_EMBEDDED_FOLDERS = (_PACKAGE / "embedded", _PACKAGE.parent / "data")
MANIFEST = "pruned.json"
_FORMAT = {"format": "greedy_helpers pruned model", "version": 1}


def load_model(
    name_or_path: str | Path = "llama-mini",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    lazy: bool = False,
    **placement,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """(model, tokenizer), the model in eval mode; no tokenizer if a local folder has none.

    Args:
        name_or_path: an embedded model (`"llama-mini"`, `"gpt2-mini"`), a local folder (dense or saved by
            :func:`save_pruned`), or a Hugging Face Hub id (`"openai-community/gpt2"`).
        device: default: CUDA where there is one, else the CPU.
        dtype: default: float32 on the CPU, the checkpoint's own on an accelerator.
        lazy: leave the blocks' weights in the folder's safetensors files, and only the rest in the CPU's memory. Such a
            model can be pruned block by block (:func:`~greedy_helpers.prune.prune` with a `work_dir`, and `device` to
            work on a GPU) and saved; it cannot run as a whole. `device` decides the default dtype only.
        placement: `device_map` and what goes with it (`max_memory`, `offload_folder`): accelerate spreads a model that
            is larger than one device, to be run but not pruned. In place of `device`.

    Raises:
        FileNotFoundError: no such embedded model or folder, a folder that lacks a file, or a Hub id that is
            neither cached nor reachable.
        ValueError: a pruned checkpoint that is damaged or does not fit, see :func:`load_pruned`.
    """
    place, is_local = _resolve(str(name_or_path))
    try:
        config = AutoConfig.from_pretrained(place)
        # A local folder of save_pruned is checked against its manifest even if its model lost nothing.
        ours = getattr(config, "pruned_units", None) or getattr(config, "added_biases", None)
        if ours or (is_local and (Path(place) / MANIFEST).is_file()):
            if not is_local:
                from huggingface_hub import snapshot_download

                place = snapshot_download(place)
            return load_pruned(place, device, dtype, lazy=lazy, **placement)
        return _load(AutoModelForCausalLM, place, config, device, dtype, lazy, **placement)
    except (OSError, SafetensorError) as error:
        if is_local:
            raise FileNotFoundError(f"load_model: {place} is not a complete model folder: {error}") from error
        raise FileNotFoundError(
            f"load_model: {place!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a local folder, nor a "
            f"Hub model that is cached or reachable from here. The embedded models need no network. ({error})"
        ) from error


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone, without the weights; names as in :func:`load_model`."""
    return AutoTokenizer.from_pretrained(_resolve(str(name_or_path))[0])


def load_pruned(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    verify: bool = True,
    lazy: bool = False,
    **placement,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """(model, tokenizer) that :func:`save_pruned` wrote, with the same logits. Reads safetensors and JSON, no pickle.

    Args:
        device, dtype, lazy, placement: as in :func:`load_model`. `device_map="auto"` spreads a pruned model over GPUs,
            CPU and disk as it does a dense one.
        verify: compare every file with its checksum first (a second per GB).

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: no manifest of ours, a file that is not the one that was saved, a weight file that does not belong
            there, or sizes that do not fit the model.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise FileNotFoundError(f"load_pruned: expected a folder at {folder}, found nothing there") from error
        raise ValueError(
            f"load_pruned: {folder} has no {MANIFEST}: not saved by save_pruned, or not completely copied"
        ) from error
    except ValueError as error:
        raise ValueError(f"load_pruned: {folder / MANIFEST} is not JSON: {error}") from error
    found = {key: manifest.get(key) if isinstance(manifest, dict) else None for key in _FORMAT}
    if found != _FORMAT or not isinstance(manifest.get("sha256"), dict):
        raise ValueError(
            f"load_pruned: expected a manifest of {_FORMAT} with checksums, found {found} in {folder / MANIFEST}"
        )
    weights = {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth")}
    if foreign := sorted(weights - manifest["sha256"].keys()):
        raise ValueError(f"load_pruned: {folder} holds weight files that were not saved with it: {', '.join(foreign)}")
    for name, expected in manifest["sha256"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load_pruned: {folder} is not a complete model folder: {name} is missing")
        if verify and (actual := sha256_of(folder / name)) != expected:
            raise ValueError(
                f"load_pruned: {folder / name} is not the file that was saved: expected SHA-256 {expected[:12]}..., "
                f"found {actual[:12]}... ({(folder / name).stat().st_size:,} bytes)"
            )
    config = AutoConfig.from_pretrained(folder)
    return _load(_loader_of_pruned(config), str(folder), config, device, dtype, lazy, **placement)


def _load(loader, place: str, config: PreTrainedConfig, device, dtype, lazy: bool = False, **placement):
    if placement.get("device_map") is not None and (lazy or device is not None):
        raise ValueError("expected one of device, device_map and lazy, found device_map and another")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    tokenizer = None
    if not Path(place).is_dir() or any(Path(place).glob("token*")):
        tokenizer = AutoTokenizer.from_pretrained(place)
    if lazy:
        return _load_lazily(loader, place, config, dtype).eval(), tokenizer
    model = loader.from_pretrained(place, config=config, dtype=dtype, **placement)
    return model.to(device).eval() if placement.get("device_map") is None else model.eval(), tokenizer


def _load_lazily(loader, place: str, config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
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
    name = (config.architectures or ["none"])[0]
    base = getattr(transformers, name, None)
    if base is None:
        raise ValueError(f"load_pruned: config.json names the class {name!r}, which transformers does not have")

    def __init__(self, config, *args, **kwargs) -> None:
        base.__init__(self, config, *args, **kwargs)
        modules = {module.name: module for module in depth2_modules(self)}
        for name, n_units in (getattr(config, "pruned_units", None) or {}).items():
            if name not in modules:
                raise ValueError(f"load_pruned: config.json names the module {name!r}, which the model lacks")
            most = modules[name].n_units
            if type(n_units) is not int or not 1 <= n_units <= most:
                raise ValueError(f"load_pruned: config.json: {name}: expected 1 to {most} units, found {n_units!r}")
            remove_units(modules[name], torch.arange(n_units, device="cpu"))
        for path in getattr(config, "added_biases", None) or ():  # filled with what was saved
            linear = self.get_submodule(path)
            add_to_bias(linear, weight_of(linear).new_zeros(weight_of(linear).shape[0]))

    # transformers finds out what a class supports from its name and source, so keep the base's own.
    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__, "_dense_class": base})


def _dense_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    return getattr(model, "_dense_class", type(model))


def save_pruned(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    report: PruneReport | None = None,
    details: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model with any sizes per module; :func:`load_pruned` reads it back with the same logits.

    Everything is written to a temporary folder beside the target and renamed at the end: a killed or failed save
    leaves no half-written checkpoint and, with `overwrite`, the old one in place. The folder has a model card
    (README.md) and can be pushed to the Hub as it is.

    Args:
        tokenizer: saved along.
        report: what :func:`~greedy_helpers.prune.prune` returned; goes into the manifest and the card.
        details: further lines of the card, e.g. `{"base model": "llama-mini", "perplexity before": 14.2}`.
        dtype: store the weights in this dtype (e.g. `torch.float16`, half the bytes); default: as they are.

    Raises:
        FileExistsError: `folder` is a file, or is not empty and `overwrite` is not set.
        OSError: the folder cannot be written.
    """

    def write(partial: Path) -> None:
        units = {module.name: module.n_units for module in depth2_modules(model)}
        dense = {module.name: module.n_units for module in depth2_modules(_meta_model(model))}
        if is_lazy(model):
            _write_lazily(model, partial, dtype)
        else:
            model.save_pretrained(partial, state_dict={k: _cast(v, dtype) for k, v in model.state_dict().items()})
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        config = json.loads((partial / "config.json").read_text())
        if pruned := {name: n for name, n in units.items() if n != dense[name]}:
            config["pruned_units"] = pruned
        if added := _added_biases(model):
            config["added_biases"] = added
        config["architectures"] = [_dense_class(model).__name__]
        if dtype is not None:
            config["dtype"] = str(dtype).removeprefix("torch.")
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (partial / "README.md").write_text(_model_card(model, units, dense, report, details or {}))
        manifest: dict[str, Any] = {
            **_FORMAT,
            "units": {name: {"dense": dense[name], "left": n} for name, n in units.items()},
            "report": None if report is None else report.to_dict(tensors=False),
            "details": {key: str(value) for key, value in (details or {}).items()},
            "sha256": {path.name: sha256_of(path) for path in sorted(partial.iterdir()) if path.name != "README.md"},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    return _write_folder(Path(folder), write, overwrite)


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _write_lazily(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> None:
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
        weights = {name: _cast(value, dtype).contiguous() for name, value in weights.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        total += sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def export_plain(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a pruned model that plain `AutoModelForCausalLM.from_pretrained` loads, without this package.

    That works if every block kept the same number of units and the family's config can say so. Llama's config wants
    the hidden size to be a multiple of the number of heads (4,096 is none of 24); the same weights are then exported
    under the Mistral class, which computes the same logits.

    Blocks that were left alone count too: a model pruned in blocks 4 to 29 only has two sizes. Other runtimes (vLLM,
    llama.cpp's converter) read the same folder; see the README.

    Raises:
        ValueError: sizes that differ between blocks, or a config that refuses them; with the way out.
        UnsupportedModule: the family's config has no words for the cut (heads of GPT-2, whose head size is derived).
        FileExistsError, OSError: as in :func:`save_pruned`.
    """
    if is_lazy(model):
        raise ValueError(
            "export_plain: expected a model in memory, found one with its blocks on the disk; save_pruned it"
        )
    family, edits = family_of(model), {}
    modules, dense = depth2_modules(model), {m.name: m.n_units for m in depth2_modules(_meta_model(model))}
    for layout in family.modules:
        mine = [module for module in modules if module.layout == layout]
        counts = sorted({module.n_units for module in mine})
        if counts == sorted({dense[module.name] for module in mine}):
            continue
        if len(counts) > 1:
            raise ValueError(
                f"export_plain: one config describes all blocks, so {mine[0].name} and its like need the same number "
                f"of units, found {counts}; use save_pruned, which stores any sizes"
            )
        if not layout.config:
            raise UnsupportedModule(
                f"export_plain: a plain {model.config.model_type} config cannot say that {mine[0].name} has "
                f"{counts[0]} of {dense[mine[0].name]} units; use save_pruned"
            )
        sizes = mine[0].sizes | dict.fromkeys(UNIT_AXES, counts[0])
        edits |= {key: product(text, sizes) for key, text in layout.config.items()}

    def write(partial: Path) -> None:
        refused = []
        for config_class, model_class in _export_classes(model, family.export_as):
            try:
                _write_plain(model, config_class, model_class, edits, partial)
                break
            except Exception as error:  # configs refuse with errors of several libraries
                refused.append(f"{config_class.__name__}: {error}")
        else:
            raise ValueError(f"export_plain: no plain config takes {edits}; use save_pruned. ({'; '.join(refused)})")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)

    return _write_folder(Path(folder), write, overwrite)


def _export_classes(model: PreTrainedModel, export_as: str | None) -> list[tuple[type, type]]:
    dense_class = _dense_class(model)
    found = [(type(model.config), dense_class)]
    if export_as is not None:
        head = dense_class.__name__.removeprefix(type(model.config).__name__.removesuffix("Config"))
        if hasattr(transformers, export_as + head):
            found.append((getattr(transformers, f"{export_as}Config"), getattr(transformers, export_as + head)))
    return found


def _write_plain(model: PreTrainedModel, config_class: type, model_class: type, edits: dict, folder: Path) -> None:
    values = copy.deepcopy(model.config).to_dict() | edits
    for ours in ("pruned_units", "added_biases"):
        values.pop(ours, None)
    if config_class is not type(model.config):
        known = config_class().to_dict().keys() | edits.keys()
        values = {k: v for k, v in values.items() if k in known and k not in ("model_type", "architectures")}
        values["sliding_window"] = None
    config = config_class(**values)
    with torch.device("meta"):
        plain = model_class(config)
    state = model.state_dict()
    expected = {name: value.shape for name, value in plain.state_dict().items()}
    differing = {n for n in expected.keys() | state.keys() if n not in state or expected.get(n) != state[n].shape}
    if differing:
        raise ValueError(f"{len(differing)} tensors do not fit, e.g. {min(differing)}")
    plain.load_state_dict(state, assign=True)  # references: the weights exist once
    plain.save_pretrained(folder)


def _meta_model(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model that the config alone describes, on the meta device (no memory)."""
    with torch.device("meta"):
        return _dense_class(model)(model.config)


def _added_biases(model: PreTrainedModel) -> list[str]:
    """Linears with a bias that the config's own model does not have: FLAP's remedy leaves them."""
    theirs = dict(_meta_model(model).named_parameters())
    biases = (f"{module.level2.path}.bias" for module in depth2_modules(model) if module.level2.linear.bias is not None)
    return [path.removesuffix(".bias") for path in biases if path not in theirs]


def _write_folder(folder: Path, write: Callable[[Path], None], overwrite: bool) -> Path:
    """Let `write` fill a temporary folder, then put it in the place of `folder`: all or nothing."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"expected a folder, or nothing, at {folder}, found a file")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty; pass overwrite=True to replace it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OSError(f"cannot write to {folder.parent}: {error}") from error
    try:
        write(partial)
        if folder.is_dir():
            replaced = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, replaced)
            try:
                os.replace(partial, folder)
            except BaseException:
                os.replace(replaced, folder)
                raise
            shutil.rmtree(replaced, ignore_errors=True)  # the new folder is in its place: no failure any more
        else:
            os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.chmod(folder, 0o755)  # mkdtemp made it private
    return folder


def _model_card(
    model: PreTrainedModel,
    units: Mapping[str, int],
    dense: Mapping[str, int],
    report: PruneReport | None,
    details: Mapping[str, object],
) -> str:
    facts = {
        "architecture": _dense_class(model).__name__,
        "parameters": f"{model.num_parameters():,}",
        "units left": f"{sum(units.values()):,} of {sum(dense.values()):,} (heads or KV groups, and FFN channels)",
    }
    if report is not None:
        facts |= {
            "ratio": "by plan" if report.ratio is None else f"{report.ratio} of the units of each module",
            "criterion": report.criterion,
            "reconstruction": "none"
            if report.refit is None
            else f"refit {report.refit}, target {report.target}, damping {report.damp}",
            "calibration": f"{report.tokens:,} tokens",
        }
    facts |= {key: str(value) for key, value in details.items()}
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return _CARD.format(rows=rows)


_CARD = """---
library_name: transformers
tags: [structured-pruning, greedy-output-approximation]
---
# A pruned language model

Whole attention heads and feed-forward channels were removed without retraining, after *Greedy Output Approximation*
(Li, Dong, Lei; arXiv 2407.19126).

| | |
|---|---|
{rows}

The blocks may differ in size, so plain `from_pretrained` refuses the weights. `pruned.json` lists every module's size
and the checksum of every file. To load:

```python
import greedy_helpers as gh

model, tokenizer = gh.load_model("path or Hub id of this folder")
```
"""


def disk_bytes(folder: str | Path) -> int:
    """Bytes of the weight files in a saved model's folder."""
    found = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    if not found:
        raise FileNotFoundError(f"disk_bytes: expected *.safetensors in {folder}, found none")
    return sum(found)
