"""Exact greedy output approximation: which units to remove when all survivors are refitted after every removal.

Every heuristic criterion scores a unit as if the others stayed as they are. Here the unit goes whose removal raises the
least-squares error least *after* level 2 was solved again on the survivors, one after the other (backward elimination).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .criteria import Criterion, Seen, removal_costs, weighted_square
from .reconstruct import normal_equations
from .structure import Depth2Module, weight_of


@dataclass(frozen=True)
class Elimination:
    """The path of a backward elimination.

    Attributes:
        order: long [n_removed], units in the order in which they went.
        costs: float64 [n_removed], by how much each removal raised ||Y - Z W'||^2 + lam ||W - W0||^2 (sum over tokens),
            all survivors refitted before and after.
        keep: long [n_kept], the survivors, sorted.
        next_costs: float64 [n_kept], what removing each of them, alone, would cost next.
        solution: [channels of the survivors in their order, d_y], the refitted W' on them.
    """

    order: Tensor
    costs: Tensor
    keep: Tensor
    next_costs: Tensor
    solution: Tensor


@torch.no_grad()
def eliminate(
    h: Tensor,
    solution: Tensor,
    index: Tensor,
    n_keep: int = 1,
    *,
    n_sets: int = 1,
    block: int = 32,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-6,
    inverse: Tensor | None = None,
) -> Elimination:
    """Remove units one at a time, always the one that costs least, until `n_keep` are left.

    With H = Z'Z + lam I and B the solution on all channels, removing the channels g of one unit costs exactly
    tr(B_g' ([H^-1]_gg)^-1 B_g), and moves B and H^-1 to B - H^-1_:g ([H^-1]_gg)^-1 B_g and to the Schur complement
    (optimal brain surgeon; Hassibi and Stork 1993). One factorisation serves the whole path.

    Units of one channel (FFN) are removed in blocks: inside a block the downdates of H^-1 and B are kept as `block`
    low-rank columns, so that a step reads B once and writes nothing of size [n, n]; the large products are done once
    per block. Cost about n^2 (n / block + d_y) in memory traffic, n^3 in arithmetic.

    Args:
        h: [n, n], positive definite.
        solution: [n, d_y], the minimiser on all n channels.
        index: long [n_units, width], the channels of each unit. Channels of no unit stay.
        n_keep: how many units to leave; 1, or `n_sets`, gives the whole path.
        n_sets: the units come in so many sets of equal size, one after the other, and go in rounds of one unit from
            each set, always the cheapest of a set that has not lost one in this round: query heads of KV heads.
        dtype: of the computation. float32 is faster on GPUs; it is re-factorised when it drifts.
        tolerance: relative residual of the downdated inverse that causes a new factorisation (times 1e3 for float32).
        inverse: [n, n], H^-1 in `dtype` where it is known already; it is overwritten.

    Raises:
        ValueError: n_keep outside [1, n_units], or not the same number in every set.
        torch.linalg.LinAlgError: H is not positive definite.
    """
    n_units, width = index.shape
    if not 1 <= n_keep <= n_units or n_units % n_sets or n_keep % n_sets:
        sets = f" in {n_sets} equal sets" if n_sets > 1 else ""
        raise ValueError(f"eliminate: expected to keep between 1 and {n_units} units{sets}, found {n_keep}")
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h.to(dtype))) if inverse is None else inverse
    state = _State(h, inverse, solution, tolerance * (1e3 if torch.float32 in (dtype, h.dtype) else 1))
    step = _single_channels if width == n_sets == 1 else _one_unit
    left = index.to(h.device)
    units = torch.arange(n_units, device=h.device)
    order, costs = [], []
    while len(units) > n_keep:
        places = state.places(left)
        due = _due(units // (n_units // n_sets), n_sets)
        gone, cost = step(state, places[due], min(block, len(units) - n_keep))
        gone = due[gone]
        order.append(units[gone])
        costs.append(cost.double())
        stays = torch.ones(len(units), dtype=torch.bool, device=h.device)
        stays[gone] = False
        state.drop(places[gone].flatten())
        units, left = units[stays], left[stays]
    state.compact()
    empty = torch.empty(0, dtype=torch.float64)
    return Elimination(
        torch.cat(order).cpu() if order else empty.long(),
        torch.cat(costs).cpu() if costs else empty,
        units.cpu(),
        removal_costs(state.inverse, state.solution, state.places(left)).double().cpu(),
        state.solution.double(),
    )


def _due(sets: Tensor, n_sets: int) -> Tensor:
    """Places of the units that may go next: those whose set has lost the fewest. `sets`: long [units], their sets."""
    left = torch.bincount(sets, minlength=n_sets)
    return (left == left.max())[sets].nonzero().flatten()


class _State:
    """H^-1 and the solution on the channels that are left, moved along with every block of removals.

    Rows and columns of channels that went are zero until :meth:`compact` takes them out, which copies the matrices and
    so is done now and then only.
    """

    def __init__(self, h: Tensor, inverse: Tensor, solution: Tensor, tolerance: float) -> None:
        self.h, self.inverse, self.tolerance = h, inverse, tolerance
        self.full = solution  # on all channels
        self.solution = solution.to(inverse.dtype, copy=True)
        self.channels = torch.arange(len(h), device=h.device)  # those of the matrices
        self.alive = torch.ones(len(h), dtype=torch.bool, device=h.device)  # among them: those that are left
        self.probe = torch.randn(len(h), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(h)
        self.refactorised = 0

    def places(self, index: Tensor) -> Tensor:
        """Where the channels of `index` are in the matrices."""
        place = torch.full((len(self.h),), -1, dtype=torch.long, device=self.h.device)
        place[self.channels] = torch.arange(len(self.channels), device=self.h.device)
        return place[index]

    def drop(self, places: Tensor) -> None:
        """Take channels, whose influence is already removed, out of the matrices; check what is left for drift."""
        self.alive[places] = False
        self.inverse[places], self.inverse[:, places], self.solution[places] = 0, 0, 0
        if 8 * int(self.alive.sum()) < 7 * len(self.alive):
            self.compact()
        left, probe = self.channels[self.alive], torch.zeros_like(self.probe)
        probe[left] = self.probe[left]
        back = torch.zeros_like(probe)
        back[self.channels] = (self.inverse @ probe[self.channels].to(self.inverse)).to(back)
        drift = ((self.h @ back)[left] - probe[left]).norm() / probe.norm()
        if not drift <= self.tolerance:
            self.compact()
            factor = torch.linalg.cholesky(self.h[left][:, left].to(self.inverse))
            self.inverse = torch.cholesky_inverse(factor)
            rest = self.h[left] @ self.full  # H B: what B solves, whatever subset of channels is left
            self.solution = torch.cholesky_solve(rest.to(factor), factor)
            self.refactorised += 1

    def compact(self) -> None:
        """Give the memory of what went back."""
        stays, self.channels = self.alive, self.channels[self.alive]
        self.inverse, self.solution = self.inverse[stays][:, stays], self.solution[stays]
        self.alive = torch.ones(len(self.channels), dtype=torch.bool, device=self.h.device)


def _one_unit(state: _State, places: Tensor, _most: int) -> tuple[Tensor, Tensor]:
    """Remove the cheapest unit of several channels. `places`: long [units, width]."""
    costs = removal_costs(state.inverse, state.solution, places)
    gone = costs.argmin()
    g = places[gone]
    columns = state.inverse[:, g]  # [n, width]
    # never a batched LU: on some processors it is wrong for wide blocks, and these are positive definite anyway
    move = torch.cholesky_solve(columns.T, torch.linalg.cholesky(state.inverse[g][:, g]))  # ([H^-1]_gg)^-1 H^-1_g:
    state.solution.addmm_(move.T, state.solution[g], alpha=-1)
    state.inverse.addmm_(columns, move, alpha=-1)
    return gone[None], costs[gone][None]


def _single_channels(state: _State, places: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Remove the `most` cheapest channels, one after the other; the downdates are applied to H^-1 and B at the end.

    Behind k removals H^-1 is P - U U' and the solution is B - U C, with U [n, most] and C [most, d_y], zero behind k.
    On a GPU each step waits for the launch of its kernels, so there are few, and none waits for the CPU.
    """
    p, b, places = state.inverse, state.solution, places[:, 0]
    u, c = p.new_zeros(len(p), most), b.new_zeros(most, b.shape[1])
    pivots = p.diagonal().clone()  # [H^-1]_jj, kept up to date
    sizes = torch.full_like(pivots, torch.inf).index_copy_(0, places, b[places].square().sum(1))  # ||B_j||^2, or gone
    floor = torch.finfo(p.dtype).tiny
    gone, costs = [], []
    for k in range(most):
        price = sizes / pivots.clamp(min=floor)
        j = price.argmin(keepdim=True)  # [1]
        root, row = pivots[j].clamp(min=floor).sqrt(), u[j][0]
        u_k = torch.addmv(p[:, j][:, 0], u, row, alpha=-1) / root
        c_k = torch.addmv(b[j][0], c.T, row, alpha=-1) / root
        pull = torch.addmv(b @ c_k, u, c @ c_k, alpha=-1)
        sizes.addcmul_(u_k, pull, value=-2).addcmul_(u_k, u_k * c_k.dot(c_k)).index_fill_(0, j, torch.inf)
        pivots.addcmul_(u_k, u_k, value=-1)
        u[:, k], c[k] = u_k, c_k
        gone.append(j)
        costs.append(price[j])
    state.inverse.addmm_(u, u.T, alpha=-1)
    state.solution.addmm_(u, c, alpha=-1)
    place_to_unit = torch.full((len(p),), -1, dtype=torch.long, device=p.device)
    place_to_unit[places] = torch.arange(len(places), device=p.device)
    return place_to_unit[torch.cat(gone)], torch.cat(costs).clamp(min=0)


@torch.no_grad()
def swap(
    h: Tensor, rest: Tensor, index: Tensor, keep: Tensor, most: int = 50, tries: int = 4, n_sets: int = 1
) -> tuple[Tensor, int]:
    """Local search behind the elimination: trade a removed unit for a kept one while that lowers the error.

    In every round the removed units that would help most are tried in turn: it comes in, the cheapest of the others
    goes, and the trade stands if the error is lower than before. Ends when none of `tries` candidates helps.

    Args:
        h: [n, n], positive definite; rest: [n, d_y] = H B with B the solution on all channels.
        index: long [n_units, width]; keep: long [n_kept], the units of :class:`Elimination`.
        most: trades at most; each costs one factorisation of the survivors.
        n_sets: see :func:`eliminate`; a trade stays inside a set.

    Returns:
        The new `keep`, sorted, and the number of trades.
    """
    kept, trades = set(keep.tolist()), 0
    index = index.to(h.device)
    everything = range(len(index))
    while trades < most and 0 < len(kept) < len(index):
        inside = torch.tensor(sorted(kept), device=h.device)
        outside = torch.tensor([u for u in everything if u not in kept], device=h.device)
        gains = _gains(h, rest, index, inside, outside)
        for place in gains.argsort(descending=True)[:tries].tolist():
            candidate = int(outside[place])
            trial = torch.tensor(sorted({*kept, candidate}), device=h.device)
            costs = _survivor_costs(h, rest, index[trial])
            in_set = len(index) // n_sets
            costs[(trial == candidate) | (trial // in_set != candidate // in_set)] = torch.inf
            if costs.min() < gains[place] * (1 - 1e-9):
                kept = {*kept, candidate} - {int(trial[costs.argmin()])}
                trades += 1
                break
        else:
            break
    return torch.tensor(sorted(kept), dtype=torch.long), trades


def _gains(h: Tensor, rest: Tensor, index: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """By how much each unit outside would lower the error if it came back: [outside]."""
    s, r = index[inside].flatten(), index[outside]  # [k], [outside, width]
    factor = torch.linalg.cholesky(h[s][:, s])
    b = torch.cholesky_solve(rest[s], factor)
    q = rest[r] - h[r][:, :, s] @ b  # [outside, width, d_y]
    across = h[r][:, :, s]  # [outside, width, k]
    schur = (
        h[r[:, :, None], r[:, None, :]]
        - across @ torch.cholesky_solve(across.flatten(0, 1).T, factor).T.view_as(across).mT
    )
    return weighted_square(schur, q)


def _survivor_costs(h: Tensor, rest: Tensor, index: Tensor) -> Tensor:
    """Exact cost of removing each of the units that are there: [units]."""
    s = index.flatten()
    factor = torch.linalg.cholesky(h[s][:, s])
    inverse, b = torch.cholesky_inverse(factor), torch.cholesky_solve(rest[s], factor)
    return removal_costs(inverse, b, torch.arange(len(s), device=h.device).view(index.shape))


@torch.no_grad()
def exact_greedy(
    module: Depth2Module,
    seen: Seen,
    *,
    swaps: int = 0,
    whole_path: bool = False,
    metric: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The exact greedy selection as a criterion: float64 [n_units].

    A unit's score is the rise of the squared output error per token when everything up to it has been removed and the
    rest refitted: early losses score low. Survivors share the highest scores, in the order of what removing each of
    them alone would cost next. Combine it with a remedy that refits after the cut, which is what it counts on.

    Damping and targets are those of the remedy (`seen.damp`, and what `seen.level2` is paired with); without targets
    (in :func:`~greedy_helpers.pruning.scores_of`) they are the module's own outputs.

    Args:
        swaps: at most so many trades of :func:`swap` behind the elimination.
        whole_path: eliminate down to the last unit even if fewer have to go; for plans over the whole model, which
            compare the costs of all modules (:func:`~greedy_helpers.allocation.cost_plan`).
        metric: module name -> L [d, d], see :func:`~greedy_helpers.prices.loss_metric`. Errors e are then counted as
            1/2 ||e L||^2, the rise of the loss in nats per token to second order. What the survivors are refitted to
            does not depend on it, only which unit is the cheapest, and its price.
        dtype: see :func:`eliminate`.

    Raises:
        ValueError: damping 0 with fewer tokens than channels; no or hardly any damping with channels that are never on,
            or that equal each other.
    """
    linear, moments = module.level2.linear, seen.level2
    system, rest = normal_equations(moments, weight_of(linear), linear.bias, seen.damp, dtype=dtype)
    solution = weight_of(linear).to(system.h).T + system.solve(rest)
    if metric is not None:
        solution = solution @ (metric[module.name].to(solution) * 0.5**0.5)
    n_keep = module.n_sets if whole_path or seen.n_keep is None else seen.n_keep
    inverse = (
        system.inverse() if system.h.dtype == dtype else None
    )  # of another precision it would begin with its errors
    sets = {"n_sets": module.n_sets}
    path = eliminate(system.h, solution, module.level2.index, n_keep, dtype=dtype, inverse=inverse, **sets)
    keep, next_costs = path.keep, path.next_costs
    scores = torch.zeros(module.n_units, dtype=torch.float64)
    scores[path.order] = path.costs.clamp(min=0).cumsum(0) / moments.n
    total = scores.max()
    if swaps and len(path.order):
        rest = system.h @ solution
        keep, trades = swap(system.h, rest, module.level2.index, keep, swaps, **sets)
        if trades:
            scores[path.keep] = total  # those of them that went in a trade went last
            next_costs = _survivor_costs(system.h, rest, module.level2.index[keep].to(rest.device)).cpu()
    scores[keep] = total * (1 + 1e-9) + next_costs.double().clamp(min=0) / moments.n + torch.finfo(torch.float64).tiny
    return scores


def whole_path(metric: Mapping[str, Tensor] | None = None) -> Criterion:
    """Exact greedy down to the last unit, for plans that compare the costs of all modules."""
    return partial(exact_greedy, whole_path=True, metric=metric)
