"""How many units each module loses, and which: equal shares, protected blocks, budgets spread over the whole model.

A *plan* maps module names to the number of units they keep; :func:`~greedy_helpers.pruning.prune` takes one as `plan=`.
Ratios and budgets are counted in parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

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
    _check_multiple("uniform_plan", multiple)
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
    model go until `n_parameters` are gone, to half of the smallest unit. A unit counts with its exact number of
    parameters (the published code takes a head for 170 FFN channels, whatever the model).

    Args:
        scores: module name -> scores [n_units], taken on the dense model, see
            :func:`~greedy_helpers.pruning.scores_of`.
        floor: the share of units every module keeps (at least one); the published code has none and may remove all.

    Raises:
        KeyError: a module without scores.
        ValueError: more parameters than the floor leaves to remove.
    """
    offers = []
    for module in modules:
        values = scores[module.name].double().cpu()
        spread = values.std() if len(values) > 1 else torch.tensor(0.0)
        standard = (values - values.mean()) / spread if spread > 0 else torch.zeros_like(values)
        rounds = standard.view(module.n_sets, -1).sort(dim=1).values.mean(0)  # one unit of each set goes at a time
        free = rounds[: _n_free(module, floor)].tolist()
        offers += [_offer(value, module, module.n_sets) for value in free]
    return _cheapest_first(modules, offers, n_parameters)


def cost_plan(
    modules: Sequence[Depth2Module],
    scores: Mapping[str, Tensor],
    n_parameters: int,
    floor: float = 0.05,
    *,
    multiple: int = 1,
) -> dict[str, int]:
    """The budget where it costs least: units go, over all modules, in the order of cost per parameter.

    For scores that mean the same everywhere: what it costs when a unit and everything below it in its module are
    removed, as :func:`~greedy_helpers.greedy.exact_greedy` gives it with `whole_path=True`, in nats
    (:func:`~greedy_helpers.prices.loss_metric`) or in squared error. The price of a module's next unit is the rise from
    the last. Heads and channels trade freely, and `n_parameters` are met to half of the smallest unit, as long as such
    units are left.

    Args:
        scores: module name -> cumulative costs [n_units], taken on the dense model.
        floor: the share of units every module keeps (at least one).
        multiple: FFN modules keep a multiple of so many channels, or all they have; see :func:`uniform_plan`.

    Raises:
        KeyError: a module without scores.
        ValueError: more parameters than the floor leaves to remove.
    """
    _check_multiple("cost_plan", multiple)
    offers = []
    for module in modules:
        gone = _numbers_gone(module, floor, multiple)
        rises = cumulative_costs(module, scores)[gone].diff()
        widths = [more - less for less, more in pairwise(gone)]
        # a unit that costs little behind one that costs much is not for sale alone: average the price over both
        prices = _rising_prices([rise / width for rise, width in zip(rises.tolist(), widths, strict=True)], widths)
        per_parameter = [price / unit_parameters(module) for price in prices]
        offers += [_offer(price, module, width) for price, width in zip(per_parameter, widths, strict=True)]
    return _cheapest_first(modules, offers, n_parameters)


def shape_plan(
    modules: Sequence[Depth2Module],
    scores: Mapping[str, Tensor],
    n_parameters: int,
    floor: float = 0.05,
    *,
    multiple: int = 1,
) -> dict[str, int]:
    """The cheapest plan among those that give every attention module one size and every FFN one size.

    Such a model needs no format of its own (:func:`~greedy_helpers.export.export_plain`), and inference engines take
    it. Every number of heads is tried, the FFNs take the rest; scores as for :func:`cost_plan`.

    Raises:
        KeyError: a module without scores.
        ValueError: modules of one kind that differ in size; or no shape within the floor removes as much, up to half a
            channel (or multiple) per FFN.
    """
    _check_multiple("shape_plan", multiple)
    kinds = [[m for m in modules if (m.kind == "attention") == heads] for heads in (True, False)]
    for same in kinds:
        if len(sizes := {(m.n_units, m.n_sets, unit_parameters(m)) for m in same}) > 1:
            found = ", ".join(f"{n} {same[0].unit}s" for n, *_ in sorted(sizes))
            raise ValueError(f"shape_plan: expected modules of one size, found {found}")
    attention, ffns = kinds
    per_channel = sum(map(unit_parameters, ffns))
    sums = [sum((cumulative_costs(m, scores) for m in same), torch.zeros(1)) for same in kinds]
    numbers = [_numbers_gone(same[0], floor, multiple) if same else [0] for same in kinds]
    step = max((b - a for a, b in pairwise(numbers[1])), default=0) * per_channel
    shapes = []
    for heads in numbers[0]:
        rest = n_parameters - heads * sum(map(unit_parameters, attention))
        channels = min(numbers[1], key=lambda gone: abs(gone * per_channel - rest))
        if abs(channels * per_channel - rest) <= step / 2 or not ffns:
            miss = abs(channels * per_channel - rest) if not ffns else 0  # heads alone: the nearest number
            shapes.append((miss, (sums[0][heads] + sums[1][channels]).item(), heads, channels))
    if not shapes:
        most = sum(n[-1] * sum(map(unit_parameters, same)) for n, same in zip(numbers, kinds, strict=True) if same)
        raise ValueError(f"shape_plan: expected to remove at most {most:,} parameters, found {n_parameters:,}")
    *_, heads, channels = min(shapes)
    return {m.name: m.n_units - (heads if m.kind == "attention" else channels) for m in modules}


