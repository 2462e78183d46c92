"""A short search behind a plan: modules trade parameters, and the whole model is the judge.

A plan by prices (:func:`~greedy_helpers.allocation.cost_plan`) adds up what every module costs alone. What two cost
together is seen only when both are cut.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .allocation import Plan, check_plan, keep_best, removed_parameters, unit_parameters
from .criteria import Seen
from .doors import check_own_weights
from .greedy import exact_greedy
from .large.lazy import is_lazy
from .moments import Moments
from .pruning import scores_of
from .reconstruct import solve
from .stream import forward_replaced, windows_per_batch
from .structure import (
    Depth2Module,
    UnitChoice,
    blocks_of,
    check_tokens,
    depth2_modules,
    eval_mode,
    input_device,
    set_weight,
    weight_of,
)


@dataclass(frozen=True)
class Trade:
    """A candidate: the plan in which `giver` loses units and `taker` gets their parameters.

    Attributes:
        divergence: of the plan, on the windows that drive the search.
        accepted: whether it was lower than that of the plan before.
    """

    giver: str
    taker: str
    plan: dict[str, int] = field(repr=False)
    divergence: float
    accepted: bool


@dataclass(frozen=True)
class Traded:
    """What :func:`trade` found.

    Attributes:
        plan: the traded plan if it is the better one on the windows that decide, else the one that was given.
        before, after: KL(dense || pruned) of the given and of the traded plan there, in nats per token.
        history: all candidates in order.
    """

    plan: dict[str, int]
    before: float
    after: float
    history: list[Trade] = field(repr=False)

    @property
    def kept(self) -> bool:
        """Whether `plan` is the traded one."""
        return self.after < self.before


class Nested:
    """Every module's elimination on the dense model's inputs, and level 2 behind any number of its removals."""

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Tensor,
        modules: Sequence[Depth2Module],
        *,
        damp: float = 1e-2,
        metric: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            metric: see :func:`~greedy_helpers.greedy.exact_greedy`; it chooses units, and no weight depends on it.
            options: of :func:`~greedy_helpers.pruning.scores_of`. The moments of all modules are held at once in
                `precision`, [channels, channels] each.
        """
        self._damp, self._moments = damp, dict[str, Moments]()
        self._modules = {module.name: module for module in modules}
        self._dense = {m.name: (weight_of(m.level2.linear).detach(), m.level2.linear.bias) for m in modules}

        def order(module: Depth2Module, seen: Seen) -> Tensor:
            if module.name not in self._dense:
                return torch.zeros(module.n_units)
            scores = exact_greedy(module, seen, whole_path=True, metric=metric)
            self._moments[module.name] = seen.level2.aim_at(*self._dense[module.name])  # without the factorisation
            return scores

        self._scores = scores_of(model, calibration, order, blocks={m.block for m in modules}, damp=damp, **options)
        self._refitted = lru_cache(4 * len(modules))(self._refit)

    @torch.no_grad()
    def _refit(self, name: str, n_keep: int) -> tuple[Tensor, Tensor | None]:
        module, (weight, bias) = self._modules[name], self._dense[name]
        keep = keep_best(self._scores[name], n_keep, module.n_sets)
        stays = module.level2.stays(keep).nonzero().flatten().to(weight.device)
        found = solve(self._moments[name].select(stays), weight[:, stays], bias, self._damp)
        zeroed = torch.zeros_like(weight)
        zeroed[:, stays] = found.weight.to(zeroed)
        return zeroed, found.bias

    def put(self, modules: Iterable[Depth2Module], plan: Plan) -> None:
        """Each level 2 refitted to the module's own outputs by the units that stay, and zero where the others were."""
        for module in modules:
            set_weight(module.level2.linear, *self._refitted(module.name, plan[module.name]))


