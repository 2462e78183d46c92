"""Fair comparisons: one calibration set, one budget, one evaluation for every method; sweeps that can be resumed."""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .allocation import adaptive_plan, cost_plan, n_removed, unit_parameters
from .checkpoint import load_model
from .criteria import (
    Criterion,
    by_kind,
    flap,
    obs_cost,
    output_energy,
    random_scores,
    second_moment,
    second_moment_identity,
    taylor,
    wanda_sp,
    weight_norm,
)
from .data import calibration_tokens, default_sources, evaluation_tokens
from .evaluate import perplexity
from .files import replace_file, rows_as_json
from .greedy import exact_greedy
from .large import is_lazy
from .prune import PruneReport, fixed_scores, prune, scores_of
from .structure import depth2_modules

_PACKAGE = Path(__file__).resolve().parent
# Recorded measurements that the notebooks plot: part of an installed package, or in data/ of a clone.
RESULTS = _PACKAGE / "results" if (_PACKAGE / "results").is_dir() else _PACKAGE.parent / "data" / "results"

Maker = Callable[[PreTrainedModel, Tensor, int], Criterion]


def _always(criterion: Criterion) -> Maker:
    return lambda model, calibration, seed: criterion


def _taylor(kind: str) -> Maker:
    return lambda model, calibration, seed: taylor(model, calibration, kind)


# name -> (dense model, calibration [n, seq], seed) -> criterion. Add yours to compare it with all others.
CRITERIA: dict[str, Maker] = {
    "random": lambda model, calibration, seed: partial(random_scores, seed=seed),
    "L1": _always(partial(weight_norm, p=1)),
    "L2": _always(weight_norm),
    "Wanda-sp": _always(wanda_sp),
    "FLAP WIFV": _always(flap),
    "FLAP WIFN": _always(partial(flap, metric="WIFN")),
    "FLAP IFV": _always(partial(flap, metric="IFV")),
    "Taylor vector": _taylor("vector"),
    "Taylor element1": _taylor("element1"),
    "Taylor element2": _taylor("element2"),
    "Taylor mix": _taylor("mix"),
    "second moment": _always(second_moment),
    "second moment, identity": _always(second_moment_identity),
    "output energy": _always(output_energy),
    "OBS cost": _always(obs_cost),
    "exact greedy": _always(exact_greedy()),
    "energy heads, greedy FFN": _always(by_kind(output_energy, exact_greedy())),
}
# Tries both of these and keeps the one that is better on validation text: see choose().
_BEST = "greedy, heads by trial"
_TRIED = ("exact greedy", "energy heads, greedy FFN")

# name -> how prune() repairs.
REMEDIES: dict[str, dict] = {
    "none": {},
    "bias (FLAP)": {"refit": "bias"},
    "two-step (paper)": {"refit": "pre"},
    "post": {"refit": "post"},
    "post, local target": {"refit": "post", "target": "local"},
    "both": {"refit": "both"},
    "recommended": {"refit": "both", "target": "residual"},
}

ALLOCATIONS = ("uniform", "adaptive", "cost")


@dataclass(frozen=True)
class Recipe:
    """One method: what is removed, how it is repaired, and how the budget is spread over the modules.

    Attributes:
        criterion: a key of :data:`CRITERIA`, or `"greedy, heads by trial"`: exact greedy for FFN channels, and for
            heads exact greedy or output energy, whichever :func:`choose` finds better.
        remedy: a key of :data:`REMEDIES`.
        allocation: `"uniform"`: the same share of units everywhere. `"adaptive"`: FLAP's AL-AM, one ranking of
            standardised scores taken on the dense model, with as many parameters removed as uniform would.
            `"cost"`: exact greedy's costs per parameter over the whole model, the same number of parameters.
    """

    criterion: str = "second moment"
    remedy: str = "none"
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        known = {"criterion": [*CRITERIA, _BEST], "remedy": list(REMEDIES), "allocation": list(ALLOCATIONS)}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected a {name} among {', '.join(allowed)}; found {getattr(self, name)!r}")

    def __str__(self) -> str:
        remedy = "" if self.remedy == "none" else f" + {self.remedy}"
        return self.criterion + ("" if self.allocation == "uniform" else f", {self.allocation}") + remedy


