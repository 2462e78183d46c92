"""Criteria: how much each unit of a module matters. A criterion is a function (module, seen) -> scores [n_units].

Higher means keep. Scores are compared inside one module only. Writing your own takes one function; pass it to
:func:`~greedy_helpers.prune.prune` like the ones here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moments
from .structure import Depth2Module, weight_of


@dataclass(frozen=True)
class Seen:
    """What the calibration tokens show about one module, measured behind the already pruned prefix.

    Attributes:
        level1: moments of the module's input x (read by every level-1 linear): Sigma = level1.xx / level1.n.
        level2: moments of level 2's input z; `level2.mean_square` is E[z_j^2].
    """

    level1: Moments
    level2: Moments


Criterion = Callable[[Depth2Module, Seen], Tensor]


@torch.no_grad()
def second_moment(module: Depth2Module, seen: Seen) -> Tensor:
    """The paper's criterion: the energy a unit sends to the residual stream (sec. 3.2.3, eq. 3-4, appendix B).

    Plain FFN, channel j: M_j = ||B_:,j||^2 E[(a_j' x)^2] with E[(a_j' x)^2] = a_j' Sigma a_j and Sigma = E[x x']
    uncentred. (Eq. 3-4 print ||B_i|| under a sum over i; the column j is meant. The factor 1/2 for ReLU changes no
    ranking inside a module and is left out. Level 1's bias, if any, is part of the pre-activation.)

    Gated FFN: the product of that metric of the up path and that of the gate path, a heuristic of the paper's.

    Attention: behind the softmax a head is a linear module V -> O on the mixed input, and a_j' Sigma_mixed a_j is
    exactly the mean square of O's input channel j: the head's score is the sum of ||B_:,j||^2 E[z_j^2] over its
    channels.

    Wrong when channels are strongly correlated (it looks at each alone) and when the activation function is far
    from linear on the data. Float64 [n_units], on the moments' device.
    """
    columns = weight_of(module.level2.linear).to(seen.level2.xx).square().sum(0)  # ||B_:,j||^2, [channels]
    if module.kind == "attention":
        energy = columns * seen.level2.mean_square
        return energy[module.level2.index.to(energy.device)].sum(1)
    columns = columns[module.level2.index[:, 0].to(columns.device)]  # [n_units]
    scores = torch.ones_like(columns)
    for group in module.level1.values():
        energy = _preactivation_energy(group.linear, seen.level1)
        for path in group.index.T.to(energy.device):  # a fused gate_up has two channels per unit
            scores = scores * columns * energy[path]
    return scores


def _preactivation_energy(linear, moments: Moments) -> Tensor:
    """E[(a_j' x + b_j)^2] of every output channel: diag(A Sigma A') + 2 b (A mu) + b^2."""
    a = weight_of(linear).to(moments.xx)
    energy = ((a @ moments.xx) * a).sum(1) / moments.n
    if linear.bias is not None:
        b = linear.bias.to(moments.xx)
        energy = energy + 2 * b * (a @ moments.x) / moments.n + b.square()
    return energy


@torch.no_grad()
def weight_norm(module: Depth2Module, seen: Seen | None = None, p: int = 2) -> Tensor:
    """Magnitude: sum of |w|^p over a unit's rows of level 1 and columns of level 2 (L2 for p=2, L1 for p=1).

    Looks at no data, so it keeps a channel with large weights that never fires. Function approximation in the
    paper's words (sec. 3.2.1). Float64 [n_units].
    """
    scores = torch.zeros(module.n_units, dtype=torch.float64, device=module.level2.linear.weight.device)
    for group in module.groups:
        size = weight_of(group.linear).double().abs().pow(p).sum(1 if group.side == "out" else 0)
        scores += size[group.index.to(size.device)].sum(1)
    return scores


def random_scores(module: Depth2Module, seen: Seen | None = None, seed: int = 0) -> Tensor:
    """Chance, the baseline to beat: the same scores for the same seed and module name. Float64 [n_units]."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{module.name}".encode()))
    return torch.rand(module.n_units, generator=generator, dtype=torch.float64)