def cumulative_costs(module: Depth2Module, scores: Mapping[str, Tensor]) -> Tensor:
    """What it costs that so many units of a module are gone: float64 [n_units + 1]. Between whole rounds: the next."""
    rising = scores[module.name].double().cpu().sort().values
    whole = rising[module.n_sets - 1 :: module.n_sets]  # one unit of every set goes at a time
    return torch.cat([rising.new_zeros(1), whole.repeat_interleave(module.n_sets)])


def _check_multiple(function: str, multiple: int) -> None:
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"{function}: expected a multiple of at least 1 channel, found {multiple!r}")


def _numbers_gone(module: Depth2Module, floor: float, multiple: int) -> list[int]:
    """How many units of a module may be gone, rising from none: whole rounds of heads, multiples of channels left."""
    most = _n_free(module, floor) * module.n_sets
    if module.kind == "attention":
        return list(range(0, most + 1, module.n_sets))
    first = module.n_units % multiple or multiple
    return [0, *range(first, most + 1, multiple)]


def _n_free(module: Depth2Module, floor: float) -> int:
    """How many units of each of its sets may go when the share `floor`, and at least one, has to stay."""
    in_set = module.n_units // module.n_sets
    return in_set - max(1, round(floor * in_set))


class _Offer(NamedTuple):
    """The next `n_units` of a module, at a price that can be compared with any other's."""

    price: float
    parameters: int
    module: str
    n_units: int


def _offer(price: float, module: Depth2Module, n_units: int) -> _Offer:
    return _Offer(price, n_units * unit_parameters(module), module.name, n_units)


def _cheapest_first(modules: Sequence[Depth2Module], offers: Sequence[_Offer], n_parameters: int) -> dict[str, int]:
    """Take offers in the order of their prices until `n_parameters` are gone, to half of the smallest offer.

    One that is too large for what is left is passed over, and all behind it in its module. Where nothing smaller is
    left, the first of them is taken if it brings the number nearer.
    """
    if (most := sum(offer.parameters for offer in offers)) < n_parameters:
        raise ValueError(f"expected at least {n_parameters:,} parameters in removable units, found {most:,}")
    slack = min((offer.parameters for offer in offers), default=0) / 2
    plan, left = {module.name: module.n_units for module in modules}, n_parameters
    passed: dict[str, _Offer] = {}
    for offer in sorted(offers):
        if offer.module in passed or offer.parameters > left + slack:
            passed.setdefault(offer.module, offer)
            continue
        plan[offer.module] -= offer.n_units
        left -= offer.parameters
    for offer in passed.values():
        if offer.parameters / 2 <= left:
            plan[offer.module] -= offer.n_units
            break
    return plan


def _rising_prices(prices: Sequence[float], widths: Sequence[int]) -> list[float]:
    """The nearest non-decreasing sequence (pool adjacent violators): slopes of the cumulative cost's convex hull."""
    pools: list[list[float]] = []  # [mean, width, count]
    for price, width in zip(prices, widths, strict=True):
        pools.append([price, width, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, width, count = pools.pop()
            total = pools[-1][1] + width
            pools[-1] = [(pools[-1][0] * pools[-1][1] + mean * width) / total, total, pools[-1][2] + count]
    return [mean for mean, _, count in pools for _ in range(int(count))]


def removed_parameters(modules: Sequence[Depth2Module], plan: Plan) -> int:
    """How many parameters `plan` takes out of `modules`; those that it does not name keep all their units."""
    return sum((m.n_units - plan.get(m.name, m.n_units)) * unit_parameters(m) for m in modules)


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
