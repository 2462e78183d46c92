"""How a module is repaired: what happens before its scores are taken, and what after its units are cut.

A remedy is two functions and what they need. Adding one takes a function and a line of :data:`REMEDIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from .criteria import Seen
from .moments import Moments
from .reconstruct import Solution, add_to_bias, refit
from .structure import Depth2Module

Target = Literal["dense", "local", "residual"]


@dataclass(frozen=True)
class Cut:
    """What a cut leaves to repair.

    Attributes:
        survivors: moments of level 2's remaining inputs, paired with the targets.
        weight: level 2's weight before the cut, [d, channels].
        gone: long, the input channels that were removed.
    """

    survivors: Moments
    weight: Tensor
    gone: Tensor


@dataclass(frozen=True)
class Remedy:
    """What is done beside the cut.

    Attributes:
        before: (module, seen) -> the last refit, before the scores.
        after: (module, cut, seen) -> the last refit, after the cut.
        target: what level 2 shall put out. `"dense"` (the paper): what the module puts out in the dense model.
            `"local"`: what the module, still whole, puts out behind the pruned prefix. `"residual"`: the dense output
            plus what the residual stream lacks in front of the module, so that it also repairs what the prefix broke;
            for blocks that add their modules' outputs to the stream as they are.
        refits_level1: whether `before` replaces level 1 and needs what it reads in the dense model.
        reads_means: whether the dense model's mean of level 2's input is needed.
    """

    before: Callable[[Depth2Module, Seen], Solution | None] | None = None
    after: Callable[[Depth2Module, Cut, Seen], Solution | None] | None = None
    target: Target = "dense"
    refits_level1: bool = False
    reads_means: bool = False

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            raise ValueError(f"Remedy: expected a target among {get_args(Target)}, found {self.target!r}")


def refit_both_levels(module: Depth2Module, seen: Seen) -> Solution:
    """The paper's two steps (Algorithms 3 and 4): level 1 to its dense outputs, then level 2 to its target."""
    linears = [group.linear for group in module.level1.values()]
    refit(linears, seen.only_level1(), seen.refit_damp, through=True)
    return refit([module.level2.linear], seen.level2, seen.refit_damp)


def refit_survivors(module: Depth2Module, cut: Cut, seen: Seen) -> Solution:
    """Level 2 to its target, from the inputs that are left."""
    return refit([module.level2.linear], cut.survivors, seen.refit_damp)


def absorb_mean(module: Depth2Module, cut: Cut, seen: Seen) -> None:
    """FLAP's remedy: the dense mean of what was removed becomes part of level 2's bias."""
    mean = seen.hidden_mean[cut.gone]
    add_to_bias(module.level2.linear, cut.weight[:, cut.gone.to(cut.weight.device)].to(mean) @ mean)


_PRE = {"before": refit_both_levels, "refits_level1": True}
_POST = {"after": refit_survivors}
REMEDIES: dict[str, Remedy] = {
    "none": Remedy(),
    "bias": Remedy(after=absorb_mean, reads_means=True),
    "pre": Remedy(**_PRE),
    "pre, residual": Remedy(**_PRE, target="residual"),
    "post": Remedy(**_POST),
    "post, local": Remedy(**_POST, target="local"),
    "post, residual": Remedy(**_POST, target="residual"),
    "both": Remedy(**_PRE, **_POST),
    "both, residual": Remedy(**_PRE, **_POST, target="residual"),
}
