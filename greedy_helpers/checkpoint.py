"""Loading models by name, saving pruned ones, and loading those again.

A pruned model is an ordinary Hugging Face folder with two additions: an entry `pruned_units` in config.json (module
path -> number of units left, of both KV and query heads where they are grouped; and `added_biases`, where a remedy gave
a bias to a layer without one) and a manifest `pruned.json` (format, checksums, how it was pruned). :func:`load_model`
builds the dense architecture without memory, cuts it to size with the same surgery that pruned it, and lets
transformers fill in the weights: whatever surgery can do, a checkpoint can hold.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .allocation import keep_best
from .card import model_card
from .data import EMBEDDED
from .files import replace_folder, sha256_of
from .large.lazy import is_lazy
from .large.on_disk import cast, check_keys, load_lazily, misfit, stored_tensors, write_lazily
from .loading import load_tokenizer_of, model_class, read_config, refuse_quantized, resolve, without_report
from .reconstruct import add_to_bias
from .structure import depth2_modules, linears_of, weight_of
from .surgery import remove_units

if TYPE_CHECKING:
    from .report import PruneReport

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
        name_or_path: an embedded model (`"llama-mini"`, `"gpt2-mini"`), the public model that `make real` installs
            (`"smollm2-135m"`, see :mod:`greedy_helpers.public`), a local folder (dense or saved by
            :func:`save_pruned`), or a Hugging Face Hub id (`"openai-community/gpt2"`).
        device: default: CUDA where there is one, else the CPU.
        dtype: default: float32 on the CPU, the checkpoint's own on an accelerator.
        lazy: leave the blocks' weights in the folder's safetensors files, and only the rest in the CPU's memory. Such a
            model can be pruned block by block (:func:`~greedy_helpers.pruning.prune` with a `work_dir`, and `device` to
            work on a GPU) and saved; it cannot run as a whole. `device` decides the default dtype only.
        placement: `device_map` and what goes with it (`max_memory`, `offload_folder`): accelerate spreads a model that
            is larger than one device, to be run but not pruned. In place of `device`. `trust_remote_code=True` runs
            Python code that comes with the model; without it nobody is asked, and such a model is refused.

    Raises:
        FileNotFoundError: no such embedded model or folder, a folder that lacks a file, or a Hub id that is
            neither cached nor reachable.
        ValueError: a quantized checkpoint, one with code of its own, a config that its class refuses, weights that are
            missing, of other shapes, or not of the class in `config.architectures`; a pruned checkpoint that is damaged
            or does not fit, see :func:`load_pruned`.
        UnsupportedModule: an encoder-decoder model.
    """
    place, is_local = resolve(str(name_or_path))
    trust = bool(placement.pop("trust_remote_code", False))
    try:
        values = PreTrainedConfig.get_config_dict(place)[0]
        # A local folder of save_pruned is checked against its manifest even if its model lost nothing.
        ours = values.get("pruned_units") or values.get("added_biases")
        if ours or (is_local and (Path(place) / MANIFEST).is_file()):
            if not is_local:
                place = snapshot_download(place)
            return load_pruned(place, device, dtype, lazy=lazy, **placement)
        config = read_config(place, values, trust)
        return _load(model_class(place, config, trust), place, config, device, dtype, lazy, trust, **placement)
    except (OSError, SafetensorError) as error:
        if is_local:
            raise FileNotFoundError(f"load_model: {place} is not a complete model folder: {error}") from error
        raise FileNotFoundError(
            f"load_model: {place!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a local folder, nor a "
            f"Hub model that is cached or reachable from here. The embedded models need no network. ({error})"
        ) from error


def check_config(name_or_path: str | Path) -> PreTrainedConfig | None:
    """The config of a model, or its refusal by that alone, before anything else is read; None if it cannot be read.

    Raises:
        ValueError, UnsupportedModule: as :func:`load_model`.
    """
    place = resolve(str(name_or_path))[0]
    try:
        return read_config(place, PreTrainedConfig.get_config_dict(place)[0])
    except OSError:  # load_model says what is missing
        return None


