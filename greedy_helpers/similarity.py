"""Heads that attend alike: streaming Jensen-Shannon divergence of attention maps, and which heads it makes redundant.

Remove what is redundant first, not what is small (paper, sec. 3.2.2, eq. 1, Algorithm 2, fig. 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import closing

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .criteria import Criterion, Seen, second_moment
from .large.distributed import all_windows
from .stream import walk
from .structure import Depth2Module, UnitChoice, depth2_modules


@torch.no_grad()
def head_divergence(maps: Iterable[Tensor], max_elements: int | None = None) -> Tensor:
    """Mean Jensen-Shannon divergence between the attention maps of every two heads, in nats: float64 [heads, heads].

    D_ij = mean over samples and query rows of JS(P_i row || P_j row) (eq. 1), with JS(p || q) = H((p + q) / 2) -
    (H(p) + H(q)) / 2. Symmetric, zero on the diagonal, at most ln 2. (The paper does not state its logarithm.)

    Entropies are taken in float32 or better whatever the maps' dtype; 0 log 0 is 0, so masked keys count nothing.

    Args:
        maps: batches [batch, heads, query, key], rows sum to 1. A batch is let go before the next one is asked for.
        max_elements: numbers in the largest temporary tensor, of all pairs of heads at some query rows; default: 2^20
            (4 MB) on a CPU, whose cache they fit, 2^26 on a GPU.

    Raises:
        ValueError: no maps, or not of that shape.
        FloatingPointError: NaN or Inf in the maps.
    """
    total, rows = None, 0
    for batch in maps:
        if batch.ndim != 4:
            raise ValueError(f"head_divergence: expected maps [batch, heads, query, key], found {list(batch.shape)}")
        n, heads, queries, keys = batch.shape
        first, second = torch.triu_indices(heads, heads, 1, device=batch.device)
        if total is None:
            total = torch.zeros(heads, heads, dtype=torch.float64, device=batch.device)
        most = max_elements or (2**20 if batch.device.type == "cpu" else 2**26)
        step = max(1, most // max(1, max(heads, len(first)) * keys))
        wide = torch.promote_types(batch.dtype, torch.float32)
        for start in range(0, n * queries, step):
            place = torch.arange(start, min(start + step, n * queries), device=batch.device)
            p = batch[place // queries, :, place % queries].to(wide)  # [rows, heads, key]
            entropy = _entropies(p)
            between = _entropies((p[:, first] + p[:, second]) / 2) - (entropy[first] + entropy[second]) / 2
            total[first, second] += between.clamp(min=0)  # rounding of equal heads
        rows += n * queries
        batch = p = None  # before the iterator makes the next one
    if total is None:
        raise ValueError("head_divergence: expected at least one batch of attention maps, found none")
    if not total.isfinite().all():
        raise FloatingPointError(f"head_divergence: NaN or Inf in the attention maps ({rows} rows)")
    return (total + total.T) / rows


def _entropies(p: Tensor) -> Tensor:
    """Sums over rows of the entropies of p [rows, heads, key]: float64 [heads]."""
    return -torch.special.xlogy(p, p).sum(-1).sum(0, dtype=torch.float64)


def unit_divergence(divergence: Tensor, group: int) -> Tensor:
    """Divergence between KV groups: the mean over their pairs of query heads, [heads / group, heads / group].

    For KV heads as units (`unit="kv"`), each with its `group` consecutive query heads. The diagonal is 0.

    Raises:
        ValueError: `group` does not divide the number of heads.
    """
    heads = len(divergence)
    if group < 1 or heads % group:
        raise ValueError(f"unit_divergence: expected a multiple of {group} heads, found {heads}")
    found = divergence.unflatten(0, (-1, group)).unflatten(2, (-1, group)).mean((1, 3))
    return found.fill_diagonal_(0) if group > 1 else found


def redundant_heads(divergence: Tensor, tau: float) -> list[int]:
    """Algorithm 2 as printed: the heads (or units) that had a twin closer than `tau` when they were marked.

    Walks over all ordered pairs (i, j), i != j, and marks i when D_ij < tau and neither i nor j is marked. At least
    one head is always left. The twin may be marked later in the walk, so a removed head need not resemble any
    survivor; `greedy_helpers.course.graphs.maximal_redundancy` counts the heads that can go if each has to.

    Raises:
        ValueError: tau negative or not a number, or `divergence` not square.
    """
    if not tau >= 0:
        raise ValueError(
            f"redundant_heads: expected tau >= 0 in nats (at most ln 2 = 0.693 says anything), found {tau}"
        )
    if divergence.ndim != 2 or divergence.shape[0] != divergence.shape[1]:
        raise ValueError(f"redundant_heads: expected divergences [heads, heads], found {list(divergence.shape)}")
    marked: set[int] = set()
    values = divergence.tolist()
    for i, j in itertools.permutations(range(len(values)), 2):
        if values[i][j] < tau and i not in marked and j not in marked:
            marked.add(i)
    return sorted(marked)


def redundant_first(
    module: Depth2Module, seen: Seen, *, criterion: Criterion = second_moment, tau: float = 0.16
) -> Tensor:
    """A criterion that ranks redundant heads below all others; everything else is left to `criterion`.

    Similarity composes: the same scores, shifted where Algorithm 2 marks a head. Needs attention maps, so load the
    model with `attn_implementation="eager"` or call `model.set_attn_implementation("eager")`. The maps of one batch of
    one block are held at a time, batch * heads * seq^2 numbers: with long windows give `prune` a small `batch_size`.
    """
    values = criterion(module, seen)
    if module.kind != "attention":
        return values
    divergence = head_divergence(seen.attention_maps())
    units = redundant_heads(unit_divergence(divergence, len(divergence) // module.n_units), tau)
    values = values.clone()
    values[units] -= values.max() - values.min() + 1
    return values


def divergences_of(
    model: PreTrainedModel,
    calibration: Tensor,
    batch_size: int = 1,
    *,
    unit: UnitChoice = "query",
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The divergence between the units of every attention module, on the model as it is: name -> [n_units, n_units].

    One batch of one block's maps is held at a time; the hidden states of all tokens are carried from block to block.
    A batch has batch_size * heads * seq^2 numbers, and eager attention holds several such tensors: with 12 heads and
    1,024 tokens 16 windows one by one need about 300 MB beside the model, four at a time about 1 GB.

    `unit`, `device`, and several processes: as in :func:`~greedy_helpers.pruning.prune`.

    Raises:
        ValueError: the attention implementation computes no maps; see :func:`redundant_first`.
    """
    divergences: dict[str, Tensor] = {}
    last = max((module.block for module in depth2_modules(model, kinds={"attention"})), default=-1)
    with closing(walk(model, calibration, last, batch_size=batch_size, device=device)) as walked:
        for block, stream in walked:
            for module in depth2_modules(model, [stream.position], kinds={"attention"}, unit=unit):
                divergence = head_divergence(all_windows(stream.attention_maps(block, module.owner)))
                divergences[module.name] = unit_divergence(divergence, len(divergence) // module.n_units).cpu()
    return divergences
