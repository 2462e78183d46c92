"""Fair comparisons: one calibration set, one budget, one evaluation for every method; sweeps that can be resumed."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .checkpoint import load_model
from .criteria import random_scores
from .data import calibration_tokens, default_sources, evaluation_tokens
from .evaluate import perplexity
from .files import replace_file, rows_as_json
from .pruning import prune
from .recipes import Recipe
from .structure import Unit

_PACKAGE = Path(__file__).resolve().parent
# Recorded measurements that the notebooks plot: part of an installed package, or in data/ of a clone.
RESULTS = _PACKAGE / "results" if (_PACKAGE / "results").is_dir() else _PACKAGE.parent / "data" / "results"


@dataclass(frozen=True)
class Settings:
    """What all runs of a sweep share. Windows are packed; calibration is training text, evaluation is held out.

    Attributes:
        calibration, evaluation: windows per run and per text.
        seq: tokens per window, of both.
        source: the calibration text; None: the first of the model's default sources.
        damp: of every recipe.
        unit: what is removed where query heads share KV heads, see :func:`~greedy_helpers.pruning.prune`.
        column: of a calibration text that is a table.
    """

    calibration: int = 32
    evaluation: int = 48
    seq: int = 256
    source: str | None = None
    damp: float = 1e-2
    unit: Unit = "query"
    column: str = "text"


Judge = Callable[[PreTrainedModel], dict[str, float]]


def sweep(
    out: str | Path,
    models: Sequence[str],
    recipes: Iterable[Recipe],
    ratios: Sequence[float],
    seeds: Sequence[int] = (0,),
    settings: Settings = Settings(),
    *,
    extra: Callable[[str], Judge] | None = None,
    progress: bool = True,
) -> dict:
    """Every recipe at every ratio and calibration seed on every model, written to a JSON file after every run.

    A killed sweep goes on where it stopped: call it again with the same file. Rows are never measured twice.

    Args:
        out: the JSON file; made if it is not there.
        models: names for :func:`~greedy_helpers.checkpoint.load_model`.
        extra: model name -> a function of the model whose numbers join each row (e.g. accuracies).

    Returns:
        `{"settings": ..., "dense": {model: {text: perplexity}}, "texts": [...], "rows": [...]}`. A row has model,
        ratio, criterion, remedy, allocation, seed, one perplexity per text, the share of block and of all parameters
        left, and seconds.

    Raises:
        ValueError: the file holds results of other settings; a recipe with another damping, or with functions of your
            own, which a row could not name.
    """
    out, recipes = Path(out), list(recipes)
    for recipe in recipes:
        if recipe.damp != settings.damp or recipe_of(recipe.names, recipe.damp) != recipe:
            raise ValueError(
                f"sweep: expected recipes of names, with the damping of the settings ({settings.damp:g}): a row has no "
                f"other words for them; found {recipe!r}"
            )
    found = json.loads(out.read_text()) if out.exists() else {"settings": _described(settings), "dense": {}, "rows": []}
    stored = {key: value for key, value in found["settings"].items() if key in asdict(settings)}
    mine = asdict(Settings()) | stored  # files of older versions lack some
    if mine != asdict(settings):
        raise ValueError(f"sweep: {out} holds results of {mine}, expected {asdict(settings)}; name another file")
    done = {_key(row) for row in found["rows"]}
    wanted = [
        {"model": model, "ratio": ratio, **_names(recipe), "seed": seed}
        for model, seed, ratio, recipe in product(models, seeds, ratios, recipes)
    ]
    todo = [row for row in wanted if _key(row) not in done]
    subject: _Subject | None = None
    for row in tqdm(todo, desc="sweep", unit="run", disable=not progress):
        if subject is None or subject.name != row["model"]:
            subject = _Subject(row["model"], settings, extra)
        if row["model"] not in found["dense"]:
            found["dense"][row["model"]] = subject.judge(subject.dense)
            found["texts"] = list(dict.fromkeys([*found.get("texts", ()), *subject.texts]))
        calibration = subject.calibration(row["seed"])
        model, recipe = copy.deepcopy(subject.dense), recipe_of(row, settings.damp)
        report = prune(model, calibration, row["ratio"], recipe, unit=settings.unit, progress=False)
        sizes = {key: report.parameters[key] for key in ("total", "blocks")}
        left = {f"{key} left": round(after / before, 5) for key, (before, after) in sizes.items()}
        found["rows"].append(row | subject.judge(model) | left | {"seconds": round(report.seconds, 2)})
        _write(out, found)
    if not todo:
        _write(out, found)
    return found


class _Subject:
    """One model of a sweep and its texts, each tokenized once, and only if a recipe needs it."""

    def __init__(self, name: str, settings: Settings, extra: Callable[[str], Judge] | None) -> None:
        self.name, self._settings = name, settings
        self.dense, self._tokenizer = load_model(name)
        self._sources = default_sources(name)
        self.texts = {label: self._held_out(source) for label, source in self._sources.items()}
        self._more = extra(name) if extra is not None else lambda model: {}
        self._calibration: tuple[int, Tensor] | None = None  # of the seed asked for last

    def _held_out(self, source: str) -> Tensor:
        return evaluation_tokens(self._tokenizer, self._settings.evaluation, self._settings.seq, source)

    def judge(self, model: PreTrainedModel) -> dict[str, float]:
        numbers = {label: perplexity(model, tokens) for label, tokens in self.texts.items()} | self._more(model)
        return {label: round(value, 4) for label, value in numbers.items()}

    def calibration(self, seed: int) -> Tensor:
        if self._calibration is None or self._calibration[0] != seed:
            source = self._settings.source or next(iter(self._sources.values()))
            windows, seq = self._settings.calibration, self._settings.seq
            column = self._settings.column
            self._calibration = seed, calibration_tokens(self._tokenizer, windows, seq, source, seed, column)
        return self._calibration[1]


def _described(settings: Settings) -> dict:
    """The settings, and what else a reader has to know to repeat the numbers."""
    return asdict(settings) | {
        "calibration text": "random windows of the training split",
        "evaluation text": "evenly spaced windows of the held-out split; perplexity with an empty context per window",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hardware": f"{torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + ' CPU'}",
    }


def _names(recipe: Recipe) -> dict[str, str]:
    """What a row says of a recipe; the damping is one of the settings."""
    return {key: value for key, value in recipe.names.items() if key != "damp"}


def recipe_of(row: Mapping, damp: float = 1e-2) -> Recipe:
    """The recipe of a sweep's row. Random scores are drawn with the row's seed."""
    criterion = row["criterion"]
    if criterion == "random" and row.get("seed"):
        criterion = partial(random_scores, seed=row["seed"])
    return Recipe(criterion, row["remedy"], damp, row["allocation"])


def _key(row: Mapping) -> tuple:
    return tuple(row[name] for name in ("model", "ratio", "criterion", "remedy", "allocation", "seed"))


def _write(out: Path, found: dict) -> None:
    """Replaced at once: a killed sweep leaves a whole file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda partial_file: partial_file.write_text(rows_as_json(found)))


def frame(found: Mapping) -> pd.DataFrame:
    """A sweep's rows, with `method` (the recipe in words) and, per text, the excess log-perplexity over dense."""
    table = pd.DataFrame(found["rows"])
    table["method"] = [str(recipe_of(row | {"seed": 0})) for row in table.to_dict("records")]
    for text in found.get("texts", next(iter(found["dense"].values()))):  # what `extra` added is no perplexity
        if text in table:
            dense = table["model"].map({model: values[text] for model, values in found["dense"].items()})
            table[f"{text} excess"] = (table[text] / dense).map(lambda ratio: torch.tensor(ratio).log().item())
    return table