def model_without_weights(name_or_path: str | Path) -> PreTrainedModel | None:
    """The model that :func:`load_model` would load, on the meta device: its structure. None as for the config.

    Raises:
        ValueError, UnsupportedModule: as :func:`load_model`.
    """
    if (config := check_config(name_or_path)) is None:
        return None
    ours = getattr(config, "pruned_units", None) or getattr(config, "added_biases", None)
    loader = _loader_of_pruned(config) if ours else model_class(str(name_or_path), config)
    with torch.device("meta"):
        return loader(config)


def load_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer alone, without the weights; names as in :func:`load_model`."""
    return load_tokenizer_of(resolve(str(name_or_path))[0], trust_remote_code)


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
            f"load_pruned: {folder} has no {MANIFEST}: not saved by gh.save_pruned, or not completely copied"
        ) from error
    except ValueError as error:
        raise ValueError(f"load_pruned: {folder / MANIFEST} is not JSON: {error}") from error
    found = {key: manifest.get(key) if isinstance(manifest, dict) else None for key in _FORMAT}
    if found != _FORMAT or not isinstance(manifest.get("sha256"), dict):
        raise ValueError(
            f"load_pruned: expected a manifest of {_FORMAT} with checksums, found {found} in {folder / MANIFEST}"
        )
    # What transformers may read as weights; a trainer's optimizer.pt is none.
    weights = {path.name for pattern in ("*.safetensors", "pytorch_model*") for path in folder.glob(pattern)}
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
    config = read_config(str(folder), PreTrainedConfig.get_config_dict(folder)[0])
    return _load(_loader_of_pruned(config), str(folder), config, device, dtype, lazy, **placement)


def _load(loader, place: str, config: PreTrainedConfig, device, dtype, lazy=False, trust=False, **placement):
    if placement.get("device_map") is not None and (lazy or device is not None):
        raise ValueError("expected one of device, device_map and lazy, found device_map and another")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    tokenizer = None
    if not Path(place).is_dir() or any(Path(place).glob("token*")):
        tokenizer = load_tokenizer_of(place, trust)
    if lazy and not Path(place).is_dir():
        place = snapshot_download(place, allow_patterns=["*.json", "*.safetensors"])
    refuse_quantized(place, placement)
    if lazy:
        return load_lazily(loader, place, config, dtype).eval(), tokenizer
    with without_report():  # it is in the errors
        model, info = loader.from_pretrained(
            place, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **placement
        )
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise misfit(place, name, expected, stored)
    check_keys(model, place, info["missing_keys"], info["unexpected_keys"])
    if not Path(place).is_dir():
        with suppress(OSError):  # nothing is looked up, the files have just been read
            refuse_quantized(snapshot_download(place, local_files_only=True), {})
    return model.to(device).eval() if placement.get("device_map") is None else model.eval(), tokenizer


def _loader_of_pruned(config: PreTrainedConfig) -> type[PreTrainedModel]:
    name = (config.architectures or ["none"])[0]
    base = getattr(transformers, name, None)
    if base is None:
        raise ValueError(f"load_pruned: config.json names the class {name!r}, which transformers does not have")
    return _cut_class(base)


@cache
def _cut_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass that cuts itself to the sizes in `config.pruned_units` when built, and saves what loads again."""

    def __init__(self, config, *args, **kwargs) -> None:
        base.__init__(self, config, *args, **kwargs)
        blocks = {module.name: module.block for module in depth2_modules(self)}
        for name, left in (getattr(config, "pruned_units", None) or {}).items():
            if name not in blocks:
                raise ValueError(f"load_pruned: config.json names the module {name!r}, which the model lacks")
            _cut_to(self, name, blocks[name], left)
        linears = linears_of(self)
        for path in getattr(config, "added_biases", None) or ():  # filled with what was saved
            if path not in linears:
                raise ValueError(f"load_pruned: config.json names the linear layer {path!r}, which the model lacks")
            add_to_bias(linears[path], weight_of(linears[path]).new_zeros(weight_of(linears[path]).shape[0]))

    def save_pretrained(self, save_directory, is_main_process=True, **options) -> None:
        cut = _cut_of(self)
        base.save_pretrained(self, save_directory, is_main_process, **options)
        if is_main_process:
            # A trainer writes its own files into the same folder, and writes them again.
            _describe(
                self, Path(save_directory), cut, patterns=("model*.safetensors*", "config.json", "gen*config.json")
            )

    def __reduce_ex__(self, protocol):  # pickle looks classes up by name, and finds the base
        return (_empty, (base,), *base.__reduce_ex__(self, protocol)[2:])

    # transformers finds out what a class supports from its name and source, so keep the base's own.
    methods = (__init__, save_pretrained, __reduce_ex__)
    attributes = {"__module__": base.__module__, "_dense_class": base}
    return type(base.__name__, (base,), attributes | {method.__name__: method for method in methods})


