"""Exporting a pruned model to a folder that plain transformers loads."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import dense_class, dense_model
from .files import replace_folder
from .large.lazy import is_lazy
from .layouts import product
from .structure import Depth2Module, UnsupportedModule, depth2_modules, family_of
from .surgery import axis_sizes


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
    model = getattr(model, "_orig_mod", model)  # inside what torch.compile returned
    if is_lazy(model):
        raise ValueError(
            "export_plain: expected a model in memory, found one with its blocks on the disk; save_pruned it"
        )
    family, edits = family_of(model), {}
    modules = depth2_modules(model, unit="kv")
    dense = {module.name: module for module in depth2_modules(dense_model(model), unit="kv")}
    for layout in family.modules:
        mine = [module for module in modules if module.layout == layout]
        counts = sorted({_count(module) for module in mine})
        if counts == sorted({_count(dense[module.name]) for module in mine}):
            continue
        if len(counts) > 1:
            raise ValueError(
                f"export_plain: one config describes all blocks, so {mine[0].name} and its like need the same number "
                f"of units, found {', '.join(counts)}; use save_pruned, which stores any sizes"
            )
        if not layout.config:
            raise UnsupportedModule(
                f"export_plain: a plain {model.config.model_type} config cannot say that {mine[0].name} has "
                f"{counts[0]} of {_count(dense[mine[0].name])} units; use save_pruned"
            )
        sizes = axis_sizes(mine[0], mine[0].n_units)
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

    return replace_folder(folder, write, overwrite)


def _count(module: Depth2Module) -> str:
    return f"{module.n_units}" + (f" (with {module.n_units * module.group} query heads)" if module.group > 1 else "")


def _export_classes(model: PreTrainedModel, export_as: str | None) -> list[tuple[type, type]]:
    ours = dense_class(model)
    found = [(type(model.config), ours)]
    if export_as is not None:
        head = ours.__name__.removeprefix(type(model.config).__name__.removesuffix("Config"))
        if hasattr(transformers, export_as + head):
            found.append((getattr(transformers, f"{export_as}Config"), getattr(transformers, export_as + head)))
    return found


def _write_plain(model: PreTrainedModel, config_class: type, model_class: type, edits: dict, folder: Path) -> None:
    values = copy.deepcopy(model.config).to_dict() | edits
    for ours in ("pruned_units", "added_biases"):
        values.pop(ours, None)
    if config_class is not type(model.config):
        known = config_class().to_dict().keys() | edits.keys() | {"dequantized_from"}
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
    if model.can_generate():  # as it is: what transformers would refuse to write did not hinder the model either
        model.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
