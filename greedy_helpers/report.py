"""What a pruning run did, module by module: for reading, for pictures, for JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TENSORS = ("scores", "keep")


@dataclass(frozen=True)
class PruneStep:
    """What happened to one module.

    Attributes:
        unit: what a unit is, e.g. `"query head"`: see :class:`~greedy_helpers.structure.Depth2Module`.
        scores: the criterion's values, [units_before]; keep: the surviving units.
        error_cut, error: relative squared error of the module's output against the targets on the calibration tokens
            (0 = equal, 1 = as bad as silence), after the cut and after the last refit. With the dense model's outputs
            as targets it contains what the pruned prefix already broke.
        rank, condition: of the last refit's X'X and X'X + lam I, see :class:`~greedy_helpers.reconstruct.Solution`;
            None without a refit.
    """

    name: str
    kind: str
    unit: str
    block: int
    units_before: int
    units_after: int
    error_cut: float
    error: float
    seconds: float
    rank: int | None
    condition: float | None
    scores: Tensor = field(repr=False)
    keep: Tensor = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class PruneReport:
    """What :func:`~greedy_helpers.pruning.prune` did: its settings and one step per module, in order.

    Attributes:
        ratio: the share asked for, None if a plan said it; `asked` says of what.
        criterion, remedy, allocation, damp: the recipe, in words.
        tokens: of the calibration text.
        parameters: [before, after] of `"modules"`, the linears of those that were to be pruned, which a ratio is about;
            of `"blocks"`, all of them with their norms; and in `"total"`: the same cut is a smaller share each time.
        seconds: of the whole run, passes over the dense model included.
        stream_errors: relative squared error of the residual stream behind every block that was visited, against the
            dense model's: what all modules up to there have broken together, whatever their targets.
    """

    ratio: float | None
    criterion: str
    remedy: str
    allocation: str
    damp: float
    tokens: int
    parameters: dict[str, list[int]]
    seconds: float
    stream_errors: list[float]
    steps: list[PruneStep]

    @property
    def removed(self) -> dict[str, float]:
        """`"modules"`, `"blocks"` and `"total"` -> the share of their parameters that went."""
        return {part: 1 - after / before if before else 0.0 for part, (before, after) in self.parameters.items()}

    @property
    def asked(self) -> str:
        """What was asked for, in words."""
        blocks = sorted({step.block for step in self.steps})
        where = f"{len(self.steps)} modules in blocks {blocks[0]} to {blocks[-1]}" if blocks else "no module"
        if self.ratio is None:
            return f"sizes by a plan for {where}"
        share = f"{100 * self.ratio:.4g}%"
        if self.allocation == "floor":
            return f"{share} of the units of each of {where}, rounded down"
        spread = "" if self.allocation == "uniform" else f", spread by {self.allocation} scores"
        if self.allocation == "uniform" and self.steps and all(step.kind == "attention" for step in self.steps):
            spread = ", to the nearest whole heads, as no FFN takes the rest"
        return f"{share} of the parameters of {where}{spread}"

    def __str__(self) -> str:
        units: dict[str, list[int]] = {}
        for step in self.steps:
            before, after = units.get(step.unit, (0, 0))
            units[step.unit] = [before + step.units_before, after + step.units_after]
        names = {"channel": "FFN channels"}
        left = " and ".join(
            f"{after:,} of {before:,} {names.get(unit, unit + 's')}" for unit, (before, after) in units.items()
        )
        before, after = self.parameters["total"]
        return (
            f"{self.criterion}, {self.allocation}, remedy {self.remedy}, {self.tokens:,} calibration tokens; asked: "
            f"{self.asked}; removed: {self.removed['modules']:.2%} of their parameters, "
            f"{self.removed['blocks']:.2%} of the blocks' parameters, {self.removed['total']:.2%} of the model's "
            f"({before:,} -> {after:,}); left in the modules that were pruned: {left or 'nothing to cut'}"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per module, without the tensors."""
        return pd.DataFrame([{k: v for k, v in vars(step).items() if k not in _TENSORS} for step in self.steps])

    def figure(self) -> Figure:
        """Units left and errors per module: see :func:`~greedy_helpers.course.plots.prune_steps`."""
        from matplotlib import pyplot as plt  # here, so that importing the package does not import matplotlib

        from .course import plots

        fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", facecolor="white")
        plots.prune_steps(axes, self.to_frame())
        plt.close(fig)  # shown where it is returned to, and not a second time
        return fig

    def to_dict(self, tensors: bool = True) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON; without scores and kept units if not `tensors`."""
        steps = [{k: v for k, v in step.to_dict().items() if tensors or k not in _TENSORS} for step in self.steps]
        return {**vars(self), "removed": self.removed, "steps": steps}

    def to_json(self, tensors: bool = False) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(tensors), indent=1)
