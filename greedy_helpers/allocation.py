"""How many units each module loses, and which: equal shares, protected blocks, budgets spread over the whole model.

A *plan* maps module names to the number of units they keep; :func:`~greedy_helpers.pruning.prune` takes one as `plan=`.
Ratios and budgets are counted in parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .structure import Depth2Module, UnitChoice, blocks_of, count_parameters, depth2_modules, weight_of

Plan = Mapping[str, int]


def check_ratio(ratio: float) -> float:
    """The share to remove, in [0, 1).

    Raises:
        ValueError: outside [0, 1) or not a number.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise ValueError(f"expected a ratio in [0, 1), the share to remove, found {ratio!r}")
    return float(ratio)


def n_removed(n_units: int, ratio: float) -> int:
    """floor(ratio * n_units), safe against rounding: 0.3 * 10 is 2.999...96 in floating point."""
    return int(check_ratio(ratio) * n_units + 1e-9)


def keep_best(scores: Tensor, n_keep: int, n_sets: int = 1) -> Tensor:
    """The `n_keep` highest of `scores`, or as many of each set: sorted long [n_keep]. Equal scores: the earlier stays.

    Args:
        n_sets: see :class:`~greedy_helpers.structure.Depth2Module`.

    Raises:
        ValueError: n_keep outside [1, n], or not the same number in every set.
        FloatingPointError: a score is NaN.
    """
    if not 1 <= n_keep <= len(scores) or n_keep % n_sets:
        sets = f", a multiple of {n_sets}" if n_sets > 1 else ""
        raise ValueError(f"expected to keep between 1 and {len(scores)} units{sets}, found {n_keep}")
    if scores.isnan().any():
        raise FloatingPointError(f"expected a number for every unit, found {int(scores.isnan().sum())} NaN scores")
    order = torch.argsort(scores.cpu().view(n_sets, -1), dim=1, descending=True, stable=True)[:, : n_keep // n_sets]
    first = torch.arange(n_sets, device="cpu")[:, None] * (len(scores) // n_sets)
    return torch.sort((first + order).flatten()).values


def middle_blocks(model: PreTrainedModel, first: int = 4, last: int = 2) -> range:
    """All blocks but the `first` and `last` few: LLM-Pruner's and the paper's convention, [4, 30) of LLaMA's 32.

    Raises:
        ValueError: no block would be left.
    """
    n_blocks = len(blocks_of(model))
    if first < 0 or last < 0 or first + last >= n_blocks:
        raise ValueError(f"middle_blocks: expected to protect fewer than all {n_blocks} blocks, found {first} + {last}")
    return range(first, n_blocks - last)


def unit_parameters(module: Depth2Module) -> int:
    """Parameters that go with one unit: its rows of level 1 with their biases, and its columns of level 2."""
    total = 0
    for group in module.groups:
        d_out, d_in = weight_of(group.linear).shape
        per_channel = d_in + (group.linear.bias is not None) if group.side == "out" else d_out
        total += group.index.shape[1] * per_channel
    return total


def module_parameters(module: Depth2Module) -> int:
    """Weights and biases of all linears of the module: what no unit owns, like shared keys and values, included."""
    linears = [group.linear for group in module.groups]
    return sum(weight_of(linear).numel() + (0 if linear.bias is None else len(linear.bias)) for linear in linears)


def asked_parameters(modules: Sequence[Depth2Module], ratio: float) -> int:
    """The number of parameters that `ratio` of `modules` is.

    Raises:
        ValueError: ratio outside [0, 1).
    """
    return round(check_ratio(ratio) * sum(map(module_parameters, modules)))


def budget(model: PreTrainedModel, ratio: float, of: str = "blocks") -> int:
    """The number of parameters to remove: a share of the blocks' parameters, or of `"all"`.

    Papers mean different things by the same percentage; say which.

    Raises:
        ValueError: ratio outside [0, 1), or another `of`.
    """
    if of not in ("blocks", "all"):
        raise ValueError(f"budget: expected a share of 'blocks' or of 'all' parameters, found {of!r}")
    return round(check_ratio(ratio) * count_parameters(model)["total" if of == "all" else "blocks"])


def uniform_plan(modules: Sequence[Depth2Module], n_parameters: int, *, multiple: int = 1) -> dict[str, int]:
    """The same share of the parameters of each of `modules`, together as near to `n_parameters` as whole units allow.

    Every attention module keeps the number of units that is nearest to its share, counted in parameters; query heads
    go in equal numbers from every KV head, and one of each stays. FFN channels take the rest, the same share of every
    FFN, so that FFNs of one size stay of one size: half a channel per FFN is the most by which `n_parameters` is
    missed. Where no FFN is among the modules, the nearest numbers of heads are all there is.

    Args:
        n_parameters: for a ratio, that share of the modules' :func:`module_parameters`.
        multiple: FFN modules keep a multiple of so many channels (the nearest one, at least one multiple), or all
            they have; then half a multiple per FFN is the most by which `n_parameters` is missed. Matrix kernels work
            in tiles: in half precision tensor cores are most efficient on widths that are multiples of 8, on an A100
            of 64 (NVIDIA, *Matrix Multiplication Background User's Guide*). Heads stay as they are: each comes with
            its whole dimension, a power of two in most models.

    A warning names the modules whose nearest number is all they have.

    Raises:
        ValueError: the modules cannot lose that many parameters, saying the most that can go; or a multiple below 1.
    """
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"uniform_plan: expected a multiple of at least 1 channel, found {multiple!r}")
    total = sum(map(module_parameters, modules)) or 1
    attention, ffns = ([m for m in modules if (m.kind == "attention") == heads] for heads in (True, False))

    def plan_of(wanted: int) -> dict[str, int]:
        shares = {m.name: wanted / total * module_parameters(m) / unit_parameters(m) for m in attention}
        plan = {m.name: _n_kept(m.n_units, shares[m.name], m.n_sets) for m in attention}
        rest = max(0, wanted - removed_parameters(attention, plan))
        removable = sum(m.n_units * unit_parameters(m) for m in ffns)
        kept = {m.name: _n_kept(m.n_units, rest / removable * m.n_units, multiple) for m in ffns}
        return {m.name: (plan | kept)[m.name] for m in modules}

    steps = [(min(multiple, m.n_units), m) for m in ffns] or [(m.n_sets, m) for m in attention]
    rounding = sum(step * unit_parameters(m) for step, m in steps) / 2
    most = n_parameters
    while (found := removed_parameters(modules, plan_of(most))) < most - rounding:
        most = found  # of which heads may take less, so that the FFNs have to take more
    if most < n_parameters:
        raise ValueError(
            f"expected to remove at most {int(1000 * most / total) / 10}% of the modules' parameters ({most:,}), found "
            f"{n_parameters / total:.1%} ({n_parameters:,}): an FFN keeps {multiple} of its channels, attention "
            + ("one head of every KV head" if any(m.n_sets > 1 for m in modules) else "one of its heads")
            + ('; unit="kv" allows more' if any(map(_kv_heads_free_more, modules)) else "")
        )
    plan = plan_of(n_parameters)
    if n_parameters > 0:
        share = f"{100 * n_parameters / total:.3g}%"
        warn_of_whole(modules, plan, f"the number of units nearest to {share} of their parameters is none")
    return plan


def _n_kept(n_units: int, n_gone: float, multiple: int) -> int:
    """All units, or the multiple of so many that is nearest to what `n_gone` leave (never none). A tie: more stay."""
    left = n_units - n_gone
    below = int(left // multiple) * multiple
    candidates = {n_units, *(min(max(n, multiple), n_units) for n in (below, below + multiple))}
    return min(candidates, key=lambda kept: (round(abs(kept - left), 6), -kept))  # rounded: ties are meant as such


def _kv_heads_free_more(module: Depth2Module) -> bool:
    """Whether one KV head with all its query heads is less than one query head of each and all keys and values."""
    heads = module.n_units * unit_parameters(module)
    bias = module.level2.linear.bias
    shared = module_parameters(module) - heads - (0 if bias is None else len(bias))
    return (shared + heads) / module.n_sets < shared + module.n_sets * unit_parameters(module)


def warn_of_whole(modules: Sequence[Depth2Module], plan: Plan, reason: str) -> None:
    """Name the modules that a rule for all of them alike leaves whole."""
    if whole := [module for module in modules if plan[module.name] == module.n_units]:
        first, more = whole[0], len(whole) - 1
        warnings.warn(
            f"{reason}: {first.name}, with {first.n_units} {first.unit}s,"
            + (f" and {more} more lose" if more else " loses")
            + " nothing",
            stacklevel=3,
        )


def adaptive_plan(
    modules: Sequence[Depth2Module], scores: Mapping[str, Tensor], n_parameters: int, floor: float = 0.05
) -> dict[str, int]:
    """One ranking over all modules (FLAP's AL-AM, section 3.3 of arXiv 2312.11983).

    Scores are standardised inside each module, as their scales are not comparable, and the lowest units of the whole
    model go until `n_parameters` are gone: the cheapest overshoot, less than one unit. A unit counts with its exact
    number of parameters (the published code takes a head for 170 FFN channels, whatever the model).

    Args:
        scores: module name -> scores [n_units], taken on the dense model, see
            :func:`~greedy_helpers.pruning.scores_of`.
        floor: the share of units every module keeps (at least one); the published code has none and may remove all.

    Raises:
        KeyError: a module without scores.
        ValueError: more parameters than the floor leaves to remove.
    """
    candidates = []
    for module in modules:
        values = scores[module.name].double().cpu()
        spread = values.std() if len(values) > 1 else torch.tensor(0.0)
        standard = (values - values.mean()) / spread if spread > 0 else torch.zeros_like(values)
        cost = unit_parameters(module) * module.n_sets
        rounds = standard.view(module.n_sets, -1).sort(dim=1).values.mean(0)  # one unit of each set goes at a time
        candidates += [(value, cost, module.name) for value in rounds[: _n_free(module, floor)].tolist()]
    return _cheapest_first(modules, candidates, n_parameters)


def cost_plan(
    modules: Sequence[Depth2Module], scores: Mapping[str, Tensor], n_parameters: int, floor: float = 0.05
) -> dict[str, int]:
    """The budget where it costs least: units go, over all modules, in the order of cost per parameter.

    For scores that mean the same everywhere: the rise of the squared output error per token when a unit and everything
    below it in its module are removed (:func:`~greedy_helpers.greedy.exact_greedy` with `whole_path=True`, scaled by
    what an error is worth in its place if that differs). The price of a module's next unit is the rise from the last.

    Args:
        scores: module name -> cumulative costs [n_units], taken on the dense model.
        floor: the share of units every module keeps (at least one).

    Raises:
        KeyError: a module without scores.
        ValueError: more parameters than the floor leaves to remove.
    """
    candidates = []
    for module in modules:
        rising = (
            scores[module.name].double().sort().values[module.n_sets - 1 :: module.n_sets][: _n_free(module, floor)]
        )
        # a unit that costs little behind one that costs much is not for sale alone: average the price over both
        prices = _rising_prices(rising.diff(prepend=rising.new_zeros(1)).tolist())
        cost = unit_parameters(module) * module.n_sets
        candidates += [((price / cost, place), cost, module.name) for place, price in enumerate(prices)]
    return _cheapest_first(modules, candidates, n_parameters)


def _n_free(module: Depth2Module, floor: float) -> int:
    """How many units of each of its sets may go when the share `floor`, and at least one, has to stay."""
    in_set = module.n_units // module.n_sets
    return in_set - max(1, round(floor * in_set))


def _cheapest_first(
    modules: Sequence[Depth2Module], candidates: Sequence[tuple[Any, int, str]], n_parameters: int
) -> dict[str, int]:
    """Let units go in the order of their keys until `n_parameters` are gone: candidates are (key, parameters, name).

    A candidate is one unit of each of its module's sets.
    """
    plan, removed = {module.name: module.n_units for module in modules}, 0
    at_once = {module.name: module.n_sets for module in modules}
    for _, cost, name in sorted(candidates):
        if removed >= n_parameters:
            break
        plan[name] -= at_once[name]
        removed += cost
    _check_enough(modules, plan, n_parameters)
    return plan


def _rising_prices(prices: Sequence[float]) -> list[float]:
    """The nearest non-decreasing sequence (pool adjacent violators): slopes of the cumulative cost's convex hull."""
    pools: list[list[float]] = []  # [mean, count]
    for price in prices:
        pools.append([price, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, count = pools.pop()
            total = pools[-1][1] + count
            pools[-1] = [(pools[-1][0] * pools[-1][1] + mean * count) / total, total]
    return [mean for mean, count in pools for _ in range(int(count))]


def redundancy_plan(
    modules: Sequence[Depth2Module], redundant: Mapping[str, Sequence[int]], n_parameters: int
) -> dict[str, int]:
    """Attention loses what similarity found redundant (tau sets the number), the FFNs share the rest equally.

    Args:
        redundant: attention module's name -> its redundant units, see
            :func:`~greedy_helpers.similarity.redundant_heads`.

    Raises:
        ValueError: the heads alone exceed the budget, or the FFNs cannot fill it.
    """
    attention = [m for m in modules if m.kind == "attention"]
    plan = {m.name: _n_left(m, len(redundant.get(m.name, ()))) for m in attention}
    left = n_parameters - removed_parameters(attention, plan)
    if left < 0:
        raise ValueError(
            f"redundancy_plan: the redundant heads hold {n_parameters - left:,} parameters, more than the budget of "
            f"{n_parameters:,}; expected a smaller tau or a larger ratio"
        )
    return plan | uniform_plan([m for m in modules if m.kind != "attention"], left)


def _n_left(module: Depth2Module, n_gone: int) -> int:
    """What stays when at most `n_gone` units go, the same number of every set, and one of each stays."""
    return max(module.n_sets, module.n_units - n_gone // module.n_sets * module.n_sets)


def removed_parameters(modules: Sequence[Depth2Module], plan: Plan) -> int:
    """How many parameters `plan` takes out of `modules`; those that it does not name keep all their units."""
    return sum((m.n_units - plan.get(m.name, m.n_units)) * unit_parameters(m) for m in modules)


def _check_enough(modules: Sequence[Depth2Module], plan: Plan, n_parameters: int) -> None:
    if (most := removed_parameters(modules, plan)) < n_parameters:
        raise ValueError(f"expected at least {n_parameters:,} parameters in removable units, found {most:,}")


def check_plan(
    model: PreTrainedModel,
    plan: Plan,
    chosen: Collection[str] | None = None,
    unit: UnitChoice = "query",
) -> None:
    """Refuse a plan that names modules the model lacks, or keeps none or more than all of their units.

    Args:
        chosen: the modules that may be pruned at all; default: all.
        unit: see :func:`~greedy_helpers.structure.depth2_modules`.

    Raises:
        KeyError, ValueError: naming the module.
    """
    units = {module.name: (module.n_units, module.n_sets) for module in depth2_modules(model, unit=unit)}
    for name, n_keep in plan.items():
        if name not in units:
            raise KeyError(f"plan: the model has no module {name!r}; it has {', '.join(list(units)[:4])}, ...")
        if chosen is not None and name not in chosen:
            raise KeyError(f"plan: {name} is not among the blocks and kinds that are to be pruned")
        n_units, n_sets = units[name]
        whole = isinstance(n_keep, int) and not isinstance(n_keep, bool)
        if not whole or not 1 <= n_keep <= n_units or n_keep % n_sets:
            kind = (
                f"{n_sets} to {n_units} query heads, a multiple of {n_sets}" if n_sets > 1 else f"1 to {n_units} units"
            )
            raise ValueError(f"plan: {name}: expected to keep {kind}, found {n_keep!r}")