PAPER = Recipe("second moment", "two-step (paper)")
FLAP = Recipe("FLAP WIFV", "bias (FLAP)", "adaptive")
RECOMMENDED = Recipe(_BEST, "recommended")


def choose(
    model: PreTrainedModel,
    calibration: Tensor,
    ratio: float,
    recipes: Sequence[Recipe],
    validation: Tensor | None = None,
    **options,
) -> tuple[Recipe, dict[Recipe, float]]:
    """The recipe that is best on text it was not fitted to, and every recipe's perplexity there. `model` stays whole.

    Squared errors of layers cannot tell recipes apart that keep different heads; the loss can, and forward passes are
    cheap beside the pruning.

    Args:
        validation: long [n, seq], best of text that the model was not trained on either, and that nothing is reported
            on. Default: the last quarter of the calibration windows, which the recipes then do without.

    Raises:
        ValueError: neither validation windows nor four calibration windows. Otherwise as prune.
    """
    if validation is None:
        if len(calibration) < 4:
            found = len(calibration)
            raise ValueError(f"choose: expected validation windows or at least 4 calibration windows, found {found}")
        calibration, validation = calibration.tensor_split([len(calibration) - len(calibration) // 4])
    if is_lazy(model):
        raise ValueError(
            "choose: trying recipes runs whole models, and this one's blocks are on the disk; expected one criterion, "
            f"e.g. {_TRIED[-1]!r}"
        )
    perplexities, work_dir = {}, options.pop("work_dir", None)
    for recipe in recipes:
        trial = copy.deepcopy(model)
        folder = None if work_dir is None else Path(work_dir) / f"trial of {recipe}"
        apply(trial, calibration, ratio, recipe, work_dir=folder, **options)
        perplexities[recipe] = perplexity(trial, validation)
    return min(perplexities, key=perplexities.get), perplexities


def apply(
    model: PreTrainedModel,
    calibration: Tensor,
    ratio: float,
    recipe: Recipe,
    *,
    seed: int = 0,
    validation: Tensor | None = None,
    **options,
) -> PruneReport:
    """Prune `model` in place by a recipe.

    Args:
        seed: of random scores.
        validation: for recipes that try and choose, see :func:`choose`.
        options: passed on to :func:`~greedy_helpers.prune.prune` (damp, batch_size, blocks, progress, ...).

    Raises:
        As prune.
    """
    if recipe.criterion == _BEST:
        tried = [replace(recipe, criterion=name) for name in _TRIED]
        recipe, _ = choose(model, calibration, ratio, tried, validation, seed=seed, **options)
    criterion = CRITERIA[recipe.criterion](model, calibration, seed)
    amount: float | Mapping[str, int] = ratio
    if recipe.allocation != "uniform":
        modules = depth2_modules(model, options.get("blocks"), options.get("kinds"))
        wanted = sum(n_removed(m.n_units, ratio) * unit_parameters(m) for m in modules)
        passes = {key: options[key] for key in ("batch_size", "device") if key in options}
        if recipe.allocation == "adaptive":
            scores = scores_of(model, calibration, criterion, **passes)
            amount, criterion = adaptive_plan(modules, scores, wanted), fixed_scores(scores, recipe.criterion)
        else:
            scores = scores_of(model, calibration, exact_greedy(whole_path=True), **passes)
            amount = cost_plan(modules, scores, wanted)
    return prune(model, calibration, amount, criterion=criterion, **REMEDIES[recipe.remedy], **options)


@dataclass(frozen=True)
class Settings:
    """What all runs of a sweep share. Windows are packed; calibration is training text, evaluation is held out.

    Attributes:
        calibration, evaluation: windows per run and per text.
        seq: tokens per window, of both.
        source: the calibration text; None: the first of the model's default sources.
    """

    calibration: int = 32
    evaluation: int = 48
    seq: int = 256
    source: str | None = None
    damp: float = 1e-2


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
        ValueError: the file holds results of other settings.
    """
    out, recipes = Path(out), list(recipes)
    found = json.loads(out.read_text()) if out.exists() else {"settings": _described(settings), "dense": {}, "rows": []}
    mine = {key: value for key, value in found["settings"].items() if key in asdict(settings)}
    if mine != asdict(settings):
        raise ValueError(f"sweep: {out} holds results of {mine}, expected {asdict(settings)}; name another file")
    done = {_key(row) for row in found["rows"]}
    wanted = [
        {"model": model, "ratio": ratio, **asdict(recipe), "seed": seed}
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
        model, recipe = copy.deepcopy(subject.dense), Recipe(row["criterion"], row["remedy"], row["allocation"])
        validation = subject.validation() if recipe.criterion == _BEST else None
        started = time.perf_counter()
        options = {"seed": row["seed"], "damp": settings.damp, "progress": False, "validation": validation}
        report = apply(model, calibration, row["ratio"], recipe, **options)
        seconds = time.perf_counter() - started
        left = {f"{key} left": round(after / before, 5) for key, (before, after) in report.parameters.items()}
        found["rows"].append(row | subject.judge(model) | left | {"seconds": round(seconds, 2)})
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
        self._validation: Tensor | None = None

    def _held_out(self, source: str, part: Literal["test", "validation"] = "test") -> Tensor:
        return evaluation_tokens(self._tokenizer, self._settings.evaluation, self._settings.seq, source, part)

    def judge(self, model: PreTrainedModel) -> dict[str, float]:
        numbers = {label: perplexity(model, tokens) for label, tokens in self.texts.items()} | self._more(model)
        return {label: round(value, 4) for label, value in numbers.items()}

    def calibration(self, seed: int) -> Tensor:
        if self._calibration is None or self._calibration[0] != seed:
            source = self._settings.source or next(iter(self._sources.values()))
            windows, seq = self._settings.calibration, self._settings.seq
            self._calibration = seed, calibration_tokens(self._tokenizer, windows, seq, source, seed=seed)
        return self._calibration[1]

    def validation(self) -> Tensor:
        if self._validation is None:
            self._validation = torch.cat([self._held_out(source, "validation") for source in self._sources.values()])
        return self._validation


def _described(settings: Settings) -> dict:
    """The settings, and what else a reader has to know to repeat the numbers."""
    return asdict(settings) | {
        "calibration text": "random windows of the training split",
        "validation text": "as many windows halfway between those of the evaluation, for recipes that choose",
        "evaluation text": "evenly spaced windows of the held-out split; perplexity with an empty context per window",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hardware": f"{torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + ' CPU'}",
    }


def _key(row: Mapping) -> tuple:
    return tuple(row[name] for name in ("model", "ratio", "criterion", "remedy", "allocation", "seed"))


def _write(out: Path, found: dict) -> None:
    """Replaced at once: a killed sweep leaves a whole file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda partial_file: partial_file.write_text(rows_as_json(found)))


def frame(found: Mapping) -> pd.DataFrame:
    """A sweep's rows, with `method` (the recipe in words) and, per text, the excess log-perplexity over dense."""
    table = pd.DataFrame(found["rows"])
    recipes = table[["criterion", "remedy", "allocation"]].itertuples(index=False)
    table["method"] = [str(Recipe(*row)) for row in recipes]
    for text in found.get("texts", next(iter(found["dense"].values()))):  # what `extra` added is no perplexity
        if text in table:
            dense = table["model"].map({model: values[text] for model, values in found["dense"].items()})
            table[f"{text} excess"] = (table[text] / dense).map(lambda ratio: torch.tensor(ratio).log().item())
    return table