def _cut_to(model: PreTrainedModel, name: str, block: int, left: object) -> None:
    """Give a module of a dense model the size that config.json says, see :func:`_units_of`; the weights come later."""
    left = left if isinstance(left, dict) else {"kv": left}
    if not left.keys() <= {"kv", "query"}:
        raise ValueError(f"load_pruned: config.json: {name}: expected the numbers of KV and query heads, found {left}")
    for unit in ("kv", "query")[: len(left)]:
        (module,) = (module for module in depth2_modules(model, [block], unit=unit) if module.name == name)
        n_units, sets, most = left.get(unit), module.n_sets, module.n_units
        if type(n_units) is not int or not 1 <= n_units <= most or n_units % sets:
            expected = f"{sets} to {most} {module.unit}s" + (f", a multiple of {sets}" if sets > 1 else "")
            raise ValueError(f"load_pruned: config.json: {name}: expected {expected}, found {n_units!r}")
        remove_units(module, keep_best(torch.zeros(most, device="cpu"), n_units, sets))


def _empty(base: type[PreTrainedModel]) -> PreTrainedModel:
    """What unpickling and copying fill with the state of a pruned model."""
    found = _cut_class(base)
    return found.__new__(found)


def dense_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The transformers class of a model, pruned or not."""
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
        report: what :func:`~greedy_helpers.pruning.prune` returned; goes into the manifest and the card.
        details: further lines of the card, e.g. `{"base model": "llama-mini", "perplexity before": 14.2}`.
        dtype: store the weights in this dtype (e.g. `torch.float16`, half the bytes); default: as they are.

    Raises:
        FileExistsError: `folder` is a file, or is not empty and `overwrite` is not set.
        OSError: the folder cannot be written.
        ValueError: the model holds weights that its class would not load again, or lacks some that it would need.
        TypeError, UnsupportedModule: a wrapped, adapted or quantized model.
    """
    model = getattr(model, "_orig_mod", model)  # inside what torch.compile returned
    cut = _cut_of(model)

    def write(partial: Path) -> None:
        if is_lazy(model):
            write_lazily(model, partial, dtype)
        else:
            dense_class(model).save_pretrained(model, partial, state_dict=_state_in(model, dtype))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _describe(model, partial, cut, dtype, report, details)

    folder = Path(folder)
    home = folder.resolve()
    replace_folder(folder, write, overwrite)
    if is_lazy(model) and folder.resolve() == home:  # what was read from this very folder is read from it again
        stored = stored_tensors(home)
        for name, (file, _) in model.weights_on_disk.items():
            if Path(file).resolve().parent == home:
                model.weights_on_disk[name] = stored[name].file, name
    return folder


