"""What a folder or a Hub model is, before its weights are read: its config, its class, and the reasons to refuse it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .data import EMBEDDED
from .doors import PRUNE_FIRST, UnsupportedModule
from .families import FAMILIES
from .large.on_disk import Stored, stored_tensors
from .public import PUBLIC, place_of
from .structure import refusal

_PACKAGE = Path(__file__).resolve().parent
# In a clone the models are in data/; an installed wheel carries them inside the package.
_EMBEDDED_FOLDERS = (_PACKAGE / "embedded", _PACKAGE.parent / "data")
_FLOATS = ("F64", "F32", "F16", "BF16", *(f"torch.{name}" for name in "float64 float32 float16 bfloat16".split()))


def resolve(name: str) -> tuple[str, bool]:
    """The folder or Hub id behind a name, and whether it is a folder.

    Raises:
        FileNotFoundError: nothing there, or a folder without a config or weights.
        ValueError: GGUF weights.
    """
    if name in PUBLIC:
        place = place_of(name)
        return place, Path(place).is_dir()
    if name in EMBEDDED:
        found = [folder / name for folder in _EMBEDDED_FOLDERS if (folder / name).is_dir()]
        if not found:
            raise FileNotFoundError(f"load_model: the embedded model {name!r} is in none of {_EMBEDDED_FOLDERS}")
        folder = found[0]
    else:
        folder = Path(name).expanduser()
        if folder.suffix.lower() == ".gguf" or (folder.is_dir() and _only_gguf(folder)):
            raise ValueError(
                f"load_model: {folder}: GGUF weights are quantized; load the full-precision checkpoint they were made "
                "from, prune it, save it with export_plain, and convert that"
            )
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


def _only_gguf(folder: Path) -> bool:
    return any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_mod*"))


def read_config(place: str, values: Mapping[str, Any], trust: bool = False) -> PreTrainedConfig:
    """The config of a model, from the `values` of its config.json.

    Llama's config class wants the hidden size to be a multiple of the number of heads. A Llama that somebody pruned
    further is loaded under the class that can say its sizes and computes the same, as `export_plain` writes it.

    Args:
        trust: run the code that comes with the model.

    Raises:
        ValueError: quantized, or with code of its own, or sizes that its config class refuses.
        UnsupportedModule: encoder and decoder.
    """
    if method := _quantization(values):
        raise ValueError(f"load_model: {place} is quantized ({method}); {PRUNE_FIRST}")
    own, known = values.get("auto_map") or {}, values.get("model_type") in CONFIG_MAPPING
    name = (values.get("architectures") or [None])[0]
    if own and not trust and (not known or (any("Model" in key for key in own) and name not in dir(transformers))):
        raise ValueError(
            f"load_model: {place} needs Python code of its own ({', '.join(map(str, own.values()))}), which is not run "
            "unless you have read it and pass trust_remote_code=True"
        )
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust)
    except StrictDataclassError as error:
        config = _under_another_class(place, values, error)
    if not getattr(config, "quantization_config", True):
        del config.quantization_config  # empty: transformers takes its presence alone for quantization
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModule(f"load_model: {place}: model type {config.model_type!r}: {refusal(config)}")
    return config


def _quantization(values: Any) -> str | None:
    """The method that a config or a part of it (a text tower's) names."""
    if not isinstance(values, Mapping):
        return None
    for key in ("quantization_config", "compression_config"):
        if found := values.get(key):
            return str(found.get("quant_method", key) if isinstance(found, Mapping) else key)
    return next((method for part in values.values() if (method := _quantization(part))), None)


def _under_another_class(place: str, values: Mapping[str, Any], error: Exception) -> PreTrainedConfig:
    model_type, words = values.get("model_type", ""), str(error.__cause__ or error).split("\n")[-1].strip()
    twin = getattr(FAMILIES.get(model_type), "export_as", None)
    if twin is not None:
        own = CONFIG_MAPPING[model_type].__name__.removesuffix("Config")
        head = (values.get("architectures") or [f"{own}ForCausalLM"])[0].removeprefix(own)
        rest = {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
        try:
            config = getattr(transformers, f"{twin}Config").from_dict({**rest, "sliding_window": None})
        except StrictDataclassError:
            pass
        else:
            config.architectures = [twin + head]
            return config
    raise ValueError(f"load_model: {place}: its config.json is not one of type {model_type!r}: {words}") from error


def model_class(place: str, config: PreTrainedConfig, trust: bool = False) -> type[PreTrainedModel]:
    """The class that `config.architectures` names; the causal language model of the config's type if it names none.

    Raises:
        ValueError: neither is there.
    """
    own = getattr(config, "auto_map", None) or {}
    if trust and (code := next((own[key] for key in ("AutoModelForCausalLM", "AutoModel") if key in own), None)):
        return get_class_from_dynamic_module(code, place)
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and isinstance(config, found.config_class):
            return found
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"load_model: {place}: expected a class of transformers in config.architectures, found "
            f"{config.architectures}, and model type {config.model_type!r} has no causal language model"
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def load_tokenizer_of(place: str, trust: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer; code that comes with it is run only if `trust`.

    Raises:
        ValueError: it needs such code.
    """
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust)
    except ValueError as error:
        if trust or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"load_model: the tokenizer of {place} needs Python code of its own, which is not run unless you have "
            "read it and pass trust_remote_code=True"
        ) from error


def refuse_quantized(place: str, options: Mapping[str, Any]) -> None:
    """Refuse to quantize while loading, and weights that are stored as integers or 8-bit floats.

    Raises:
        ValueError: naming the option or the weight.
    """
    for option in ("quantization_config", "load_in_8bit", "load_in_4bit"):
        if options.get(option):
            raise ValueError(f"load_model: {option}: quantized weights cannot be pruned; {PRUNE_FIRST}")
    if not Path(place).is_dir():
        return
    for name, stored in (stored_tensors(place) or _pickled_tensors(place)).items():
        # a table such as GPT-2's mask is called a bias, too
        parameter = name.endswith("weight") or (name.endswith("bias") and len(stored.shape) == 1)
        if parameter and stored.dtype not in _FLOATS:
            raise ValueError(f"load_model: {place} is quantized ({name} is stored as {stored.dtype}); {PRUNE_FIRST}")


def _pickled_tensors(place: str) -> dict[str, Stored]:
    """What `pytorch_model*.bin` hold, as :func:`stored_tensors`; a file that cannot be read is left to transformers."""
    found = {}
    for file in sorted(Path(place).glob("pytorch_model*.bin")):
        with suppress(Exception):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
            found |= {k: Stored(str(file), list(v.shape), str(v.dtype)) for k, v in state.items()}
    return found


@contextmanager
def without_report() -> Iterator[None]:
    """transformers' table of missing and unexpected weights is not printed."""
    logger = transformers.logging.get_logger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)