class Judge:
    """KL(dense || the model as it is now), in nats per token. Made while the model is dense.

    Of the dense model only what its last block puts out is held. Its logits are computed from that batch by batch: one
    more head per pass, and nothing of the size of the vocabulary is kept.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, batch_size: int | None = None) -> None:
        self._model, self._blocks = model, blocks_of(model)
        self._batches = tokens.to(input_device(model)).split(windows_per_batch(batch_size, tokens.shape[1]))
        self._dense = [self._run(batch)[1][-1:] * len(self._blocks) for batch in self._batches]

    @torch.no_grad()
    def _run(self, batch: Tensor, behind: Sequence[Any] = ()) -> tuple[Tensor, list[Any]]:
        """Log-probabilities, and what each block returned; the first blocks do not run, they return `behind`."""
        made = list(behind)
        first, rest = self._blocks[: len(made)], self._blocks[len(made) :]
        with forward_replaced(first, lambda *_args, **_kwargs: behind[-1]), ExitStack() as hooks:
            for block in rest:
                hooks.callback(block.register_forward_hook(lambda _m, _args, output: made.append(output)).remove)
            logits = self._model(input_ids=batch, use_cache=False).logits
        return logits.float().log_softmax(-1), made

    def divergence(self, known: Sequence[Sequence[Any]] = (), first: int = 0) -> tuple[float, list[list[Any]]]:
        """The divergence, and what every block returned, by batches.

        Args:
            known: the latter of a model that is the same in front of block `first`: those blocks do not run again.
        """
        total, outputs = 0.0, []
        for place, batch in enumerate(self._batches):
            found, made = self._run(batch, known[place][:first] if first else ())
            dense, _ = self._run(batch, self._dense[place])
            total += F.kl_div(found, dense, log_target=True, reduction="sum").item()
            outputs.append(made)
        return total / sum(batch.numel() for batch in self._batches), outputs


def trade(
    model: PreTrainedModel,
    plan: Plan,
    calibration: Tensor,
    validation: Tensor,
    *,
    trades: int = 40,
    rounds: int = 4,
    share: float = 0.1,
    damp: float = 1e-2,
    metric: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    unit: UnitChoice = "query",
    batch_size: int | None = None,
    precision: torch.dtype = torch.float32,
) -> Traded:
    """Let pairs of modules trade parameters, drawn at random, as long as that brings the model nearer to the dense one.

    A candidate is judged without surgery and without another walk: level 2 of every module is refitted to the module's
    own outputs on dense inputs (:class:`Nested`), and the units that went are zeroed. So it is not quite what
    :func:`~greedy_helpers.pruning.prune` makes of the plan. The first half of the validation windows drives the search;
    the other half decides whether its outcome is worth more than the plan that was given.

    Args:
        plan: module name -> units kept. Modules that it does not name stay whole; what it removes is removed by every
            candidate, to half of the smallest unit.
        calibration: long [n, seq], for elimination and refits.
        validation: long [n >= 2, seq], other windows, each half a fair sample.
        trades: candidates; each costs a pass over half of the validation windows.
        rounds: after each the step is halved.
        share: the first step, a share of the mean module's removable parameters; heads go one by one at least.
        metric, damp, precision: see :class:`Nested`.

    The model is as it was when this returns or raises.

    Raises:
        KeyError, ValueError, TypeError: a plan that does not fit the model or names fewer than two modules, tokens the
            model cannot read, a model without a head or with its blocks on the disk, numbers out of range.
    """
    modules = {m.name: m for m in _check_arguments(model, plan, validation, trades, rounds, share, unit)}
    options = {"unit": unit, "batch_size": batch_size, "precision": precision}
    step = share * sum(m.n_units * unit_parameters(m) for m in modules.values()) / len(modules)
    given = now = {name: plan[name] for name in modules}
    budget, history, tried, draw = removed_parameters([*modules.values()], given), [], [given], random.Random(seed)
    with eval_mode(model), _put_back(modules.values()):
        nested = Nested(model, calibration, [*modules.values()], damp=damp, metric=metric, **options)
        driving, deciding = (Judge(model, half, batch_size) for half in validation.chunk(2))
        nested.put(modules.values(), given)
        before, _ = deciding.divergence()
        lowest, behind = driving.divergence()
        for number in range(trades):
            found = offers([*modules.values()], now, budget, step / 2 ** (number * rounds // trades))
            if not (found := [offer for offer in found if offer[-1] not in tried]):
                continue
            giver, taker, candidate = draw.choice(found)
            pair = modules[giver], modules[taker]
            nested.put(pair, candidate)
            divergence, outputs = driving.divergence(behind, min(module.block for module in pair))
            accepted = divergence < lowest
            tried.append(candidate)
            history.append(Trade(giver, taker, candidate, divergence, accepted))
            if accepted:
                now, lowest, behind = candidate, divergence, outputs
            else:
                nested.put(pair, now)
        nested.put(modules.values(), now)
        after, _ = deciding.divergence()
    return Traded(now if after < before else given, before, after, history)


def offers(
    modules: Sequence[Depth2Module], plan: Plan, n_parameters: int, step: float
) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Every (giver, taker, plan) that moves about `step` parameters and keeps `n_parameters` removed."""
    sizes = {m.name: m.n_sets * unit_parameters(m) for m in modules}  # one unit of every set goes at a time
    slack, surplus = min(map(unit_parameters, modules)) / 2, removed_parameters(modules, plan) - n_parameters
    for giver, taker in permutations(modules, 2):
        # the one with the larger units sets the number, the other makes up for it
        lead, follow, sign = (giver, taker, 1) if sizes[giver.name] >= sizes[taker.name] else (taker, giver, -1)
        n_lead = max(1, round(step / sizes[lead.name]))
        wanted = n_lead * sizes[lead.name] + sign * surplus
        n_follow = round(wanted / sizes[follow.name])
        moved = {
            lead.name: plan[lead.name] - sign * n_lead * lead.n_sets,
            follow.name: plan[follow.name] + sign * n_follow * follow.n_sets,
        }
        fits = all(m.n_sets <= moved[m.name] <= m.n_units for m in (giver, taker))
        if fits and n_follow > 0 and abs(wanted - n_follow * sizes[follow.name]) <= slack:
            yield giver.name, taker.name, {**plan, **moved}