def _state_in(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The state dict in `dtype`; what was one tensor under two names stays one."""
    once: dict[object, torch.Tensor] = {}
    return {
        name: once.setdefault(name if value.is_meta else (value.data_ptr(), value.shape), cast(value, dtype))
        for name, value in model.state_dict().items()
    }


def _describe(
    model: PreTrainedModel,
    folder: Path,
    cut: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    report: PruneReport | None = None,
    details: Mapping[str, object] | None = None,
    patterns: Iterable[str] = ("*",),
) -> None:
    """Beside saved weights: what config.json has to say about the cut, the card, the manifest of the files named so."""
    whole = dense_model(model)
    units, dense = _units_of(model, whole), _units_of(whole, whole)
    config = json.loads((folder / "config.json").read_text()) | cut
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if value or key not in ("pruned_units", "added_biases")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if not (folder / "README.md").exists():
        model_card(model, whole, report, details).save(folder / "README.md")
    files = {path for pattern in patterns for path in folder.glob(pattern)} - {folder / MANIFEST, folder / "README.md"}
    manifest: dict[str, Any] = {
        **_FORMAT,
        "units": {name: {"dense": dense[name], "left": n} for name, n in units.items()},
        "report": None if report is None else report.to_dict(tensors=False),
        "details": {key: str(value) for key, value in (details or {}).items()},
        "sha256": {path.name: sha256_of(path) for path in sorted(files)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _cut_of(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json has to say so that :func:`load_pruned` builds this very model: its names, shapes and sharing.

    Raises:
        ValueError: naming the weights that would be lost, or missing.
    """
    depth2_modules(model)  # refuses what cannot be described
    name, whole = dense_class(model).__name__, dense_model(model)
    if getattr(transformers, name, None) is not dense_class(model):
        raise ValueError(f"save_pruned: expected a class of transformers, found {name}: it could not be loaded again")
    units, dense = _units_of(model, whole), _units_of(whole, whole)
    ours, theirs, linears = model.state_dict().keys(), whole.state_dict().keys(), linears_of(whole)
    cut = {
        "architectures": [name],
        "pruned_units": {module: left for module, left in units.items() if left != dense[module]},
        # FLAP's remedy leaves biases in layers that had none; anybody may add one.
        "added_biases": [p for p in linears if f"{p}.bias" in ours - theirs],
    }
    head, tied = model.get_output_embeddings(), getattr(model.config, "tie_word_embeddings", None)
    if head is not None and tied != (head.weight is model.get_input_embeddings().weight):
        cut["tie_word_embeddings"] = not tied
    config = copy.deepcopy(model.config)
    for key, value in cut.items():
        setattr(config, key, value)
    with torch.device("meta"):
        again = _loader_of_pruned(config)(config)
    _check_same_weights(model, again, f"{name} with this config")
    return cut


def _units_of(model: PreTrainedModel, dense: PreTrainedModel) -> dict[str, int | dict[str, int]]:
    """Module -> its units; where query heads share KV heads in the dense model: how many there are of both."""
    grouped = {module.name for module in depth2_modules(dense) if module.group > 1}
    units = {m.name: {"kv": m.n_units, "query": m.n_units * m.group} for m in depth2_modules(model, unit="kv")}
    return {name: both if name in grouped else both["kv"] for name, both in units.items()}


def _check_same_weights(model: PreTrainedModel, again: PreTrainedModel, what: str) -> None:
    ours, theirs = ({key: list(value.shape) for key, value in m.state_dict().items()} for m in (model, again))
    differing = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    for key in sorted(differing, key=lambda key: (key not in ours, key)):
        raise ValueError(
            f"save_pruned: {key} ({ours.get(key, 'not in the model')}) would be lost: {what} has "
            f"{theirs.get(key, 'no such weight')} there{_and_more(differing)}; change the config, or undo the change"
        )
    offloaded = not is_lazy(model) and any(parameter.is_meta for parameter in model.parameters())
    if not offloaded and (alone := sorted({n for group in _shared(model) ^ _shared(again) for n in group})):
        raise ValueError(
            f"save_pruned: {', '.join(alone)}: not shared as {what} shares them; give them the same parameter, or "
            "change the config"
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _shared(model: PreTrainedModel) -> set[frozenset[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def dense_model(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model that the config alone describes, on the meta device (no memory)."""
    with torch.device("meta"):
        return dense_class(model)(model.config)
