"""What the benchmarks share: where results go, and what one has to know about the machine to read them."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from greedy_helpers.data import evaluation_tokens
from greedy_helpers.evaluate import perplexity
from greedy_helpers.files import replace_file, rows_as_json

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results"


def results_file(name: str, device: str) -> Path:
    """data/results/NAME_DEVICE.json; one file per kind of device."""
    return RESULTS / f"{name}_{device.partition(':')[0]}.json"


def machine(device: str) -> dict[str, str | int]:
    """Hardware, threads and versions: numbers from different ones do not belong in one file."""
    on_cuda = device.startswith("cuda")
    return {
        "hardware": torch.cuda.get_device_name(device) if on_cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def load_average() -> float | None:
    """Jobs that wanted a core in the last minute, our own included; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def digest(tokens: Tensor) -> str:
    """Of token ids: what was really read, whatever file or Hub it came from."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


class HeldOut:
    """Texts by name that judge a model: `windows` evenly spaced windows of `seq` tokens of each NAME=SOURCE."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sources: list[str], windows: int, seq: int) -> None:
        named = dict(source.split("=", 1) for source in sources)
        self.texts = {name: evaluation_tokens(tokenizer, windows, seq, source) for name, source in named.items()}
        self.settings = {
            "evaluation": f"{windows} evenly spaced windows of {seq} tokens per text, each with an empty context",
            "evaluation tokens, sha256": {name: digest(tokens) for name, tokens in self.texts.items()},
        }

    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        return {name: round(perplexity(model, tokens, batch_size=4), 4) for name, tokens in self.texts.items()}


def save(found: dict, out: Path) -> None:
    """Replaces the file at once, one row per line: a run that is stopped leaves a whole file behind."""
    replace_file(out, lambda partial: partial.write_text(rows_as_json(found)))


class Record:
    """A file of results: the rows that it has, and new ones, saved at once, so that a stopped run goes on.

    Attributes:
        found: the file's content: settings, rows, and what else `fresh` holds.
    """

    def __init__(self, out: Path, fresh: dict, parser: argparse.ArgumentParser) -> None:
        """`fresh` is what a new file begins with. An old one with other settings is refused, through the parser."""
        self.out, self.found = out, {**fresh, "rows": []}
        if out.exists():
            self.found = json.loads(out.read_text())
            if (old := self.found["settings"]) != fresh["settings"]:
                parser.error(f"{out} was measured with {old}, not {fresh['settings']}; name another file")

    def known(self, **key: object) -> dict | None:
        """The row with these entries."""
        return next((row for row in self.found["rows"] if row.items() >= key.items()), None)

    def add(self, row: dict) -> None:
        print({key: value for key, value in row.items() if not isinstance(value, list)}, flush=True)
        self.found["rows"].append(row)
        save(self.found, self.out)