def _check_arguments(
    model: PreTrainedModel, plan: Plan, validation: Tensor, trades: int, rounds: int, share: float, unit: UnitChoice
) -> list[Depth2Module]:
    check_tokens(model, validation, packed=True)
    check_plan(model, plan, unit=unit)
    if len(validation) < 2 or len(plan) < 2:
        found = f"{len(plan)} and {len(validation)}"
        raise ValueError(f"trade: expected a plan of at least 2 modules and 2 validation windows, found {found}")
    if trades < 0 or rounds < 1 or not 0 < share < 1:
        found = f"{trades}, {rounds} and {share}"
        raise ValueError(f"trade: expected trades >= 0, rounds >= 1 and a share in (0, 1), found {found}")
    if is_lazy(model) or model.get_output_embeddings() is None:
        found = "its blocks on the disk" if is_lazy(model) else f"{type(model).__name__} without a head"
        raise ValueError(f"trade: expected a whole causal language model in memory, found {found}")
    modules = [module for module in depth2_modules(model, unit=unit) if module.name in plan]
    check_own_weights({module.level2.path: module.level2.linear for module in modules})
    return modules


@contextmanager
def _put_back(modules: Iterable[Depth2Module]) -> Iterator[None]:
    """Every level 2 has its own parameters again behind the `with`."""
    before = [(m.level2.linear, m.level2.linear.weight, m.level2.linear.bias) for m in modules]
    try:
        yield
    finally:
        for linear, weight, bias in before:
            linear.weight, linear.bias = weight, bias
