"""Recipes: which units go, how the rest is repaired, how strongly refits are damped, and where the budget is spent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from .allocation import Plan, adaptive_plan, asked_parameters, cost_plan, n_removed, uniform_plan, warn_of_whole
from .criteria import (
    Criterion,
    by_kind,
    fixed_scores,
    flap,
    obs_cost,
    output_energy,
    random_scores,
    second_moment,
    second_moment_identity,
    taylor_scores,
    wanda_sp,
    weight_norm,
)
from .greedy import exact_greedy, whole_path
from .reconstruct import HELD_OUT
from .remedies import REMEDIES, Remedy
from .structure import Depth2Module, UnitChoice

# Names of criteria, for recipes, tables and the command line.
CRITERIA: dict[str, Criterion] = {
    "random": random_scores,
    "L1": partial(weight_norm, p=1),
    "L2": weight_norm,
    "Wanda-sp": wanda_sp,
    "FLAP WIFV": flap,
    "FLAP WIFN": partial(flap, metric="WIFN"),
    "FLAP IFV": partial(flap, metric="IFV"),
    "second moment": second_moment,
    "second moment, identity": second_moment_identity,
    "output energy": output_energy,
    "OBS cost": obs_cost,
    "exact greedy": exact_greedy,
    "energy heads, greedy FFN": partial(by_kind, attention=output_energy, ffn=exact_greedy),
}


@dataclass(frozen=True)
class Dense:
    """What a recipe may ask about the whole model before anything is cut.

    Attributes:
        model, calibration, unit: as :func:`~greedy_helpers.pruning.prune` was given them.
        scores: criterion -> every module's scores, :func:`~greedy_helpers.pruning.scores_of` with the run's settings.
        metric: () -> the loss's metric on every module's output, :func:`~greedy_helpers.prices.loss_metric`; computed
            once, whoever asks.
        energy: () -> the stream's energy behind every module, :func:`~greedy_helpers.prices.stream_energy`.
    """

    model: PreTrainedModel
    calibration: Tensor
    unit: UnitChoice
    scores: Callable[[Criterion], dict[str, Tensor]]
    metric: Callable[[], dict[str, Tensor]]
    energy: Callable[[], dict[str, float]]


# Criteria that look at the whole dense model first.
PREPARED: dict[str, Callable[[Dense], Criterion]] = {
    "exact greedy, loss metric": lambda dense: partial(exact_greedy, metric=dense.metric()),
    **{
        f"Taylor {kind}": lambda dense, kind=kind: partial(
            fixed_scores, scores=taylor_scores(dense.model, dense.calibration, kind, unit=dense.unit)
        )
        for kind in ("vector", "element1", "element2", "mix")
    },
}

# (modules, ratio, criterion, the dense model) -> (plan, criterion to prune with).
Allocation = Callable[[Sequence[Depth2Module], float, Criterion, Dense], tuple[Plan, Criterion]]


def uniform(
    modules: Sequence[Depth2Module], ratio: float, criterion: Criterion, _dense: Dense
) -> tuple[Plan, Criterion]:
    """The same share of parameters everywhere, to the nearest unit: `ratio` of the modules' parameters go."""
    return uniform_plan(modules, asked_parameters(modules, ratio)), criterion


