"""How a budget falls over the depth of a model, as others spread it: by what a block does to the stream, by its place.

Shares of blocks, and the plan they make. For comparison with :func:`~greedy_helpers.allocation.cost_plan`, which asks
every unit for its price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .allocation import asked_parameters, check_ratio, uniform_plan
from .large.distributed import all_sum
from .stream import walk
from .structure import Depth2Module, blocks_of, check_tokens


def block_influence(model: PreTrainedModel, tokens: Tensor, *, batch_size: int | None = None) -> list[float]:
    """One minus the cosine between the stream before and behind a block, its mean over the tokens: one per block.

    ShortGPT's measure (Men et al., arXiv 2403.03853). Nothing is changed.

    Args:
        tokens: long [n, seq], calibration text.
    """
    check_tokens(model, tokens, packed=True)
    found, n_blocks = [], len(blocks_of(model))
    with closing(walk(model, tokens, n_blocks - 1, batch_size=batch_size)) as walked:
        for block, stream in walked:
            before, total = stream.hidden, torch.zeros(2, dtype=torch.float64)
            stream.advance(block)
            for one, other in zip(before, stream.hidden, strict=True):
                turned = 1 - torch.cosine_similarity(one.double(), other.double(), dim=-1)
                total += torch.tensor([turned.sum().item(), turned.numel()])
            all_sum(total)
            found.append((total[0] / total[1]).item())
    return found


def influence_shares(influence: Sequence[float], ratio: float, temperature: float, most: float = 0.8) -> list[float]:
    """Shares that fall with the influence, MoDeGPT's rule (Lin et al., arXiv 2408.09632, eq. 12): one per block.

    n ratio softmax(-influence / temperature). What a share exceeds `most` by goes to the other blocks in proportion.

    Raises:
        ValueError: a ratio outside [0, 1) or above `most`, or a temperature that is not positive.
    """
    if not 0 <= check_ratio(ratio) <= most:
        raise ValueError(f"influence_shares: expected a ratio of at most {most}, found {ratio}")
    if not temperature > 0:
        raise ValueError(f"influence_shares: expected a temperature above 0, found {temperature}")
    weights = torch.softmax(-torch.tensor(influence, dtype=torch.float64) / temperature, 0)
    shares, full = torch.zeros_like(weights), torch.zeros(len(weights), dtype=torch.bool)
    for _ in influence:  # every round fills a block, or is the last
        left = ratio * len(weights) - most * full.sum()
        shares = torch.where(full, most, left * weights / weights[~full].sum())
        if not (over := shares > most * (1 + 1e-12)).any():
            break
        full |= over
    return shares.tolist()


def slope_shares(n_blocks: int, ratio: float, slope: float) -> list[float]:
    """Shares that rise by `slope` from block to block about `ratio`: ATP's rule (Huang et al., arXiv 2502.14770).

    Raises:
        ValueError: a share outside [0, 1).
    """
    shares = [check_ratio(ratio) + slope * (place - (n_blocks - 1) / 2) for place in range(n_blocks)]
    if not (min(shares) >= 0 and max(shares) < 1):
        reached = f"{min(shares):.3f} and {max(shares):.3f}"
        raise ValueError(f"slope_shares: expected shares in [0, 1), found {reached} with a slope of {slope}")
    return shares


def plan_of_shares(modules: Sequence[Depth2Module], shares: Sequence[float] | Mapping[int, float]) -> dict[str, int]:
    """Every block loses its share of its own modules' parameters, see :func:`~greedy_helpers.allocation.uniform_plan`.

    Args:
        shares: block index -> share in [0, 1).

    Raises:
        ValueError: see :func:`~greedy_helpers.allocation.uniform_plan`.
    """
    plan = {}
    for index in sorted({module.block for module in modules}):
        block = [module for module in modules if module.block == index]
        plan |= uniform_plan(block, asked_parameters(block, shares[index]))
    return plan