def by_floor(
    modules: Sequence[Depth2Module], ratio: float, criterion: Criterion, _dense: Dense
) -> tuple[Plan, Criterion]:
    """The same share of units everywhere, rounded down: floor(ratio * units) of every module go (the paper).

    Of query heads that share KV heads, floor(ratio * query heads per KV head) of each.
    """
    plan = {m.name: m.n_units - m.n_sets * n_removed(m.n_units // m.n_sets, ratio) for m in modules}
    if ratio > 0:
        warn_of_whole(modules, plan, f"{100 * ratio:.3g}% of their units is less than one")
    return plan, criterion


def adaptive(
    modules: Sequence[Depth2Module], ratio: float, criterion: Criterion, dense: Dense
) -> tuple[Plan, Criterion]:
    """FLAP's AL-AM: one ranking of standardised scores of the dense model, until `ratio` of the parameters are gone."""
    scores = dense.scores(criterion)
    plan = adaptive_plan(modules, scores, asked_parameters(modules, ratio))
    return plan, partial(fixed_scores, scores=scores)


def by_cost(
    modules: Sequence[Depth2Module], ratio: float, criterion: Criterion, dense: Dense
) -> tuple[Plan, Criterion]:
    """Exact greedy's costs per parameter, over the whole dense model, until `ratio` of the parameters are gone."""
    costs = dense.scores(whole_path())
    return cost_plan(modules, costs, asked_parameters(modules, ratio)), criterion


def by_loss(
    modules: Sequence[Depth2Module], ratio: float, criterion: Criterion, dense: Dense
) -> tuple[Plan, Criterion]:
    """The same with costs in nats: what a module's error does to the loss, to second order."""
    prices = dense.scores(whole_path(dense.metric()))
    return cost_plan(modules, prices, asked_parameters(modules, ratio)), criterion


def by_stream(
    modules: Sequence[Depth2Module], ratio: float, criterion: Criterion, dense: Dense
) -> tuple[Plan, Criterion]:
    """The same with squared errors as shares of the residual stream's energy behind the module: forward passes only."""
    costs, energy = dense.scores(whole_path()), dense.energy()
    prices = {module.name: costs[module.name] / energy[module.name] for module in modules}
    return cost_plan(modules, prices, asked_parameters(modules, ratio)), criterion


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "floor": by_floor,
    "adaptive": adaptive,
    "cost": by_cost,
    "stream prices": by_stream,
    "loss prices": by_loss,
}


@dataclass(frozen=True)
class Recipe:
    """One method.

    Attributes:
        criterion: a function (module, seen) -> scores [n_units], higher = keep, with its options bound by
            `functools.partial`; or a name in :data:`CRITERIA` or :data:`PREPARED`.
        remedy: a :class:`~greedy_helpers.remedies.Remedy`, or a name in :data:`~greedy_helpers.remedies.REMEDIES`.
        damp: ridge damping of every refit, and of criteria that solve, as a share of the mean diagonal of X'X; or
            `"held out"`: every refit chooses its own, or to be left out, by what it does on every fifth calibration
            window (:func:`~greedy_helpers.reconstruct.choose_damp`).
        allocation: what a ratio means: `"uniform"`, that share of the parameters, the same of every module up to whole
            units (:func:`~greedy_helpers.allocation.uniform_plan`); `"floor"`, that share of every module's units,
            rounded down; `"adaptive"`, `"cost"`, `"stream prices"` and `"loss prices"`, that share of all modules'
            parameters, where they score lowest.

    Raises:
        ValueError: a name that is not in its table, or damp < 0.
        TypeError: something else than a name or an object of the right kind.
    """

    criterion: Criterion | str = "exact greedy"
    remedy: Remedy | str = "post, local"
    damp: float | str = 1e-2
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        known = {"criterion": [*CRITERIA, *PREPARED], "remedy": [*REMEDIES], "allocation": [*ALLOCATIONS]}
        for field, allowed in known.items():
            value = getattr(self, field)
            if isinstance(value, str) and value not in allowed:
                raise ValueError(f"expected a {field} among {'; '.join(allowed)}: found {value!r}")
            own = {"criterion": callable(value), "remedy": isinstance(value, Remedy), "allocation": False}
            if not isinstance(value, str) and not own[field]:
                meant = {"criterion": "a function (module, seen)", "remedy": "a Remedy", "allocation": "a name"}[field]
                raise TypeError(f"expected as {field} {meant}, found {value!r}")
        if self.damp != HELD_OUT and (isinstance(self.damp, str) or not self.damp >= 0):
            raise ValueError(f"expected damp >= 0 or {HELD_OUT!r}, found {self.damp!r}")

    @property
    def names(self) -> dict[str, str | float]:
        """The recipe in plain words and numbers, ready for JSON."""
        return {
            "criterion": name_of(self.criterion),
            "remedy": name_of(self.remedy),
            "damp": self.damp,
            "allocation": self.allocation,
        }

    def __str__(self) -> str:
        names = self.names
        remedy = "" if names["remedy"] == "none" else f" + {names['remedy']}"
        spread = "" if self.allocation in ("uniform", "floor") else f", {self.allocation}"  # both: equal shares
        return names["criterion"] + spread + remedy

    def resolved(self, dense: Dense) -> tuple[Criterion, Remedy]:
        """The functions that the names stand for. Some criteria look at the dense model now."""
        criterion, remedy = self.criterion, self.remedy
        if isinstance(criterion, str):
            prepare = PREPARED.get(criterion)
            criterion = CRITERIA[criterion] if prepare is None else prepare(dense)
        return criterion, REMEDIES[remedy] if isinstance(remedy, str) else remedy


def name_of(part: Criterion | Remedy | str) -> str:
    """What a criterion or a remedy is called: its name in the tables, or its function's with the options."""
    if isinstance(part, str):
        return part
    table = REMEDIES if isinstance(part, Remedy) else CRITERIA
    if (name := next((key for key, value in table.items() if _same(value, part)), None)) is not None:
        return name
    if isinstance(part, Remedy):
        given = {key: value for key, value in vars(part).items() if value not in (None, False)}
        return f"Remedy({', '.join(f'{key}={_short(value)}' for key, value in given.items())})"
    if isinstance(part, partial):
        given = [*map(_short, part.args), *(f"{key}={_short(value)}" for key, value in part.keywords.items())]
        return f"{getattr(part.func, '__name__', _short(part.func))}({', '.join(given)})"
    return getattr(part, "__name__", type(part).__name__)


def _same(one: Criterion | Remedy, other: Criterion | Remedy) -> bool:
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return one is other or (isinstance(one, Remedy) and one == other)


def _short(value: object) -> str:
    if callable(value):
        return name_of(value)
    if isinstance(value, Mapping):  # scores by module: a digest tells two of them apart
        digest = hashlib.sha256()
        for key, entry in value.items():
            digest.update(str(key).encode())
            digest.update(entry.detach().cpu().double().numpy().tobytes() if isinstance(entry, Tensor) else b"")
        return f"<{len(value)} modules, {digest.hexdigest()[:12]}>"
    return repr(value)


# The default everywhere: the budget where it costs the loss least, the exact search by the same prices, and one refit
# behind it to the module's own outputs, with the damping that held-out calibration windows prefer. Not the residual
# target: it gains a little on the small embedded models at 50% and loses much on SmolLM2-135M there.
RECOMMENDED = Recipe("exact greedy, loss metric", "post, local", HELD_OUT, "loss prices")
# Li, Dong, Lei (arXiv 2407.19126): the second moment, level 1 and level 2 refitted before the cut.
PAPER = Recipe("second moment", "pre", allocation="floor")
# An et al. (arXiv 2312.11983) as published: fluctuation, one ranking over the model, means into biases.
FLAP = Recipe("FLAP WIFV", "bias", allocation="adaptive")
# Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial Optimization":
# exact greedy selection (without its local search), level 2 refitted to the module's own outputs.
OSSCAR = Recipe("exact greedy", "post, local")
